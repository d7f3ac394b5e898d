"""Streams: the same text in pieces, signs of life, errors midway, and clients that go away."""

import asyncio
import json
import time

import httpx
import pytest

from foretoken.server import streaming
from foretoken.server.streaming import EventStream
from tests.server.conftest import wait_until

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
STARTS = {
    "completions": {"prompt": "Once upon a time"},
    "chat": {"messages": [{"role": "user", "content": "Tell me of Tom."}]},
}
kinds = pytest.mark.parametrize("kind", PATHS)
# Characters of two to four bytes, which the embedded model has no whole tokens for.
MANY_BYTES = "[äöüß€λ中文日本語😀🚀]{12}"


def body_of(kind, **fields):
    return {"model": "stories", "max_tokens": 24, "seed": 7, **STARTS[kind], **fields}


def events(text):
    """Return the objects of a stream, which ends as it should."""
    parts = [part for part in text.split("\n\n") if part and not part.startswith(":")]
    assert all(part.startswith("data: ") for part in parts)
    assert parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


@pytest.fixture
def stream(http):
    """Return the events of a streamed request."""

    def post(kind, **fields):
        answer = http.post(PATHS[kind], json=body_of(kind, stream=True, **fields))
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return events(answer.text)

    return post


@pytest.fixture
def whole(http):
    """Return the answer to a request that is not streamed."""
    return lambda kind, **fields: http.post(PATHS[kind], json=body_of(kind, **fields)).json()


def text_of(choice):
    if "text" in choice:
        return choice["text"]
    return (choice.get("message") or choice["delta"]).get("content", "")


def gathered(chunks, index=0):
    """Return a choice of a stream in the form of a whole one."""
    choices = [it for chunk in chunks for it in chunk["choices"] if it["index"] == index]
    logprobs = None
    if choices[0]["logprobs"]:
        names = choices[0]["logprobs"]
        logprobs = {
            name: [entry for choice in choices for entry in choice["logprobs"][name]]
            for name in names
            if isinstance(names[name], list)
        }
    assert [bool(choice["finish_reason"]) for choice in choices[:-1]] == [False] * (
        len(choices) - 1
    )
    return {
        "text": "".join(map(text_of, choices)),
        "logprobs": logprobs,
        "finish_reason": choices[-1]["finish_reason"],
        "tokens": [it for choice in choices for it in choice["foretoken"]["tokens"]],
    }


CASES = {
    "plain": {},
    "parts of characters": {"regex": MANY_BYTES, "max_tokens": 80},
    "cut inside a character": {"regex": MANY_BYTES, "max_tokens": 5},
    "stop": {"stop": [" a ", "was", "she went"], "max_tokens": 60},
    "stop held back": {"stop": [" little girl named Zorro", "zzz"]},
    "stop of many bytes": {"regex": MANY_BYTES, "stop": ["€", "文", "🚀"], "max_tokens": 80},
    "eos": {"max_tokens": 400, "temperature": 0},
}


@kinds
@pytest.mark.parametrize("case", CASES)
def test_a_stream_says_what_the_whole_answer_says(stream, whole, kind, case):
    asked = {"speculation": {"details": True}, **CASES[case]}
    asked |= {"logprobs": 1} if kind == "completions" else {"logprobs": True, "top_logprobs": 1}
    chunks = stream(kind, **asked, stream_options={"include_usage": True})
    answer = whole(kind, **asked)
    [expected] = answer["choices"]
    found = gathered(chunks)
    assert found["text"] == text_of(expected)
    assert found["finish_reason"] == expected["finish_reason"]
    wanted = {k: v for k, v in expected["logprobs"].items() if isinstance(v, list)}
    assert found["logprobs"] == wanted
    assert [it["id"] for it in found["tokens"]] == [
        it["id"] for it in expected["foretoken"]["tokens"]
    ]
    assert chunks[-1]["usage"] == answer["usage"] or case == "plain"  # the first one caches
    num_tokens = answer["usage"]["completion_tokens"]
    assert {len(column) for column in found["logprobs"].values()} == {num_tokens}


@kinds
def test_choices_come_interleaved_and_whole(stream, whole, kind):
    asked = {"n": 4, "speculation": {"details": True}}
    chunks = stream(kind, **asked)
    expected = whole(kind, **asked)["choices"]
    assert len({text_of(choice) for choice in expected}) > 1
    for index, choice in enumerate(expected):
        assert gathered(chunks, index)["text"] == text_of(choice)
    order = [choice["index"] for chunk in chunks for choice in chunk["choices"]]
    assert order != sorted(order)


@kinds
def test_the_form_of_chunks(stream, kind):
    chunks = stream(kind, stream_options={"include_usage": True})
    assert len({chunk["id"] for chunk in chunks}) == 1
    *contents, last = chunks
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 24
    assert [chunk["usage"] for chunk in contents] == [None] * len(contents)
    assert ["foretoken" in chunk for chunk in contents] == [False] * (len(contents) - 1) + [True]
    assert contents[-1]["foretoken"]["seeds"] == [7]
    if kind == "chat":
        roles = [chunk["choices"][0]["delta"].get("role") for chunk in contents]
        assert roles == ["assistant"] + [None] * (len(contents) - 1)


