"""The draft model: its cache follows what stands, and its race is the target's."""

import pytest
import torch

from foretoken.core.draft import DraftBudget, SiblingDraw
from foretoken.core.noise import Stream
from foretoken.core.options import ComponentSpec, build_options
from foretoken.core.sampling import Sampler
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.drafters import model_drafter as module_under_test
from foretoken.drafters import prepare_drafter
from foretoken.drafters.base import DraftContext, RequestView
from foretoken.drafters.draft_model import DraftModelDrafter, DraftModelOptions
from foretoken.errors import ConfigError, VocabularyMismatchError
from foretoken.models.tokenizer import Tokenizer
from tests.engines import (
    TableModel,
    check_books,
    check_idle,
    counting_model,
    finish,
    greedy,
    make_draft_model,
    make_engine,
    make_host,
    micro_model,
    outcome_of,
    plain_ids,
    random_table,
    sampled,
)
from tests.fakes import ByteTokenizer, build_module, tiny_config
from tests.goodness import FALSE_FAILURE, fit_probability, independence_probability

PROMPT = [3, 1, 4, 1, 5]


def context_of(text, params=None, *, siblings=SiblingDraw.COUPLED, request_id="r", **budget):
    params = params or greedy(50)
    return DraftContext(
        request_id=request_id,
        token_ids=text,
        sampler=Sampler(params, params.seed or 0, len(PROMPT)),
        budget=DraftBudget(**{"max_nodes": 8, "max_depth": 8, **budget}),
        siblings=SiblingDraw.DETERMINISTIC if params.is_greedy else siblings,
    )


def started(drafter, text, request_id="r"):
    drafter.start(RequestView(request_id=request_id, prompt_ids=list(text)))
    return drafter._states[request_id]


def cached_ids(drafter, state):
    """Return, per cached position, the first key value: what tells one token from another."""
    slots = drafter._cache.slots(state.sequence, 0, state.sequence.num_cached)
    return drafter._cache.keys[0][torch.from_numpy(slots)]


# -- the cache follows the accepted path -----------------------------------------------------


@pytest.mark.parametrize("expansion", [None, (2, 2, 1, 1)])
def test_cache_equals_that_of_a_draft_model_fed_with_the_text(expansion):
    target = micro_model()
    draft = micro_model(blur=0.3)
    drafter = make_draft_model(target, draft, expansion=expansion, min_gain=0)
    text = list(PROMPT)
    state = started(drafter, text)
    engine_ids = plain_ids(target, PROMPT, greedy(24))
    while len(text) < 20:
        [proposed] = drafter.propose([context_of(text)])
        path = proposed.tree.match(engine_ids[len(text) - len(PROMPT) :])
        num_new = len(path) + 1
        new_ids = engine_ids[len(text) - len(PROMPT) :][:num_new]
        drafter.commit([outcome_of(Verdict(tuple(path), tuple(new_ids), FinalKind.RECOVERED))])
        text += new_ids
        drafter._cache.check_integrity()
        # Everything but the new root, and perhaps the last accepted node, which was never fed.
        assert len(text) - 2 <= state.sequence.num_cached <= len(text) - 1
        other = make_draft_model(target, draft)
        other_state = started(other, text)
        other.propose([context_of(text)])
        other.commit([outcome_of(Verdict((), (0,), FinalKind.RECOVERED))])
        kept = cached_ids(drafter, state)
        torch.testing.assert_close(
            kept, cached_ids(other, other_state)[: len(kept)], rtol=1e-9, atol=1e-9
        )


def test_final_token_equal_to_a_dropped_draft_node_is_not_taken_from_the_cache():
    """The final token's row has to be run, because its logits are what the next draft needs."""
    target = counting_model()
    drafter = make_draft_model(target, counting_model(), min_gain=0, width=2)
    text = list(PROMPT)
    state = started(drafter, text)
    [draft] = drafter.propose([context_of(text, max_nodes=4)])
    assert draft.tree.match([6, 7, 8, 9]) == [1, 2, 3, 4]
    # The engine pruned the node of token 7 away: only 6 was scored, and 7 is the target's own.
    drafter.commit([outcome_of(Verdict((1,), (6, 7), FinalKind.BONUS))])
    text += [6, 7]
    assert state.sequence.num_cached == len(text) - 1
    [again] = drafter.propose([context_of(text, max_nodes=4)])
    assert again.tree.token_ids[0] == 7
    assert len(again.tree.match([8, 9])) == 2


