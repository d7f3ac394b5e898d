"""Batches: who stands where, which tokens count, and where logits come from."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from foretoken.errors import ConfigError
from foretoken.models.heads.target import target_tensors
from foretoken.training.corpus import Example
from foretoken.training.heads.prepare import StateBounds, state_source
from tests.fakes import VOCAB_SIZE, tiny_language_model

CPU = torch.device("cpu")


@pytest.fixture
def source(texts, two_layers):
    head = target_tensors(str(two_layers)).head
    return state_source(texts.target, (1,), head, texts.examples[3], dtype="auto", device=CPU)


def bounds(tmp_path, **changes):
    return StateBounds(
        **{"folder": tmp_path / "states", "max_bytes": 1e9, "num_uses": 2, **changes}
    )


def test_a_batch_says_what_stands_where(source, texts):
    places = [9, 2, 4]
    batch = source.computed(texts.examples).batch(places)
    assert list(batch.hidden) == [1]
    for row, place in enumerate(places):
        example = texts.examples[place]
        num_tokens = len(example.token_ids)
        assert batch.token_ids[row, :num_tokens].tolist() == list(example.token_ids)
        assert batch.is_token[row].tolist() == [
            position < num_tokens for position in range(batch.token_ids.shape[1])
        ]
        outputs = batch.token_ids[row][batch.is_output[row]]
        assert outputs.tolist() == list(example.output_ids)
        assert not batch.token_ids[row, num_tokens:].any()
        assert not batch.hidden[1][row, num_tokens:].any()
        assert not batch.logits[row, num_tokens:].any()


def test_the_logits_behind_a_token_say_the_next_one(source, texts):
    """The outputs are greedy: a shift by one anywhere shows."""
    batch = source.computed(texts.examples).batch(range(len(texts.examples)))
    said = batch.logits[:, :-1].argmax(dim=2)
    counts = batch.is_output[:, 1:]
    assert torch.equal(said[counts], batch.token_ids[:, 1:][counts])


def test_logits_are_made_of_states_where_they_can_be(source, texts):
    assert source.layout.num_logits == 0
    assert source.layout.layers == (1, 2)
    assert source.layout.dtype == torch.float32


def test_logits_that_are_capped_are_held():
    target = tiny_language_model("gemma2")
    head = torch.randn(VOCAB_SIZE, 32)
    example = Example((1, 2, 3), (4, 5))
    source = state_source(target, (1, 1), head, example, dtype="float32", device=CPU)
    assert source.head is None
    assert source.layout.num_logits == VOCAB_SIZE
    assert source.layout.layers == (1,)
    batch = source.computed([example]).batch([0])
    assert batch.logits.shape == (1, 5, VOCAB_SIZE)
    assert batch.logits.dtype == torch.float32
    assert batch.logits.abs().max() < 8  # gemma2's cap in the tests


@pytest.mark.parametrize(
    ("changes", "is_on_disk"), [({}, True), ({"num_uses": 1}, False), ({"max_bytes": 100}, False)]
)
def test_states_are_kept_if_that_is_worth_it_and_they_fit(
    source, texts, tmp_path, changes, is_on_disk
):
    data, described = source.held(texts.examples, bounds(tmp_path, **changes))
    assert described["is_on_disk"] == (tmp_path / "states").exists() == is_on_disk
    assert described["num_bytes"] == sum(len(it.token_ids) for it in texts.examples) * 2 * 16 * 4
    one, other = data.batch([1, 8]), source.computed(texts.examples).batch([1, 8])
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.hidden[1], other.hidden[1])


def test_states_are_not_kept_where_the_disk_has_no_room(source, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    _, described = source.held(texts.examples, bounds(tmp_path))
    assert not described["is_on_disk"]


def test_states_may_be_held_in_half_the_room(texts, two_layers, tmp_path):
    head = target_tensors(str(two_layers)).head
    source = state_source(texts.target, (1,), head, texts.examples[3], dtype="bfloat16", device=CPU)
    data, described = source.held(texts.examples, bounds(tmp_path))
    assert described["dtype"] == "bfloat16"
    assert described["num_bytes"] == sum(len(it.token_ids) for it in texts.examples) * 2 * 16 * 2
    assert torch.equal(data.batch([3]).logits, source.computed(texts.examples).batch([3]).logits)


def test_an_unknown_type_is_an_error(texts, two_layers):
    head = target_tensors(str(two_layers)).head
    with pytest.raises(ConfigError, match="float32, bfloat16, float16; got 'int8'"):
        state_source(texts.target, (1,), head, texts.examples[3], dtype="int8", device=CPU)
