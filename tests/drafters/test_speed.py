"""SPEED: early choices of the target's own, and when they are issued and taken back."""

import pytest
import torch

from foretoken.core.draft import SiblingDraw
from foretoken.core.options import ComponentSpec
from foretoken.core.sampling import Sampler
from foretoken.drafters import prepare_drafter
from foretoken.drafters.in_flight import InFlightNode
from foretoken.drafters.speed import SpeedDrafter, SpeedOptions
from foretoken.errors import ConfigError, UnsupportedModelError
from foretoken.models.loops import LoopShape
from tests.engines import greedy, make_host, micro_model, sampled

SHAPE = LoopShape(prelude=0, group=2, loops=4, coda=0)
VOCAB_SIZE = 11


def make_node(depth, params, token_ids=(1, 2, 3), path=()):
    return InFlightNode(
        request_id="r",
        token_ids=list(token_ids),
        path=path,
        depth=depth,
        guesses=(),
        sampler=Sampler(params, params.seed or 0, 2),
        siblings=SiblingDraw.COUPLED,
        drafter_index=0,
    )


def random_logits(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, VOCAB_SIZE, generator=generator)


def guesses_of(growths):
    return [
        None if it.guesses is None else [guess.token_id for guess in it.guesses] for it in growths
    ]


@pytest.mark.parametrize(
    ("check", "exit_loop", "depths"),
    [("eager", 1, {1, 2, 3}), ("eager", 3, {3}), ("eager", 4, set()), ("lazy", 1, {1}),
     ("lazy", 3, {3}), ("lazy", 4, set())],
)  # fmt: skip
def test_rows_are_looked_at_from_the_exit_loop_on_or_there_alone(check, exit_loop, depths):
    assert SpeedDrafter(SpeedOptions(check=check), SHAPE).looks(exit_loop) == depths


@pytest.mark.parametrize("params", [greedy(9), sampled(9, seed=4), sampled(9, temperature=0.3)])
def test_a_guess_is_what_the_target_would_say_if_the_row_ended_there(params):
    nodes = [make_node(1, params, path=(5,) * length) for length in range(4)]
    logits = random_logits(4)
    growths = SpeedDrafter(SpeedOptions(), SHAPE).grow(nodes, logits, 1)
    expected = [
        node.sampler.choose(row, node.token_ids, node.path)
        for node, row in zip(nodes, logits, strict=True)
    ]
    assert guesses_of(growths) == [[token_id] for token_id in expected]
    assert [growth.best_id for growth in growths] == expected


def test_controls_see_the_tokens_in_flight():
    params = greedy(9, no_repeat_ngram_size=2)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7], logits[0, 8] = 5.0, 4.0
    drafter = SpeedDrafter(SpeedOptions(), SHAPE)
    free, bound = (make_node(1, params, (4, 7, 1), path) for path in ((6,), (6, 4)))
    assert guesses_of(drafter.grow([free], logits, 1)) == [[7]]
    assert guesses_of(drafter.grow([bound], logits, 1)) == [[8]]


def test_where_controls_leave_nothing_there_is_no_guess_and_no_failure():
    node = make_node(1, greedy(9, logits_processors=(fail,)))
    [growth] = SpeedDrafter(SpeedOptions(), SHAPE).grow([node], random_logits(1), 1)
    assert (growth.guesses, growth.best_id) == ([], None)
    assert node.sampler.failure is None


def fail(input_ids, scores):
    """Stand for a user's processor that breaks."""
    raise ValueError("broken")


def test_depths_that_only_the_planner_asks_for_leave_guesses_alone():
    nodes = [make_node(depth, greedy(9)) for depth in (1, 2, 3)]
    growths = SpeedDrafter(SpeedOptions(check="lazy"), SHAPE).grow(nodes, random_logits(3), 2)
    assert [found is None for found in guesses_of(growths)] == [True, False, True]
    assert None not in [growth.best_id for growth in growths]


def test_a_target_with_other_weights_at_each_depth_is_refused_with_alternatives():
    with pytest.raises(UnsupportedModelError, match="share one read of its weights") as caught:
        prepare_drafter(ComponentSpec("speed", {}))(make_host(micro_model("llama")))
    assert "early-exit" in caught.value.hint


@pytest.mark.parametrize(
    "values", [{"exit_loop": 0}, {"in_flight": 0}, {"check": "often"}, {"exit_loop": True}]
)
def test_options_are_checked_before_a_model_is_loaded(values):
    with pytest.raises(ConfigError, match="speed:"):
        SpeedOptions(**values)


def test_guesses_when_rows_are_final_are_refused():
    with pytest.raises(ConfigError, match="below the target's 4 loops; got 4"):
        SpeedDrafter(SpeedOptions(exit_loop=4), SHAPE)