def test_a_whole_accepted_path_leaves_its_unfed_leaf_for_the_next_draft():
    target = counting_model()
    drafter = make_draft_model(target, counting_model(), width=1)
    text = list(PROMPT)
    state = started(drafter, text)
    [draft] = drafter.propose([context_of(text, max_depth=3)])
    assert draft.tree.token_ids[1:] == (6, 7, 8)
    drafter.commit([outcome_of(Verdict((1, 2, 3), (6, 7, 8, 9), FinalKind.BONUS))])
    text += [6, 7, 8, 9]
    assert state.sequence.num_cached == len(text) - 2  # 8 was drafted but never fed
    [again] = drafter.propose([context_of(text, max_nodes=3)])
    assert again.tree.token_ids == (9, 10, 11, 12)


def test_an_accepted_path_of_other_drafters_is_kept_as_far_as_it_was_drafted_here():
    target = counting_model()
    drafter = make_draft_model(target, counting_model(), width=1)
    text = list(PROMPT)
    state = started(drafter, text)
    drafter.propose([context_of(text, max_nodes=5)])
    drafter.commit([outcome_of(Verdict((1, 5, 9), (6, 20, 21, 22), FinalKind.BONUS))])
    assert state.sequence.num_cached == len(text) + 1  # and 6
    text += [6, 20, 21, 22]
    [again] = drafter.propose([context_of(text, max_nodes=3)])
    assert again.tree.token_ids == (22, 23, 24, 25)


def test_a_failed_step_leaves_nothing_staged_for_the_next():
    drafter = make_draft_model(counting_model(), counting_model())
    state = started(drafter, PROMPT)
    drafter.propose([context_of(PROMPT)])
    num_staged = state.sequence.num_staged
    for _ in range(3):
        drafter._model.fail_next = True
        with pytest.raises(RuntimeError, match="fell off"):
            drafter.propose([context_of(PROMPT)])
    [draft] = drafter.propose([context_of(PROMPT)])
    assert state.sequence.num_staged == num_staged
    assert draft.tree.token_ids[1] == 6
    drafter._cache.check_integrity()
    drafter.commit([outcome_of(Verdict((), (0,), FinalKind.RECOVERED))])
    assert state.sequence.num_cached == len(PROMPT)


# -- the race --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.7, "top_k": 9},
        {"top_p": 0.8},
        {"frequency_penalty": 1.5, "repetition_penalty": 1.3},
    ],
)
@pytest.mark.parametrize("options", [{"width": 1, "min_gain": 0}, {"expansion": (1,) * 6}])
def test_a_draft_model_equal_to_the_target_is_accepted_in_full_when_sampling(values, options):
    """Both run the same race on the same logits: the draft's favourite is the target's choice."""
    target = random_table(seed=4)
    drafter = make_draft_model(target, random_table(seed=4), max_depth=6, **options)
    for seed in range(6):
        engine = make_engine(target, {"draft-model": drafter}, max_nodes=6)
        request = engine.add_request(PROMPT, sampled(29, seed=seed, **values))
        finish(engine)
        stats = request.stats
        # The first step drafts after the prompt; 29 tokens are four steps of seven and a last.
        assert (stats.num_steps, stats.num_accepted) == (5, stats.num_draft_tokens)
        assert request.output_ids == plain_ids(target, PROMPT, sampled(29, seed=seed, **values))


