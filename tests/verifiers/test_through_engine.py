"""Rules in the real engine with the real drafter: the law of the output, and that it repeats."""

import pytest
import torch

from foretoken.core.params import SamplingParams
from foretoken.core.verdict import Exactness
from foretoken.engine.engine import Engine, EngineConfig
from foretoken.planner.plan import Plan
from foretoken.verifiers import VERIFIERS
from tests.engines import (
    KV_TOKENS,
    check_books,
    check_idle,
    finish,
    greedy,
    make_draft_model,
    make_host,
    micro_model,
    plain_ids,
    random_table,
    sampled,
)
from tests.goodness import FALSE_FAILURE, fit_probability

RULES = sorted(VERIFIERS._table)
LOSSLESS = [name for name in RULES if VERIFIERS.load(name).exactness is not Exactness.LOSSY]
VOCAB_SIZE, NUM_TOKENS, NUM_REQUESTS = 5, 3, 1000
PROMPT = [3, 1]


def make_engine(name, target, *drafts, max_requests=16, max_nodes=5, **options):
    """Return an engine with a rule and one draft-model drafter for each draft model."""
    host = make_host(target, max_requests=max_requests, kv_cache_tokens=4 * KV_TOKENS)
    drafters = {
        f"draft-{index}": make_draft_model(target, draft, host=host, min_gain=0, **options)
        for index, draft in enumerate(drafts)
    }
    return Engine(
        target,
        target.new_cache(4 * KV_TOKENS),
        drafters,
        VERIFIERS.load(name)(),
        Plan(verifier=name, max_nodes=max_nodes),
        config=EngineConfig(max_requests=max_requests),
    )


def tables():
    """Return target and draft that agree about as much as real ones."""
    target = random_table(VOCAB_SIZE, seed=3, spread=1.0)
    other = random_table(VOCAB_SIZE, seed=4, spread=1.0)
    draft = random_table(VOCAB_SIZE, seed=3, spread=1.0)
    draft.table = 0.6 * target.table + 0.6 * other.table
    return target, draft


def joint_law(table, params):
    """Return the law of the tokens after the prompt, flat, for a top-k of the table's rows."""
    logits = table / params.temperature
    if params.top_k:
        floor = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    probs = logits.softmax(dim=-1)
    law = probs[PROMPT[-1]]
    for _ in range(NUM_TOKENS - 1):
        law = law[..., None] * probs
    return law.reshape(-1)


def draw_outputs(engine, params):
    """Return the outputs of many seeds as one number each, [n]."""
    requests = [
        engine.add_request(PROMPT, sampled(NUM_TOKENS, seed=seed, **params))
        for seed in range(NUM_REQUESTS)
    ]
    while engine.num_unfinished:
        engine.step()
    outputs = torch.tensor([request.output_ids for request in requests])
    powers = VOCAB_SIZE ** torch.arange(NUM_TOKENS - 1, -1, -1)
    accepted = sum(request.stats.num_accepted for request in requests)
    return (outputs * powers).sum(dim=1), accepted


def rules_and_growths():
    """Yield each rule with a tree that grows by estimates, and, slow, with a fixed one."""
    for name in LOSSLESS:
        yield pytest.param(name, {"width": 2}, id=name)
        yield pytest.param(name, {"expansion": (2, 2)}, id=f"{name}-fixed", marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "options"), list(rules_and_growths()))
def test_outputs_fit_the_target(name, options):
    """Chi-square of all three tokens together; correct code fails for one seed in a million."""
    target, draft = tables()
    params = {"temperature": 0.8, "top_k": 4}
    winners, num_accepted = draw_outputs(make_engine(name, target, draft, **options), params)
    law = joint_law(target.table, SamplingParams(**params))
    assert fit_probability(winners, law) > FALSE_FAILURE
    assert num_accepted > 0.2 * NUM_REQUESTS  # the rule had something to do


def test_the_same_test_finds_a_lossy_rule():
    target, draft = tables()
    params = {"temperature": 0.8, "top_k": 4}
    winners, _ = draw_outputs(make_engine("typical", target, draft, width=2), params)
    assert fit_probability(winners, joint_law(target.table, SamplingParams(**params))) < 1e-30


@pytest.mark.parametrize("name", ["mss", "rrs"])
def test_merged_drafts_of_two_models_fit_the_target(name):
    """Chi-square as above, one in a million; the tree is cut to the budget after merging."""
    target, draft = tables()
    other = random_table(VOCAB_SIZE, seed=9, spread=1.0)
    params = {"temperature": 0.8, "top_k": 4}
    engine = make_engine(name, target, draft, other, max_nodes=4, width=2)
    winners, num_accepted = draw_outputs(engine, params)
    law = joint_law(target.table, SamplingParams(**params))
    assert fit_probability(winners, law) > FALSE_FAILURE
    assert num_accepted > 0.2 * NUM_REQUESTS


# -- repeatable ------------------------------------------------------------------------------


def outputs_of(name, requests, **sizes):
    target, draft = micro_model(), micro_model(blur=0.3)
    engine = make_engine(name, target, draft, **sizes)
    added = [engine.add_request(prompt, params) for prompt, params in requests]
    finish(engine)
    check_idle(engine)
    return [request.output_ids for request in added]


@pytest.mark.parametrize("name", RULES)
def test_same_seed_gives_the_same_tokens_whatever_shares_the_batch(name):
    wanted = ([3, 1, 4, 1, 5], sampled(12, seed=7))
    others = [([seed, 2, 9], sampled(5 + seed, seed=seed)) for seed in range(4)]
    others.append(([8, 8], greedy(9)))
    alone = outputs_of(name, [wanted], max_requests=1)
    assert outputs_of(name, [wanted], max_requests=1) == alone
    assert outputs_of(name, [*others, wanted], max_requests=3)[-1:] == alone
    different = [outputs_of(name, [(wanted[0], sampled(12, seed=seed))]) for seed in (8, 9)]
    assert alone not in different


@pytest.mark.parametrize("name", RULES)
def test_greedy_requests_are_plain_decoding_by_every_rule(name):
    """Also beside sampled ones, whose drafts are drawn in another way."""
    requests = [([3, 1, 4, 1, 5], greedy(14)), ([2, 7], sampled(9, seed=1)), ([6], greedy(11))]
    outputs = outputs_of(name, requests)
    for index in (0, 2):
        assert outputs[index] == plain_ids(micro_model(), *requests[index])


@pytest.mark.parametrize("name", RULES)
def test_a_draft_equal_to_the_target_is_accepted_whole(name):
    """p = q: nothing is ever rejected, up to rounding; naive and typical ask for something else."""
    target = random_table(seed=4)
    engine = make_engine(name, target, random_table(seed=4), max_nodes=6, expansion=(1,) * 6)
    request = engine.add_request(PROMPT, sampled(29, seed=2))
    finish(engine)
    check_books(engine)
    if name not in ("naive", "typical"):
        # 29 tokens are four steps of seven and a last.
        assert (request.stats.num_steps, request.stats.num_accepted) == (5, 24)
    assert len(request.output_ids) == 29


@pytest.mark.parametrize("name", [n for n in RULES if VERIFIERS.load(n).max_width == 1])
@pytest.mark.parametrize("options", [{"width": 4}, {"expansion": (3, 1, 2)}])
def test_chain_rules_get_chains(name, options):
    target, draft = tables()
    engine = make_engine(name, target, draft, **options)
    request = engine.add_request(PROMPT, sampled(20, seed=1))
    finish(engine)
    assert request.error is None
    assert request.stats.num_accepted > 0
