"""A target that says what it is told, by passes and verification that really run."""

from types import SimpleNamespace

import pytest

from foretoken import LLM, SamplingParams
from foretoken.bench import script
from foretoken.bench.clocks import Seconds
from foretoken.bench.foretoken_host import ForetokenHost, ForetokenSpec
from foretoken.bench.script import CERTAIN, scripted
from foretoken.bench.systems import Task

PROMPT, OTHER = tuple(b"once upon a time"), tuple(b"another one")
SCRIPT = (7, 3, 7, 3, 7, 3, 7, 200, 7, 3, 7, 3)
SCRIPTS = {PROMPT: SCRIPT}


@pytest.fixture(scope="module")
def llm(pair):
    drafters = (f"draft-model:path={pair.draft}", "prompt-lookup")
    return LLM(pair.target, drafters=drafters, max_nodes=6, dtype="float64", threads=1)


def ids(llm, prompts, *, num_more=0, temperature=0.0, drafters=None):
    """Generate as many tokens as the script has, and some more."""
    params = [
        SamplingParams(
            max_new_tokens=len(SCRIPT) + num_more,
            temperature=temperature,
            seed=seed,
            ignore_eos=True,
        )
        for seed in range(len(prompts))
    ]
    return llm.generate([list(prompt) for prompt in prompts], params, drafters=drafters)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafters", [(), ("draft-model",), ("prompt-lookup",), None])
def test_the_target_says_its_script_and_others_what_they_like(llm, temperature, drafters):
    free = ids(llm, [OTHER, PROMPT], temperature=temperature, drafters=())
    with scripted(llm.engine.parts, SCRIPTS):
        told = ids(llm, [OTHER, PROMPT], temperature=temperature, drafters=drafters)
    assert told[1].token_ids == list(SCRIPT)
    assert told[0].token_ids == free[0].token_ids
    assert free[1].token_ids != list(SCRIPT)


def test_what_repeats_itself_takes_fewer_steps(llm):
    """Copying predicts the alternation, so passes must be saved; the odd token costs one."""
    with scripted(llm.engine.parts, SCRIPTS):
        [plain] = ids(llm, [PROMPT], drafters=())
        [copied] = ids(llm, [PROMPT], drafters=("prompt-lookup",))
    assert plain.stats.num_steps == len(SCRIPT)
    assert copied.stats.num_steps < len(SCRIPT)
    assert 0 < copied.stats.num_accepted < copied.stats.num_draft_tokens


def test_after_its_end_the_target_goes_on_by_itself(llm):
    with scripted(llm.engine.parts, SCRIPTS):
        [told] = ids(llm, [PROMPT], num_more=5)
    [free] = ids(llm, [(*PROMPT, *SCRIPT)])
    assert told.token_ids == [*SCRIPT, *free.token_ids[:5]]


def test_a_long_prompt_in_chunks_is_known_all_the_same(pair):
    llm = LLM(pair.target, drafters="none", dtype="float64", threads=1, prefill_chunk=5)
    with scripted(llm.engine.parts, SCRIPTS):
        [told] = ids(llm, [PROMPT])
    assert told.token_ids == list(SCRIPT)


def test_below_a_wrong_draft_token_nothing_is_told(llm, monkeypatch):
    """Rows off the script show the model's own logits; else drafters could read the future."""
    target, rows = llm.engine.parts.target, []
    forward = target.forward

    def watched(batch, wanted, **more):
        output = forward(batch, wanted, **more)
        rows.append((batch, list(wanted), output))
        return output

    monkeypatch.setattr(target, "forward", watched)
    with scripted(llm.engine.parts, SCRIPTS):
        ids(llm, [PROMPT])
    num_off = 0
    for batch, wanted, output in rows:
        [segment] = batch.segments
        raised = [bool((row == CERTAIN).any()) for row in output.logits]
        start = int(batch.layout.positions[wanted[0]]) - len(PROMPT)
        for place, row in enumerate(wanted):
            path, node = [], row
            while node > wanted[0]:
                path.insert(0, segment.token_ids[node])
                node = segment.parents[node]
            follows = tuple(path) == SCRIPT[start + 1 : start + 1 + len(path)]
            is_open = start + 1 + len(path) < len(SCRIPT)
            assert raised[place] == (follows and is_open)
            num_off += not follows
    assert num_off > 0  # else this test has seen nothing


def test_it_leaves_nothing_behind(llm):
    parts = llm.engine.parts
    before = dict(vars(parts.target)), dict(vars(parts.scheduler))
    with pytest.raises(RuntimeError), scripted(parts, SCRIPTS):
        raise RuntimeError("stopped")
    assert (dict(vars(parts.target)).keys(), dict(vars(parts.scheduler)).keys()) == (
        before[0].keys(),
        before[1].keys(),
    )
    with scripted(parts, {}):
        assert "forward" not in vars(parts.target)


def test_the_telling_is_not_in_a_turns_time(pair, monkeypatch):
    """A clock that only the telling moves: what is left of a turn is nothing."""
    clock = SimpleNamespace(seconds=0.0)
    choices = script._choices

    def slow_choices(*arguments):
        clock.seconds += 5.0
        return choices(*arguments)

    monkeypatch.setattr(script, "_choices", slow_choices)
    monkeypatch.setattr(Seconds, "now", lambda: Seconds(clock.seconds, 2 * clock.seconds))
    host = ForetokenHost(
        ForetokenSpec(
            model=pair.target,
            drafters=("none",),
            max_nodes=1,
            dtype="float32",
            device="cpu",
            threads=1,
            max_batch=1,
            max_tokens=64,
        )
    )
    task = Task(prompt_ids=PROMPT, max_new_tokens=4, temperature=0.0, seed=0, script=SCRIPT)
    turn = host.run([task, task], batch_size=1, speculative=False)
    assert clock.seconds == 2 * 4 * 5.0
    assert (turn.unit_s, turn.cpu_s) == ([0.0, 0.0], 0.0)