def test_sampled_candidates_are_ranked_by_the_race_not_by_probability():
    """Drafting the likeliest tokens would agree with the target's draw much less often."""
    target = random_table(seed=2, spread=0.5)
    drafter = make_draft_model(target, random_table(seed=2, spread=0.5), width=1)
    firsts = set()
    for seed in range(30):
        params = sampled(9, seed=seed)
        started(drafter, PROMPT)
        [draft] = drafter.propose([context_of(PROMPT, params)])
        drafter.stop("r")
        sampler = Sampler(params, seed, len(PROMPT))
        assert draft.tree.token_ids[1] == sampler.choose(target.table[PROMPT[-1]], PROMPT)
        firsts.add(draft.tree.token_ids[1])
    assert len(firsts) > 5


def test_tokens_that_the_controls_rule_out_are_not_drafted():
    target = random_table(seed=1)
    drafter = make_draft_model(target, random_table(seed=1), width=4, min_gain=0)
    started(drafter, PROMPT)
    [draft] = drafter.propose([context_of(PROMPT, sampled(9, top_k=2), max_nodes=30)])
    assert max(map(len, draft.tree.children)) == 2


# -- other ways of drawing -------------------------------------------------------------------


def test_without_noise_the_likeliest_tokens_are_drafted():
    """For rules with dice of their own; their order and estimates are the draft's probabilities."""
    target = random_table(seed=2, spread=0.5)
    drafter = make_draft_model(target, random_table(seed=2, spread=0.5), width=3, min_gain=0)
    probs = target.table[PROMPT[-1]].softmax(dim=-1)
    for seed in range(5):
        params = sampled(9, seed=seed)
        started(drafter, PROMPT)
        context = context_of(PROMPT, params, siblings=SiblingDraw.DETERMINISTIC, max_depth=1)
        [draft] = drafter.propose([context])
        drafter.stop("r")
        best = probs.topk(3)
        assert list(draft.tree.token_ids[1:]) == best.indices.tolist()
        estimates = torch.tensor(draft.draft_logprobs[1:])
        torch.testing.assert_close(estimates.exp().double(), best.values, rtol=1e-3, atol=0)
        assert not draft.draws


SAMPLES = [SiblingDraw.IID, SiblingDraw.WITHOUT_REPLACEMENT]


@pytest.mark.parametrize("siblings", SAMPLES)
@pytest.mark.parametrize("options", [{"width": 2, "min_gain": 0}, {"expansion": (2, 2)}])
def test_samples_come_with_the_distribution_that_the_target_would_have_there(siblings, options):
    """Every control of the request is applied before the draw, along each path."""
    params = sampled(9, seed=3, temperature=0.7, top_k=5, presence_penalty=1.5)
    target = random_table(seed=1)
    drafter = make_draft_model(target, random_table(seed=1), **options)
    started(drafter, PROMPT)
    [draft] = drafter.propose([context_of(PROMPT, params, siblings=siblings)])
    tree, sampler = draft.tree, Sampler(params, 3, len(PROMPT))
    assert draft.siblings is siblings
    for node, groups in draft.draws.items():
        row = target.table[tree.token_ids[node]]
        expected = sampler.distribution(row, PROMPT, tree.sequence(node)[1:])
        [group] = groups
        assert group.probs.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
        assert all(expected[tree.token_ids[child]] > 0 for child in group.nodes)
    assert set(draft.draws) == {node for node in range(len(tree)) if tree.children[node]}


@pytest.mark.parametrize("siblings", SAMPLES)
def test_samples_have_the_drafts_law(siblings):
    """Chi-square of the first two draws; correct code fails for one seed in a million."""
    vocab_size, num_seeds = 6, 3000
    model = random_table(vocab_size, seed=8, spread=1.0)
    drafter = make_draft_model(model, model, expansion=(2,))
    probs = model.table[PROMPT[-1]].softmax(dim=-1)
    pairs = []
    for seed in range(num_seeds):
        started(drafter, PROMPT)
        [draft] = drafter.propose([context_of(PROMPT, sampled(9, seed=seed), siblings=siblings)])
        drafter.stop("r")
        first, second = (draft.tree.token_ids[node] for node in draft.draws[0][0].nodes)
        pairs.append(first * vocab_size + second)
    law = torch.outer(probs, probs)
    if siblings is SiblingDraw.WITHOUT_REPLACEMENT:
        law = law / (1 - probs)[:, None] * (1 - torch.eye(vocab_size))
    assert fit_probability(torch.tensor(pairs), law.reshape(-1)) > FALSE_FAILURE


