"""What every registered drafter must do. A drafter joins by one line in `OPTIONS`."""

import math
import random

import pytest

from foretoken.core.draft import DraftBudget
from foretoken.core.options import ComponentSpec
from foretoken.core.sampling import Sampler
from foretoken.core.tree import ROOT
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.drafters import DRAFTERS, prepare_drafter
from foretoken.drafters.base import DraftContext, DrafterNeeds, RequestView, Taxonomy
from foretoken.models.loading import load_model
from tests.engines import (
    check_idle,
    finish,
    greedy,
    held_sizes,
    make_engine,
    make_host,
    plain_ids,
    sampled,
)
from tests.fakes import build_module, tiny_config

VOCAB_SIZE = 41
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
}

# Name: least options, made from a directory that holds a model of the target's tokens.
OPTIONS = {
    "none": lambda folder: {},
    "prompt-lookup": lambda folder: {},
    "draft-model": lambda folder: {"path": str(folder)},
}
PARAMS = {"greedy": greedy(12), "sampled": sampled(12, seed=5, temperature=0.7, top_k=12)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_module(tiny_config("llama", **SIZES), seed=3).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def target(folder):
    # The draft model is the target itself, so that whole paths are accepted.
    return load_model(str(folder), dtype="float64", device="cpu")


@pytest.fixture(params=sorted(OPTIONS))
def name(request):
    return request.param


@pytest.fixture
def build(name, folder, target):
    return lambda: prepare_drafter(ComponentSpec(name, OPTIONS[name](folder)))(make_host(target))


@pytest.fixture
def drafter(build):
    return build()


def make_context(token_ids, *, request_id="r", params=PARAMS["greedy"], max_nodes=8, max_depth=8):
    return DraftContext(
        request_id=request_id,
        token_ids=token_ids,
        sampler=Sampler(params, params.seed or 0, 3),
        budget=DraftBudget(max_nodes=max_nodes, max_depth=max_depth),
    )


def random_text(rng, length=None):
    """Return token ids that repeat themselves, so that retrieval finds something."""
    return [rng.randrange(5) for _ in range(length or rng.randint(1, 40))]


def start(drafter, token_ids, request_id="r"):
    drafter.start(RequestView(request_id=request_id, prompt_ids=list(token_ids)))


def propose_fresh(drafter, context, request_id="fresh"):
    """Return the draft for a context as if its whole text were a new prompt."""
    start(drafter, context.token_ids, request_id)
    fresh = make_context(
        context.token_ids,
        request_id=request_id,
        max_nodes=context.budget.max_nodes,
        max_depth=context.budget.max_depth,
    )
    object.__setattr__(fresh, "sampler", context.sampler)
    [draft] = drafter.propose([fresh])
    drafter.stop(request_id)
    return draft


def assert_same_draft(draft, other):
    assert draft.tree.token_ids == other.tree.token_ids
    assert draft.tree.parents == other.tree.parents
    assert (draft.siblings, draft.source) == (other.siblings, other.source)
    # The same numbers, from passes of other shapes: float64 up to its last bits.
    assert draft.draft_logprobs == pytest.approx(other.draft_logprobs, rel=1e-9, abs=1e-9)


# -- registration ----------------------------------------------------------------------------


def test_every_registered_drafter_is_in_the_suite():
    assert set(OPTIONS) == set(DRAFTERS._table)


def test_drafter_says_what_it_is_and_needs(name, drafter):
    assert isinstance(type(drafter).taxonomy, Taxonomy)
    assert isinstance(drafter.needs, DrafterNeeds)
    assert DRAFTERS.load(name) is type(drafter)
    assert type(drafter).Options.__dataclass_params__.frozen


# -- lossless --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("max_nodes", [0, 1, 9])
def test_output_equals_plain_decoding(drafter, target, kind, max_nodes):
    prompts = [[1, 2, 3, 4, 1, 2, 3], [7], [5, 5, 5, 5, 5, 9]]
    engine = make_engine(target, {"it": drafter}, max_nodes=max_nodes, prefill_chunk=4)
    requests = [engine.add_request(prompt, PARAMS[kind]) for prompt in prompts]
    finish(engine)
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output_ids == plain_ids(target, prompt, PARAMS[kind])
    check_idle(engine)


# -- proposals -------------------------------------------------------------------------------


@pytest.mark.parametrize("max_depth", [0, 1, 2, 5, 30])
@pytest.mark.parametrize("max_nodes", [0, 1, 2, 7, 24])
def test_draft_stays_within_its_budget_below_the_pending_token(name, drafter, max_nodes, max_depth):
    rng = random.Random(max_nodes * 31 + max_depth)
    for params in PARAMS.values():
        text = random_text(rng)
        start(drafter, text)
        [draft] = drafter.propose(
            [make_context(text, params=params, max_nodes=max_nodes, max_depth=max_depth)]
        )
        drafter.stop("r")
        assert draft.tree.token_ids[ROOT] == text[-1]
        assert draft.tree.num_draft_tokens <= max_nodes
        assert max(draft.tree.depths) <= max_depth
        assert all(0 <= token_id < VOCAB_SIZE for token_id in draft.tree.token_ids)
        assert set(draft.source[1:]) <= {name}
        assert draft.source[ROOT] == ""
        assert draft.draft_logprobs[ROOT] == 0
        assert all(-math.inf < logprob <= 0 for logprob in draft.draft_logprobs)


def test_no_siblings_are_equal(drafter):
    rng = random.Random(4)
    for _ in range(6):
        text = random_text(rng)
        start(drafter, text)
        [draft] = drafter.propose([make_context(text, max_nodes=24)])
        drafter.stop("r")
        assert len(draft.tree.sequences) == len(draft.tree)


@pytest.mark.parametrize("kind", PARAMS)
def test_proposals_are_the_same_alone_and_in_a_batch(drafter, kind):
    rng = random.Random(11)
    texts = {f"r{index}": random_text(rng) for index in range(4)}
    for request_id, text in texts.items():
        start(drafter, text, request_id)
    contexts = [
        make_context(text, request_id=request_id, params=PARAMS[kind], max_nodes=3 + index)
        for index, (request_id, text) in enumerate(texts.items())
    ]
    together = drafter.propose(contexts)
    assert len(together) == len(contexts)
    for context, draft in zip(contexts, together, strict=True):
        assert_same_draft(draft, propose_fresh(drafter, context))
    for context, draft in zip(contexts[::-1], drafter.propose(contexts[::-1]), strict=True):
        assert draft.tree == together[contexts.index(context)].tree


@pytest.mark.parametrize("kind", PARAMS)
def test_same_seed_gives_the_same_draft(build, kind):
    text = random_text(random.Random(2), 30)
    drafts = []
    for _ in range(2):
        drafter = build()
        start(drafter, text)
        drafts += drafter.propose([make_context(text, params=PARAMS[kind])])
    assert drafts[0] == drafts[1]


def test_nothing_to_propose_for_gives_nothing(drafter):
    assert drafter.propose([]) == []


def test_proposing_again_without_commit_gives_the_same_draft(drafter):
    """A step that fails after the draft leaves it to the next step to draft again."""
    text = random_text(random.Random(6), 20)
    start(drafter, text)
    [first] = drafter.propose([make_context(text)])
    [second] = drafter.propose([make_context(text)])
    assert_same_draft(first, second)


# -- commits ---------------------------------------------------------------------------------


def verdict_of(draft, share, rng):
    """Return a verdict that accepts a share of the deepest path, then a token not drafted there."""
    tree = draft.tree
    deepest = max(range(len(tree)), key=lambda node: tree.depths[node])
    path = tree.path(deepest)[1:]
    path = path[: round(share * len(path))]
    node = path[-1] if path else ROOT
    drafted = {tree.token_ids[child] for child in tree.children[node]}
    final_id = next(token for token in rng.sample(range(VOCAB_SIZE), 40) if token not in drafted)
    kind = FinalKind.RECOVERED if tree.children[node] else FinalKind.BONUS
    return Verdict(tuple(path), (*(tree.token_ids[step] for step in path), final_id), kind)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0], ids=["full", "partial", "zero"])
