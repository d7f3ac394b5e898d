"""Trees that a compiled draft model grows in one call are those that it grows level by level."""

import random
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken.assets import EMBEDDED
from foretoken.core.draft import DraftBudget, SiblingDraw
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.drafters import model_drafter
from foretoken.drafters.base import DraftContext, RequestView
from foretoken.drafters.early_exit import EarlyExitDrafter, EarlyExitOptions
from foretoken.errors import CapacityError
from foretoken.models import decoder
from foretoken.models.cache import BLOCK_SIZE
from foretoken.models.draft_vocabulary import DraftVocabulary, ReducedModel
from foretoken.models.loaded import adapt_loaded
from foretoken.models.loading import load_model
from foretoken.models.partial import LayerSet
from tests.engines import (
    check_idle,
    counting_model,
    finish,
    greedy,
    make_draft_model,
    make_engine,
    make_host,
    micro_config,
    micro_model,
    outcome_of,
    plain_ids,
    sampled,
)
from tests.fakes import VOCAB_SIZE, build_module

PROMPT = [3, 1, 4, 1, 5]


@lru_cache(maxsize=16)
def compiled_model(kind="sharp", dtype=torch.float32, **changes):
    """Return a compiled model of two layers.

    Args:
        kind: `sharp`, or `tied`: many tokens are equally likely, and so are many paths, because a
            token's row depends on what it is modulo 5 and says what is to come modulo 7.
        dtype: Of its weights.
        changes: Override fields of the configuration.
    """
    module = build_module(micro_config("llama", **changes))
    if kind == "tied":
        weights = module.state_dict()
        vocab_size = len(weights["lm_head.weight"])
        weights["lm_head.weight"] = weights["lm_head.weight"][torch.arange(vocab_size) % 7]
        embedding = weights["model.embed_tokens.weight"]
        weights["model.embed_tokens.weight"] = embedding[torch.arange(vocab_size) % 5]
        for name in weights:
            if "o_proj" in name or "down_proj" in name:
                weights[name] = torch.zeros_like(weights[name])
        module.load_state_dict(weights)
    return adapt_loaded(module.to(dtype))


def both_routes(model, host=None, **options):
    """Return a drafter that grows trees in one call, and one that goes level by level."""
    host = host or make_host(counting_model(VOCAB_SIZE))
    whole, by_level = (make_draft_model(None, model, host=host, **options) for _ in range(2))
    assert whole._whole_trees is not None
    by_level._whole_trees = None
    return whole, by_level


def start(drafters, texts):
    for drafter in drafters:
        for index, text in enumerate(texts):
            drafter.start(RequestView(request_id=f"r{index}", prompt_ids=list(text)))


