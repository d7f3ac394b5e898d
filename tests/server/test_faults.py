"""Clients that leave, stall, shout or send nonsense, and requests that fail, through real sockets.

What is sent and never harms: wrong bodies and fields in `test_errors`, keys and foreign pages in
`test_security`; failing steps and drafters in `test_engine_thread`; signals in `test_lifecycle`.
"""

import asyncio
import dataclasses
import gc
import json
import random
import re
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from foretoken import LLM, SamplingParams
from foretoken.server.app import create_app
from foretoken.server.lifecycle import bind
from foretoken.server.settings import ServerSettings
from tests.engines import check_idle
from tests.server import conftest
from tests.server.conftest import MODEL_NAME, START_S, served, wait_until
from tests.server.test_lifecycle import Process

PATH = "/v1/completions"
PROMPT = "Once upon a time"
LONG = {"model": "stories", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True}
SHORT = {"model": "stories", "prompt": "Tom and Lily", "max_tokens": 24, "seed": 5}


@pytest.fixture(scope="module")
def plain():
    """An engine beside the server's, for what is said alone."""
    with closing(LLM(MODEL_NAME, drafters="none", prefix_caching=False)) as llm:
        yield llm


def alone(plain, prompt, **params):
    return plain.generate(prompt, SamplingParams(**params))[0]


def head(length, *lines):
    """Return the head of a call, which announces a body of some length."""
    lines = [f"POST {PATH} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines]
    return ("\r\n".join([*lines, f"Content-Length: {length}"]) + "\r\n\r\n").encode()


def message(body, *lines):
    content = json.dumps(body).encode()
    return head(len(content), *lines) + content


def connect(server, receive_bytes=None):
    """Return a connected socket, which may have room for little."""
    address = urlsplit(server.base_url)
    sock = socket.socket()
    sock.settimeout(START_S)
    if receive_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.connect((address.hostname, address.port))
    return sock


def counter(server, name):
    """Return the value of one of the server's metrics."""
    text = httpx.get(f"{server.base_url}/metrics").text
    [value] = re.findall(rf"^foretoken:{re.escape(name)} ([\d.e+]+)$", text, re.MULTILINE)
    return float(value)


def is_idle(server):
    return server.engine_thread.num_running == server.engine_thread.num_waiting == 0


def kept_by_server(server):
    """Return what the server still keeps of requests, where it keeps anything."""
    thread = server.engine_thread
    observers = {type(it).__name__: it for it in thread._observer._observers}
    kept = {
        "thread": thread._unfinished,
        "building": thread._num_building,
        "loop": thread._loop._admitted,
        "metrics": observers["ServerMetrics"]._running,
        "log": observers["RequestLog"]._calls,
    }
    return {name: value for name, value in kept.items() if value}


# -- clients that leave ------------------------------------------------------------------------


class Leaver:
    """A client that goes away at a random place, in one of the ways in which connections end."""

    def __init__(self, server, rng):
        self._address = urlsplit(server.base_url)
        self._rng = rng
        self.places = set()

    async def leave(self):
        rng = self._rng
        place = rng.choice(("head", "body", "at once", "whole", "stream"))
        body = {
            **LONG,
            "prompt": PROMPT * rng.choice((1, 1, 30)),
            "max_tokens": 200,
            "n": rng.choice((1, 1, 2, 4)),
            "stream": place == "stream" or rng.random() < 0.5,
        }
        sent = message(body)
        if place in ("head", "body"):
            length = len(head(len(json.dumps(body))))
            bounds = (0, length) if place == "head" else (length, len(sent) - 1)
            sent = sent[: rng.randint(*bounds)]
        reader, writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        writer.write(sent)
        await writer.drain()
        if place == "whole":
            await asyncio.sleep(rng.random() / 10)
        elif place == "stream":
            for _ in range(rng.randint(1, 40)):
                await reader.readline()
        self.places.add((place, self._end(writer)))
        await asyncio.sleep(0)
        writer.close()

    def _end(self, writer):
        way = self._rng.choice(("close", "reset", "half"))
        if way == "reset":  # instead of a farewell, the other side gets an error
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        elif way == "half":
            writer.write_eof()
        return way


def test_500_clients_that_leave_anywhere_leave_nothing(llm, settings, plain, caplog):
    """Those who stay get what they get alone; memory of the server is as if nobody had come."""
    params = {"temperature": 1.0, "seed": 5, "max_new_tokens": 24}
    expected = alone(plain, SHORT["prompt"], **params).text
    with served(create_app(llm, settings), settings) as server:  # what is opened once is open
        assert httpx.post(f"{server.base_url}{PATH}", json=SHORT).status_code == 200
    gc.collect()
    num_threads, files = threading.active_count(), open_files()
    with served(create_app(llm, settings), settings) as server:
        leaver = Leaver(server, random.Random(3))

        async def scenario():
            places = asyncio.Semaphore(30)
            async with httpx.AsyncClient(base_url=server.base_url, timeout=START_S) as client:

                async def one(index):
                    async with places:
                        if index % 25:
                            await leaver.leave()
                        else:
                            answer = await client.post(PATH, json=SHORT)
                            assert answer.json()["choices"][0]["text"] == expected

                await asyncio.gather(*(one(index) for index in range(521)))

        asyncio.run(scenario())
        wait_until(lambda: is_idle(server))
        assert len(leaver.places) == 15  # each place, in each way
        wait_until(lambda: not server.uvicorn.server_state.connections)
        assert not server.uvicorn.server_state.tasks
        assert kept_by_server(server) == {}
        assert counter(server, 'finished_requests_total{outcome="cancelled"}') > 200
        assert httpx.post(f"{server.base_url}{PATH}", json=SHORT).status_code == 200
    check_idle(llm.engine)
    assert not [it for it in caplog.records if it.levelname in ("WARNING", "ERROR")], caplog.text
    gc.collect()
    assert threading.active_count() == num_threads
    assert open_files() == files


def open_files():
    """Return what this process has open, where the system tells.

    Nameless files are left out: libffi keeps the code of callbacks in them, for good.
    """
    folder = Path("/proc/self/fd")
    names = []
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):  # the one with which the folder was read
            names.append(str(path.readlink()).partition("[")[0])
    return sorted(name for name in names if not name.endswith("(deleted)"))


