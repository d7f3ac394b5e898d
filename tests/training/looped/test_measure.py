"""Bits per character and agreement: every token counts once, at every depth."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foretoken.models.blank import blank_model
from foretoken.models.draft_shape import DraftShape
from foretoken.models.loops import LoopShape
from foretoken.models.trainable import load_trainable
from foretoken.training.looped.measure import depth_quality, windows

SHAPE = DraftShape(layers=3, hidden=16, heads=2, kv_heads=1, head_dim=8, intermediate=24)
LOOPS = LoopShape(prelude=0, group=1, loops=3, coda=0)


@pytest.fixture(scope="module")
def looped(like):
    return blank_model(load_trainable(like), SHAPE, loops=LOOPS, seed=2)


def texts(*lengths):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 257, (length,), generator=generator).tolist() for length in lengths]


@given(lengths=st.lists(st.integers(1, 40), max_size=5), context=st.integers(2, 12))
def test_windows_count_every_token_but_the_first_once(lengths, context):
    texts, first = [], 0
    for length in lengths:
        texts.append(list(range(first, first + length)))
        first += length
    counted = []
    for window in windows(texts, context):
        assert len(window.token_ids) <= context + 1
        assert window.first <= context // 2
        counted += window.token_ids[window.first + 1 :]
    assert sorted(counted) == sorted(it for text in texts for it in text[1:])


def test_the_numbers_are_those_of_each_text_alone(looped):
    some = texts(9, 2, 30, 17)
    measured = depth_quality(looped, some, num_characters=50, context=64)
    nats, same, total = torch.zeros(3), torch.zeros(3), 0
    for text in some:
        ids = torch.tensor([text])
        exits = looped.module.exit_logits(ids[:, :-1])[:, 0].log_softmax(dim=-1)
        nats -= exits.gather(2, ids[:, 1:].T.expand(3, -1, 1)).sum(dim=(1, 2))
        same += (exits.argmax(dim=-1) == exits[-1].argmax(dim=-1)).sum(dim=-1)
        total += len(text) - 1
    assert measured.num_tokens == total
    expected = (nats / math.log(2) / 50).tolist()
    assert measured.bits_per_character == pytest.approx(expected, rel=1e-5)
    assert measured.agreement == pytest.approx((same / total).tolist())
    assert measured.agreement[-1] == 1
    assert measured.agreement[0] < 1


def test_a_plain_model_has_one_depth_and_long_texts_are_read_in_windows(like):
    plain = blank_model(load_trainable(like), SHAPE, seed=2)
    (text,) = texts(30)
    measured = depth_quality(plain, [text], num_characters=7, context=16)
    nats = 0.0
    for start, first in ((0, 0), (8, 8), (16, 8)):  # each sees half a context of what came before
        ids = torch.tensor([text[start : start + 17]])
        log_probs = plain.logits(ids[:, :-1]).log_softmax(dim=-1)
        nats -= log_probs.gather(2, ids[:, 1:, None])[0, first:].sum().item()
    assert measured.bits_per_character == pytest.approx([nats / math.log(2) / 7], rel=1e-5)
    assert measured.agreement == [1.0]
    assert measured.num_tokens == 29


def test_a_model_in_training_stays_so(looped):
    looped.module.train()
    depth_quality(looped, texts(5), num_characters=5, context=8)
    assert looped.module.training
    looped.module.eval()