class Requests:
    """Some requests that two drafters draft for, step by step."""

    def __init__(self, drafters, texts, params):
        self.drafters, self.texts = drafters, [list(text) for text in texts]
        # Samplers keep noise; each drafter has its own, so that neither lives on the other's.
        self._samplers = [
            [Sampler(it, it.seed or 0, len(text)) for it, text in zip(params, texts, strict=True)]
            for _ in drafters
        ]
        start(drafters, texts)

    def propose(self, budgets):
        """Return one drafter's drafts; the other's are the same, and so is all that is kept."""
        drafts, others = (
            drafter.propose(self._contexts(samplers, budgets))
            for drafter, samplers in zip(self.drafters, self._samplers, strict=True)
        )
        for draft, other in zip(drafts, others, strict=True):
            assert draft.tree.token_ids == other.tree.token_ids
            assert draft.tree.parents == other.tree.parents
            assert draft.draft_logprobs == other.draft_logprobs  # to the last bit
            assert (draft.siblings, draft.source) == (other.siblings, other.source)
        for index in range(len(self.texts)):
            one, other = (drafter._states[f"r{index}"] for drafter in self.drafters)
            assert one.num_known == other.num_known
            assert one.child_at == other.child_at
            assert one.sequence.num_staged == other.sequence.num_staged
            assert len(one.sequence.blocks) == len(other.sequence.blocks)
        self.check()
        return drafts

    def commit(self, drafts, rng):
        """Let a random path of each draft stand, and a random token after it."""
        outcomes = []
        for index, draft in enumerate(drafts):
            path, children = [], draft.tree.children[0]
            while children and rng.random() < 0.75:
                path.append(rng.choice(children))
                children = draft.tree.children[path[-1]]
            new_ids = [draft.tree.token_ids[node] for node in path] + [rng.randrange(40)]
            verdict = Verdict(tuple(path), tuple(new_ids), FinalKind.RECOVERED)
            outcomes.append(outcome_of(verdict, f"r{index}"))
            self.texts[index] += new_ids
        for drafter in self.drafters:
            drafter.commit(outcomes)
        self.check()

    def check(self):
        for drafter in self.drafters:
            drafter._cache.check_integrity()
        for index in range(len(self.texts)):
            one, other = (drafter._states[f"r{index}"].sequence for drafter in self.drafters)
            assert one.num_cached == other.num_cached

    def _contexts(self, samplers, budgets):
        return [
            DraftContext(
                request_id=f"r{index}",
                token_ids=list(self.texts[index]),
                sampler=sampler,
                budget=budget,
                siblings=_way(sampler),
            )
            for index, (sampler, budget) in enumerate(zip(samplers, budgets, strict=True))
        ]


def _way(sampler):
    return SiblingDraw.DETERMINISTIC if sampler.is_greedy else SiblingDraw.COUPLED


def params_of(temperature, seed):
    return SamplingParams(temperature=temperature, seed=seed)


BUDGETS = st.builds(
    DraftBudget,
    max_nodes=st.sampled_from([0, 1, 2, 5, 8, 40]),
    max_depth=st.sampled_from([0, 1, 3, 12]),
    max_width=st.sampled_from([None, None, 1, 3]),
    min_gain=st.sampled_from([0.0, 0.0, 0.4]),
)


@pytest.mark.parametrize("kind", ["sharp", "tied"])
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, VOCAB_SIZE - 13, VOCAB_SIZE + 13])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_drafts_are_those_grown_level_by_level(kind, vocab_size, data):
    """Whatever the options, budgets, histories and company, greedy or sampled, ties included."""
    options = {
        "width": data.draw(st.sampled_from([1, 2, 4, 80])),
        "max_depth": data.draw(st.sampled_from([1, 2, 4, 10])),
        "min_gain": data.draw(st.sampled_from([0.0, 0.1, 0.5])),
        "max_nodes": data.draw(st.sampled_from([None, 1, 3, 6])),
    }
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    model = compiled_model(kind, dtype, vocab_size=vocab_size)
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    texts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]
    params = [params_of(rng.choice([0.0, 0.0, 0.6, 1.0]), index) for index in range(len(texts))]
    requests = Requests(both_routes(model, **options), texts, params)
    for _ in range(data.draw(st.integers(1, 4))):
        drafts = requests.propose([data.draw(BUDGETS) for _ in texts])
        if rng.random() < 0.8:  # else the step failed, or went without its drafts
            requests.commit(drafts, rng)


def test_ties_are_there():
    """Else the test above would prove less than it says."""
    drafter, _ = both_routes(compiled_model("tied"), width=4, min_gain=0)
    requests = Requests([drafter, drafter], [PROMPT], [greedy(9)])
    [draft] = requests.propose([DraftBudget(max_nodes=20, max_depth=4)])
    assert len(set(draft.draft_logprobs[1:])) < draft.tree.num_draft_tokens / 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("width", "max_nodes"), [(4, 40), (1, 24)])
