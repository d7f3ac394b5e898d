"""Verdicts and how exact they are."""

import pytest

from foretoken.core.verdict import Exactness, FinalKind, Verdict


def test_final_token_is_not_counted_as_accepted():
    verdict = Verdict(path=(1, 4), token_ids=(8, 9, 3), final_kind=FinalKind.BONUS)
    assert verdict.num_accepted == 2
    assert verdict.final_id == 3


@pytest.mark.parametrize("token_ids", [(), (8, 9), (8, 9, 3, 4)])
def test_verdict_emits_its_path_and_one_token(token_ids):
    with pytest.raises(ValueError, match="2 accepted nodes"):
        Verdict(path=(1, 4), token_ids=token_ids, final_kind=FinalKind.RECOVERED)


def test_the_weakest_part_decides():
    assert Exactness.weakest(Exactness.BITWISE) is Exactness.BITWISE
    assert Exactness.weakest(Exactness.NUMERICAL, Exactness.BITWISE) is Exactness.NUMERICAL
    assert Exactness.weakest(*Exactness) is Exactness.LOSSY
