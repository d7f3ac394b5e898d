"""Requests made up from the service's own OpenAPI schema, through a real socket.

Nothing answers 500, every answer is one that the schema announces and has its form; what the
schema forbids is refused, and what it allows is not refused for its form.
"""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.server.conftest import MODEL_NAME

OPERATIONS = [
    "GET /health",
    "GET /metrics",
    "GET /ready",
    "GET /stats",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "POST /v1/chat/completions",
    "POST /v1/completions",
]
# CI draws the same few examples each time; more of them, and others, are drawn on request.
NUM_EXAMPLES = int(os.environ.get("FORETOKEN_FUZZ_EXAMPLES", "25"))
TOKEN_IDS = {
    "allowed_token_ids",
    "bad_words_ids",
    "prompt",
    "sequence_bias",
    "stop_token_ids",
    "suppress_tokens",
}

fuzzed = settings(
    max_examples=NUM_EXAMPLES,
    derandomize="FORETOKEN_FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def operations(api):
    """What a running server says that it can do, by method and path."""
    schema = schemathesis.openapi.from_url(f"{api.base_url}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{it.method.upper()} {it.path}": it for it in found}


def test_all_operations_are_tried(operations):
    assert sorted(operations) == OPERATIONS


@pytest.mark.parametrize(
    ("name", "mode"),
    # What is only read takes nothing that could be wrong.
    [*((it, "POSITIVE") for it in OPERATIONS), *((it, "NEGATIVE") for it in OPERATIONS[-2:])],
)
def test_the_schema_is_kept(operations, name, mode):
    """Names of models are made up too, so hardly any of these reaches the engine."""

    @given(case=operations[name].as_strategy(schemathesis.GenerationMode[mode]))
    @fuzzed
    def send(case):
        case.call_and_validate(timeout=60)

    send()


@pytest.mark.parametrize("name", OPERATIONS[-2:])
def test_the_engine_takes_what_the_schema_allows(operations, name, api):
    """A few fields at a time, with the served model and tokens that it knows."""
    statuses = []

    @given(case=operations[name].as_strategy(), data=st.data())
    @fuzzed
    def send(case, data):
        body = case.body
        needed = {"model", "prompt", "messages"} & set(body)
        others = sorted(set(body) - needed)
        kept = data.draw(st.lists(st.sampled_from(others), max_size=4)) if others else []
        body = {key: known(value) if key in TOKEN_IDS else value for key, value in body.items()}
        body = {key: value for key, value in body.items() if key in needed or key in kept}
        body |= {"model": MODEL_NAME, "max_tokens": 6, "timeout_s": 20}
        if "n" in body:
            body["n"] = min(body["n"] or 1, 3)
        case.body = body
        response = case.call(timeout=60)
        statuses.append(response.status_code)
        # A grammar may be none, a prompt may be too long: the schema cannot say all.
        case.validate_response(response, excluded_checks=[positive_data_acceptance])

    send()
    assert statuses.count(200) > NUM_EXAMPLES / 5, statuses
    assert api.engine_thread.num_running == 0


def known(value):
    """Return token ids as ones that the model knows."""
    if isinstance(value, list):
        return [known(part) for part in value][:20]
    return value % 512 if isinstance(value, int) else value