def test_samples_are_independent_of_the_noise_and_of_the_dice():
    """Chi-square of (draft's sample, target's choice); correct code fails one seed in a million.

    The rules' dice come from a stream of their own, of which the first number is compared.
    """
    vocab_size, num_seeds = 6, 3000
    model = random_table(vocab_size, seed=8, spread=0.3)
    drafter = make_draft_model(model, model, expansion=(1,))
    drawn, chosen, rolled = [], [], []
    for seed in range(num_seeds):
        params = sampled(9, seed=seed)
        started(drafter, PROMPT)
        [draft] = drafter.propose([context_of(PROMPT, params, siblings=SiblingDraw.IID)])
        drafter.stop("r")
        sampler = Sampler(params, seed, len(PROMPT))
        drawn.append(draft.tree.token_ids[1])
        chosen.append(sampler.choose(model.table[PROMPT[-1]], PROMPT))
        dice = sampler.generator(Stream.VERIFY, len(PROMPT))
        rolled.append(int(dice.random() * vocab_size))
    for other in (chosen, rolled):
        pair = (torch.tensor(drawn), torch.tensor(other))
        assert independence_probability(*pair, vocab_size) > FALSE_FAILURE


def test_requests_of_one_batch_may_be_drawn_for_in_different_ways():
    """Greedy requests are ranked, coupled ones race, others are sampled: all in the same passes."""
    target = random_table(seed=1)
    ways = [SiblingDraw.DETERMINISTIC, *SiblingDraw, SiblingDraw.COUPLED]
    kinds = [greedy(9)] + [sampled(9, seed=seed) for seed in range(1, len(ways))]
    widths = [None, None, 1, 2, 1, 2]

    def drafts(indices):
        model = random_table(seed=5)
        drafter = make_draft_model(target, model, width=3, min_gain=0)
        contexts = []
        for index in indices:
            started(drafter, PROMPT, f"r{index}")
            contexts.append(
                context_of(
                    PROMPT,
                    kinds[index],
                    siblings=ways[index],
                    request_id=f"r{index}",
                    max_width=widths[index],
                    max_depth=2 + index % 3,
                )
            )
        return drafter.propose(contexts), model.num_passes

    together, num_passes = drafts(range(len(ways)))
    assert num_passes == 4
    for index, draft in enumerate(together):
        [alone], _ = drafts([index])
        assert draft == alone
        assert widths[index] is None or max(map(len, draft.tree.children)) <= widths[index]


def test_where_the_controls_leave_nothing_nothing_is_drawn():
    def forbid(input_ids, scores):
        return torch.full_like(scores, -torch.inf)

    target, params = random_table(20, seed=1), sampled(9, seed=1, logits_processors=(forbid,))
    drafter = make_draft_model(target, random_table(20, seed=1))
    for siblings in SiblingDraw:
        started(drafter, PROMPT)
        [draft] = drafter.propose([context_of(PROMPT, params, siblings=siblings)])
        drafter.stop("r")
        assert draft.tree.num_draft_tokens == 0


# -- limits ----------------------------------------------------------------------------------


def test_draft_context_shorter_than_the_targets_stops_drafting_there():
    target = micro_model()
    draft = micro_model(max_position_embeddings=16)
    drafter = make_draft_model(target, draft, width=2, min_gain=0)
    engine = make_engine(target, {"draft-model": drafter}, max_nodes=6)
    request = engine.add_request(PROMPT, greedy(30))
    emissions = finish(engine)[request.request_id]
    assert request.output_ids == plain_ids(target, PROMPT, greedy(30))
    assert request.stats.num_accepted > 0  # before the limit
    assert [len(emission.token_ids) for emission in emissions[-14:]] == [1] * 14
    check_idle(engine)


