"""Random calls of every kind to a server, and what came of them; the traffic of `server_soak`."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import record

MODEL = "stories"
PATHS = {"text": "/v1/completions", "chat": "/v1/chat/completions"}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
OPENINGS = record.OPENINGS.read_text(encoding="utf-8").splitlines()
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "is_happy": {"type": "boolean"},
    },
    "required": ["name", "age", "is_happy"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
# Beside the bare call, each with some probability.
OPTIONS: tuple[dict[str, Any], ...] = (
    {"n": 2},
    {"n": 3},
    {"stop": [".", " friend"]},
    {"response_format": FORMAT},
    {"regex": "[a-z ]{5,60}[.]"},
    {"prediction": {"type": "content", "content": "there was a little girl named Lily. " * 3}},
    {"frequency_penalty": 0.6, "presence_penalty": 0.3},
    {"repetition_penalty": 1.3},
    {"logit_bias": {"5": -50, "300": 4}},
    {"top_p": 0.8, "top_k": 40},
    {"min_p": 0.05},
    {"no_repeat_ngram_size": 3},
    {"ignore_eos": True},
    {"speculation": {"enabled": False}},
    {"speculation": {"drafters": ["suffix"], "max_nodes": 4, "details": True}},
    {"timeout_s": 0.2},
)
# At most one of them: a grammar and another rule may leave no token to choose, which is an error.
CLASHING = {"response_format", "regex", "no_repeat_ngram_size"}


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request, and how it may end.

    Args:
        kind: What it is counted as.
        path: Where it goes.
        content: Its body.
        allowed: Statuses that are as they should be.
        leaves_after: Chunks of a stream, or seconds of a whole answer, after which the client goes
            away; None stays.
    """

    kind: str
    path: str
    content: bytes
    allowed: frozenset[int] = frozenset({200, 429})
    leaves_after: float | None = None

    @property
    def is_stream(self) -> bool:
        """Whether chunks come as they are made."""
        return b'"stream": true' in self.content


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a call.

    Args:
        outcome: A status, "left", "event CODE" for an error within a stream, or "broken KIND" for
            a connection that failed.
        is_expected: Whether that is as it should be.
        num_tokens: Of a call that came to its end.
        choices: Of the same, as `comparable` gives them.
        text: Of an answer that should not be; shortened.
    """

    outcome: str
    is_expected: bool
    num_tokens: int = 0
    choices: Any = None
    text: str = ""


# -- what is asked -------------------------------------------------------------------------------


def body_of(kind: str, prompt: str, **fields: Any) -> dict[str, Any]:
    """Return a call's body."""
    asked: dict[str, Any] = {"prompt": prompt}
    if kind == "chat":
        asked = {"messages": [{"role": "user", "content": prompt}]}
    return {"model": MODEL, **asked, **fields}


def good_call(rng: random.Random, *, is_short: bool = False) -> Call:
    """Return a call that is answered, unless there is no room or its own time is over."""
    kind = rng.choice(("text", "text", "chat"))
    prompt = " ".join(rng.choices(OPENINGS, k=1 if is_short else rng.choice((1, 1, 2, 4, 16))))
    body = body_of(
        kind,
        prompt,
        max_tokens=rng.choice((1, 4, 12) if is_short else (1, 16, 40, 80, 160)),
        temperature=rng.choice((0, 0.7, 1.0)),
        seed=rng.getrandbits(48),
    )
    for option in OPTIONS:
        clashes = bool(CLASHING & option.keys() and CLASHING & body.keys())
        if not clashes and rng.random() < 0.12:
            body |= option
    if rng.random() < 0.2:
        body |= {"logprobs": True, "top_logprobs": 3} if kind == "chat" else {"logprobs": 3}
    leaves_after: float | None = None
    if rng.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if rng.random() < 0.3:
            leaves_after = rng.choice((0, 1, 2, 5, 20))
    elif rng.random() < 0.2:
        leaves_after = rng.random() / 4
    allowed = frozenset({200, 429} | ({504} if "timeout_s" in body else set()))
    form = "stream" if "stream" in body else "whole"
    return Call(f"{kind} {form}", PATHS[kind], json.dumps(body).encode(), allowed, leaves_after)


