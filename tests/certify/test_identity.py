"""Comparing one text with plain decoding's, and saying where it went another way."""

from types import SimpleNamespace

import pytest
import torch

from foretoken.certify.divergence import explain
from foretoken.certify.identity import Case, Comparison, Plain
from foretoken.certify.settings import CertifyPrompt
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.engine.request import FinishReason

PROMPT = CertifyPrompt(
    prompt_ids=(1, 2), params=SamplingParams(), temperatures=(0.0,), place="here"
)
CASE = Case(prompt=PROMPT, prompt_index=0, temperature=0.0, seed=3)
ROWS = [torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 5.0, 2.0])]


def compare(output_ids, rows, reason=FinishReason.LENGTH):
    comparison = Comparison(temperature=0.0, is_speculative=True, batch_size=1, is_promised=True)
    request = SimpleNamespace(
        output_ids=output_ids,
        token_ids=[1, 2, *output_ids],
        num_prompt_ids=2,
        finish_reason=reason,
        stats=SimpleNamespace(num_draft_tokens=4, num_accepted=2),
    )
    plain = Plain([2, 0, 1], ROWS, FinishReason.LENGTH)
    comparison.add(CASE, plain, request, rows, Sampler(SamplingParams(), 3, 2))
    return comparison


def test_the_same_text():
    found = compare([2, 0, 1], [row.clone() for row in ROWS])
    assert (found.num_texts, found.num_same_texts, found.num_rows, found.num_same_rows) == (
        1,
        1,
        3,
        3,
    )
    assert (found.num_draft_tokens, found.num_accepted, found.divergences) == (4, 2, [])


def test_rows_are_compared_up_to_the_first_other_token():
    """What follows has another history; its rows say nothing."""
    rows = [ROWS[0], torch.tensor([1.5, 1.75, 1.0]), torch.tensor([9.0, 9.0, 9.0])]
    found = compare([2, 1, 0], rows)
    assert (found.num_same_texts, found.num_rows, found.num_same_rows) == (0, 2, 1)
    assert found.row_difference == 1.5
    [(case, why)] = found.divergences
    assert (case, why.position, why.cause) == (CASE, 1, "logits")
    assert (why.plain.token_id, why.found.token_id) == (0, 1)
    assert (why.plain.plain_logit, why.plain.found_logit) == (3.0, 1.5)
    assert (why.margin, why.row_difference, why.rows_same) == (2.0, 1.5, False)
    assert why.margin_ulp == 2.0 / 2**-22


@pytest.mark.parametrize(
    ("output_ids", "reason", "detail"),
    [
        ([2, 0], FinishReason.EOS, "ended by length, here ended by eos"),
        ([2, 0, 1], FinishReason.STOP, "ended by length, here ended by stop"),
    ],
)
def test_another_end(output_ids, reason, detail):
    [(_, why)] = compare(output_ids, ROWS, reason).divergences
    assert (why.position, why.cause, why.detail) == (len(output_ids), "end", detail)
    assert why.as_dict()["plain"] is None


def test_a_sampled_difference_is_explained_by_the_race():
    """Scores are those of the race: the logit over the temperature, with the position's noise."""
    params = SamplingParams(temperature=0.5)
    row = torch.tensor([0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
    chosen = Sampler(params, 7, 2).choose(row, [1, 2, 3])
    other = (chosen + 1) % 4
    moved = row.clone()
    moved[other] += 50.0
    why = explain(Sampler(params, 7, 2), [1, 2, 3], 1, (row, moved), (chosen, other))
    assert why.cause == "logits"
    noise = Sampler(params, 7, 2).noise(3, row)
    for token in (why.plain, why.found):
        expected = float(row[token.token_id] / 0.5 + noise[token.token_id])
        assert token.plain_score == pytest.approx(expected)
    assert why.found.found_score == pytest.approx(why.found.plain_score + 100)
    wrong = explain(Sampler(params, 7, 2), [1, 2, 3], 1, (row, row.clone()), (chosen, other))
    assert (wrong.cause, wrong.rows_same) == ("rule", True)


def test_what_is_masked_is_null():
    row = torch.tensor([1.0, -torch.inf])
    why = explain(Sampler(SamplingParams(), 0, 1), [1], 0, (row, row), (0, 1))
    entry = why.as_dict()
    assert (entry["found"]["plain_logit"], entry["margin"], entry["margin_ulp"]) == (None,) * 3
