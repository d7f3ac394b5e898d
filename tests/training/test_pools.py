"""What pools gain: counted as it would be by hand, and as it is served."""

import numpy as np
import pytest
import torch

from foretoken import SamplingParams
from foretoken.errors import ForetokenError
from foretoken.models.trainable import load_trainable
from foretoken.training.boost import first_choices, window_hits
from foretoken.training.corpus import Example, collect, seeded
from foretoken.training.pools import HeldOut, PoolMeter, difference, ratio

PROMPTS = [(token_id, 5) for token_id in range(6)]


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["greedy", "sampled"])
def held_out(request, target, tmp_path_factory):
    sampling = SamplingParams(max_new_tokens=9, temperature=request.param)
    params = seeded(sampling, 0, len(PROMPTS))
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    return HeldOut(collect(target, PROMPTS, params, path, stage=""), params, 2)


def meter(models, held_out):
    return PoolMeter(str(models.target), held_out, {"device": "cpu"})


def test_counts_are_those_of_the_union(models, held_out):
    paths = [models.start, models.target, models.start]
    pools = meter(models, held_out).measure(paths, (1, 2, 3), "pool")
    hits = [first_choices(load_trainable(path), held_out.examples) for path in paths]
    for size, counts in enumerate(pools, start=1):
        num_tokens = num_windows = 0
        for text in zip(*hits[:size], strict=True):
            num_tokens += int(torch.stack(text).any(dim=0).sum())
            covered = [window_hits(hit, 2) for hit in text]
            num_windows += int(torch.stack(covered).any(dim=0).sum())
        assert counts.first_choices.sum(axis=1).tolist() == [num_tokens, 54]
        assert counts.covered_windows.sum(axis=1).tolist() == [num_windows, 30]
    one, two, three = (counts.shares() for counts in pools)
    assert one["first_choices"] < two["first_choices"]
    assert one["tokens_per_step"] < two["tokens_per_step"]
    assert two == three  # the same model twice says nothing new


def test_a_single_models_best_choices(models, held_out):
    counter = meter(models, held_out)
    [counts] = counter.measure([models.start], [1], "one")
    assert counter.best_choices(models.start, 1) == counts.shares()["first_choices"]
    assert counter.best_choices(models.start, 61) == 1.0


def test_a_chain_of_the_target_is_accepted_whole(models, held_out):
    [counts] = meter(models, held_out).measure([models.target], [1], "itself")
    if held_out.params[0].temperature == 0:
        assert counts.shares()["first_choices"] == 1.0
    # Nine tokens: one from the prompt's pass with its draft of two, then three a step.
    assert counts.tokens_per_step.tolist() == [[9] * 6, [3] * 6]


def test_a_single_models_tree_has_as_many_nodes_as_the_chains(models, held_out):
    counter = meter(models, held_out)
    [chain] = counter.measure([models.start], [1], "one")
    trees = [counter.tree(models.start, size) for size in (1, 8)]
    assert trees[0].sum(axis=1)[0] == 54
    assert ratio(trees[0]) <= ratio(trees[1])
    assert ratio(trees[1]) > ratio(chain.tokens_per_step)


def test_other_tokens_than_the_corpus_has_are_an_error(models, held_out):
    wrong = [*held_out.examples[:-1], Example((5, 5), (1,) * 9)]
    with pytest.raises(ForetokenError, match="other tokens than the corpus holds"):
        meter(models, HeldOut(wrong, held_out.params, 2)).measure([models.start], [1], "")


def test_a_difference_and_its_interval():
    one = np.array([[8, 9, 7, 8], [10, 10, 10, 10]])
    other = np.array([[5, 6, 5, 4], [10, 10, 10, 10]])
    gain = difference(one, other)
    assert gain["value"] == 0.3
    low, high = gain["interval_95"]
    assert 0.2 <= low < 0.3 < high <= 0.4
    assert difference(one, one) == {"value": 0.0, "interval_95": [0.0, 0.0]}
    assert difference(other, one)["value"] == -0.3


def test_a_ratio_is_of_totals():
    one, other = np.array([[9, 0], [90, 10]]), np.array([[0, 0], [90, 10]])
    assert difference(one, other)["value"] == 0.09