@pytest.mark.parametrize("num_prompt_ids", [15, 16, 17, 20])
def test_prompts_around_the_draft_models_context_are_served(num_prompt_ids):
    target = micro_model()
    drafter = make_draft_model(target, micro_model(max_position_embeddings=16))
    prompt = [(7 * step) % 40 for step in range(num_prompt_ids)]
    engine = make_engine(target, {"draft-model": drafter})
    request = engine.add_request(prompt, greedy(6))
    finish(engine)
    assert request.output_ids == plain_ids(target, prompt, greedy(6))


def test_more_draft_logits_than_target_logits_are_cut():
    """Models of one family pad their vocabulary differently; only the target's ids are drafted."""
    target, table = counting_model(20), torch.zeros(26, 26, dtype=torch.float64)
    table[:, 25] = 90.0  # a token that the target does not have
    table[:20, :20] = target.table
    drafter = make_draft_model(target, TableModel(table), width=3)
    engine = make_engine(target, {"draft-model": drafter})
    request = engine.add_request(PROMPT, greedy(12))
    finish(engine)
    assert request.output_ids == [token_id % 20 for token_id in range(6, 18)]
    assert request.stats.num_accepted > 0


@pytest.mark.parametrize(
    "params",
    [
        greedy(8, logit_bias={24: 99.0}),
        sampled(8, logit_bias={24: 99.0}, temperature=0.1),
        greedy(8, repetition_penalty=1.2, logit_bias={24: 99.0}),
        greedy(8, presence_penalty=0.1, logit_bias={24: 99.0}),
    ],
)
def test_fewer_draft_logits_than_target_logits_leave_ids_undrafted(params):
    """Padding ids that only the target has used to index past the end of the draft's logits."""
    target = counting_model(26)
    drafter = make_draft_model(target, counting_model(20))
    engine = make_engine(target, {"draft-model": drafter})
    requests = [engine.add_request(prompt, params) for prompt in (PROMPT, [3, 25, 4])]
    finish(engine)
    for request in requests:
        assert request.output_ids == plain_ids(target, request.prompt_ids, params)


def test_long_prompts_are_prefilled_in_chunks(monkeypatch):
    monkeypatch.setattr(module_under_test, "PREFILL_ROWS", 7)
    prompt = [step % 11 for step in range(40)]
    drafts = []
    for rows in (7, 512):
        monkeypatch.setattr(module_under_test, "PREFILL_ROWS", rows)
        model = random_table(seed=3)
        drafter = make_draft_model(model, model)
        started(drafter, prompt)
        drafts += drafter.propose([context_of(prompt)])
        assert max(model.rows_per_pass) == (7 if rows == 7 else 40)
        drafter._cache.check_integrity()
    assert drafts[0] == drafts[1]


def test_trees_of_many_nodes_fit_into_the_draft_cache():
    target = random_table(vocab_size=60, seed=5, spread=0.1)
    host = make_host(target, max_requests=2, kv_cache_tokens=2 * 304)
    drafter = make_draft_model(
        target, random_table(vocab_size=60, seed=6, spread=0.1), host=host, width=16, min_gain=0
    )
    engine = make_engine(
        target, {"draft-model": drafter}, kv_tokens=2 * 304, max_nodes=280, max_requests=2
    )
    requests = [engine.add_request(PROMPT, sampled(10, seed=seed)) for seed in range(2)]
    finish(engine)
    for seed, request in enumerate(requests):
        assert request.output_ids == plain_ids(target, PROMPT, sampled(10, seed=seed))


@pytest.mark.parametrize("max_nodes", [0, 1, 5])
def test_requests_that_come_and_go_free_the_draft_cache(max_nodes):
    target = random_table()
    drafter = make_draft_model(target, random_table(seed=1))
    engine = make_engine(target, {"draft-model": drafter}, max_nodes=max_nodes, max_requests=2)
    for seed in range(7):
        engine.add_request(PROMPT, sampled(3 + seed, seed=seed))
        engine.step()
        check_books(engine)
    finish(engine)
    check_idle(engine)


# -- creation --------------------------------------------------------------------------------