def test_an_echo_comes_first(stream, whole):
    asked = {"echo": True, "logprobs": 1, "n": 2, "speculation": {"details": True}}
    chunks = stream("completions", **asked)
    for index, expected in enumerate(whole("completions", **asked)["choices"]):
        found = gathered(chunks, index)
        assert found["text"] == expected["text"]
        assert found["text"].startswith("Once upon a time")
        assert found["logprobs"] == expected["logprobs"]


@kinds
@pytest.mark.parametrize("num_choices", [1, 2])
def test_an_error_midway_is_an_event(stream, whole, kind, num_choices):
    # After two tokens none is left that has not been said.
    asked = {"allowed_token_ids": [40, 41], "no_repeat_ngram_size": 1, "n": num_choices}
    *contents, last = stream(kind, **asked)
    assert contents
    assert last == whole(kind, **asked)
    assert last["error"]["type"] == "invalid_request_error"
    assert "rule" in last["error"]["message"] or "token" in last["error"]["message"]


# -- clients that go away ----------------------------------------------------------------------


def endless(kind, **fields):
    return body_of(kind, max_tokens=450, ignore_eos=True, temperature=0, **fields)


@pytest.fixture
def slow_engine(api, llm, monkeypatch):
    """Steps take so long that nothing ends by itself before a test looks."""
    step = llm.engine.step

    def slow_step():
        time.sleep(0.01)
        return step()

    monkeypatch.setattr(llm.engine, "step", slow_step)
    yield
    wait_until(lambda: api.engine_thread.num_running == 0)


@kinds
@pytest.mark.usefixtures("slow_engine")
@pytest.mark.parametrize("num_choices", [1, 3])
def test_a_stream_ends_when_its_client_goes_away(api, kind, num_choices):
    body = endless(kind, stream=True, n=num_choices, speculation={"enabled": False})
    with (
        httpx.Client(base_url=api.base_url) as client,
        client.stream("POST", PATHS[kind], json=body) as answer,
    ):
        next(answer.iter_lines())
        assert api.engine_thread.num_running == num_choices
    wait_until(lambda: api.engine_thread.num_running == 0, timeout_s=2)
    assert api.engine_thread.num_waiting == 0


@pytest.mark.usefixtures("slow_engine")
def test_a_whole_answer_is_given_up_when_its_client_goes_away(api):
    body = endless("completions", n=2, speculation={"enabled": False})
    with (
        httpx.Client(base_url=api.base_url, timeout=0.3) as client,
        pytest.raises(httpx.ReadTimeout),
    ):
        client.post(PATHS["completions"], json=body)
    wait_until(lambda: api.engine_thread.num_running == 0, timeout_s=2)


@pytest.mark.usefixtures("slow_engine")
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_deadline_is_an_error(http, is_stream):
    body = endless("completions", stream=is_stream, timeout_s=0.02, speculation={"enabled": False})
    answer = http.post(PATHS["completions"], json=body)
    error = events(answer.text)[-1]["error"] if is_stream else answer.json()["error"]
    assert answer.status_code == (200 if is_stream else 504)
    assert error["code"] == "deadline_exceeded"


# -- the response alone -------------------------------------------------------------------------


def run_response(events, receive):
    """Run a stream without a server; return what it sent and how often it was closed."""
    sent, closed = [], []

    async def send(message):
        sent.append(message)

    async def run():
        response = EventStream(events(), lambda: closed.append(1))
        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)

    asyncio.run(run())
    return [message.get("body", b"") for message in sent], len(closed)


async def never():
    await asyncio.Event().wait()


def test_a_silent_stream_gives_signs_of_life(monkeypatch):
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.02)

    async def slow():
        yield b"data: 1\n\n"
        await asyncio.sleep(0.2)
        yield b"data: 2\n\n"

    bodies, num_closed = run_response(slow, never)
    assert bodies[1] == b"data: 1\n\n"
    assert bodies[-2:] == [b"data: 2\n\n", b""]
    pings = bodies[2:-2]
    assert set(pings) == {b": keep-alive\n\n"}
    assert 2 <= len(pings) <= 10
    assert num_closed == 1


def test_a_stream_that_is_left_is_closed_at_once():
    was_closed = []

    async def endless_events():
        try:
            while True:
                yield b"data: 1\n\n"
                await asyncio.sleep(0.001)
        finally:
            was_closed.append(1)

    async def leave():
        await asyncio.sleep(0.02)
        return {"type": "http.disconnect"}

    bodies, num_closed = run_response(endless_events, leave)
    assert b"data: 1\n\n" in bodies
    assert bodies[-1] != b""  # there was nobody to tell the end to
    assert num_closed == len(was_closed) == 1
