"""Where an output ends: stop tokens, the end of a grammar, and inside an accepted path."""

from dataclasses import replace

import numpy as np
import pytest

from foretoken.drafters.forced import ForcedDrafter
from foretoken.engine.engine import Engine
from foretoken.engine.request import FinishReason
from foretoken.errors import RequestError
from foretoken.planner.base import PassingPlanner
from foretoken.planner.plan import Plan
from foretoken.verifiers.coupled import CoupledVerifier
from tests.engines import check_idle, counting_drafter, counting_model, finish, greedy, make_engine


class UpTo:
    """A grammar: numbers counted up from the prompt's last, of which `last` is the final one."""

    def __init__(self, last, vocab_size, num_prompt_ids):
        self._last = last
        self._vocab_size = vocab_size
        self._num_prompt_ids = num_prompt_ids

    def _text(self, token_ids, path):
        return [*token_ids[self._num_prompt_ids :], *path]

    def allowed(self, token_ids, path=()):
        mask = np.zeros(self._vocab_size, dtype=bool)
        if not self.is_complete(token_ids, path):
            mask[[*token_ids, *path][-1] + 1] = True
        return mask

    def forced(self, token_ids):
        return list(range(token_ids[-1] + 1, self._last + 1))

    def is_complete(self, token_ids, path=()):
        return self._text(token_ids, path)[-1:] == [self._last]


def test_a_stop_token_ends_inside_an_accepted_path():
    engine = make_engine(counting_model(eos_ids=(20,)), {"it": counting_drafter()})
    request = engine.add_request([1], greedy(50, stop_token_ids=(5, 9)))
    finish(engine)
    assert (request.output_ids, request.finish_reason) == ([2, 3, 4, 5], FinishReason.STOP)
    assert request.stats.num_steps == 1
    check_idle(engine)


@pytest.mark.parametrize("drafters", [{}, {"it": counting_drafter()}], ids=["plain", "drafts"])
def test_nothing_ends_before_min_new_tokens(drafters):
    engine = make_engine(counting_model(eos_ids=(4,)), drafters)
    request = engine.add_request([1], greedy(50, stop_token_ids=(5,), min_new_tokens=9))
    finish(engine)
    # Where 4 may not come, nothing else stands out: the lowest id does, and counting starts anew.
    assert request.output_ids == [2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert request.finish_reason is FinishReason.EOS


@pytest.mark.parametrize("labels", [[], ["count"], ["forced"], ["count", "forced"]])
def test_a_grammar_ends_the_output_inside_an_accepted_path(labels):
    target = counting_model()
    engine = Engine(
        target,
        target.new_cache(512),
        {"count": counting_drafter(), "forced": ForcedDrafter()},
        CoupledVerifier(),
        Plan(),
        compile_grammar=lambda params, num_prompt_ids: (
            UpTo(7, 26, num_prompt_ids) if params.regex else None
        ),
    )
    request = engine.add_request([1], greedy(50, regex="up to 7"), drafters=labels)
    free = engine.add_request([1], greedy(10), drafters=labels)
    finish(engine)
    assert (request.output_ids, request.finish_reason) == ([2, 3, 4, 5, 6, 7], FinishReason.STOP)
    assert request.stats.num_steps == (1 if labels else 6)
    assert free.output_ids == list(range(2, 12))
    check_idle(engine)


def test_a_grammar_without_a_way_to_compile_it_is_refused():
    engine = make_engine(counting_model())
    with pytest.raises(RequestError, match="a grammar needs the model's tokenizer"):
        engine.new_request([1], greedy(4, regex="a+"))
    check_idle(engine)


def test_controls_that_leave_no_token_end_their_own_request():
    engine = make_engine(counting_model(), {"it": counting_drafter()})
    stuck = engine.add_request([1], greedy(9, suppress_tokens=tuple(range(26))))
    whole = engine.add_request([1], greedy(9))
    finish(engine)
    assert (stuck.output_ids, stuck.finish_reason) == ([], FinishReason.ERROR)
    assert "no token is left" in str(stuck.error)
    assert whole.output_ids == list(range(2, 11))
    check_idle(engine)


@pytest.mark.parametrize("drafters", [{}, {"it": counting_drafter()}], ids=["plain", "drafts"])
def test_a_processor_that_fails_ends_its_own_request(drafters):
    def broken(input_ids, scores):
        if input_ids.shape[1] > 3:
            raise ZeroDivisionError("of the user's own")
        return scores

    engine = make_engine(counting_model(), drafters)
    broken_one = engine.add_request([1], greedy(9, logits_processors=(broken,)))
    whole = engine.add_request([1], greedy(9))
    short = engine.add_request([1], greedy(3, logits_processors=(broken,)))
    finish(engine)
    # What was chosen before stands, as in plain decoding, which comes to the error step by step.
    assert (broken_one.output_ids, broken_one.finish_reason) == ([2, 3, 4], FinishReason.ERROR)
    assert "of the user's own" in str(broken_one.error)
    assert (short.output_ids, short.finish_reason) == ([2, 3, 4], FinishReason.LENGTH)
    assert short.error is None
    assert whole.output_ids == list(range(2, 11))
    check_idle(engine)


class Told(PassingPlanner):
    """Notes the texts that it is told of, and fails if it should."""

    def __init__(self, planner, error=None):
        super().__init__(planner)
        self.error, self.texts = error, []

    def finish(self, text):
        self.texts.append((text.request_id, text.num_prompt_ids, list(text.token_ids)))
        if self.error is not None:
            raise self.error


def test_the_planner_is_told_of_every_text_that_ends():
    engine = make_engine(counting_model(), {"it": counting_drafter()})
    told = Told(engine.parts.planner)
    engine.parts = replace(engine.parts, planner=told)
    engine.add_request([1], greedy(3), request_id="a")
    engine.add_request([4, 5], greedy(2), request_id="b")
    finish(engine)
    assert sorted(told.texts) == [("a", 1, [1, 2, 3, 4]), ("b", 2, [4, 5, 6, 7])]
    check_idle(engine)


def test_a_planner_that_fails_with_a_text_leaves_nothing_behind():
    engine = make_engine(counting_model(), {"it": counting_drafter()})
    told = Told(engine.parts.planner, ValueError("a drafter could not tell"))
    engine.parts = replace(engine.parts, planner=told)
    engine.add_request([1], greedy(3))
    with pytest.raises(ValueError, match="could not tell"):
        finish(engine)
    check_idle(engine)