def test_vocabulary_of_another_size_is_refused(tmp_path):
    config = tiny_config("llama", num_hidden_layers=1, vocab_size=50)
    build_module(config).save_pretrained(tmp_path)
    spec = ComponentSpec("draft-model", {"path": str(tmp_path)})
    with pytest.raises(VocabularyMismatchError, match="draft 50 tokens, target 61") as caught:
        prepare_drafter(spec)(make_host(micro_model()))
    assert "prompt-lookup" in caught.value.hint


def test_tokens_of_another_meaning_are_refused(monkeypatch, tmp_path):
    config = tiny_config("llama", num_hidden_layers=1)
    build_module(config).save_pretrained(tmp_path)
    monkeypatch.setattr(
        Tokenizer,
        "load",
        classmethod(lambda cls, path: ByteTokenizer(ByteTokenizer()._alphabet[::-1])),
    )
    host = make_host(micro_model(), tokenizer=ByteTokenizer())
    with pytest.raises(VocabularyMismatchError, match=r"draft \d+ for '\\n', target 0"):
        prepare_drafter(ComponentSpec("draft-model", {"path": str(tmp_path)}))(host)


def test_registered_drafter_is_built_from_its_text(tmp_path):
    config = tiny_config("llama", num_hidden_layers=1)
    build_module(config).save_pretrained(tmp_path)
    spec = ComponentSpec.parse(f"draft-model:path={tmp_path},max_depth=3,width=2")
    drafter = prepare_drafter(spec)(make_host(micro_model()))
    assert isinstance(drafter, DraftModelDrafter)
    started(drafter, PROMPT)
    [draft] = drafter.propose([context_of(PROMPT, max_nodes=20)])
    assert max(draft.tree.depths) <= 3
    assert max(map(len, draft.tree.children)) <= 2


def test_the_draft_may_have_a_dtype_of_its_own(tmp_path):
    build_module(tiny_config("llama", num_hidden_layers=1)).save_pretrained(tmp_path)
    host = make_host(micro_model())

    def drafter_of(more):
        return prepare_drafter(ComponentSpec.parse(f"draft-model:path={tmp_path}{more}"))(host)

    assert drafter_of("")._model.info.dtype is torch.float64  # as the host says for the target
    assert drafter_of(",dtype=bfloat16")._model.info.dtype is torch.bfloat16
    with pytest.raises(ConfigError, match=r"dtype is auto or one of .* got 'half'"):
        drafter_of(",dtype=half")


def options_of(text):
    return build_options(DraftModelOptions, ComponentSpec.parse(text))


def test_expansion_is_read_from_text_and_bounds_the_depth():
    options = options_of("draft-model:path=x,expansion=1-1-3-1-1")
    assert options.expansion == (1, 1, 3, 1, 1)
    assert options.depth_limit == 5
    assert options_of("draft-model:path=x,expansion=2-2,max_depth=1").depth_limit == 1
    assert options_of("draft-model:path=x,max_depth=3").depth_limit == 3


@pytest.mark.parametrize("expansion", [None, (3, 3)])
def test_tree_stays_within_the_drafters_own_bound(expansion):
    drafter = make_draft_model(
        micro_model(), micro_model(blur=0.3), expansion=expansion, min_gain=0, max_nodes=3
    )
    started(drafter, PROMPT)
    [draft] = drafter.propose([context_of(PROMPT, max_nodes=8)])
    assert draft.tree.num_draft_tokens == 3
    [draft] = drafter.propose([context_of(PROMPT, max_nodes=2)])
    assert draft.tree.num_draft_tokens == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("draft-model", "needs the option 'path'"),
        ("draft-model:path=x,expansion=1-a", "integers joined by '-'"),
        ("draft-model:path=x,expansion=", "integers joined by '-'"),
        ("draft-model:path=x,expansion=1-0", "at least 1 per level"),
        ("draft-model:path=x,max_depth=0", "max_depth is at least 1; got 0"),
        ("draft-model:path=x,width=0", "width is at least 1"),
        ("draft-model:path=x,min_gain=-1", "min_gain not negative"),
        ("draft-model:path=x,max_nodes=0", "max_nodes is at least 1; got 0"),
        ("draft-model:path=x,depth=4", "unknown option of draft-model 'depth'"),
    ],
)
def test_bad_options_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        options_of(text)
