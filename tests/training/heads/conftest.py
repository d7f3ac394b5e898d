"""A kind of head of our own, and texts of a tiny target."""

from types import SimpleNamespace

import pytest

from foretoken import LLM, SamplingParams
from foretoken.core.registry import Registry
from foretoken.drafters import DRAFTERS
from foretoken.training.corpus import collect
from tests.training.conftest import save_tiny
from tests.training.heads.toy import KIND, ToyDrafter

PROMPTS = [[token_id, token_id + 9, 4][: 1 + token_id % 3] for token_id in range(12)]


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory):
    """A directory with a tiny target of two layers whose outputs depend on what is before."""
    return save_tiny(tmp_path_factory.mktemp("models") / "two", seed=4, num_hidden_layers=2)


@pytest.fixture(scope="session")
def texts(two_layers, tmp_path_factory):
    """Greedy outputs of different lengths."""
    llm = LLM(str(two_layers), drafters="none")
    params = [SamplingParams(max_new_tokens=3 + 2 * index) for index in range(len(PROMPTS))]
    path = tmp_path_factory.mktemp("texts") / "corpus.jsonl"
    examples = collect(llm, PROMPTS, params, path, stage="collecting")
    return SimpleNamespace(examples=examples, target=llm.engine.parts.target)


@pytest.fixture
def toy_kind(monkeypatch):
    """Registers the kind and its drafter for a test; returns the table of kinds."""
    registry = Registry("kind of head", {}, group="foretoken.heads")
    registry.add("toy", KIND)
    for module in ("trainer", "settings"):
        monkeypatch.setattr(f"foretoken.training.heads.{module}.KINDS", registry)
    monkeypatch.setitem(DRAFTERS._table, "toy", ToyDrafter)
    return registry
