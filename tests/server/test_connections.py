"""Clients that are slow or too many, and clients that only want a head."""

import json
import socket
import time
from contextlib import ExitStack, closing
from urllib.parse import urlsplit

import httpx
import pytest

from foretoken.server.app import create_app
from foretoken.server.connections import NUM_SPARE
from foretoken.server.settings import ServerSettings
from tests.server.conftest import MODEL_NAME, served, wait_until

READ_S = 0.6
PATIENCE_S = 20.0  # of the test; a server without the bound would wait for ever
MAX_CONNECTIONS = 3
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"model": MODEL_NAME, "prompt": "Once", "max_tokens": 1}).encode()


@pytest.fixture(scope="module")
def hurried(llm):
    """A server that waits for nobody, with room for few."""
    settings = ServerSettings(
        model_name=MODEL_NAME,
        port=0,
        drain_s=2.0,
        read_timeout_s=READ_S,
        max_connections=MAX_CONNECTIONS,
    )
    with served(create_app(llm, settings), settings) as running:
        yield running


@pytest.fixture(autouse=True)
def _all_have_left(hurried):
    wait_until(lambda: not hurried.uvicorn.server_state.connections)


def connect(server):
    address = urlsplit(server.base_url)
    return closing(socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S))


def read_to_the_end(sock):
    """Return what comes until the server closes."""
    received = b""
    while piece := sock.recv(65536):
        received += piece
    return received


def trickle(sock, text):
    """Send a byte now and then until the server answers; return all that it says."""
    sock.settimeout(0.02)
    for index in range(len(text)):
        try:
            sock.sendall(text[index : index + 1])
            received = sock.recv(65536)
        except TimeoutError:
            continue
        sock.settimeout(PATIENCE_S)
        return received + read_to_the_end(sock)
    raise AssertionError("the server has taken in all of it")


def check_408(received):
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert (error["code"], error["type"]) == ("request_timeout", "timeout_error")
    assert f"{READ_S:g} s" in error["message"]


# -- slow clients ------------------------------------------------------------------------------


def test_a_body_that_trickles_is_given_up(hurried):
    """A client that sent a byte now and then held its connection for ever."""
    with connect(hurried) as sock:
        sock.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n")
        begin_s = time.monotonic()
        check_408(trickle(sock, b" " * 1000))
        assert time.monotonic() - begin_s >= READ_S


def test_a_head_that_trickles_is_given_up(hurried):
    """Before it is whole no application sees the request, so nothing there can end it."""
    with connect(hurried) as sock:
        check_408(trickle(sock, HEAD + b"X-Filler: " + b"x" * 1000))


def test_the_second_head_of_a_connection_may_not_trickle_either(hurried):
    with connect(hurried) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        check_408(trickle(sock, HEAD + b"X-Filler: " + b"x" * 1000))


def test_a_silent_connection_is_closed_without_a_word(hurried):
    with connect(hurried) as sock:
        assert read_to_the_end(sock) == b""


def test_the_rest_of_a_body_that_nobody_reads_may_not_trickle(hurried):
    """An answer that came before the body's end, as 404 does, left the connection open."""
    with connect(hurried) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        begin_s = time.monotonic()
        assert b"408" in trickle(sock, b" " * 1000)
        assert time.monotonic() - begin_s < PATIENCE_S


def test_who_is_slow_but_in_time_is_answered(hurried):
    with connect(hurried) as sock:
        sock.sendall(HEAD[:20])
        time.sleep(2 * READ_S / 3)
        sock.sendall(HEAD[20:] + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY[:10])
        time.sleep(2 * READ_S / 3)  # the body has its own time
        sock.sendall(BODY[10:])
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_an_answer_may_take_longer_than_its_question(hurried):
    body = {"model": MODEL_NAME, "prompt": "Once", "max_tokens": 400, "ignore_eos": True}
    body |= {"temperature": 0, "n": 8, "speculation": {"enabled": False}}
    begin_s = time.monotonic()
    answer = httpx.post(f"{hurried.base_url}/v1/completions", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200
    assert time.monotonic() - begin_s > READ_S


# -- many clients ------------------------------------------------------------------------------


def crowd(stack, server, num_connections):
    """Open connections that are in the middle of a body, and stay there for a while."""
    for _ in range(num_connections):
        stack.enter_context(connect(server)).sendall(HEAD + b"Content-Length: 9\r\n\r\n")
    connections = server.uvicorn.server_state.connections
    wait_until(lambda: len(connections) >= num_connections)


def test_one_more_connection_is_refused_and_health_is_not(hurried):
    with ExitStack() as stack:
        crowd(stack, hurried, MAX_CONNECTIONS)
        answer = httpx.get(f"{hurried.base_url}/v1/models")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["connection"] == "close"
        assert answer.json()["error"]["code"] == "too_many_connections"
        assert httpx.get(f"{hurried.base_url}/health").status_code == 200
    wait_until(lambda: httpx.get(f"{hurried.base_url}/v1/models").status_code == 200)


def test_beyond_the_spare_connections_nobody_gets_in(hurried):
    with ExitStack() as stack:
        crowd(stack, hurried, MAX_CONNECTIONS + NUM_SPARE)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{hurried.base_url}/health")
        assert len(hurried.uvicorn.server_state.connections) <= MAX_CONNECTIONS + NUM_SPARE


# -- HEAD --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/health", "/ready", "/metrics", "/stats", "/v1/models", f"/v1/models/{MODEL_NAME}", "/"],
)
def test_head_is_the_head_of_get(hurried, path):
    """HEAD /health answered 405."""
    with httpx.Client(base_url=hurried.base_url) as http:
        head, get = http.head(path), http.get(path)
        assert (head.status_code, head.content) == (200, b"")
        names = {"content-type", "x-content-type-options"}
        assert {name: head.headers[name] for name in names} == {
            name: get.headers[name] for name in names
        }
        assert int(head.headers["content-length"]) > 0
        assert http.head(path).status_code == 200  # the connection can be used again


def test_head_where_get_is_not_allowed(hurried):
    answer = httpx.head(f"{hurried.base_url}/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert httpx.head(f"{hurried.base_url}/nowhere").status_code == 404
