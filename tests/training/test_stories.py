"""Boost-tuning of the embedded pair: two models say more than one."""

import pytest

from foretoken.assets import EMBEDDED
from foretoken.training.boost_run import BoostSettings, run_boost


@pytest.mark.slow
def test_a_merged_pool_covers_more_than_one_model(tmp_path):
    openings = EMBEDDED["stories"].target.parent / "openings.txt"
    settings = BoostSettings(
        pool_size=2, num_prompts=192, max_new_tokens=64, steps=40, has_control=False
    )
    report = run_boost(settings, openings.read_text().splitlines(), tmp_path / "pool")
    # Five points of windows and 0.15 tokens per step were seen; the lower ends of the intervals
    # tell whether it is the texts' scatter.
    gains = report["held_out"]["largest_pool_minus"]["one model"]
    assert gains["covered_windows"]["interval_95"][0] > 0.01
    assert gains["first_choices"]["interval_95"][0] > 0.005
    assert gains["tokens_per_step"]["interval_95"][0] > 0.02
