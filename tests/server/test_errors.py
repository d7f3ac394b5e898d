"""Whatever is sent, the answer is OpenAI's error body: right status, the field, a next step."""

import json
import time
from itertools import pairwise

import httpx
import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient

from foretoken.errors import ConfigError, RequestError, UnknownNameError
from foretoken.server import api as api_module
from foretoken.server import validation
from foretoken.server.errors import FieldError, UnknownModelError, add_error_handlers, describe
from foretoken.server.request_id import RequestIdMiddleware
from foretoken.server.submission import (
    DeadlineError,
    EngineFailedError,
    QueueFullError,
    ShuttingDownError,
)
from foretoken.server.validation import MAX_SHOWN, explain

GOOD = {"model": "stories", "prompt": "Once", "max_tokens": 2}


def post(http, body, path="/v1/completions", **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **headers}
    return http.post(path, content=content, headers=sent)


def error_of(answer, status=400):
    """Return an answer's error, which has OpenAI's form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    [(key, error)] = answer.json().items()
    assert key == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]
    return error


FIELDS = [
    ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
    ({"max_new_tokens": 1}, "max_new_tokens", "did you mean"),
    ({"xyz": 1}, "xyz", "known are model, "),
    ({"prompt": None}, "prompt", "got None"),
    ({"prompt": 5}, "prompt", "string or should be a valid list; got 5"),
    ({"prompt": []}, "prompt", "at least 1"),
    ({"prompt": ""}, "prompt", "at least 1"),
    ({"prompt": [[]]}, "prompt.0", "at least 1"),
    ({"prompt": ["a", 5]}, "prompt.1", "valid string; got 5"),
    ({"prompt": [1, 2, "a"]}, "prompt.2", "valid integer; got 'a'"),
    ({"prompt": [True]}, "prompt.0", "valid integer"),
    ({"prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
    ({"prompt": [2**70]}, "prompt.0", "less than or equal to"),
    ({"prompt": [99999]}, "prompt", "outside the model's vocabulary"),
    ({"prompt": [5] * 600}, "prompt", "the model's context holds"),
    ({"temperature": "1"}, "temperature", "valid number; got '1'"),
    ({"temperature": True}, "temperature", "valid number"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": 1e-9}, "temperature", "0 or in [1e-06, 1e+06]"),
    ({"temperature": 10**400}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 9}, "n", "at most 8 choices"),
    ({"n": 2**31 - 1}, "n", "at most 8 choices"),
    ({"n": 1.5}, "n", "valid integer"),
    ({"prompt": ["a"] * 5, "n": 2}, "n", "got 10, 5 prompts with n = 2"),
    ({"best_of": 4}, "best_of", "got best_of 4 with n 1"),
    ({"suffix": "x"}, "suffix", "not served here"),
    ({"seed": 5.5}, "seed", "valid integer"),
    ({"seed": "5"}, "seed", "valid integer"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 10**30}, "max_tokens", "less than or equal to"),
    ({"min_tokens": 5}, "min_tokens", "at most max_tokens; got 5 and 2"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"stop": ""}, "stop", "at least 1"),
    ({"stop": ["a", ""]}, "stop.1", "at least 1"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "pattern"),
    ({"logit_bias": {"٣": 1}}, "logit_bias.٣", "pattern"),
    ({"logit_bias": {"5": "1"}}, "logit_bias.5", "valid number"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "outside the model's vocabulary"),
    ({"logit_bias": [1]}, "logit_bias", "should be an object"),
    ({"stop_token_ids": [99999]}, "stop_token_ids", "outside the model's vocabulary"),
    ({"sequence_bias": [[5]]}, "sequence_bias", "pairs"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "at least one token id"),
    ({"regex": "(", "stream": True}, "regex", "regex"),
    ({"lark": "start: nothing_like_this"}, "lark", "lark"),
    ({"regex": "a", "lark": "b"}, None, "at most one of"),
    ({"json_schema": {"type": "nonsense"}}, "json_schema", "nonsense"),
    ({"json_schema": False}, "json_schema", "json_schema"),
    ({"json_schema": 5}, "json_schema", "got 5"),
    ({"response_format": {"type": "xml"}}, "response_format", "'json_schema'"),
    ({"response_format": {}}, "response_format", "type"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"nme": "x"}}},
        "response_format.json_schema.nme",
        "did you mean 'name'?",
    ),
    ({"stream_options": {}}, "stream_options", "set stream to true"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"speculation": {"enable": True}}, "speculation.enable", "did you mean 'enabled'?"),
    ({"speculation": {"drafters": ["nope"]}}, "speculation.drafters", "suffix"),
    ({"speculation": {"max_nodes": -1}}, "speculation.max_nodes", "equal to 0"),
    ({"prediction": "x"}, "prediction", "should be an object; got 'x'"),
    ({"prediction": {"type": "audio", "content": "x"}}, "prediction.type", "'content'"),
    ({"timeout_s": 0}, "timeout_s", "greater than 0"),
    ({"logprobs_mode": "raw "}, "logprobs_mode", "'processed'"),
]


@pytest.mark.parametrize(("fields", "param", "words"), FIELDS, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_named(http, fields, param, words):
    error = error_of(post(http, {**GOOD, **fields}))
    assert error["param"] == param
    assert words in error["message"]
    assert len(error["message"]) < 1000


BODIES = {
    "nothing": b"",
    "half an object": b'{"model": "stories", "prompt":',
    "text behind": b'{"model": "stories", "prompt": "a"} x',
    "a list": b"[1]",
    "a number": b"5",
    "null": b"null",
    "bytes": b"\xff\xfe\x00",
    "invalid UTF-8": b'{"model": "stories", "prompt": "\xc3\x28"}',
    "UTF-16": '{"model": "stories"}'.encode("utf-16"),
    "half of a pair": b'{"model": "stories", "prompt": "\\ud800"}',
    "half of a pair as a key": b'{"model": "stories", "prompt": "a", "\\ud800": 1}',
    "half of a pair in a schema": b'{"model": "stories", "prompt": "a", '
    b'"json_schema": {"const": "\\udfff"}}',
    "NaN": b'{"model": "stories", "prompt": "a", "temperature": NaN}',
    "Infinity": b'{"model": "stories", "prompt": "a", "temperature": Infinity}',
    "minus Infinity": b'{"model": "stories", "prompt": "a", "temperature": -Infinity}',
    "too large a float": b'{"model": "stories", "prompt": "a", "temperature": 1e999}',
    "too large a float in a schema": b'{"model": "stories", "prompt": "a", '
    b'"json_schema": {"const": 1e999}}',
    "too many digits": b'{"model": "stories", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "a control character": b'{"model": "stories", "prompt": "a\x01"}',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a deep schema": b'{"model": "stories", "prompt": "a", "json_schema": '
    + b'{"items":' * 10_000
    + b"{}"
    + b"}" * 10_001,
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_wrong_body_is_refused(http, path, name):
    error_of(post(http, BODIES[name], path))


def nested(depth, keyword):
    schema = {"type": "null"}
    for _ in range(depth):
        schema = {keyword: [schema] if keyword == "anyOf" else schema}
    return schema


SCHEMAS = {
    "nested as deep as JSON may": nested(90, "items"),
    "nested choices": nested(60, "anyOf"),
    "a reference to itself": {"$ref": "#"},
    "a recursive schema": {"$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
    "a reference to elsewhere": {"$ref": "http://localhost:1/x.json"},
    "a reference to a file": {"$ref": "file:///etc/passwd"},
    "many items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "a long text": {"type": "string", "minLength": 10**9},
    "a catastrophic pattern": {"type": "string", "pattern": "^(((a{1,99}){1,99}){1,99}){1,99}$"},
    "many choices": {"enum": [f"choice {place}" for place in range(20_000)]},
    "wrong pattern": {"type": "string", "pattern": "("},
    "many properties": {"properties": {f"p{place}": {} for place in range(2_000)}},
    "x-guidance": {"x-guidance": {"whitespace_pattern": "((a{1,999}){1,999}){1,999}"}},
    "x-guidance of no kind": {"x-guidance": 5},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_schema_breaks_the_server(http, name):
    """It is served or refused, in seconds, and the next request is served."""
    start_s = time.perf_counter()
    answer = post(http, {**GOOD, "json_schema": SCHEMAS[name]})
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        error_of(answer)
    assert post(http, GOOD).status_code == 200
    assert time.perf_counter() - start_s < 20


@pytest.mark.parametrize("regex", ["((a{1,999}){1,999}){1,999}", "(" * 5000, "a{1,1000000000}"])
def test_no_regular_expression_breaks_the_server(http, regex):
    answer = post(http, {**GOOD, "regex": regex})
    assert answer.status_code in (200, 400), answer.text
    assert post(http, GOOD).status_code == 200


def json_schema(num_levels, level):
    """Return a schema whose definitions each refer to the next one."""
    names = [f"d{index}" for index in range(num_levels)]
    schemas = {name: level({"$ref": f"#/$defs/{after}"}) for name, after in pairwise(names)}
    return {"$defs": {**schemas, names[-1]: {}}, "$ref": "#/$defs/d0"}


CHAINS = {
    "schema": {
        "json_schema": json_schema(380, lambda next_: {"properties": {"a": next_}}),
    },
    "arrays": {
        "json_schema": json_schema(
            350, lambda next_: {"items": {"items": {"items": {"items": {"items": next_}}}}}
        )
    },
    "rules": {
        "lark": "start: r0\n"
        + "".join(f"r{index}: (r{index + 1})\n" for index in range(2400))
        + 'r2400: "a"'
    },
}


@pytest.mark.parametrize("name", CHAINS)
def test_no_chain_of_references_ends_the_process(http, name):
    """The compiler's recursion went beyond the stack: 30 kB ended the server with SIGSEGV."""
    answer = post(http, {**GOOD, **CHAINS[name]})
    assert answer.status_code in (200, 400), answer.text
    assert post(http, GOOD).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"json_schema": {"enum": ["x" * 40_000]}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"enum": ["x" * 40_000]}},
            }
        },
        {"regex": "é" * 20_000},
        {"lark": 'start: "' + "a" * 40_000 + '"'},
    ],
)
def test_the_size_of_a_grammar_is_bounded(http, fields):
    error = error_of(post(http, {**GOOD, **fields}))
    assert error["param"] in ("json_schema", "regex", "lark")
    assert "at most 32768 bytes here; got 40" in error["message"]