def test_drafts_that_outgrow_their_first_room_go_on(temperature, width, max_nodes):
    """Blocks and noise are there for some levels; the call is made again for those after them."""
    drafters = both_routes(compiled_model(), width=width, min_gain=0, max_depth=24)
    requests = Requests(drafters, [PROMPT, PROMPT * 3], [params_of(temperature, 1)] * 2)
    drafts = requests.propose([DraftBudget(max_nodes=max_nodes, max_depth=24)] * 2)
    for index, draft in enumerate(drafts):
        assert len(drafters[0]._states[f"r{index}"].child_at) > BLOCK_SIZE
        assert draft.tree.num_draft_tokens == max_nodes
    requests.commit(drafts, random.Random(1))


def test_the_first_draft_after_a_long_prompt(monkeypatch):
    monkeypatch.setattr(model_drafter, "PREFILL_ROWS", 32)
    rng = random.Random(5)
    texts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (80, 32, 33, 7)]
    params = [params_of(temperature, 1) for temperature in (0.0, 1.0, 1.0, 0.0)]
    requests = Requests(both_routes(compiled_model(), min_gain=0, max_depth=5), texts, params)
    for _ in range(3):
        drafts = requests.propose([DraftBudget(max_nodes=9, max_depth=8)] * 4)
        assert all(max(draft.tree.depths) > 1 for draft in drafts)
        requests.commit(drafts, rng)


def test_drafts_end_where_the_draft_models_context_does():
    model = compiled_model(max_position_embeddings=16)
    drafters = both_routes(model, min_gain=0, max_depth=8, width=2)
    texts = [list(range(length)) for length in (11, 13, 15, 16, 17)]
    requests = Requests(drafters, texts, [params_of(float(index % 2), 1) for index in range(5)])
    drafts = requests.propose([DraftBudget(max_nodes=30, max_depth=8)] * 5)
    assert [max(draft.tree.depths) for draft in drafts] == [5, 3, 1, 0, 0]


def test_requests_without_room_in_the_cache_go_without_a_draft():
    host = make_host(counting_model(VOCAB_SIZE), max_requests=1, kv_cache_tokens=48)
    drafters = both_routes(compiled_model(), host, min_gain=0, max_depth=3)
    requests = Requests(drafters, [list(range(40))] * 8, [greedy(9)] * 8)
    drafts = requests.propose([DraftBudget(max_nodes=60, max_depth=3)] * 8)
    assert {draft.tree.num_draft_tokens > 0 for draft in drafts} == {True, False}


def test_a_draft_that_fails_halfway_leaves_nothing_staged(monkeypatch):
    drafters = both_routes(compiled_model(), min_gain=0, width=4)
    requests = Requests(drafters, [PROMPT] * 2, [greedy(9)] * 2)
    budgets = [DraftBudget(max_nodes=60, max_depth=8)] * 2
    whole = drafters[0]
    cache, hog = whole._cache, whole._cache.open()
    with monkeypatch.context() as patch:
        patch.setattr(whole, "fitting", list)  # it would see that there is no room
        cache.stage(hog, range(-1, (cache.num_free_blocks - 12) * BLOCK_SIZE - 1))
        with pytest.raises(CapacityError):
            whole.propose(requests._contexts(requests._samplers[0], budgets))
    assert [whole._states[f"r{index}"].sequence.num_staged for index in range(2)] == [0, 0]
    cache.check_integrity()
    cache.close(hog)
    assert requests.propose(budgets)[0].tree.num_draft_tokens == 60


# -- tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {}, {"temperature": 0.6}])
def test_tokens_are_those_of_plain_decoding(values):
    """Also in a batch of which a request has controls, and so is drafted for level by level."""
    target = micro_model()
    draft = adapt_loaded(build_module(micro_config("llama")).float())
    drafter = make_draft_model(target, draft, min_gain=0.1)
    engine = make_engine(target, {"draft-model": drafter})
    kinds = [sampled(30, seed=seed, **values) for seed in range(3)]
    kinds += [sampled(30, seed=3, presence_penalty=0.5, **values)]
    requests = [engine.add_request(PROMPT[seed:], it) for seed, it in enumerate(kinds)]
    finish(engine)
    for seed, (request, params) in enumerate(zip(requests, kinds, strict=True)):
        assert request.output_ids == plain_ids(target, PROMPT[seed:], params)
        assert request.stats.num_accepted > 0
    check_idle(engine)


