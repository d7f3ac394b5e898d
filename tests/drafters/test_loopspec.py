"""What is special about `loopspec`; the law of its pairs is in `verifiers/test_depth_pairs`."""

import numpy as np
import pytest
import torch

from foretoken.core.draft import SiblingDraw
from foretoken.core.options import ComponentSpec
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.drafters import prepare_drafter
from foretoken.drafters.exits import Exits
from foretoken.drafters.in_flight import Guess, InFlightNode
from foretoken.drafters.loopspec import LoopSpecDrafter, LoopSpecOptions
from foretoken.errors import ConfigError, UnsupportedModelError
from tests.engines import make_host, micro_model
from tests.goodness import FALSE_FAILURE, fit_probability

VOCAB_SIZE, LOOPS = 6, 4
GREEDY, SAMPLED = SamplingParams(), SamplingParams(temperature=0.8)
CUT = SamplingParams(temperature=1.1, top_k=3, repetition_penalty=1.2)
SAMPLES = (SiblingDraw.IID, SiblingDraw.WITHOUT_REPLACEMENT)
ROWS = torch.randn(9, VOCAB_SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def make_drafter(loops=LOOPS, **options):
    return LoopSpecDrafter(LoopSpecOptions(**options), loops)


def make_node(depth, *, seed=0, params=SAMPLED, siblings=SiblingDraw.IID, **fields):
    return InFlightNode(
        **{
            "request_id": "r",
            "token_ids": [3, 1],
            "path": (),
            "depth": depth,
            "guesses": (),
            "sampler": Sampler(params, seed, 1),
            "siblings": siblings,
            "drafter_index": 0,
            **fields,
        }
    )


def grow(drafter, nodes, rows):
    return drafter.grow(nodes, rows, drafter.exit_loop)


def grow_one(drafter, node, row):
    [growth] = grow(drafter, [node], row.unsqueeze(0))
    return growth


# -- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_exit": 0}, "first_exit is an integer >= 1; got 0"),
        ({"second_exit": -1}, "second_exit is an integer >= 0; got -1"),
        ({"max_in_flight": 0}, "max_in_flight is an integer >= 1; got 0"),
        ({"first_exit": 2, "second_exit": 2}, "above first_exit=2; got 2"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LoopSpecOptions(**options)


@pytest.mark.parametrize("options", [{"first_exit": 4}, {"second_exit": 4}])
def test_exits_are_below_the_last_loop(options):
    with pytest.raises(ConfigError, match="after 4 loops; the target has 4"):
        make_drafter(**options)


def test_targets_without_shared_layers_are_refused():
    with pytest.raises(UnsupportedModelError, match="loopspec needs a target") as caught:
        prepare_drafter(ComponentSpec("loopspec"))(make_host(micro_model()))
    assert "early-exit" in caught.value.hint


def test_what_the_loop_needs_to_know():
    drafter = make_drafter()
    assert drafter.needs.in_flight
    assert (drafter.exit_loop, drafter.width, drafter.max_in_flight) == (1, 2, 8)
    assert make_drafter(second_exit=0).width == 1
    assert make_drafter(loops=2).width == 1
    assert make_drafter(first_exit=2, max_in_flight=3).max_in_flight == 3


def test_it_looks_at_its_exits_and_at_every_depth_while_it_learns():
    assert make_drafter(first_exit=1, second_exit=3).looks(1) == {1, 3}
    assert make_drafter(first_exit=2, second_exit=0).looks(1) == {2}
    assert make_drafter().looks(1) == {1, 2, 3}


# -- samples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [SAMPLED, CUT], ids=["sampled", "cut"])
def test_the_first_draw_has_the_law_of_the_first_exit(params):
    """Chi-square over seeds; correct code fails for one set of seeds in a million."""
    drafter = make_drafter(first_exit=1, second_exit=2)
    drawn = []
    for seed in range(3000):
        [guess] = grow_one(drafter, make_node(1, seed=seed, params=params), ROWS[0]).guesses
        drawn.append(guess.token_id)
    expected = Sampler(params, 0, 1).draft_distribution(ROWS[0], [3, 1])
    np.testing.assert_array_equal(guess.probs, expected)
    assert fit_probability(torch.tensor(drawn), torch.from_numpy(expected)) > FALSE_FAILURE


def test_the_second_draw_is_from_what_became_likelier():
    """Chi-square of x2 where the gate is open, one in a million; none where it is closed."""
    drafter = make_drafter(first_exit=1, second_exit=2)
    sampler = Sampler(SAMPLED, 0, 1)
    earlier, later = (sampler.draft_distribution(row, [3, 1]) for row in ROWS[:2])
    likelier = np.maximum(later - earlier, 0)
    likelier /= likelier.sum()
    for first_id in range(VOCAB_SIZE):
        said, drawn = (Guess(first_id, earlier),), []
        for seed in range(1000):
            node = make_node(2, seed=seed, guesses=said)
            growth = grow_one(drafter, node, ROWS[1])
            if later[first_id] >= earlier[first_id]:
                assert growth.guesses is None
                continue
            first, second = growth.guesses
            assert first is said[0]
            np.testing.assert_allclose(second.probs, likelier, atol=1e-15)
            drawn.append(second.token_id)
        if drawn:
            assert first_id not in drawn
            winners = torch.tensor(drawn)
            assert fit_probability(winners, torch.from_numpy(likelier)) > FALSE_FAILURE


def test_draws_depend_on_seed_position_and_depth_alone():
    drafter = make_drafter(first_exit=1, second_exit=0)

    def draw(**fields):
        return grow_one(drafter, make_node(1, **fields), ROWS[0]).guesses[0].token_id

    by_seed = [draw(seed=seed) for seed in range(60)]
    assert by_seed == [draw(seed=seed, request_id="other", token_ids=[5, 5]) for seed in range(60)]
    assert by_seed == [draw(seed=seed, token_ids=[5], path=(2,)) for seed in range(60)]
    assert by_seed != [draw(seed=seed, token_ids=[3, 1, 1]) for seed in range(60)]
    assert by_seed != [draw(seed=seed, drafter_index=1) for seed in range(60)]
    other = make_drafter(first_exit=2, second_exit=0)
    at_two = [grow_one(other, make_node(2, seed=seed), ROWS[0]).guesses for seed in range(60)]
    assert by_seed != [guess.token_id for [guess] in at_two]


def test_exits_of_samples_stay_whatever_is_learned():
    """Otherwise what one request is told would depend on what others said."""
    drafter = make_drafter()
    assert (drafter._exits, drafter._fixed) == (Exits(1, 2), Exits(1, 2))
    teach(drafter, rows_that_settle_at(3), num_tokens=200)
    assert drafter._exits == Exits(1, 3)
    assert drafter._fixed == Exits(1, 2)
    assert grow_one(drafter, make_node(1), ROWS[0]).guesses is not None
    assert grow_one(drafter, make_node(3), ROWS[0]).guesses is None


def test_nothing_is_drawn_where_no_token_is_left():
    def forbid(input_ids, scores):
        return torch.full_like(scores, -torch.inf)

    params = SamplingParams(temperature=1.0, logits_processors=(forbid,))
    drafter = make_drafter(first_exit=1, second_exit=2)
    assert grow_one(drafter, make_node(1, params=params), ROWS[0]).guesses is None
    said = (Guess(0, np.full(VOCAB_SIZE, 1 / VOCAB_SIZE)),)
    assert grow_one(drafter, make_node(2, params=params, guesses=said), ROWS[0]).guesses is None
    assert grow_one(drafter, make_node(2), ROWS[0]).guesses is None  # there is no first


# -- choices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, CUT], ids=["greedy", "sampled", "cut"])
def test_choices_are_those_the_target_would_make_if_the_row_ended_here(params):
    drafter = make_drafter(first_exit=1, second_exit=3)
    num_changed = 0
    for seed in range(40):
        sampler, text = Sampler(params, seed, 1), [3, 1]
        rows = torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)).double()
        fields = {"params": params, "seed": seed, "siblings": SiblingDraw.COUPLED}
        first = grow_one(drafter, make_node(1, **fields), rows[0])
        chosen = [sampler.choose(row, text) for row in rows]
        assert [guess.token_id for guess in first.guesses] == chosen[:1]
        assert first.guesses[0].probs is None
        assert first.best_id == chosen[0]
        second = grow_one(drafter, make_node(3, guesses=first.guesses, **fields), rows[1])
        assert second.best_id == chosen[1]
        if chosen[0] == chosen[1]:
            assert second.guesses is None
        else:
            assert [guess.token_id for guess in second.guesses] == chosen
            num_changed += 1
    assert 0 < num_changed < 40