# -- bodies of many values -----------------------------------------------------------------------

MANY = {
    "lists": {"prompt": [[1]] * 70_000},
    "texts": {"prompt": ["["] * 70_000},
    "objects": {"prompt": "a", "metadata": [{}] * 70_000},
    "token ids": {"prompt": [1] * 80_000},
    "a list beside the prompt": {"prompt": "a", "bad_words_ids": [[1] * 40] * 2000},
    "escapes": {"prompt": ['\\"[,'] * 70_000},
}


@pytest.mark.parametrize("name", MANY)
def test_the_values_of_a_body_are_bounded(http, name, monkeypatch):
    """A list of a million lists held the event loop for seconds while it was parsed and checked."""
    monkeypatch.setattr(validation, "from_json", None)  # they are not even parsed
    error = error_of(post(http, {**GOOD, **MANY[name]}))
    assert "the body" in error["message"]
    assert "more than" in error["message"]


@pytest.mark.parametrize("body", [b'{"prompt": "' + b'\\"' * 10**6, b'"' + b"\\" * 10**6])
def test_a_text_without_an_end_is_counted_in_one_pass(http, body):
    start_s = time.perf_counter()
    assert "no valid JSON" in error_of(post(http, body))["message"]
    assert time.perf_counter() - start_s < 10