# -- which route -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories_draft():
    return load_model(str(EMBEDDED["stories"].draft), dtype="bfloat16", device="cpu")


@pytest.fixture
def passes(monkeypatch, stories_draft):
    """Return the numbers of rows of passes of the included draft model that were made singly."""
    found = []
    forward = stories_draft.forward

    def counted(batch, rows, **values):
        found.append(batch.num_rows)
        return forward(batch, rows, **values)

    monkeypatch.setattr(stories_draft, "forward", counted)
    return found


@pytest.mark.parametrize(
    ("params", "siblings", "options", "is_whole"),
    [
        (greedy(9), SiblingDraw.DETERMINISTIC, {}, True),
        (sampled(9), SiblingDraw.COUPLED, {}, True),
        (sampled(9, temperature=0.3), SiblingDraw.COUPLED, {}, True),
        (sampled(9), SiblingDraw.DETERMINISTIC, {}, False),
        (sampled(9), SiblingDraw.IID, {}, False),
        (greedy(9), SiblingDraw.WITHOUT_REPLACEMENT, {}, False),
        (sampled(9, top_p=0.9), SiblingDraw.COUPLED, {}, False),
        (greedy(9, repetition_penalty=1.1), SiblingDraw.DETERMINISTIC, {}, False),
        (greedy(9, logit_bias={5: 1.0}), SiblingDraw.DETERMINISTIC, {}, False),
        (greedy(9), SiblingDraw.DETERMINISTIC, {"expansion": (2, 1)}, False),
    ],
)
def test_trees_grow_whole_where_logits_and_a_temperature_are_all_that_counts(
    stories_draft, passes, params, siblings, options, is_whole
):
    drafter = make_draft_model(stories_draft, stories_draft, min_gain=0, max_depth=3, **options)
    start([drafter], [PROMPT])
    context = DraftContext(
        request_id="r0",
        token_ids=PROMPT,
        sampler=Sampler(params, params.seed or 0, len(PROMPT)),
        budget=DraftBudget(max_nodes=8, max_depth=8),
        siblings=siblings,
    )
    [draft] = drafter.propose([context])
    assert max(draft.tree.depths) > 1
    assert bool(passes) is not is_whole


def test_passes_that_several_threads_share_are_made_singly(monkeypatch, stories_draft, passes):
    drafter = make_draft_model(stories_draft, stories_draft, min_gain=0, max_depth=3)
    start([drafter], [PROMPT])
    context = DraftContext(
        request_id="r0",
        token_ids=PROMPT,
        sampler=Sampler(greedy(9), 0, len(PROMPT)),
        budget=DraftBudget(max_nodes=8, max_depth=8),
    )
    whole = drafter.propose([context])
    assert not passes
    monkeypatch.setattr(decoder, "BYTES_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert drafter.propose([context]) == whole
    assert len(passes) == 3


def test_drafters_that_make_levels_in_their_own_way_are_asked_for_each():
    target = compiled_model()
    options = EarlyExitOptions(layers=1)
    assert make_draft_model(target, target)._whole_trees is not None
    assert EarlyExitDrafter(options, make_host(target))._whole_trees is None


def test_models_say_whether_they_grow_trees():
    model = compiled_model()
    assert model.tree_grower is model.forward_pass
    assert model.with_layers(LayerSet.all(1)).tree_grower is not None
    assert micro_model().tree_grower is None  # runs through modules
    same = torch.arange(VOCAB_SIZE)
    vocabulary = DraftVocabulary(d2t=same, t2d=same)
    assert ReducedModel(model, vocabulary).tree_grower is None  # its ids are not the target's