# -- slow clients ------------------------------------------------------------------------------


@pytest.fixture
def small_buffers(monkeypatch):
    """Let the system hold little of what a server has sent and nobody has read."""

    def bind_small(host, port):
        listener = bind(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**13)  # connections inherit it
        return listener

    monkeypatch.setattr(conftest, "bind", bind_small)


@pytest.mark.usefixtures("small_buffers")
def test_who_reads_nothing_holds_up_nobody_and_loses_nothing(llm, settings, plain):
    """Their answers are made and wait: a little in the sockets, the rest as tokens, unwritten."""
    with served(create_app(llm, settings), settings) as server:
        check_slow_readers(server, plain)
    check_idle(llm.engine)


def check_slow_readers(server, plain):
    url = f"{server.base_url}{PATH}"
    body = {**LONG, "n": 4, "seed": 7, "logprobs": 20, "stream": True}
    body["speculation"] = {"details": True}
    socks = [connect(server, receive_bytes=4096) for _ in range(3)]
    for sock in socks:
        sock.sendall(message(body))
    wait_until(lambda: server.engine_thread.num_running > 0)
    wait_until(lambda: is_idle(server))  # the engine does not wait for them
    start_s = time.perf_counter()
    assert httpx.post(url, json=SHORT).status_code == 200
    assert time.perf_counter() - start_s < 5
    buffered = [it.transport.get_write_buffer_size() for it in connections(server)]
    total = len(httpx.post(url, json={**body, "stream": False}, timeout=START_S).content)
    assert total > 2**19
    assert max(buffered) > 0  # they do hold something back, ...
    assert max(buffered) < total / 2  # ... and not all that there is to say
    for sock in socks:
        with sock:
            events = [it for it in read_to_end(sock).splitlines() if it.startswith("data: {")]
        texts = dict.fromkeys(range(4), "")
        for event in events:
            for choice in json.loads(event.removeprefix("data: "))["choices"]:
                texts[choice["index"]] += choice["text"]
        first = alone(
            plain, PROMPT, temperature=1.0, seed=7, max_new_tokens=400, ignore_eos=True
        ).text
        assert texts[0] == first


