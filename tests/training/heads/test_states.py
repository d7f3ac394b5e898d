"""The target's states: those it serves with, kept whole or not at all."""

import errno
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from foretoken.errors import ConfigError
from foretoken.training.heads import states as states_module
from foretoken.training.heads.states import LOGITS, StateLayout, StoredStates, TargetStates

LAYOUT = StateLayout((0, 1, 2), 16, 61, torch.float32)
# float32 sums of 16 to 24 numbers near 1, in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def token_ids(texts):
    return [example.token_ids for example in texts.examples]


@pytest.fixture
def computed(texts, token_ids):
    return TargetStates(texts.target, token_ids, LAYOUT)


class Counting:
    """Says which texts it was asked for."""

    def __init__(self, states):
        self.states, self.places = states, []

    def read(self, places):
        self.places += places
        return self.states.read(places)


def same(one, other):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def test_states_are_those_of_transformers(computed, token_ids, two_layers):
    module = AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.float32)
    places = [7, 0, 3]
    for place, found in zip(places, computed.read(places), strict=True):
        with torch.no_grad():
            output = module(torch.tensor([token_ids[place]]), output_hidden_states=True)
        for layer in range(3):
            expected = output.hidden_states[layer][0]
            torch.testing.assert_close(found[f"hidden.{layer}"], expected, **TOLERANCE)
        torch.testing.assert_close(found[LOGITS], output.logits[0], **TOLERANCE)


def test_states_do_not_depend_on_what_runs_together(computed, token_ids, monkeypatch, texts):
    together = computed.read(range(len(token_ids)))
    monkeypatch.setattr(states_module, "PASS_ROWS", 7)  # texts of up to 28 tokens go in chunks
    chunked = TargetStates(texts.target, token_ids, LAYOUT)
    assert same(together, [chunked.read([place])[0] for place in range(len(token_ids))])
    assert same(together, chunked.read(range(len(token_ids))))


def test_states_can_be_trained_with(computed):
    weight = torch.ones(16, requires_grad=True)
    (computed.read([0])[0]["hidden.1"] * weight).sum().backward()
    assert weight.grad is not None


def test_few_logits_are_held_at_once(computed, monkeypatch, token_ids, texts):
    before = computed.read([11])
    monkeypatch.setattr(states_module, "PASS_LOGITS", 4 * 61)
    assert same(before, TargetStates(texts.target, token_ids, LAYOUT).read([11]))


@pytest.fixture
def small_shards(monkeypatch, token_ids):
    """Shards of about three texts."""
    monkeypatch.setattr(states_module, "SHARD_BYTES", 40 * LAYOUT.bytes_per_token)


def test_what_is_stored_is_what_was_computed(computed, token_ids, tmp_path, small_shards):
    stored = StoredStates(tmp_path / "states", token_ids, LAYOUT)
    stored.fill(computed)
    assert len(list((tmp_path / "states").iterdir())) > 3
    places = [5, 11, 0, 5]
    assert same(stored.read(places), computed.read(places))


def test_what_is_there_is_not_computed_again(computed, token_ids, tmp_path, small_shards, progress):
    StoredStates(tmp_path, token_ids, LAYOUT).fill(computed)
    removed = tmp_path / "states-00001.safetensors"
    content = removed.read_bytes()
    removed.unlink()
    counting = Counting(computed)
    StoredStates(tmp_path, token_ids, LAYOUT).fill(counting, progress.append)
    assert 0 < len(counting.places) < len(token_ids)
    assert removed.read_bytes() == content
    assert progress[0].is_resumed
    assert progress[0].done == len(token_ids) - len(counting.places)
    assert progress[-1].done == len(token_ids)


def test_a_full_disk_keeps_what_was_written(
    computed, token_ids, tmp_path, small_shards, monkeypatch
):
    write_bytes, num_written = Path.write_bytes, 0

    def write_until_full(path, content):
        nonlocal num_written
        num_written += 1
        if num_written > 2:
            write_bytes(path, content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", write_until_full)
        with pytest.raises(ConfigError, match="cannot be written: No space left") as caught:
            StoredStates(tmp_path, token_ids, LAYOUT).fill(computed)
    assert "free some space" in caught.value.hint
    whole = ["states-00000.safetensors", "states-00001.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == whole
    again = Counting(computed)
    stored = StoredStates(tmp_path, token_ids, LAYOUT)
    stored.fill(again)
    assert len(again.places) < len(token_ids)
    assert same(stored.read(range(len(token_ids))), computed.read(range(len(token_ids))))


def test_a_broken_shard_is_an_error(computed, token_ids, tmp_path):
    stored = StoredStates(tmp_path, token_ids, LAYOUT)
    stored.fill(computed)
    (tmp_path / "states-00000.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"states-00000\.safetensors cannot be read"):
        stored.read([0])


def test_states_beyond_the_type_are_an_error(token_ids, texts, monkeypatch):
    forward = texts.target.forward

    def large(*arguments, **options):
        output = forward(*arguments, **options)
        output.hidden[1].mul_(1e6)
        return output

    monkeypatch.setattr(texts.target, "forward", large)
    half = StateLayout((1,), 16, 0, torch.float16)
    with pytest.raises(ConfigError, match=r"hidden\.1 is not finite in float16"):
        TargetStates(texts.target, token_ids, half).read([0])
