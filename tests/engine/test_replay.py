"""Replay: the same steps and tokens as the live engine, without the target."""

import math
from dataclasses import replace

import pytest

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.tree import TokenTree
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.drafters.base import DrafterNeeds
from foretoken.drafters.early_exit import EarlyExitDrafter, EarlyExitOptions
from foretoken.drafters.layer_skip import LayerSkipDrafter, LayerSkipOptions
from foretoken.drafters.prompt_lookup import PromptLookupDrafter, PromptLookupOptions
from foretoken.drafters.suffix import SuffixDrafter, SuffixOptions
from foretoken.engine import replay_target
from foretoken.engine.engine import Engine, EngineConfig
from foretoken.engine.replay import Recording, replay
from foretoken.engine.step_log import (
    StepLog,
    acceptance_by_confidence,
    acceptance_by_depth,
    acceptance_by_rank,
    judge,
    rank_acceptances,
)
from foretoken.errors import ConfigError
from foretoken.models.adapter import LanguageModel
from foretoken.planner.plan import Plan
from foretoken.planner.sequoia import best_tree
from foretoken.verifiers.coupled import CoupledVerifier
from tests.engines import (
    KV_TOKENS,
    ScriptedDrafter,
    counting_drafter,
    counting_model,
    greedy,
    make_draft_model,
    make_host,
    micro_model,
    plain_ids,
    sampled,
)

PROMPTS = [[3, 9, 3, 9, 3, 9, 4], [17, 5, 5, 5, 5, 5], list(range(20, 45))]
MAKERS = {
    "prompt-lookup": lambda host: PromptLookupDrafter.create(PromptLookupOptions(), host),
    "suffix": lambda host: SuffixDrafter.create(SuffixOptions(), host),
    "draft-model": lambda host: make_draft_model(
        host.target, micro_model(blur=0.3), host=host, min_gain=0.0
    ),
}
ROOMY = {"kv_cache_tokens": KV_TOKENS}


def run_live(target, drafters, requests, *, max_nodes, **sizes):
    """Return (requests, log) of the engine with its own target."""
    log = StepLog()
    engine = Engine(
        target,
        target.new_cache(KV_TOKENS),
        drafters,
        CoupledVerifier(),
        Plan(max_nodes=max_nodes),
        planner=log,
        config=EngineConfig(**sizes),
    )
    added = [engine.add_request(prompt_ids, params) for prompt_ids, params in requests]
    while engine.num_unfinished:
        engine.step()
    return added, log


def record(requests):
    return [
        Recording(
            prompt_ids=request.prompt_ids,
            output_ids=request.output_ids,
            params=request.params,
            seed=request.seed,
        )
        for request in requests
    ]


def without_times(log_steps):
    return [(step.drafts, step.num_rows, step.num_keys, step.num_requests) for step in log_steps]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("max_requests", [1, 3])
@pytest.mark.parametrize("way", ["greedy", "sampled", "controlled"])
def test_replay_is_the_live_run_without_the_target(name, max_requests, way):
    target = micro_model()
    params = {
        "greedy": greedy(24),
        "sampled": sampled(24, seed=11, temperature=0.8),
        "controlled": sampled(24, seed=4, temperature=0.3, top_k=8, repetition_penalty=1.05),
    }[way]
    asked = [(prompt_ids, params) for prompt_ids in PROMPTS]
    sizes = {"max_requests": max_requests, "prefill_chunk": 16}
    drafter = MAKERS[name](make_host(target, **ROOMY))
    requests, log = run_live(target, {name: drafter}, asked, max_nodes=6, **sizes)
    fresh = MAKERS[name](make_host(target, **ROOMY))
    played = replay(
        target.info,
        {name: fresh},
        record(requests),
        max_nodes=6,
        config=EngineConfig(**sizes),
    )
    assert without_times(played.steps) == without_times(log.steps)
    for stats, request in zip(played.stats, requests, strict=True):
        assert stats.num_steps == request.stats.num_steps
        assert stats.num_tokens == request.stats.num_tokens
        assert stats.num_accepted == request.stats.num_accepted
    assert sum(stats.num_accepted for stats in played.stats) > 0


