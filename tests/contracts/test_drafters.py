"""What every registered drafter must do. A drafter joins by one line in `OPTIONS`."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from foretoken.core.draft import DraftBudget, SiblingDraw, source_names
from foretoken.core.options import ComponentSpec
from foretoken.core.sampling import Sampler
from foretoken.core.tree import ROOT
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.drafters import DRAFTERS, prepare_drafter
from foretoken.drafters.base import (
    DraftContext,
    DrafterNeeds,
    Follower,
    RequestView,
    Retracer,
    StandingStates,
    Taxonomy,
)
from foretoken.drafters.datastore import Datastore
from foretoken.drafters.token_files import vocabulary_digest, write_token_file
from foretoken.drafters.token_recycling import FILE_KIND as SUCCESSORS
from foretoken.drafters.token_recycling import NUM_SUCCESSORS
from foretoken.models.loading import load_model
from tests.engines import (
    check_idle,
    draft_caches,
    finish,
    greedy,
    held_sizes,
    make_engine,
    make_host,
    outcome_of,
    plain_ids,
    sampled,
    states_of,
)
from tests.fakes import ASCII_ALPHABET, ByteTokenizer, build_module, tiny_config
from tests.heads import write_head
from tests.looped import make_looped
from tests.mtp import write_mtp_model

VOCAB_SIZE = 41
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
}

TOKENIZER = ByteTokenizer(b"?" + ASCII_ALPHABET[: VOCAB_SIZE - 1])


def write_reference(folder):
    """Write a text with which the texts of this suite have runs in common."""
    path = folder / "reference.txt"
    token_ids = random_text(random.Random(0), 300)
    path.write_text(TOKENIZER.decode(token_ids), encoding="utf-8")
    return str(path)


def write_datastore(folder):
    path = folder / "datastore"
    texts = [random_text(random.Random(seed)) for seed in range(40)]
    Datastore.build(texts).save(path, TOKENIZER)
    return str(path)


def write_successors(folder):
    """Write successors of most tokens, more or fewer, as earlier requests leave them."""
    path, rng = folder / "successors", np.random.default_rng(0)
    table = np.stack([rng.permutation(VOCAB_SIZE)[:NUM_SUCCESSORS] for _ in range(VOCAB_SIZE)])
    for token_id, num_known in enumerate(rng.integers(0, NUM_SUCCESSORS + 1, VOCAB_SIZE)):
        table[token_id, num_known:] = -1
    vocabulary = vocabulary_digest(VOCAB_SIZE, TOKENIZER)
    write_token_file(path, SUCCESSORS, vocabulary, list(table.T.astype(np.int32)))
    return str(path)


def write_other_model(folder):
    """Write a model whose tokenizer has other tokens, some of them of two characters."""
    path = folder / "other"
    pieces = [*sorted(set(TOKENIZER.vocabulary), reverse=True), "ab", "ba", "a ", " b"]
    merges = [(pair[0], pair[1]) for pair in pieces if len(pair) == 2]
    raw = RawTokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, merges))
    raw.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(path)
    config = tiny_config("llama", **{**SIZES, "vocab_size": len(pieces)})
    build_module(config, seed=4).save_pretrained(path)
    return str(path)


# Name: least options, made from a directory that holds a model of the target's tokens.
OPTIONS = {
    "none": lambda folder: {},
    "prompt-lookup": lambda folder: {},
    "draft-model": lambda folder: {"path": str(folder)},
    "universal": lambda folder: {"path": write_other_model(folder), "mode": "text"},
    "early-exit": lambda folder: {},
    "layer-skip": lambda folder: {},
    "forced": lambda folder: {},
    "suffix": lambda folder: {},
    "reference": lambda folder: {"path": write_reference(folder)},
    "rest": lambda folder: {"path": write_datastore(folder)},
    "token-recycling": lambda folder: {"path": write_successors(folder)},
    "lookahead": lambda folder: {},
    "merged": lambda folder: {"of": f"suffix+draft-model(path={folder},max_depth=3)+suffix"},
    "medusa": lambda folder: {"path": write_head(folder, "medusa")},
    "hydra": lambda folder: {"path": write_head(folder, "hydra")},
    "eagle": lambda folder: {"path": write_head(folder, "eagle", steps=3)},
    "parallel": lambda folder: {"path": write_head(folder, "parallel", steps=3)},
    "graft": lambda folder: {"path": write_head(folder, "graft", layers=2)},
    "mtp": lambda folder: {},
    "speed": lambda folder: {},
    "loopspec": lambda folder: {},
    "kangaroo": lambda folder: {"path": write_head(folder, "kangaroo", heads=2), "eta": 0.05},
    "tail": lambda folder: {
        "of": f"draft-model(path={folder},max_depth=2)",
        "then": "suffix+prompt-lookup",
    },
    "cascade": lambda folder: {
        "of": f"draft-model(path={folder},max_depth=2)+draft-model(path={folder},width=2)",
        "guess": "prompt-lookup+suffix",
    },
}
# Drafters that draft inside the target's pass, and nothing beside it.
IN_FLIGHT = ("speed", "loopspec")
# Of drafters that are made of drafters: the names that their nodes carry.
SOURCES = {
    "merged": {"suffix", "draft-model", "suffix#2"},
    "tail": {"draft-model", "suffix", "prompt-lookup"},
    "cascade": {"draft-model", "draft-model#2"},
}


def is_follower(name):
    return issubclass(DRAFTERS.load(name), Follower)


def is_retracer(name):
    return issubclass(DRAFTERS.load(name), Retracer)


def build_drafter(name, folder, target):
    """Return a drafter that `start` and `commit` can tell of its target's states."""
    spec = ComponentSpec(name, OPTIONS[name](folder))
    drafter = prepare_drafter(spec)(make_host(target, tokenizer=TOKENIZER))
    drafter.target_of_suite = target
    return drafter