def connections(server):
    return list(server.uvicorn.server_state.connections)


def read_to_end(sock):
    """Return the rest of a stream, without the marks of its pieces."""
    received = b""
    while b"[DONE]" not in received[-200:]:
        piece = sock.recv(2**20)
        assert piece, received[-200:]
        received += piece
    body = received.partition(b"\r\n\r\n")[2]
    content = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        content += rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]
    return content.decode()


def test_who_writes_slowly_holds_up_nobody(server, client):
    socks = [connect(server) for _ in range(100)]
    sent = message(SHORT)
    for place in range(0, len(sent), 40):
        for sock in socks:
            sock.sendall(sent[place : place + 40])
        assert client.get("/health").status_code == 200
    for sock in socks:
        with sock:
            assert sock.recv(100).startswith(b"HTTP/1.1 200")


def test_who_never_ends_its_body_does_not_keep_a_server_alive():
    process = Process("--port", "0", "--drain", "1")
    try:
        process.wait_until_ready()
        with connect(process) as sock:
            sock.sendall(message(SHORT)[:-1])
            time.sleep(0.2)
            code, spent_s = process.end(signal.SIGTERM)
    finally:
        process.popen.kill()
    assert code == 0, process.lines
    assert spent_s < 10
    assert not any("Traceback" in line for line in process.lines), process.lines


# -- nonsense ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_more", [1, 2**20, 16 * 2**20])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_who_sends_too_much_is_told_so(server, num_more, is_chunked):
    """Although it sends all before it reads, as most clients do."""
    content = b"x" * (server.settings.max_body_bytes + num_more)
    sent = head(len(content)) + content
    if is_chunked:
        start = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        sent = start + b"%x\r\n" % len(content) + content + b"\r\n0\r\n\r\n"
    with connect(server) as sock:
        sock.sendall(sent)
        answer = sock.recv(2**16)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"request_too_large" in answer


HEADS = {
    "bytes in a name": [b"X-\xff\xfe: a"],
    "bytes in a value": [b"X-Request-Id: \xff\xc3\x28"],
    "bytes in a key": [b"Authorization: Bearer \xff\xc3\x28\x80"],
    "bytes in an origin": [b"Origin: http://\xff\xc3\x28"],
    "an origin that is none": [b"Origin: http://[::1"],
    "bytes in a type": [b"Content-Type: application/json; charset=\xff"],
    "another charset": [b"Content-Type: application/json; charset=utf-7"],
    "an unknown coding": [b"Content-Encoding: gzip"],
    "bytes in a host": [b"Host: \xff\xc3\x28"],
    "an empty host": [b"Host: "],
    "a host without end": [b"Host: [::1"],
    "a length that is none": [b"Content-Length: \xb2"],
    "a negative length": [b"Content-Length: -1"],
    "a length twice": [b"Content-Length: 5", b"Content-Length: 7"],
    "length and chunks": [b"Content-Length: 5", b"Transfer-Encoding: chunked"],
    "a large head": [b"X-Large: " + b"x" * 100_000],
    "many lines": [b"X-Line: x"] * 5_000,
    "a zero byte": [b"X-Zero: \0"],
    "a line without a colon": [b"nonsense"],
    "an expectation": [b"Expect: 100-continue"],
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("path", [PATH.encode(), b"/\xff%ff%00/..", b"/v1/models/%c3%28"])
def test_no_head_breaks_the_server(server, client, caplog, name, path):
    own = HEADS[name]
    names = {line.partition(b":")[0] for line in own}
    content = json.dumps(SHORT).encode()
    standard = {
        b"Host": b"localhost",
        b"Content-Type": b"application/json",
        b"Content-Length": str(len(content)).encode(),
    }
    lines = [b"POST " + path + b" HTTP/1.1", b"Connection: close", *own]
    lines += [key + b": " + value for key, value in standard.items() if key not in names]
    with connect(server) as sock:
        sock.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + content)
        sock.shutdown(socket.SHUT_WR)
        try:
            while (status := sock.recv(2**16).split()[1]) == b"100":  # "go on"
                pass
        except (IndexError, ConnectionError):  # closed without a word, which is an answer too
            status = b"400"
    assert status[:1] in b"24", status
    assert not [it for it in caplog.records if it.exc_info], caplog.text
    assert client.get("/health").status_code == 200