def test_rows_of_all_kinds_grow_together_as_they_do_alone():
    rng = np.random.default_rng(4)
    nodes = [
        make_node(
            int(rng.integers(1, LOOPS)),
            seed=seed,
            params=GREEDY if seed % 3 == 0 else SAMPLED,
            siblings=list(SiblingDraw)[seed % 4],
            request_id=f"r{seed % 3}",
        )
        for seed in range(9)
    ]
    options = {"first_exit": 1, "second_exit": 2}
    together = grow(make_drafter(**options), nodes, ROWS)
    for node, row, growth in zip(nodes, ROWS, together, strict=True):
        alone = grow_one(make_drafter(**options), node, row)
        assert alone.best_id == growth.best_id
        assert said(alone) == said(growth)


def said(growth):
    return growth.guesses and [guess.token_id for guess in growth.guesses]


# -- learning --------------------------------------------------------------------------------


def rows_that_settle_at(settled):
    """Return a function from token and depth to a row: right from one depth on, else wrong."""

    def row(token_id, depth):
        said = (token_id + (1 if depth >= settled else 2)) % VOCAB_SIZE
        return torch.eye(VOCAB_SIZE, dtype=torch.float64)[said]

    return row


def teach(drafter, row, num_tokens):
    """Let the drafter see a greedy request that counts, one row in flight at a time."""
    text = [0]
    for _ in range(num_tokens):
        for depth in range(1, LOOPS):
            if depth in drafter.looks(drafter.exit_loop):
                node = make_node(
                    depth,
                    token_ids=text,
                    params=GREEDY,
                    siblings=SiblingDraw.DETERMINISTIC,
                    request_id="teacher",
                )
                grow_one(drafter, node, row(text[-1], depth))
        text.append((text[-1] + 1) % VOCAB_SIZE)
    drafter.stop("teacher")


@pytest.mark.parametrize("settled", [1, 2, 3])
def test_greedy_requests_move_to_the_exit_that_is_right(settled):
    drafter = make_drafter()
    teach(drafter, rows_that_settle_at(settled), num_tokens=300)
    assert settled in (drafter._exits.first, drafter._exits.second)


def test_exits_that_were_given_are_not_moved():
    drafter = make_drafter(first_exit=1, second_exit=2)
    teach(drafter, rows_that_settle_at(3), num_tokens=300)
    assert drafter._exits == Exits(1, 2)


def test_nothing_is_kept_of_requests_that_stopped():
    drafter = make_drafter()
    teach(drafter, rows_that_settle_at(2), num_tokens=5)
    assert not drafter._record._open
