"""Passes of finished texts, and comparing rows bit by bit."""

import math

import pytest
import torch

from foretoken.certify.identity import Noise
from foretoken.certify.observe import PlainRule, RowLog, decode, watched
from foretoken.certify.passes import TextScorer, largest_difference, same_bits, ulp
from foretoken.core.params import SamplingParams
from foretoken.core.verdict import Exactness
from foretoken.engine.names import resolve_model
from foretoken.models.loading import load_model
from tests.certify.rules import BitwiseTable, RoundingTable, tables
from tests.engines import make_engine, micro_model


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (1.0, torch.float32, 2**-23),
        (1.99, torch.float32, 2**-23),
        (-2.0, torch.float32, 2**-22),
        (0.5, torch.float64, 2**-53),
        (17.0, torch.bfloat16, 0.125),
        (10.0, torch.float16, 2**-7),
    ],
)
def test_units_in_the_last_place(value, dtype, expected):
    assert ulp(value, dtype) == expected


def test_bits_tell_zeros_apart_and_know_nan():
    assert same_bits(torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    half = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert same_bits(half, half.clone())
    assert not same_bits(half, half + 0.01 * torch.arange(2).to(half))


def test_differences_of_masked_and_broken_rows():
    inf = math.inf
    assert largest_difference(torch.tensor([1.0, -inf]), torch.tensor([1.5, -inf])) == 0.5
    assert largest_difference(torch.tensor([-inf]), torch.tensor([0.0])) == inf
    assert largest_difference(torch.tensor([math.nan]), torch.tensor([0.0])) == inf


def test_a_text_in_one_pass_has_the_rows_of_plain_decoding():
    """The embedded model claims bitwise: prompt passes and decoding give the same bits."""
    model = load_model(resolve_model("stories"))
    assert model.info.exactness is Exactness.BITWISE
    engine = make_engine(model)
    scorer = TextScorer(model, 60)
    for prompt_ids in ([3], [5, 6, 7], list(range(1, 30))):
        params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3)
        request = engine.new_request(prompt_ids, params, drafters=())
        log = RowLog([request])
        with watched(engine, log.watch, rule=PlainRule()):
            assert list(decode(engine, [request], 1)) == [request]
        rows = scorer.rows(prompt_ids, request.output_ids)
        assert len(rows) == len(log.rows(request)) == 12
        for row, plain in zip(rows, log.rows(request), strict=True):
            assert same_bits(row, plain)
        again = scorer.rows(prompt_ids, request.output_ids[:5])
        assert same_bits(again[4], rows[4])


def test_long_prompts_are_fed_in_pieces(monkeypatch):
    model = micro_model()
    whole = TextScorer(model, 60).rows(list(range(40)), [1, 2, 3])
    monkeypatch.setattr("foretoken.certify.passes.CHUNK_ROWS", 7)
    assert same_bits(TextScorer(model, 60).rows(list(range(40)), [1, 2, 3]), whole)


def test_the_engine_is_its_own_again_after_watching():
    engine = make_engine(micro_model())
    parts = engine.parts

    def fail():
        with watched(engine, lambda decision: None):
            assert engine.parts is not parts
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert engine.parts is parts


def test_what_counts_as_rounding():
    logits, _ = tables()
    noise = Noise(num_rows=3, row_difference=0.25, largest_logit=8.0)
    assert noise.tolerance(BitwiseTable(logits).info) == 0
    assert noise.tolerance(RoundingTable(logits).info) == 1.0
    silent = Noise(num_rows=3, row_difference=0.0, largest_logit=8.0)
    assert silent.tolerance(RoundingTable(logits).info) == 4 * 2**-49