def test_marks_in_texts_do_not_count(http):
    prompt = '[{",\\' * 50_000
    error = error_of(post(http, {**GOOD, "prompt": prompt}))
    assert "the prompt has" in error["message"]  # so many tokens: it was read


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": "a"}] * 5000}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 5000}]},
            "messages.0.content",
        ),
    ],
)
def test_the_messages_of_a_conversation_are_bounded(http, fields, param):
    error = error_of(post(http, {"model": "stories", **fields}, "/v1/chat/completions"))
    assert error["param"] == param
    assert "at most 4096" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/nothing/here", 404, "GET /nothing/here"),
        ("GET", "/v1/completions", 405, "GET /v1/completions"),
        ("DELETE", "/v1/models", 405, "DELETE"),
        ("GET", "/v1/models/other", 404, "use 'stories'"),
        ("GET", "/v1/models/a/b%2F..%2Fc", 404, "use 'stories'"),
        ("GET", "/" + "x" * 5000, 404, "..."),
    ],
)
def test_unknown_places(http, method, path, status, words):
    answer = http.request(method, path)
    error = error_of(answer, status)
    assert words in error["message"]
    assert len(error["message"]) < 300
    assert ("allow" in answer.headers) == (status == 405)


def test_another_model_is_not_found(http):
    error = error_of(post(http, {**GOOD, "model": "gpt-4"}), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert "'stories'" in error["message"]


def test_only_json_is_read(http):
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "application/xml", ""):
        answer = post(http, GOOD, **{"Content-Type": content_type})
        assert "application/json" in error_of(answer)["message"]