@pytest.mark.parametrize("kind", PARAMS)
def test_draft_after_a_commit_is_that_of_the_whole_text(drafter, share, kind):
    rng = random.Random(9)
    text = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    start(drafter, text)
    for _ in range(5):
        context = make_context(text, params=PARAMS[kind])
        [draft] = drafter.propose([context])
        assert_same_draft(draft, propose_fresh(drafter, context))
        verdict = verdict_of(draft, share, rng)
        drafter.commit("r", verdict)
        text += verdict.token_ids


def test_commit_of_a_step_that_it_did_not_draft_for(drafter):
    """Plain steps, and steps that another drafter won, are committed to every drafter."""
    text = [1, 2, 3, 1, 2]
    start(drafter, text)
    for step, path in enumerate([(), (1, 2), (), (3,)]):
        verdict = Verdict(path, tuple(range(step, step + len(path) + 1)), FinalKind.BONUS)
        drafter.commit("r", verdict)
        text += verdict.token_ids
    context = make_context(text)
    [draft] = drafter.propose([context])
    assert_same_draft(draft, propose_fresh(drafter, context))


def test_commit_of_another_drafters_path(drafter):
    text = [1, 2, 3, 1, 2, 3, 1]
    start(drafter, text)
    for _ in range(3):
        drafter.propose([make_context(text)])
        verdict = Verdict((4, 7), (30, 31, 32), FinalKind.RECOVERED)
        drafter.commit("r", verdict)
        text += verdict.token_ids
    context = make_context(text)
    [draft] = drafter.propose([context])
    assert_same_draft(draft, propose_fresh(drafter, context))


# -- the end ---------------------------------------------------------------------------------


def test_stop_forgets_a_request_and_may_come_twice(drafter):
    held_before = held_sizes(drafter)
    rng = random.Random(8)
    texts = {f"r{index}": random_text(rng, 30) for index in range(3)}
    for request_id, text in texts.items():
        start(drafter, text, request_id)
    drafter.propose([make_context(text, request_id=key) for key, text in texts.items()])
    drafter.commit("r0", Verdict((), (3,), FinalKind.RECOVERED))
    for request_id in [*texts, *texts, "never started"]:
        drafter.stop(request_id)
    assert held_sizes(drafter) == held_before
    if drafter.needs.draft_cache:
        drafter._cache.check_integrity()
        assert drafter._cache.num_sequences == 0
        assert drafter._cache.num_free_blocks == drafter._cache.num_blocks


def test_an_id_can_be_used_again_after_stop(drafter):
    start(drafter, [1, 2, 1, 2, 1])
    drafter.propose([make_context([1, 2, 1, 2, 1])])
    drafter.stop("r")
    start(drafter, [4, 3, 4, 3, 4])
    context = make_context([4, 3, 4, 3, 4])
    [draft] = drafter.propose([context])
    assert_same_draft(draft, propose_fresh(drafter, context))