def test_outputs_that_end_early_take_the_same_steps():
    """The model says end-of-sequence in the middle of what the drafter got right."""
    target = counting_model(eos_ids=(20,))
    requests, _ = run_live(
        target, {"count": counting_drafter()}, [([3, 4], greedy(60))], max_nodes=5
    )
    played = replay(target.info, {"count": counting_drafter()}, record(requests), max_nodes=5)
    assert requests[0].output_ids == list(range(5, 21))
    assert played.stats[0].num_steps == requests[0].stats.num_steps
    assert played.stats[0].num_tokens == 16
    assert all(node.is_taken for draft in played.drafts[:-1] for node in draft.nodes)


def test_a_record_that_was_cut_short_ends_where_it_ends():
    target = counting_model()
    recording = Recording(prompt_ids=[1], output_ids=[2, 3, 4, 5, 6], params=greedy(20), seed=0)
    drafter = counting_drafter()
    played = replay(target.info, {"count": drafter}, [recording], max_nodes=3)
    assert [draft.num_tokens for draft in played.drafts] == [4, 1]
    assert drafter.stopped == drafter.started
    assert played.tokens_per_step == 2.5


def test_mean_tokens_per_step_weighs_prompts_alike():
    target = counting_model()
    recordings = [
        Recording(prompt_ids=[1], output_ids=[2], params=greedy(1), seed=0),
        Recording(prompt_ids=[1], output_ids=list(range(2, 14)), params=greedy(12), seed=0),
    ]
    played = replay(target.info, {"count": counting_drafter()}, recordings, max_nodes=3)
    assert played.tokens_per_step == 13 / 4
    assert played.mean_tokens_per_step == (1 + 4) / 2


def test_wrong_drafts_take_as_many_steps_as_plain_decoding():
    target = counting_model()
    drafter = ScriptedDrafter(lambda context: [0, 0][: context.budget.max_depth])
    output_ids = plain_ids(target, [1], greedy(9))
    recording = Recording(prompt_ids=[1], output_ids=output_ids, params=greedy(9), seed=0)
    played = replay(target.info, {"zeros": drafter}, [recording], max_nodes=4)
    assert played.num_steps == 9
    assert acceptance_by_depth(played.drafts)[1].rate == 0
    assert 2 not in acceptance_by_depth(played.drafts)  # never reached, so never judged


def test_a_replay_times_drafting_and_its_books():
    target = micro_model()
    recording = Recording(
        prompt_ids=PROMPTS[0],
        output_ids=plain_ids(target, PROMPTS[0], greedy(12)),
        params=greedy(12),
        seed=0,
    )
    drafter = MAKERS["draft-model"](make_host(target))
    played = replay(target.info, {"draft-model": drafter}, [recording], max_nodes=4)
    assert all(step.other_s > 0 for step in played.steps)
    assert sum(step.draft_s for step in played.steps) > 0


class StateDrafter(ScriptedDrafter):
    """Drafts as many right tokens as the digits of the target's states at the last token say.

    Any other state at any step gives other drafts, so that equal steps mean equal states.
    """

    def __init__(self, truths, layers):
        super().__init__(self._chain, name="states")
        self.needs = DrafterNeeds(hidden_layers=layers)
        self._truths = truths
        self._told = {}

    def observe(self, standing):
        for it in standing:
            last = [float(states[-1].double().sum()) for states in it.hidden.values()]
            self._told[it.request_id] = sum(last)

    def _chain(self, context):
        num_right = int(abs(self._told.get(context.request_id, 0.0)) * 1e6) % 5
        [truth] = [it for it in self._truths if it[: len(context.token_ids)] == context.token_ids]
        start = len(context.token_ids)
        wrong = (truth[start + num_right] + 1) % 61 if start + num_right < len(truth) else 0
        return [*truth[start : start + num_right], wrong][: context.budget.max_depth]


