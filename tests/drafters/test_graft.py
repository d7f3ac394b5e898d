"""Grafts: layers of the target over its own states; what the conformance suite does not ask."""

import random

import pytest
import torch

from foretoken.core.draft import DraftBudget
from foretoken.core.options import ComponentSpec, build_options
from foretoken.core.sampling import Sampler
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.drafters import graft
from foretoken.drafters.base import DraftContext, RequestView, StandingStates
from foretoken.drafters.graft import GraftDrafter, GraftOptions
from foretoken.engine import scheduler
from foretoken.errors import ModelError
from foretoken.models.heads.files import target_tensors
from foretoken.models.loading import load_model
from foretoken.training.heads.kinds import KINDS
from tests.engines import (
    check_idle,
    finish,
    greedy,
    make_engine,
    make_host,
    outcome_of,
    plain_ids,
    sampled,
    states_of,
)
from tests.fakes import build_module, tiny_config
from tests.heads import shape_of, write_head

VOCAB_SIZE = 32
PARAMS = {"greedy": greedy(24), "sampled": sampled(24, seed=3, temperature=0.8, top_k=20)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    config = tiny_config("llama", vocab_size=VOCAB_SIZE, max_position_embeddings=512)
    build_module(config, 3, attn_implementation="eager", dtype=torch.float32).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def target(folder):
    return load_model(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def path(folder):
    return write_head(folder, "graft", layers=2)


@pytest.fixture(scope="module")
def whole(folder):
    """A graft of all layers, not trained: it says what its target says."""
    kind, shape, path = KINDS.load("graft"), shape_of(folder), folder / "whole"
    module = kind.build(shape, target_tensors(str(folder)), {"layers": "3"})
    kind.save(module, shape, path, "# Whole\n")
    return str(path)


def make_drafter(target, path, *, kv_cache_tokens=640, **options):
    spec = ComponentSpec("graft", {"path": path, **options})
    host = make_host(target, kv_cache_tokens=kv_cache_tokens)
    return GraftDrafter.create(build_options(GraftOptions, spec), host)


def start(drafter, text, request_id="r"):
    drafter.start(RequestView(request_id=request_id, prompt_ids=list(text)))


def tell(drafter, states, first, stop, request_id="r"):
    hidden = {layer: states[layer][first:stop] for layer in drafter.needs.hidden_layers}
    drafter.observe([StandingStates(request_id=request_id, start=first, hidden=hidden)])


def draft_of(drafter, text, request_id="r"):
    context = DraftContext(
        request_id=request_id,
        token_ids=text,
        sampler=Sampler(greedy(8), 0, 3),
        budget=DraftBudget(max_nodes=12, max_depth=4),
    )
    [draft] = drafter.propose([context])
    return draft


def some_text(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


def some_prompts(seed, count=5):
    """Return prompts, most of which begin alike, so that prefixes are shared."""
    rng, common = random.Random(seed), some_text(40, seed)
    prompts = [[rng.randrange(VOCAB_SIZE)]]
    for _ in range(count - 1):
        prompts.append(common[: rng.randint(17, 40)] + some_text(rng.randint(1, 9), rng.random()))
    return prompts


# -- through the engine ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("chunk", [3, 64])
def test_output_is_that_of_plain_decoding(target, path, kind, chunk):
    prompts = some_prompts(chunk)
    drafter = make_drafter(target, path, min_gain=0.0)
    engine = make_engine(target, {"graft": drafter}, prefill_chunk=chunk, max_requests=3)
    requests = [engine.add_request(prompt, PARAMS[kind]) for prompt in prompts]
    finish(engine)
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output_ids == plain_ids(target, prompt, PARAMS[kind])
        assert request.stats.num_draft_tokens > 0
    assert engine.cache.num_prefix_hits > 0
    assert drafter._cache.num_prefix_hits > 0  # first drafts from tokens make nothing less exact
    check_idle(engine)


@pytest.mark.parametrize("kind", PARAMS)
def test_output_is_that_of_plain_decoding_when_requests_are_thrown_back(
    target, path, kind, monkeypatch
):
    monkeypatch.setattr(scheduler, "GROWTH_BLOCKS", 0)
    prompts = some_prompts(1, 8)
    drafter = make_drafter(target, path, kv_cache_tokens=128)
    engine = make_engine(
        target, {"graft": drafter}, prefill_chunk=16, max_requests=4, kv_tokens=128
    )
    requests = [engine.add_request(prompt, PARAMS[kind]) for prompt in prompts]
    finish(engine)
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output_ids == plain_ids(target, prompt, PARAMS[kind])
    assert sum(request.stats.num_preemptions for request in requests) > 0
    check_idle(engine)


def test_graft_that_is_the_target_is_always_right(target, whole):
    drafter = make_drafter(target, whole, max_depth=5, width=1, min_gain=0.0)
    engine = make_engine(target, {"graft": drafter}, max_nodes=8)
    request = engine.add_request([4, 9, 1], greedy(31))
    finish(engine)
    assert request.output_ids == plain_ids(target, [4, 9, 1], greedy(31))
    # The prompt's pass says the first token; then each of five steps has five drafted ones.
    assert (request.stats.num_steps, request.stats.num_accepted) == (1 + 5, 5 * 5)
    check_idle(engine)


# -- states ------------------------------------------------------------------------------------


def test_drafts_read_the_states_told(target, path):
    """Other states, another draft: all of the layers are read, and every position is."""
    drafter, text = make_drafter(target, path, min_gain=0.0), some_text(12)
    states = states_of(target, text, drafter.needs.hidden_layers)
    drafts = []
    for layer in (None, *drafter.needs.hidden_layers):
        for position in (2, 10):
            changed = {key: value.clone() for key, value in states.items()}
            if layer is not None:
                changed[layer][position] = -changed[layer][position]
            start(drafter, text)
            tell(drafter, changed, 0, 11)
            drafts.append(draft_of(drafter, text).draft_logprobs)
            drafter.stop("r")
    assert drafts[0] == drafts[1]
    assert len(set(drafts[1:])) == len(drafts) - 1


def test_prompt_in_pieces_gives_the_draft_of_the_whole(target, path):
    drafter, text = make_drafter(target, path), some_text(90)
    states = states_of(target, text, drafter.needs.hidden_layers)
    drafts = []
    for pieces in ([89], [1] * 89, [50, 1, 7, 31]):
        start(drafter, text[:60])
        position = 0
        for length in pieces:
            tell(drafter, states, position, position + length)
            position += length
        drafts.append(draft_of(drafter, text))
        drafter.stop("r")
    for draft in drafts[1:]:
        assert draft.tree == drafts[0].tree
        assert draft.draft_logprobs == pytest.approx(drafts[0].draft_logprobs, abs=1e-5)


def test_what_a_draft_cached_makes_way_for_the_states(target, path):
    """After a step the draft is that of a request whose states were told in one go."""
    drafter, text = make_drafter(target, path), some_text(30)
    states = states_of(target, text, drafter.needs.hidden_layers)
    start(drafter, text[:20])
    tell(drafter, states, 0, 19)
    draft_of(drafter, text[:20])
    tell(drafter, states, 19, 24)
    drafter.commit([outcome_of(Verdict((), (1,), FinalKind.RECOVERED))])
    again = draft_of(drafter, text[:25])
    drafter.stop("r")
    start(drafter, text[:25])
    tell(drafter, states, 0, 24)
    fresh = draft_of(drafter, text[:25])
    assert again.tree == fresh.tree
    assert again.draft_logprobs == pytest.approx(fresh.draft_logprobs, abs=1e-5)
    drafter.stop("r")


@pytest.mark.parametrize("num_told", [0, 12])
def test_states_take_the_place_of_tokens_that_were_run_without(target, path, num_told):
    """The first draft comes before the states of the prompt's last piece."""
    drafter, text = make_drafter(target, path), some_text(40)
    states = states_of(target, text, drafter.needs.hidden_layers)
    start(drafter, text[:20])
    tell(drafter, states, 0, num_told)
    without = draft_of(drafter, text[:20])
    tell(drafter, states, num_told, 20)
    drafter.commit([outcome_of(Verdict((), (1,), FinalKind.RECOVERED))])
    later = draft_of(drafter, text[:21])
    drafter.stop("r")
    start(drafter, text[:21])
    tell(drafter, states, 0, 20)
    told = draft_of(drafter, text[:21])
    assert without.tree.num_draft_tokens > 0
    assert later.tree == told.tree
    assert later.draft_logprobs == pytest.approx(told.draft_logprobs, abs=1e-5)
    drafter.stop("r")


def test_long_texts_wait_for_their_states(target, path, monkeypatch):
    monkeypatch.setattr(graft, "PREFILL_ROWS", 8)
    drafter, text = make_drafter(target, path), some_text(20)
    states = states_of(target, text, drafter.needs.hidden_layers)
    start(drafter, text)
    assert draft_of(drafter, text).tree.num_draft_tokens == 0
    tell(drafter, states, 0, 19)
    assert draft_of(drafter, text).tree.num_draft_tokens > 0
    drafter.stop("r")


@pytest.mark.parametrize("num_told", [0, 12])
def test_without_states_it_drafts_from_the_tokens(target, whole, num_told):
    """Of all layers the tokens say as much as the states; then states are read again."""
    drafter, text = make_drafter(target, whole), some_text(40)
    states = states_of(target, text, drafter.needs.hidden_layers)
    start(drafter, text[:20])
    tell(drafter, states, 0, num_told)
    without = draft_of(drafter, text[:20])
    tell(drafter, states, 19, 20)
    drafter.commit([outcome_of(Verdict((), (1,), FinalKind.RECOVERED))])
    assert drafter._states["r"].sequence.num_cached == 20
    later = draft_of(drafter, text[:21])
    drafter.stop("r")
    for draft, length in ((without, 20), (later, 21)):
        start(drafter, text[:length])
        tell(drafter, states, 0, length - 1)
        told = draft_of(drafter, text[:length])
        assert draft.tree == told.tree
        assert draft.draft_logprobs == pytest.approx(told.draft_logprobs, abs=1e-5)
        drafter.stop("r")


def test_states_that_begin_late_are_read_behind_the_tokens(target, whole, monkeypatch):
    """The target found the first tokens in its prefix cache: their states are never told."""
    monkeypatch.setattr(graft, "PREFILL_ROWS", 8)
    drafter, text = make_drafter(target, whole), some_text(40)
    states = states_of(target, text, drafter.needs.hidden_layers)
    start(drafter, text)
    tell(drafter, states, 32, 39)
    assert drafter._states["r"].sequence.num_cached == 39
    late = draft_of(drafter, text)
    drafter.stop("r")
    start(drafter, text, "second")  # nothing of it is exact, so nothing is shared
    assert drafter._states["second"].sequence.num_cached == 0
    tell(drafter, states, 0, 39, "second")
    told = draft_of(drafter, text, "second")
    assert late.tree == told.tree
    assert late.draft_logprobs == pytest.approx(told.draft_logprobs, abs=1e-5)
    drafter.stop("second")


def test_rows_of_the_same_beginning_are_taken_over(target, path):
    """The target tells no states of a prefix that it has cached; the graft has cached it too."""
    drafter, text = make_drafter(target, path), some_text(45)
    states = states_of(target, text, drafter.needs.hidden_layers)
    start(drafter, text, "first")
    tell(drafter, states, 0, 44, "first")
    whole = draft_of(drafter, text, "first")
    for first_told in (32, 10):  # the target may have let go of more than the graft has
        start(drafter, text, "second")
        assert drafter._states["second"].sequence.num_cached == 32
        tell(drafter, states, first_told, 44, "second")
        again = draft_of(drafter, text, "second")
        assert again.tree == whole.tree
        assert again.draft_logprobs == pytest.approx(whole.draft_logprobs, abs=1e-6)
        drafter.stop("second")
    drafter.stop("first")
    drafter._cache.check_integrity()


def test_states_of_requests_that_it_does_not_know_are_ignored(target, path):
    drafter, text = make_drafter(target, path), some_text(9)
    states = states_of(target, text, drafter.needs.hidden_layers)
    tell(drafter, states, 0, 8)
    assert drafter._cache.num_sequences == 0


def test_heads_of_other_kinds_and_incomplete_ones_are_refused(target, folder, path, tmp_path):
    with pytest.raises(ModelError, match="'medusa'; 'graft' is needed"):
        make_drafter(target, write_head(folder, "medusa"))
    (tmp_path / "config.json").write_text((folder / "graft-0/config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(
        (folder / "graft-0/model.safetensors").read_bytes()
    )
    with pytest.raises(ModelError, match="draft"):
        make_drafter(target, str(tmp_path))