def test_messages_repeat_little_of_what_was_given(http):
    for fields in ({"temperature": "x" * 10_000}, {"x" * 10_000: 1}, {"n": ["y"] * 10_000}):
        error = error_of(post(http, {**GOOD, **fields}))
        assert len(error["message"]) < 10 * MAX_SHOWN + 800
    error = error_of(post(http, {**GOOD, "model": "z" * 10_000}), 404)
    assert len(error["message"]) < 200


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (RequestError("wrong", hint="do"), 400, None, None),
        (ConfigError("wrong", hint="do"), 400, None, None),
        (UnknownNameError("drafter", "x", ["y"]), 400, None, None),
        (FieldError("a.b", "wrong", hint="do"), 400, None, None),
        (UnknownModelError("x", "y"), 404, "model_not_found", None),
        (QueueFullError(3, 7), 429, "queue_full", "7"),
        (ShuttingDownError(5), 503, "unavailable", "5"),
        (DeadlineError(1.5), 504, "deadline_exceeded", None),
        (EngineFailedError("RuntimeError"), 500, "engine_error", None),
        (RuntimeError("secret"), 500, "internal_error", None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_has_its_status(error, status, code, retry_after):
    failure = describe(error)
    assert (failure.status, failure.code) == (status, code)
    assert failure.headers.get("Retry-After") == retry_after
    assert "secret" not in failure.message
    assert getattr(error, "hint", "") in failure.message


def test_an_unexpected_failure_says_nothing_but_its_request(caplog):
    app = FastAPI()
    add_error_handlers(app)

    @app.get("/fail")
    async def fail():
        raise RuntimeError("secret")

    app.add_middleware(RequestIdMiddleware)
    answer = TestClient(app).get("/fail", headers={"X-Request-Id": "mine"})
    error = error_of(answer, 500)
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "mine"
    assert error["code"] == "internal_error"
    assert "request mine failed" in caplog.text
    assert "secret" in caplog.text  # the log says what the answer does not


def test_a_failure_of_one_request_is_its_own(http, monkeypatch):
    def fail(*_):
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(api_module, "completion_call", fail)
        answer = post(http, GOOD)
    assert "secret" not in error_of(answer, 500)["message"]
    assert post(http, GOOD).status_code == 200


@pytest.mark.parametrize("given", ["x y", "a" * 65, "ä", 'a"b', "{}"])
def test_request_ids_that_could_deceive_are_not_taken_over(http, given):
    answer = http.get("/v1/models", headers={"X-Request-Id": given.encode()})
    assert answer.headers["x-request-id"] != given
    assert len(answer.headers["x-request-id"]) == 24


def test_errors_of_unions_speak_of_the_nearest_form():
    error = RequestValidationError(
        [
            {"type": "string_type", "loc": ("body", "a", "str"), "msg": "text", "input": [1, "b"]},
            {"type": "int_type", "loc": ("body", "a", "list[int]", 1), "msg": "int", "input": "b"},
        ]
    )
    assert explain(error) == ("a.1", "a.1: int; got 'b'")


def test_the_documentation_of_the_api_is_true(http):
    described = http.get("/openapi.json").json()
    for path in ("/v1/completions", "/v1/chat/completions"):
        responses = described["paths"][path]["post"]["responses"]
        assert set(responses) >= {"200", "400", "401", "404", "413", "429", "503", "504"}
        assert "422" not in responses
        assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert isinstance(http, httpx.Client)