STATE_MAKERS = {
    "states": lambda host, truths: StateDrafter(truths, (0, 1, 2)),
    "early-exit": lambda host, truths: EarlyExitDrafter(EarlyExitOptions(layers=1), host),
    "layer-skip": lambda host, truths: LayerSkipDrafter(
        LayerSkipOptions(skip="1", min_gain=0.0), host
    ),
}


@pytest.mark.parametrize("name", STATE_MAKERS)
@pytest.mark.parametrize("max_requests", [1, 3])
@pytest.mark.parametrize("chunk", [7, 512])
def test_drafters_on_the_targets_states_are_replayed_exactly(
    name, max_requests, chunk, monkeypatch
):
    monkeypatch.setattr(replay_target, "CHUNK_ROWS", chunk)
    target = micro_model()
    asked = [(prompt_ids, greedy(24)) for prompt_ids in PROMPTS]
    truths = [[*prompt_ids, *plain_ids(target, prompt_ids, its)] for prompt_ids, its in asked]
    sizes = {"max_requests": max_requests, "prefill_chunk": 16, "prefix_caching": False}
    host = make_host(target, **ROOMY)
    make = STATE_MAKERS[name]
    requests, log = run_live(target, {name: make(host, truths)}, asked, max_nodes=6, **sizes)
    played = replay(
        target.info,
        {name: make(host, truths)},
        record(requests),
        max_nodes=6,
        target=target,
        config=EngineConfig(**sizes),
    )
    assert without_times(played.steps) == without_times(log.steps)
    assert sum(stats.num_accepted for stats in played.stats) > 0


def test_the_target_reads_each_recording_once_in_chunks(monkeypatch):
    """It is run over as many rows as there are tokens, and keeps no more states than it must."""
    monkeypatch.setattr(replay_target, "CHUNK_ROWS", 16)
    target = micro_model()
    output_ids = plain_ids(target, PROMPTS[2], greedy(60))
    num_rows = []
    forward = LanguageModel.forward

    def counted(self, batch, rows, **options):
        num_rows.append(batch.num_rows)
        return forward(self, batch, rows, **options)

    monkeypatch.setattr(LanguageModel, "forward", counted)
    kept = []
    read = replay_target._Reading.states

    def watched(self, positions):
        states = read(self, positions)
        kept.append(max(len(it) for it in self._states.values()))
        return states

    monkeypatch.setattr(replay_target._Reading, "states", watched)
    recording = Recording(prompt_ids=PROMPTS[2], output_ids=output_ids, params=greedy(60), seed=0)
    drafter = StateDrafter([[*PROMPTS[2], *output_ids]], (1,))
    replay(
        target.info,
        {"states": drafter},
        [recording],
        max_nodes=6,
        target=target,
        config=EngineConfig(max_requests=1, prefill_chunk=16),
    )
    assert max(num_rows) == 16
    assert len(PROMPTS[2]) + 59 <= sum(num_rows) <= len(PROMPTS[2]) + 60
    assert max(kept) <= 16 + 16 + 7


@pytest.mark.parametrize(
    ("needs", "what", "hint"),
    [
        (DrafterNeeds(top_logits=4), "top_logits=4", "live"),
        (DrafterNeeds(hidden_layers=(1,)), r"hidden_layers=\(1,\)", "give the target"),
        (DrafterNeeds(shared_layers=2), "shared_layers=2", "give the target"),
        (DrafterNeeds(target_past=True), "target_past=True", "give the target"),
    ],
)
def test_drafters_that_need_the_target_are_refused_without_it(needs, what, hint):
    drafter = counting_drafter()
    drafter.needs = needs
    recording = Recording(prompt_ids=[1], output_ids=[2], params=greedy(1), seed=0)
    with pytest.raises(ConfigError, match=what) as refused:
        replay(counting_model().info, {"needy": drafter}, [recording], max_nodes=3)
    assert hint in refused.value.hint