def bad_call(rng: random.Random) -> Call:
    """Return a call that is refused."""
    body = body_of("text", rng.choice(OPENINGS), max_tokens=4)
    fields, status = rng.choice(
        (
            ({"temprature": 1}, 400),
            ({"temperature": "warm"}, 400),
            ({"max_tokens": 0}, 400),
            ({"n": 999}, 400),
            ({"prompt": [1] * 5000}, 400),
            ({"prompt": [10**6]}, 400),
            ({"json_schema": {"type": "nonsense"}}, 400),
            ({"regex": "("}, 400),
            ({"speculation": {"drafters": ["nobody"]}}, 400),
            ({"model": "other"}, 404),
            ({"user": "x" * (5 << 20)}, 413),
            (None, 400),
        )
    )
    content = b'{"model": "stories", "prompt": "' if fields is None else json.dumps(body | fields)
    content = content.encode() if isinstance(content, str) else content
    return Call("bad", PATHS["text"], content, frozenset({status}))


def fixed_calls() -> list[Call]:
    """Return calls that get the same answer each time, whatever else goes on."""
    story, long = OPENINGS[0], " ".join(OPENINGS[:16])
    bodies = [
        ("text", {"prompt": story, "temperature": 0, "logprobs": 2}),
        ("text", {"prompt": story, "temperature": 1.0, "logprobs": 2}),
        ("text", {"prompt": story, "temperature": 1.0, "speculation": {"enabled": False}}),
        ("text", {"prompt": long, "temperature": 0.8, "top_p": 0.9, "n": 3}),
        ("text", {"prompt": long, "temperature": 0, "frequency_penalty": 0.5, "stop": "!"}),
        ("text", {"prompt": long, "temperature": 0, "echo": True, "logprobs": 1}),
        ("chat", {"prompt": story, "temperature": 0.7, "response_format": FORMAT}),
        ("chat", {"prompt": long, "temperature": 1.0, "logprobs": True, "top_logprobs": 2}),
    ]
    calls = []
    for kind, fields in bodies:
        body = body_of(kind, **{"max_tokens": 48, "seed": 11, **fields})
        body["speculation"] = {"details": True, **body.get("speculation", {})}
        calls.append(Call("fixed", PATHS[kind], json.dumps(body).encode()))
    return calls


# -- what comes back -----------------------------------------------------------------------------


async def send(client: httpx.AsyncClient, call: Call) -> Result:
    """Make a call; whatever happens is a result."""
    try:
        if call.is_stream:
            return await _send_streamed(client, call)
        async with asyncio.timeout(call.leaves_after):
            answer = await client.post(call.path, content=call.content, headers=_HEADERS)
    except TimeoutError:
        return Result("left", is_expected=True)
    except httpx.HTTPError as error:
        return Result(f"broken {type(error).__name__}", is_expected=False, text=str(error)[:300])
    if answer.status_code != 200:
        return _refused(call, answer.status_code, answer.text)
    body = answer.json()
    num_tokens = body["usage"]["completion_tokens"]
    return _answered(call, num_tokens, [comparable(choice) for choice in body["choices"]])


async def _send_streamed(client: httpx.AsyncClient, call: Call) -> Result:
    num_chunks, last, num_tokens = 0, "", 0
    request = client.stream("POST", call.path, content=call.content, headers=_HEADERS)
    async with request as answer:
        if answer.status_code != 200:
            return _refused(call, answer.status_code, (await answer.aread()).decode())
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            if num_chunks == call.leaves_after:
                return Result("left", is_expected=True)
            num_chunks, last = num_chunks + 1, line.removeprefix("data: ")
            if last.startswith('{"error"'):
                code = json.loads(last)["error"]["code"]
                is_late = code == "deadline_exceeded" and 504 in call.allowed
                return Result(f"event {code}", is_expected=is_late, text=last[:300])
            if last != "[DONE]" and (usage := json.loads(last).get("usage")):
                num_tokens = usage["completion_tokens"]
    return Result("200", is_expected=last == "[DONE]", num_tokens=num_tokens, text=last[:300])


def comparable(choice: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a choice is the same each time: all but who guessed its tokens."""
    kept = {key: value for key, value in choice.items() if key != "foretoken"}
    tokens = choice.get("foretoken", {}).get("tokens", ())
    return {**kept, "token_ids": [token["id"] for token in tokens]}


def _answered(call: Call, num_tokens: int, choices: Any) -> Result:
    return Result("200", is_expected=200 in call.allowed, num_tokens=num_tokens, choices=choices)


def _refused(call: Call, status: int, text: str) -> Result:
    return Result(str(status), is_expected=status in call.allowed, text=text[:300])


_HEADERS = {"Content-Type": "application/json"}
