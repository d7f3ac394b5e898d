"""Drafters served in turn: the same tokens, and numbers that mean what they say."""

from dataclasses import replace

import numpy as np
import pytest

from foretoken import SamplingParams
from foretoken.errors import ForetokenError
from foretoken.training.corpus import collect
from foretoken.training.served import compare_served, speedup

PROMPTS = [(token_id, token_id + 9, 4) for token_id in range(3)]


@pytest.fixture
def params():
    return [SamplingParams(max_new_tokens=12, temperature=0.8, seed=seed) for seed in range(3)]


@pytest.fixture
def texts(target, params, tmp_path):
    return collect(target, PROMPTS, params, tmp_path / "corpus.jsonl", stage="collecting")


def test_every_drafter_is_served_and_compared(models, texts, params, progress):
    drafters = {
        "itself": f"draft-model:path={models.target},expansion=1-1-1",
        "start": f"draft-model:path={models.start},expansion=1-1-1",
    }
    served = compare_served(
        str(models.target), drafters, texts, params, machine={"max_nodes": 3},
        on_progress=progress.append,
    )  # fmt: skip
    assert list(served) == ["plain", "itself", "start"]
    assert served["plain"]["tokens_per_step"] == 1
    assert "speedup" not in served["plain"]
    # 12 tokens by 3 drafted ones and the target's own; the last step may be cut.
    assert served["itself"]["tokens_per_step"] == 4
    assert 1 <= served["start"]["tokens_per_step"] < 4
    assert all(it["num_different"] == 0 and it["tokens_per_s"] > 0 for it in served.values())
    low, high = served["start"]["speedup"]["interval_95"]
    assert low <= served["start"]["speedup"]["value"] <= high
    assert progress[-1].done == progress[-1].total == 3


def test_other_tokens_are_an_error(models, texts, params):
    output_ids = texts[1].output_ids
    texts[1] = replace(texts[1], output_ids=(*output_ids[:-1], (output_ids[-1] + 1) % 61))
    with pytest.raises(ForetokenError, match="serving with plain gave other tokens"):
        compare_served(str(models.target), {}, texts, params, machine={})


def test_a_speedup_is_of_totals():
    found = speedup(np.array([2.0, 4.0]), np.array([1.0, 1.0]))
    assert found["value"] == 3
    assert found["interval_95"] == [2, 4]
    assert speedup(np.ones(5), np.full(5, 0.5)) == {"value": 2, "interval_95": [2, 2]}
