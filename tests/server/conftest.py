"""A model that is loaded once, and servers on it that tests talk to over real sockets."""

import threading
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass

import httpx
import pytest

from foretoken import LLM
from foretoken.server.app import create_app
from foretoken.server.engine_thread import EngineThread
from foretoken.server.lifecycle import Server, bind, uvicorn_config
from foretoken.server.settings import ServerSettings

MODEL_NAME = "stories"
START_S = 30.0
# The embedded model was not trained on conversations and comes without one.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ opening or 'assistant' }}:{% endif %}"
)


@dataclass
class RunningServer:
    """A server in a thread of this process."""

    base_url: str
    app: object
    settings: ServerSettings
    uvicorn: Server

    @property
    def engine_thread(self) -> EngineThread:
        return self.app.state.engine_thread


@pytest.fixture(scope="session")
def llm():
    """The embedded model; tests that need other options make their own."""
    return LLM(MODEL_NAME)


@pytest.fixture
def settings():
    """Of `app`; a module that wants others has a fixture of this name."""
    return ServerSettings(model_name=MODEL_NAME, port=0, drain_s=5.0)


@pytest.fixture
def app(llm, settings):
    """An application whose lifespan has not begun."""
    return create_app(llm, settings)


@contextmanager
def served(app, settings):
    """Serve an application with uvicorn in a thread, on a free port of loopback."""
    listener = bind(settings.host, 0)
    server = Server(uvicorn_config(app, settings), app.state.engine_thread)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        wait_until(
            lambda: (
                server.started and httpx.get(f"{base_url}/ready", verify=False).status_code == 200
            )
        )
        yield RunningServer(base_url, app, settings, server)
    finally:
        server.should_exit = True
        thread.join(START_S)
        assert not thread.is_alive()


@pytest.fixture
def server(app, settings):
    """A running server; `base_url` is where."""
    with served(app, settings) as running:
        yield running


@pytest.fixture(scope="module")
def api(llm):
    """A server with a chat template, for all tests of a module; not beside `server`."""
    settings = ServerSettings(
        model_name=MODEL_NAME, port=0, drain_s=5.0, chat_template=CHAT_TEMPLATE
    )
    with served(create_app(llm, settings), settings) as running:
        yield running


@pytest.fixture(scope="module")
def steady():
    """A client of a server whose drafters always draft, whatever the clock says."""
    settings = ServerSettings(
        model_name=MODEL_NAME, port=0, drain_s=5.0, chat_template=CHAT_TEMPLATE
    )
    with (
        closing(LLM(MODEL_NAME, adaptive=False)) as llm,
        served(create_app(llm, settings), settings) as running,
        httpx.Client(base_url=running.base_url, timeout=START_S) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def http(api):
    """A plain HTTP client of `api`."""
    with httpx.Client(base_url=api.base_url, timeout=START_S) as client:
        yield client


@pytest.fixture
def client(server):
    """A plain HTTP client of `server`."""
    with httpx.Client(base_url=server.base_url, timeout=START_S) as http:
        yield http


def wait_until(condition, timeout_s=START_S):
    """Wait for something that happens in another thread or process."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.005)


class Gate:
    """Lets the engine's steps through, or holds them up; knows who took part in each."""

    def __init__(self, engine):
        self._step, self._engine = engine.step, engine
        self._open = threading.Event()
        self.waiting = threading.Event()  # a step has come to the gate
        self.members = []
        self.fail_with = None
        self.open()

    def open(self):
        self._open.set()

    def close(self):
        self._open.clear()
        self.waiting.clear()

    def step(self):
        self.members.append(set(self._engine._requests))
        self.waiting.set()
        assert self._open.wait(30)
        error, self.fail_with = self.fail_with, None
        emissions = self._step()
        if error is not None:  # what the step did before it failed stays done
            raise error
        return emissions


@pytest.fixture
def gate(llm, monkeypatch):
    gate = Gate(llm.engine)
    monkeypatch.setattr(llm.engine, "step", gate.step)
    yield gate
    gate.open()
