"""A user's processors: what they get, what they may return, and what is said of the rest."""

import numpy as np
import pytest
import torch
import transformers

from foretoken.core.processors import run_processors
from foretoken.errors import RequestError

TOKEN_IDS = np.array([4, 2, 3])
ROW = torch.tensor([0.5, -torch.inf, 2.0, -1.0])


def run(*processors, row=ROW):
    return run_processors(processors, row, TOKEN_IDS)


def test_they_get_what_transformers_gives():
    seen = []

    def look(input_ids, scores):
        seen.append((input_ids, scores))
        return scores

    assert torch.equal(run(look), ROW)
    [(input_ids, scores)] = seen
    assert torch.equal(input_ids, torch.tensor([[4, 2, 3]]))
    assert input_ids.dtype == torch.int64
    assert torch.equal(scores, ROW.unsqueeze(0))
    assert scores.dtype == torch.float32


def test_they_are_applied_in_turn():
    assert run(lambda _, s: s + 1, lambda _, s: s * 2).tolist() == [3.0, -torch.inf, 6.0, 0.0]


def test_processors_of_transformers_fit():
    theirs = transformers.RepetitionPenaltyLogitsProcessor(2.0)
    row = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0])
    assert run(theirs, row=row).tolist() == [1.0, 1.0, 0.5, -2.0, 0.5]


def test_what_they_change_in_place_is_a_copy():
    def spoil(input_ids, scores):
        input_ids.zero_()
        scores.zero_()
        return scores

    row, token_ids = ROW.clone(), TOKEN_IDS.copy()
    returned = run_processors([spoil, spoil], row, token_ids)
    assert torch.equal(row, ROW)
    assert np.array_equal(token_ids, TOKEN_IDS)
    assert returned.tolist() == [0.0] * 4


def test_what_they_keep_cannot_be_changed_later():
    kept = torch.zeros(1, 4)
    returned = run(lambda *_: kept)
    kept += 1
    assert returned.tolist() == [0.0] * 4


def test_gradients_are_cut():
    weight = torch.ones(4, requires_grad=True)
    assert not run(lambda _, scores: scores.nan_to_num(neginf=-9.0) * weight).requires_grad


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "returned a NoneType"),
        ([0.0] * 4, "returned a list"),
        (torch.zeros(4), r"returned a tensor \[4\] of torch.float32"),
        (torch.zeros(1, 5), r"returned a tensor \[1, 5\]"),
        (torch.zeros(2, 4), r"returned a tensor \[2, 4\]"),
        (torch.zeros(1, 4).double(), "of torch.float64"),
        (torch.zeros(1, 4).half(), "of torch.float16"),
        (torch.zeros(1, 4, dtype=torch.int64), "of torch.int64"),
        (torch.zeros(1, 4, device="meta"), "on meta"),
        (torch.tensor([[0, 0, torch.nan, 0]]), "returned not-a-number for token 2"),
        (torch.tensor([[0, torch.inf, -torch.inf, 0]]), "returned plus infinity for token 1"),
        (torch.full((1, 4), -torch.inf), "returned minus infinity for every token"),
    ],
)
def test_what_may_not_be_returned(returned, said):
    def bad(input_ids, scores):
        return returned

    with pytest.raises(RequestError, match=said) as caught:
        run(lambda _, scores: scores, bad)
    assert str(caught.value).startswith("logits_processors[1] (bad) returned ")
    assert r"allowed is a tensor [1, 4] of torch.float32 on cpu" in str(caught.value)
    assert caught.value.hint


def test_an_exception_is_told_with_its_type():
    class Moody(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise ZeroDivisionError("not today")

    with pytest.raises(RequestError, match=r"\[0\] \(Moody\) raised ZeroDivisionError: not"):
        run(Moody())


def test_an_interrupt_is_no_failure_of_the_processor():
    def interrupted(input_ids, scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupted)


def test_a_row_without_tokens_is_nobodys_fault():
    row = torch.full((4,), -torch.inf)
    assert torch.equal(run(lambda _, scores: 1 / 0, row=row), row)