PARAMS = {"greedy": greedy(12), "sampled": sampled(12, seed=5, temperature=0.7, top_k=12)}
SAMPLES = (SiblingDraw.IID, SiblingDraw.WITHOUT_REPLACEMENT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_module(tiny_config("llama", **SIZES), seed=3).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain_target(folder):
    # The draft model is the target itself, so that whole paths are accepted.
    return load_model(str(folder), dtype="float64", device="cpu")


@pytest.fixture(scope="module")
def mtp_target(tmp_path_factory):
    path = tmp_path_factory.mktemp("mtp")
    write_mtp_model(path, "mellum", vocab_size=VOCAB_SIZE, num_layers=2)
    return load_model(str(path), dtype="float64", device="cpu")


@pytest.fixture(scope="module")
def looped_target(tmp_path_factory):
    path = make_looped(tmp_path_factory.mktemp("looped"), vocab=VOCAB_SIZE, hidden=16, loops=4)
    return load_model(path, dtype="float64", device="cpu")


@pytest.fixture
def target(request):
    """Return a target that the drafter of a test can draft for."""
    asked = request.fixturenames
    way = request.getfixturevalue("way") if "way" in asked else (None,)
    name = request.getfixturevalue("name") if "name" in asked else way[0]
    kind = "mtp" if name == "mtp" else "looped" if name in IN_FLIGHT else "plain"
    return request.getfixturevalue(f"{kind}_target")


@pytest.fixture(params=sorted(OPTIONS))
def name(request):
    return request.param


# Every drafter with every way in which it can draw siblings.
WAYS = [
    pytest.param((name, way), id=f"{name}-{way.value}")
    for name in sorted(OPTIONS)
    for way in SiblingDraw
    if way in DRAFTERS.load(name).draws
]


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


@pytest.fixture
def way_drafter(way, folder, target):
    return build_drafter(way[0], folder, target)


@pytest.fixture
def build(name, folder, target):
    return lambda: build_drafter(name, folder, target)


@pytest.fixture
def drafter(build):
    return build()


def make_context(
    token_ids, *, request_id="r", params=PARAMS["greedy"], siblings=None, place=0, **budget
):
    siblings = siblings or (SiblingDraw.DETERMINISTIC if params.is_greedy else SiblingDraw.COUPLED)
    return DraftContext(
        request_id=request_id,
        token_ids=token_ids,
        sampler=Sampler(params, params.seed or 0, 3),
        budget=DraftBudget(**{"max_nodes": 8, "max_depth": 8, **budget}),
        siblings=siblings,
        drafter_index=place,
    )


def random_text(rng, length=None):
    """Return token ids that repeat themselves, so that retrieval finds something."""
    return [rng.randrange(5) for _ in range(length or rng.randint(1, 40))]


def start(drafter, token_ids, request_id="r"):
    drafter.start(RequestView(request_id=request_id, prompt_ids=list(token_ids)))
    tell(drafter, token_ids, range(len(token_ids) - 1), request_id)


def tell(drafter, token_ids, positions, request_id):
    """Tell a drafter that asks for them of the target's states at some positions of a text."""
    layers = drafter.needs.hidden_layers
    if layers and positions:
        states = states_of(drafter.target_of_suite, token_ids, layers)
        hidden = {layer: states[layer][positions.start : positions.stop] for layer in layers}
        drafter.observe(
            [StandingStates(request_id=request_id, start=positions.start, hidden=hidden)]
        )


def commit(drafter, text, verdict, request_id="r"):
    """Do what the engine does at the end of a step; the text takes the verdict's tokens."""
    num_told = len(text) - 1
    text += verdict.token_ids
    tell(drafter, text, range(num_told, len(text) - 1), request_id)
    drafter.commit([outcome_of(verdict, request_id)])


def propose_fresh(drafter, context, request_id="fresh"):
    """Return the draft for a context as if its whole text were a new prompt."""
    start(drafter, context.token_ids, request_id)
    [draft] = drafter.propose([replace(context, request_id=request_id)])
    drafter.stop(request_id)
    return draft


def nodes_drawn(draft):
    return {node: [group.nodes for group in groups] for node, groups in draft.draws.items()}


def assert_same_draft(draft, other):
    assert draft.tree.token_ids == other.tree.token_ids
    assert draft.tree.parents == other.tree.parents
    assert (draft.siblings, draft.source) == (other.siblings, other.source)
    assert nodes_drawn(draft) == nodes_drawn(other)
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
        sources = {part for source in draft.source[1:] for part in source_names(source)}
        assert sources <= SOURCES.get(name, {name})
        assert all(draft.source[1:])
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


@pytest.mark.parametrize("name", [it for it in sorted(OPTIONS) if is_follower(it)])
def test_following_a_path_is_drafting_after_it_and_learns_nothing(drafter):
    rng = random.Random(21)
    for _ in range(20):
        text, path = random_text(rng), random_text(rng, rng.randint(1, 9))
        start(drafter, text)
        context = make_context(text)
        if rng.random() < 0.5:  # it may be asked first
            drafter.propose([context])
        followed = drafter.follow(context, path)
        assert_same_draft(followed, propose_fresh(drafter, make_context(text + path)))
        assert_same_draft(drafter.follow(context, []), propose_fresh(drafter, context))
        assert_same_draft(drafter.propose([context])[0], propose_fresh(drafter, context))
        drafter.stop("r")


def given_along(drafter, text, num_known, max_nodes):
    """Return what drafts along a text give, one proposal after the other."""
    counts = [0] * (1 + max_nodes)
    while num_known < len(text):
        context = make_context(text[:num_known], max_nodes=max_nodes, max_depth=max_nodes)
        path = propose_fresh(drafter, context).tree.match(text[num_known:])
        for place in (0, *path):
            counts[place] += 1
        num_known += len(path) + 1
    return counts


@pytest.mark.parametrize("max_nodes", [1, 3, 12])
@pytest.mark.parametrize("name", [it for it in sorted(OPTIONS) if is_retracer(it)])
def test_retracing_a_text_is_drafting_along_it_and_learns_nothing(drafter, max_nodes):
    rng = random.Random(5)
    some_taken = 0
    for served in range(12):
        text = random_text(rng, rng.randint(2, 60))
        num_known = rng.randint(1, len(text) - 1)
        start(drafter, text[:num_known])
        expected = given_along(drafter, text, num_known, max_nodes)
        counts = drafter.retrace(text, num_known, max_nodes).tolist()
        assert counts == expected
        assert drafter.retrace(text, num_known, max_nodes).tolist() == expected
        assert not drafter.retrace(text, len(text), max_nodes).any()
        some_taken += sum(counts[1:])
        if served % 2:  # what ends may teach drafters something; the next text is then another
            drafter.propose([make_context(text)])
            assert drafter.retrace(text, num_known, max_nodes).tolist() == expected
        drafter.stop("r")
    assert some_taken > 20


# -- ways of drawing -------------------------------------------------------------------------


def propose_sampled(drafter, way, text, *, seed=5, place=0, **budget):
    """Return the draft of a text for a sampled request, drawn in a way."""
    params = sampled(12, seed=seed, temperature=0.9, top_k=20)
    start(drafter, text)
    context = make_context(text, params=params, siblings=way[1], place=place, **budget)
    [draft] = drafter.propose([context])
    drafter.stop("r")
    return draft


@pytest.mark.parametrize("max_nodes", [1, 3, 8])
@pytest.mark.parametrize("max_width", [None, 1, 2])
def test_every_way_keeps_to_the_budget_and_says_what_it_was(way, way_drafter, max_width, max_nodes):
    rng = random.Random(max_nodes)
    for _ in range(4):
        budget = {"max_nodes": max_nodes, "max_depth": 4, "max_width": max_width}
        draft = propose_sampled(way_drafter, way, random_text(rng), **budget)
        assert draft.tree.num_draft_tokens <= max_nodes
        assert max(draft.tree.depths) <= 4
        assert max_width is None or max(map(len, draft.tree.children)) <= max_width
        assert not draft.tree.num_draft_tokens or draft.siblings is way[1]
        assert len(draft.tree.sequences) == len(draft.tree)
        assert draft.prune(max_nodes) == draft


def test_samples_come_with_their_draws_and_nothing_else_does(way, way_drafter):
    draft = propose_sampled(way_drafter, way, random_text(random.Random(1)), max_nodes=12)
    if way[1] not in SAMPLES:
        assert not draft.draws
        return
    assert draft.draws or way[0] in ("none", *IN_FLIGHT)
    for node, children in enumerate(draft.tree.children):
        groups = draft.draws.get(node, ())
        assert {child for group in groups for child in group.nodes} == set(children)
        for group in groups:
            drawn = [draft.tree.token_ids[child] for child in group.nodes]
            assert group.probs.shape == (VOCAB_SIZE,)
            assert group.probs.dtype == np.float64
            assert group.probs.sum() == pytest.approx(1, abs=1e-12)
            assert (group.probs[drawn] > 0).all()
            if way[1] is SiblingDraw.WITHOUT_REPLACEMENT:
                assert len(set(drawn)) == len(drawn)
    num_draws = sum(len(group.nodes) for groups in draft.draws.values() for group in groups)
    assert num_draws >= draft.tree.num_draft_tokens


def test_every_way_is_the_same_alone_in_a_batch_and_again(way, way_drafter):
    rng = random.Random(11)
    params = sampled(12, seed=3, temperature=0.9)
    contexts = []
    for index in range(4):
        text = random_text(rng)
        start(way_drafter, text, f"r{index}")
        contexts.append(
            make_context(
                text, request_id=f"r{index}", params=params, siblings=way[1], max_nodes=3 + index
            )
        )
    together = way_drafter.propose(contexts)
    for context, draft, again in zip(
        contexts, together, way_drafter.propose(contexts), strict=True
    ):
        assert_same_draft(draft, again)
        assert_same_draft(draft, propose_fresh(way_drafter, context))


def test_samples_depend_on_seed_position_and_place_among_the_drafters(way, way_drafter):
    if way[1] not in SAMPLES or way[0] in ("none", *IN_FLIGHT):
        pytest.skip("samples nothing")
    text = random_text(random.Random(3), 12)
    options = [{}, {"seed": 6}, {"place": 1}]
    trees = [propose_sampled(way_drafter, way, text, **more).tree for more in options]
    assert len(set(trees)) == 3
    # The same last token and model state at another position: other samples.
    texts = [[4] * count for count in range(3, 9)]
    firsts = {propose_sampled(way_drafter, way, text).tree.token_ids[1] for text in texts}
    assert len(firsts) > 1


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
        commit(drafter, text, verdict)


def test_commit_of_a_step_that_it_did_not_draft_for(drafter):
    """Plain steps, and steps that another drafter won, are committed to every drafter."""
    text = [1, 2, 3, 1, 2]
    start(drafter, text)
    for step, path in enumerate([(), (1, 2), (), (3,)]):
        verdict = Verdict(path, tuple(range(step, step + len(path) + 1)), FinalKind.BONUS)
        commit(drafter, text, verdict)
    context = make_context(text)
    [draft] = drafter.propose([context])
    assert_same_draft(draft, propose_fresh(drafter, context))


def test_commit_of_another_drafters_path(drafter):
    text = [1, 2, 3, 1, 2, 3, 1]
    start(drafter, text)
    for _ in range(3):
        drafter.propose([make_context(text)])
        verdict = Verdict((4, 7), (30, 31, 32), FinalKind.RECOVERED)
        commit(drafter, text, verdict)
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
    commit(drafter, texts["r0"], Verdict((), (3,), FinalKind.RECOVERED), "r0")
    for request_id in [*texts, *texts, "never started"]:
        drafter.stop(request_id)
    assert held_sizes(drafter) == held_before
    for cache in draft_caches(drafter):
        cache.check_integrity()
        assert cache.num_sequences == 0
        assert cache.num_free_blocks == cache.num_blocks


def test_an_id_can_be_used_again_after_stop(drafter):
    start(drafter, [1, 2, 1, 2, 1])
    drafter.propose([make_context([1, 2, 1, 2, 1])])
    drafter.stop("r")
    start(drafter, [4, 3, 4, 3, 4])
    context = make_context([4, 3, 4, 3, 4])
    [draft] = drafter.propose([context])
    assert_same_draft(draft, propose_fresh(drafter, context))