def test_records_that_their_parameters_could_not_have_made_are_refused():
    info = counting_model(eos_ids=(4,)).info
    recording = Recording(prompt_ids=[1], output_ids=[2, 3, 4, 5], params=greedy(9), seed=0)
    drafter = counting_drafter()
    with pytest.raises(ConfigError, match=r"4 output tokens.*after 3 \(eos\)"):
        replay(info, {"count": drafter}, [recording, recording], max_nodes=0)
    assert set(drafter.stopped) == set(drafter.started)  # the waiting one too
    with pytest.raises(ConfigError, match="at least one output token"):
        replay(info, {}, [replace(recording, output_ids=[])], max_nodes=0)
    with pytest.raises(ConfigError, match="at least one output token"):
        replay(info, {}, [], max_nodes=0)


#        root
#       /    \
#      1      2
#     / \     |
#    3   4    3
TREE = TokenTree((0, 1, 2, 3, 4, 3), (-1, 0, 0, 1, 1, 2))


def judged(token_ids):
    draft = Draft(
        tree=TREE,
        siblings=SiblingDraw.DETERMINISTIC,
        source=("", *("d",) * 5),
        draft_logprobs=(0.0, *(math.log(p) for p in (0.55, 0.25, 0.75, 0.05, 0.95))),
    )
    path = TREE.match(token_ids[:-1])
    return judge("r", draft, Verdict(tuple(path), tuple(token_ids), FinalKind.RECOVERED))


def test_nodes_are_judged_by_the_output():
    nodes = judged([1, 4, 9]).nodes
    assert [node.is_taken for node in nodes] == [True, False, False, True, False]
    assert [node.is_parent_taken for node in nodes] == [True, True, True, True, False]
    assert [node.rank for node in nodes] == [0, 1, 0, 1, 0]
    assert [node.depth for node in nodes] == [1, 1, 2, 2, 2]


def test_a_drafted_last_token_counts_as_taken():
    """A record's last token is always the target's own, but the draft was right about it."""
    draft = judged([1, 4])
    assert [node.is_taken for node in draft.nodes] == [True, False, False, True, False]
    assert draft.num_accepted == 2


def test_acceptance_by_depth_rank_and_confidence():
    drafts = [judged([1, 4, 9]), judged([1, 9]), judged([2, 3, 9]), judged([9])]
    depths = acceptance_by_depth(drafts)
    assert {depth: (it.num_taken, it.count) for depth, it in depths.items()} == {
        1: (3, 4),
        2: (2, 3),
    }
    ranks = acceptance_by_rank(drafts)
    # Node 2 has one child, so rank 1 was there for the four roots and twice below node 1.
    assert {rank: (it.num_taken, it.count) for rank, it in ranks.items()} == {
        0: (3, 7),
        1: (2, 6),
    }
    assert rank_acceptances(drafts) == [3 / 7, 2 / 7]
    bins = acceptance_by_confidence(drafts)
    assert {low: (it.num_taken, it.count) for low, it in bins.items()} == {
        0.0: (1, 2),
        0.2: (1, 4),
        0.5: (2, 4),
        0.7: (0, 2),
        0.9: (1, 1),
    }


def test_rank_acceptances_are_what_the_tree_search_takes():
    target = micro_model()
    drafter = MAKERS["draft-model"](make_host(target, **ROOMY))
    recording = Recording(
        prompt_ids=PROMPTS[2],
        output_ids=plain_ids(target, PROMPTS[2], greedy(40)),
        params=greedy(40),
        seed=0,
    )
    played = replay(target.info, {"draft-model": drafter}, [recording], max_nodes=12)
    acceptances = rank_acceptances(played.drafts)
    assert 0 < sum(acceptances) <= 1
    tree = best_tree(acceptances, num_nodes=13, max_depth=8)
    assert tree.expected_tokens > 1
