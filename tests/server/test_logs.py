"""Logs: a line for each call, and nothing that a user wrote unless the operator asks for it."""

import asyncio
import io
import json
import logging
import threading

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel, ValidationError

from foretoken import CapacityError
from foretoken.server.app import create_app
from foretoken.server.logs import (
    WITHHELD,
    RequestLog,
    RequestLogMiddleware,
    configure_logging,
    log_event,
    render_exception,
)
from foretoken.server.request_id import RequestIdMiddleware
from foretoken.server.settings import ServerSettings
from tests.engines import counting_model, finish, greedy, make_engine
from tests.server.conftest import MODEL_NAME

SECRET = "xylophone"
PROMPT = f"Once upon a time there was a {SECRET}"


@pytest.fixture
def lines():
    """Return a function that gives the lines written so far, as JSON objects."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging("json", stream=stream, level=logging.DEBUG)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # the test's client, not the server
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:] = before
    root.setLevel(level)


@pytest.fixture
def client(llm, lines):
    """A client of the whole application; exceptions become answers."""
    app = create_app(llm, ServerSettings(model_name=MODEL_NAME, drain_s=5.0))

    @app.get("/fails")
    def fail():
        raise ValueError(f"cannot read {SECRET}")

    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        yield client


def calls(lines):
    return [line for line in lines() if line["event"] == "request"]


def complete(client, **values):
    body = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    return client.post("/v1/completions", json=body | values)


# -- one line for each call ----------------------------------------------------------------------


def test_a_line_for_a_completion(client, lines):
    answer = complete(client, ignore_eos=True)
    assert answer.status_code == 200, answer.text
    [line] = calls(lines)
    assert line["request_id"] == answer.headers["x-request-id"]
    assert (line["method"], line["endpoint"]) == ("POST", "/v1/completions")
    assert (line["status"], line["outcome"], line["choices"]) == (200, "length", 1)
    assert line["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert line["output_tokens"] == 12
    assert line["tokens_per_step"] >= 1
    assert line["tokens_per_s"] > 0
    assert 0 < line["ttft_ms"] <= line["duration_ms"]
    assert line["drafters"]
    assert line["level"] == "info"


def test_choices_of_a_call_share_its_line(client, lines):
    assert complete(client, n=3, temperature=1, seed=1, ignore_eos=True).status_code == 200
    [line] = calls(lines)
    assert (line["choices"], line["output_tokens"]) == (3, 36)


def test_a_streamed_call_has_its_line_too(client, lines):
    with client.stream(
        "POST",
        "/v1/completions",
        json={"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 8, "stream": True},
    ) as answer:
        answer.read()
    [line] = calls(lines)
    assert (line["status"], line["endpoint"]) == (200, "/v1/completions")
    assert 0 < line["output_tokens"] <= 8


def test_polls_are_no_news(client, lines):
    client.get("/health")
    client.get("/metrics")
    assert {line["level"] for line in calls(lines)} == {"debug"}


def test_an_address_that_leads_nowhere_is_not_repeated(client, lines):
    assert client.get(f"/{SECRET}?{SECRET}").status_code == 404
    [line] = calls(lines)
    assert (line["status"], line["endpoint"]) == (404, "unknown")
    assert SECRET not in str(lines())


def test_the_line_waits_for_the_engine():
    """A client that goes away is answered before the engine lets go of its request."""
    written, log = [], RequestLog()
    log._write = written.append
    engine = make_engine(counting_model())
    app = FastAPI()
    app.add_middleware(RequestLogMiddleware, log=log)
    app.add_middleware(RequestIdMiddleware)
    requests = [engine.add_request([0], greedy(4)) for _ in range(2)]

    @app.get("/x")
    async def submit():
        for request in requests:
            log.submitted(request)

    with TestClient(app) as client:
        client.get("/x")
    assert written == []
    finish(engine)
    for request in requests:
        assert written == []
        thread = threading.Thread(target=log.finished, args=(request, "cancelled", 0.1))
        thread.start()
        thread.join()
    [call] = written
    assert (call.endpoint, call.status, len(call.ends)) == ("/x", 200, 2)
    assert log._calls == {}


def test_a_request_without_a_call_has_a_line_of_its_own(lines):
    log, engine = RequestLog(), make_engine(counting_model())
    request = engine.add_request([0, 1], greedy(4))
    log.submitted(request)
    finish(engine)
    log.finished(request, "length", 0.5)
    [line] = calls(lines)
    assert line["request_id"] == line["id"] == request.request_id
    assert (line["prompt_tokens"], line["output_tokens"]) == (2, 4)
    assert line["queued_ms"] == 500.0
    assert line["ttft_ms"] >= 500.0
    assert "endpoint" not in line


# -- nothing of what users write -----------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": {SECRET: 1}},
        {"prompt": PROMPT, "temperature": SECRET},
        {"prompt": PROMPT, SECRET: 1},
        {"prompt": PROMPT, "max_tokens": -1},
        {"prompt": PROMPT, "logit_bias": {SECRET: 2}},
        {"prompt": PROMPT, "stop": [SECRET] * 99},
        {"prompt": PROMPT, "response_format": {"type": "json_schema", "json_schema": SECRET}},
        {"prompt": PROMPT, "speculation": {"drafters": [SECRET]}},
        {"prompt": PROMPT, "model": SECRET},
    ],
    ids="-".join,
)
def test_errors_repeat_nothing(client, lines, body):
    answer = client.post("/v1/completions", json={"model": MODEL_NAME, "max_tokens": 4} | body)
    assert answer.status_code in (400, 404)
    [line] = calls(lines)
    assert line["status"] == answer.status_code
    assert SECRET not in str(lines())


@pytest.mark.parametrize("content", [b'{"prompt": "xylophone', b'{"prompt": "xylophone\xff"}'])
def test_bodies_that_are_no_json_repeat_nothing(client, lines, content):
    answer = client.post(
        "/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert SECRET not in str(lines())


def test_prompts_and_outputs_of_good_calls_are_not_written(client, lines):
    answer = complete(client, user=SECRET, stop=[SECRET], ignore_eos=True)
    assert answer.status_code == 200, answer.text
    assert SECRET not in str(lines())
    assert answer.json()["choices"][0]["text"].strip() not in str(lines())


def test_an_exception_is_written_without_its_message(client, lines):
    answer = client.get("/fails")
    assert answer.status_code == 500
    assert SECRET not in answer.text
    assert SECRET not in str(lines())
    [error] = [line for line in lines() if line["level"] == "error"]
    assert answer.headers["x-request-id"] in error["event"]
    assert "builtins.ValueError: " + WITHHELD in error["exception"]
    assert "in fail" in error["exception"], "where it was raised"
    [line] = calls(lines)
    assert (line["status"], line["endpoint"]) == (500, "/fails")


def test_what_the_event_loop_says_is_not_repeated(lines):
    """asyncio describes callbacks with their arguments."""

    async def break_a_callback():
        asyncio.get_running_loop().call_soon(int, SECRET)
        await asyncio.sleep(0)

    asyncio.run(break_a_callback())
    [line] = [line for line in lines() if line["level"] == "error"]
    assert "ValueError" in line["exception"]
    assert SECRET not in str(lines())


class Body(BaseModel):
    number: int


def failure(error_type):
    """Return an exception that another one caused, both with a prompt in their messages."""
    try:
        try:
            Body(number=SECRET)
        except ValidationError as cause:
            raise error_type(f"bad {SECRET}") from cause
    except error_type as error:
        return error


def test_causes_come_first_and_are_withheld_too():
    text = render_exception(failure(KeyError), with_messages=False)
    assert SECRET not in text
    assert text.index("ValidationError: ") < text.index("builtins.KeyError: ")
    assert text.count(WITHHELD) == 2


def test_messages_of_the_machine_are_written():
    error = CapacityError("no room", hint="wait")
    assert "CapacityError: no room" in render_exception(error, with_messages=False)
    assert "disk full" in render_exception(OSError("disk full"), with_messages=False)


def test_all_messages_if_asked():
    assert render_exception(failure(KeyError), with_messages=True).count(SECRET) >= 2


def test_prompts_and_outputs_if_asked(llm, lines):
    settings = ServerSettings(model_name=MODEL_NAME, drain_s=5.0, log_prompts=True)
    with TestClient(create_app(llm, settings), "http://localhost") as client:
        answer = complete(client, ignore_eos=True)
    [line] = calls(lines)
    assert SECRET in line["prompts"][0]
    assert line["outputs"] == [answer.json()["choices"][0]["text"]]


# -- formats -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("lines")  # puts the handlers back
@pytest.mark.parametrize("log_format", ["text", "json", None])
def test_formats(log_format):
    stream = io.StringIO()
    configure_logging(log_format, stream=stream)
    log_event("started", url="http://127.0.0.1:8000", model="stories")
    logging.getLogger("somebody").info("from %s", "elsewhere")
    logging.getLogger("somebody").debug("too much")
    first, second = stream.getvalue().splitlines()
    if log_format == "text":
        assert "started" in first
        assert first.endswith("url=http://127.0.0.1:8000 model=stories"), "in the order given"
        assert "\x1b" not in first, "no colours where there is no terminal"
    else:
        record = json.loads(first)
        assert (record["event"], record["url"]) == ("started", "http://127.0.0.1:8000")
        assert record["timestamp"].endswith("Z")
        assert json.loads(second)["event"] == "from elsewhere"


def test_every_line_of_a_request_names_it(lines):
    app = FastAPI()
    app.add_middleware(RequestLogMiddleware, log=RequestLog())
    app.add_middleware(RequestIdMiddleware)

    @app.get("/x")
    async def speak():
        logging.getLogger("elsewhere").info("inside")

    with TestClient(app) as client:
        answer = client.get("/x")
    [line] = [line for line in lines() if line["event"] == "inside"]
    assert line["request_id"] == answer.headers["x-request-id"]
