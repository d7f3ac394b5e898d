"""Health, sockets, and what signals do to a server under load."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from foretoken import ConfigError, SamplingParams
from foretoken.server.app import create_app, warm_up
from foretoken.server.lifecycle import bind, url_of
from foretoken.server.settings import ServerSettings
from tests.engines import check_idle
from tests.server.conftest import MODEL_NAME, START_S, served, wait_until

LONG = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True}


# -- health ------------------------------------------------------------------------------------


def test_a_server_is_healthy_and_ready(client):
    for path in ("/health", "/ready"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ready"})


def test_a_draining_server_is_healthy_and_not_ready(server, client):
    server.engine_thread.stop_accepting()
    assert client.get("/health").status_code == 200
    answer = client.get("/ready")
    assert (answer.status_code, answer.json()) == (503, {"status": "draining"})
    assert int(answer.headers["retry-after"]) >= 1
    answer = client.post("/v1/completions", json=LONG)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1


def test_a_broken_engine_is_neither(llm, server, client, monkeypatch):
    def fail():
        raise ValueError("no")

    def find_damage():
        raise RuntimeError("a block is lost")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", fail)
        patch.setattr(llm.engine.cache, "check_integrity", find_damage)
        assert client.post("/v1/completions", json=LONG).status_code == 500
    wait_until(lambda: client.get("/health").status_code == 503)
    assert client.get("/ready").status_code == 503
    assert client.post("/v1/completions", json=LONG).status_code == 500


def test_a_failed_step_leaves_the_server_healthy(llm, server, client, monkeypatch):
    def fail():
        raise ValueError("no")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", fail)
        answer = client.post("/v1/completions", json=LONG)
    assert answer.status_code == 500
    assert "no" not in answer.json()["error"]["message"].split()
    assert client.get("/health").status_code == 200
    assert client.post("/v1/completions", json={**LONG, "max_tokens": 4}).status_code == 200


# -- sockets -----------------------------------------------------------------------------------


def test_an_address_that_is_taken():
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"127\.0\.0\.1:{port}: address already in use"
        ) as it:
            bind("127.0.0.1", port)
    assert "--port" in it.value.hint
    bind("127.0.0.1", port).close()  # free again


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid"])
def test_an_address_of_another_machine(host):
    with pytest.raises(ConfigError, match=f"cannot listen on {host}:0") as caught:
        bind(host, 0)
    assert "--host" in caught.value.hint


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "localhost"), ("0.0.0.0", "127.0.0.1")],
)
def test_the_address_that_is_shown(host, shown):
    with bind(host, 0) as listener:
        assert url_of(listener, host) == f"http://{shown}:{listener.getsockname()[1]}"


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_an_ipv6_address_has_brackets():
    try:
        listener = bind("::1", 0)
    except ConfigError:
        pytest.skip("this machine has no IPv6 loopback")
    with listener:
        assert url_of(listener, "::1") == f"http://[::1]:{listener.getsockname()[1]}"


# -- a process ---------------------------------------------------------------------------------


class Process:
    """`foretoken serve` as a process of its own."""

    def __init__(self, *arguments):
        command = [sys.executable, "-m", "foretoken", "serve", "--threads", "1", *arguments]
        self.popen = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def base_url(self):
        shown = re.search(r"http://[\d.]+:\d+", "".join(self.lines))
        return shown[0] if shown else None

    def wait_until_ready(self):
        wait_until(lambda: self.base_url or self.popen.poll() is not None, 120)
        wait_until(lambda: httpx.get(f"{self.base_url}/ready", verify=False).status_code == 200)
        return self

    def end(self, signal_number, timeout_s=START_S):
        """Send a signal; return the exit code and for how many seconds it went on."""
        start_s = time.monotonic()
        self.popen.send_signal(signal_number)
        code = self.popen.wait(timeout_s)
        self._reader.join(5)
        return code, time.monotonic() - start_s

    def _read(self):
        with self.popen.stderr as stream:
            self.lines.extend(stream)


@pytest.fixture
def start():
    processes = []

    def start_one(*arguments):
        processes.append(Process("--port", "0", *arguments))
        return processes[-1].wait_until_ready()

    yield start_one
    for process in processes:
        if process.popen.poll() is None:
            process.popen.kill()
            process.popen.wait()


class Streams:
    """Clients in threads, each reading a stream to its end."""

    def __init__(self, base_url, num_streams, **fields):
        self.events = [[] for _ in range(num_streams)]
        self.errors = [None] * num_streams
        body = {**LONG, "temperature": 0, **fields, "stream": True}
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.Client(base_url=base_url, timeout=START_S, limits=limits, verify=False)
        self._threads = [
            threading.Thread(target=self._read, args=(body, index)) for index in range(num_streams)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, body, index):
        try:
            with self._client.stream("POST", "/v1/completions", json=body) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        self.events[index].append(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            self.errors[index] = error

    def wait_until_all_run(self):
        wait_until(lambda: all(self.events))
        return self

    def join(self):
        for thread in self._threads:
            thread.join(START_S)
        self._client.close()
        return [[json.loads(it) for it in events if it != "[DONE]"] for events in self.events]


def test_a_signal_under_load_lets_all_streams_end(start):
    process = start()
    streams = Streams(process.base_url, 20).wait_until_all_run()  # more than run at once
    code, _ = process.end(signal.SIGTERM)
    assert code == 0, process.lines
    for events, raw in zip(streams.join(), streams.events, strict=True):
        assert raw[-1] == "[DONE]"
        assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert streams.errors == [None] * 20
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{process.base_url}/health")
    assert any("once more stops at once" in line for line in process.lines)
    assert not any("Traceback" in line for line in process.lines)


def test_a_second_signal_stops_at_once(start):
    process = start("--drain", "60", "--max-requests", "1")
    streams = Streams(process.base_url, 12, max_tokens=450)
    wait_until(lambda: any(streams.events))
    process.popen.send_signal(signal.SIGINT)
    wait_until(lambda: any("once more" in line for line in process.lines))
    code, _ = process.end(signal.SIGINT)
    assert code == 130
    streams.join()
    assert any(error is not None for error in streams.errors)
    assert not any("Traceback" in line for line in process.lines), process.lines


def test_a_port_in_use_is_one_line_and_no_model_is_loaded(server):
    port = server.base_url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "foretoken", "serve", "--port", port, "--model", "no-such-model"],
        capture_output=True,
        text=True,
        check=False,
        timeout=START_S,
    )
    assert done.returncode == 2
    error, hint = done.stderr.splitlines()
    assert error == f"error: cannot listen on 127.0.0.1:{port}: address already in use"
    assert hint.startswith("hint: choose another --port")


# -- the same signals, without a process -------------------------------------------------------


def test_a_drain_has_an_end(llm, gate):
    settings = ServerSettings(model_name=MODEL_NAME, port=0, drain_s=1.0)
    with served(create_app(llm, settings), settings) as running:
        streams = Streams(running.base_url, 3, max_tokens=450).wait_until_all_run()
        gate.close()  # nothing finishes by itself
        start_s = time.monotonic()
        running.uvicorn.handle_exit(signal.SIGTERM, None)
        assert running.engine_thread.state == "draining"
        time.sleep(1.5)
        gate.open()
    assert time.monotonic() - start_s < 10
    streams.join()
    assert all(error is not None for error in streams.errors)
    check_idle(llm.engine)


def test_warming_up_leaves_nothing_behind(llm):
    params = SamplingParams(max_new_tokens=12, seed=1, temperature=0.8)
    [before] = llm.generate("Once upon a time", params)
    warm_up(llm)
    [after] = llm.generate("Once upon a time", params)
    assert after.token_ids == before.token_ids
    check_idle(llm.engine)