# -- requests that fail ------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_processor_that_fails_fails_its_own_request(llm, server, plain, monkeypatch, is_stream):
    """Those beside it, in the same steps, get the tokens that they get alone."""

    def fail_later(input_ids, scores):
        if input_ids.shape[1] > 12:
            raise ZeroDivisionError("secret")
        return scores

    new_request = llm.engine.new_request

    def inject(prompt_ids, params, **options):
        if params.seed == 666:
            params = dataclasses.replace(params, logits_processors=[fail_later])
        return new_request(prompt_ids, params, **options)

    monkeypatch.setattr(llm.engine, "new_request", inject)
    bodies = [{**SHORT, "max_tokens": 60, "seed": seed, "stream": is_stream} for seed in range(9)]
    failing = {**SHORT, "max_tokens": 60, "seed": 666, "stream": is_stream}
    url = f"{server.base_url}{PATH}"
    with ThreadPoolExecutor(len(bodies) + 1) as pool:
        failed, *answers = pool.map(
            lambda body: httpx.post(url, json=body, timeout=START_S), [failing, *bodies]
        )
    if is_stream:
        error = events_of(failed)[-1]["error"]
    else:
        assert failed.status_code == 400
        error = failed.json()["error"]
    assert "ZeroDivisionError" in error["message"]
    for seed, answer in enumerate(answers):
        chunks = events_of(answer) if is_stream else [answer.json()]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        expected = alone(plain, SHORT["prompt"], temperature=1.0, seed=seed, max_new_tokens=60)
        assert text == expected.text
    wait_until(lambda: is_idle(server))
    assert kept_by_server(server) == {}


def events_of(answer):
    lines = [it.removeprefix("data: ") for it in answer.text.splitlines() if it.startswith("data")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# -- too little KV cache -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def cramped():
    """A server whose KV cache holds hardly more than one long request."""
    settings = ServerSettings(model_name=MODEL_NAME, port=0, drain_s=5.0)
    with (
        closing(LLM(MODEL_NAME, kv_cache_tokens=320, max_requests=8)) as llm,
        served(create_app(llm, settings), settings) as server,
    ):
        yield server
    check_idle(llm.engine)


def test_all_get_their_tokens_where_the_cache_holds_but_one(cramped, plain):
    bodies = [
        {**LONG, "max_tokens": 250, "seed": seed, "temperature": seed % 2} for seed in range(24)
    ]
    url = f"{cramped.base_url}{PATH}"
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: httpx.post(url, json=body, timeout=120), bodies))
    params = [
        SamplingParams(
            max_new_tokens=250, ignore_eos=True, seed=it["seed"], temperature=it["temperature"]
        )
        for it in bodies
    ]
    expected = plain.generate([PROMPT] * len(bodies), params)
    texts = [answer.json()["choices"][0]["text"] for answer in answers]
    assert texts == [output.text for output in expected]
    assert counter(cramped, "num_preemptions_total") > 0
    assert kept_by_server(cramped) == {}


def test_what_could_never_fit_is_refused_at_once(cramped):
    answer = httpx.post(f"{cramped.base_url}{PATH}", json=LONG)
    assert answer.status_code == 400
    assert "320" in answer.json()["error"]["message"]
    assert "lower max_tokens" in answer.json()["error"]["message"]
