"""EAGLE: heads that go on from the target's states; what the conformance suite does not ask."""

import random

import pytest
import torch

from foretoken.core.draft import DraftBudget
from foretoken.core.options import ComponentSpec, build_options
from foretoken.core.sampling import Sampler
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.drafters import eagle, prepare_drafter
from foretoken.drafters.base import DraftContext, RequestView, StandingStates
from foretoken.drafters.eagle import EagleDrafter, EagleOptions
from foretoken.engine import scheduler
from foretoken.errors import ModelError
from foretoken.models.heads.eagle import EAGLE_1, EagleDesign, EagleModule
from foretoken.models.heads.eagle_layer import LayerSizes
from foretoken.models.heads.eagle_served import ServedEagle
from foretoken.models.heads.files import TargetShape
from foretoken.models.loading import load_model
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
from tests.heads import random_tensors, write_head

VOCAB_SIZE = 32
PARAMS = {"greedy": greedy(24), "sampled": sampled(24, seed=3, temperature=0.8, top_k=20)}
VARIANTS = {
    "eagle-1": {"variant": "eagle-1"},
    "eagle-3": {"steps": 3},
    "narrow": {"width": 12, "heads": 2, "kv_heads": 1, "draft_vocab": 20},
}


def write_target(folder, **changes):
    config = tiny_config(
        "llama",
        **{"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 3, **changes},
    )
    build_module(config, 3, attn_implementation="eager", dtype=torch.float32).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def target(folder):
    return load_model(str(folder), dtype="float32")


@pytest.fixture(params=VARIANTS)
def path(request, folder):
    return write_head(
        folder, "eagle", list(VARIANTS).index(request.param), **VARIANTS[request.param]
    )


def make_drafter(target, path, *, dtype="auto", kv_cache_tokens=640, **options):
    host = make_host(target, kv_cache_tokens=kv_cache_tokens)
    host = type(host)(**{**{name: getattr(host, name) for name in host.__slots__}, "dtype": dtype})
    spec = ComponentSpec("eagle", {"path": path, **options})
    return EagleDrafter.create(build_options(EagleOptions, spec), host)


def make_context(token_ids, request_id="r", max_nodes=12, max_depth=4):
    return DraftContext(
        request_id=request_id,
        token_ids=token_ids,
        sampler=Sampler(greedy(8), 0, 3),
        budget=DraftBudget(max_nodes=max_nodes, max_depth=max_depth),
    )


def tell(drafter, states, start, stop, request_id="r"):
    hidden = {layer: states[layer][start:stop] for layer in drafter.needs.hidden_layers}
    drafter.observe([StandingStates(request_id=request_id, start=start, hidden=hidden)])


def start(drafter, text, request_id="r"):
    drafter.start(RequestView(request_id=request_id, prompt_ids=list(text)))


def draft_of(drafter, text, request_id="r"):
    [draft] = drafter.propose([make_context(text, request_id)])
    return draft


# -- through the engine ------------------------------------------------------------------------


def some_prompts(rng, count=5):
    """Return prompts, most of which begin alike, so that prefixes are shared."""
    common = [rng.randrange(VOCAB_SIZE) for _ in range(40)]
    prompts = [[rng.randrange(VOCAB_SIZE)]]
    for _ in range(count - 1):
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 9))]
        prompts.append(common[: rng.randint(17, 40)] + own)
    return prompts


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("chunk", [3, 64])
def test_output_is_that_of_plain_decoding(target, path, kind, chunk):
    prompts = some_prompts(random.Random(chunk))
    drafter = make_drafter(target, path, min_gain=0.0)
    engine = make_engine(target, {"eagle": drafter}, prefill_chunk=chunk, max_requests=3)
    requests = [engine.add_request(prompt, PARAMS[kind]) for prompt in prompts]
    finish(engine)
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output_ids == plain_ids(target, prompt, PARAMS[kind])
        assert request.stats.num_draft_tokens > 0
    assert engine.cache.num_prefix_hits > 0
    check_idle(engine)


@pytest.mark.parametrize("kind", PARAMS)
def test_output_is_that_of_plain_decoding_when_requests_are_thrown_back(
    target, path, kind, monkeypatch
):
    monkeypatch.setattr(scheduler, "GROWTH_BLOCKS", 0)
    prompts = some_prompts(random.Random(1), 8)
    drafter = make_drafter(target, path, kv_cache_tokens=128)
    engine = make_engine(
        target, {"eagle": drafter}, prefill_chunk=16, max_requests=4, kv_tokens=128
    )
    requests = [engine.add_request(prompt, PARAMS[kind]) for prompt in prompts]
    finish(engine)
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output_ids == plain_ids(target, prompt, PARAMS[kind])
    assert sum(request.stats.num_preemptions for request in requests) > 0
    check_idle(engine)


def test_output_is_that_of_plain_decoding_among_other_drafters(target, path):
    """Steps in which others draft, and drafts of which others' tokens are taken."""
    spec = ComponentSpec(
        "merged", {"of": f"eagle(path={path},max_depth=2)+suffix+eagle(path={path})"}
    )
    drafters = {
        "merged": prepare_drafter(spec)(make_host(target)),
        "eagle": make_drafter(target, path),
    }
    engine = make_engine(target, drafters, max_requests=3)
    labels = [None, ["eagle"], ["merged"], None]
    requests = [
        engine.add_request(prompt, PARAMS["sampled"], drafters=own)
        for prompt, own in zip(some_prompts(random.Random(5), 4), labels, strict=True)
    ]
    finish(engine)
    for request in requests:
        assert request.output_ids == plain_ids(target, request.prompt_ids, PARAMS["sampled"])
        assert request.stats.num_draft_tokens > 0
    check_idle(engine)


def make_oracle(folder, num_layers=1):
    """Return a target that says after each token another one, always the same, and its head.

    The target's layers add nothing. The head's embedding and language-model head are unit vectors,
    and `fc` maps each token's to that of the one after it.
    """
    config = tiny_config(
        "llama", vocab_size=VOCAB_SIZE, hidden_size=VOCAB_SIZE, num_hidden_layers=num_layers
    )
    module = build_module(config, 8, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for layer in module.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        following = module(input_ids=torch.arange(VOCAB_SIZE)[:, None]).logits[:, 0].argmax(-1)
    module.save_pretrained(folder)
    target = load_model(str(folder), dtype="float32")
    sizes = LayerSizes(hidden=VOCAB_SIZE, heads=2, kv_heads=2, head_dim=16, intermediate=8)
    design = EagleDesign(
        variant=EAGLE_1,
        sizes=sizes,
        target_layers=(num_layers,),
        has_embedding=True,
        has_head=True,
    )
    shape = TargetShape.of(target.info)
    head = EagleModule(design, shape, random_tensors(shape))
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() == 2:
                parameter.zero_()
        head.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE))
        head.lm_head.weight.copy_(torch.eye(VOCAB_SIZE) * 20)
        head.fc.weight[:, :VOCAB_SIZE] = torch.nn.functional.one_hot(
            following, VOCAB_SIZE
        ).T.float()
    return target, head


def test_head_that_is_always_right_reaches_the_full_depth(tmp_path):
    target, head = make_oracle(tmp_path)
    host = make_host(target)
    drafter = EagleDrafter(
        ServedEagle(head, target.info), EagleOptions(path="unused", max_depth=5, width=1), host
    )
    engine = make_engine(target, {"eagle": drafter}, max_nodes=8)
    request = engine.add_request([4, 9, 1], greedy(31))
    finish(engine)
    assert request.output_ids == plain_ids(target, [4, 9, 1], greedy(31))
    # The first step has no states to go on from; five of six steps' tokens are drafted then.
    assert (request.stats.num_steps, request.stats.num_accepted) == (1 + 5, 5 * 5)
    check_idle(engine)


# -- states ------------------------------------------------------------------------------------


def test_no_draft_before_the_states_are_known(target, path):
    drafter, text = make_drafter(target, path), [1, 2, 3, 4, 5]
    states = states_of(target, text, drafter.needs.hidden_layers)
    start(drafter, text)
    assert draft_of(drafter, text).tree.num_draft_tokens == 0
    tell(drafter, states, 0, 3)  # but not of the token before the root
    assert draft_of(drafter, text).tree.num_draft_tokens == 0
    tell(drafter, states, 3, 4)
    assert draft_of(drafter, text).tree.num_draft_tokens > 0
    drafter.stop("r")


def test_drafts_read_the_states_told(target, path):
    """Other states, another draft: all of the layers are read, and every position is."""
    drafter, text = make_drafter(target, path, min_gain=0.0), list(range(12))
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


def test_prompt_in_pieces_gives_the_draft_of_the_whole(target, path, monkeypatch):
    monkeypatch.setattr(eagle, "PREFILL_ROWS", 4)
    rng = random.Random(3)
    text = [rng.randrange(VOCAB_SIZE) for _ in range(90)]
    drafter = make_drafter(target, path)
    states = states_of(target, text, drafter.needs.hidden_layers)
    drafts = []
    for pieces in ([89], [1] * 89, [50, 1, 7, 31]):
        start(drafter, text[:60])
        position = 0
        for length in pieces:
            tell(drafter, states, position, position + length)
            position += length
            # Rows of the prompt are run as their states come, so few of them wait.
            assert len(drafter._waiting["r"]) <= max(4, position - 59) or length > 4
        drafts.append(draft_of(drafter, text))
        drafter.stop("r")
    for draft in drafts[1:]:
        assert draft.tree == drafts[0].tree
        assert draft.draft_logprobs == pytest.approx(drafts[0].draft_logprobs, abs=1e-5)


def test_states_that_begin_late_are_used(target, path):
    """The first tokens were found in the prefix cache: their states are never told."""
    text = list(range(20))
    drafter = make_drafter(target, path)
    states = states_of(target, text, drafter.needs.hidden_layers)
    start(drafter, text)
    tell(drafter, states, 16, 19)
    draft = draft_of(drafter, text)
    assert draft.tree.num_draft_tokens > 0
    drafter.stop("r")
    # The same states and tokens elsewhere: rotations are relative.
    start(drafter, text[10:])
    tell(drafter, {layer: it[10:] for layer, it in states.items()}, 6, 9)
    other = draft_of(drafter, text[10:])
    assert other.tree == draft.tree
    assert other.draft_logprobs == pytest.approx(draft.draft_logprobs, abs=1e-6)


def run_whole(drafter, states, text, request_id):
    """Draft for a text and keep its rows, so that others may take them over."""
    start(drafter, text, request_id)
    tell(drafter, states, 0, len(text) - 1, request_id)
    draft = draft_of(drafter, text, request_id)
    drafter.commit([outcome_of(Verdict((), (1,), FinalKind.RECOVERED), request_id)])
    later = states_of_more(states, drafter)
    tell(drafter, later, len(text) - 1, len(text), request_id)
    draft_of(drafter, [*text, 1], request_id)
    return draft


def states_of_more(states, drafter):
    """Return states with one more position, which nothing is asked about."""
    return {layer: torch.cat((it, it[:1])) for layer, it in states.items()}


def test_rows_of_the_same_beginning_are_taken_over(target, path):
    """The target tells no states of a prefix that it has cached; the head has cached it too."""
    text = [index * 7 % VOCAB_SIZE for index in range(45)]
    drafter = make_drafter(target, path)
    states = states_of(target, text, drafter.needs.hidden_layers)
    whole = run_whole(drafter, states, text, "first")
    start(drafter, text, "second")
    assert drafter._states["second"].sequence.num_cached == 32
    for first_told in (32, 10):  # the target may have let go of more than the head has
        tell(drafter, states, first_told, 44, "second")
        again = draft_of(drafter, text, "second")
        assert again.tree == whole.tree
        assert again.draft_logprobs == pytest.approx(whole.draft_logprobs, abs=1e-6)
        drafter.stop("second")
        start(drafter, text, "second")
    # Of another first token no row is the same, nor of another one further on.
    for position, num_shared in ((0, 0), (20, 16)):
        other = text.copy()
        other[position] = (other[position] + 1) % VOCAB_SIZE
        start(drafter, other, "other")
        assert drafter._states["other"].sequence.num_cached == num_shared
        drafter.stop("other")
    for request_id in ("first", "second"):
        drafter.stop(request_id)
    drafter._cache.check_integrity()


def test_rows_without_their_beginning_are_not_shared(target, path):
    text = [index * 7 % VOCAB_SIZE for index in range(60)]
    drafter = make_drafter(target, path)
    states = states_of(target, text, drafter.needs.hidden_layers)
    start(drafter, text)
    tell(drafter, states, 16, 59)
    draft_of(drafter, text)
    drafter.commit([outcome_of(Verdict((), (1,), FinalKind.RECOVERED))])
    tell(drafter, states, 59, 60)
    assert draft_of(drafter, [*text, 1]).tree.num_draft_tokens > 0
    start(drafter, text, "second")
    assert drafter._states["second"].sequence.num_cached == 0
    assert drafter._cache.num_cached_blocks == 0


def test_states_with_a_gap_begin_anew(target, path):
    text = list(range(24))
    drafter = make_drafter(target, path)
    states = states_of(target, text, drafter.needs.hidden_layers)
    start(drafter, text)
    tell(drafter, states, 0, 5)
    tell(drafter, states, 18, 23)
    gapped = draft_of(drafter, text)
    drafter.stop("r")
    start(drafter, text)
    tell(drafter, states, 18, 23)
    assert draft_of(drafter, text) == gapped


def test_states_that_nobody_drafts_from_are_bounded(target, path, monkeypatch):
    monkeypatch.setattr(eagle, "PREFILL_ROWS", 8)
    monkeypatch.setattr(eagle, "MAX_WAITING", 32)
    text = [index % VOCAB_SIZE for index in range(100)]
    drafter = make_drafter(target, path)
    states = states_of(target, text, drafter.needs.hidden_layers)
    start(drafter, text[:1])  # the other tokens are output, of which it is not told
    for position in range(99):
        tell(drafter, states, position, position + 1)
        assert len(drafter._waiting["r"]) <= 32
    assert draft_of(drafter, text).tree.num_draft_tokens > 0
    drafter.stop("r")
    assert drafter._cache.num_sequences == 0


def test_a_step_that_failed_is_forgotten(target, path):
    """Drafted, never committed, and its tokens came another way."""
    text = list(range(12))
    drafter = make_drafter(target, path)
    states = states_of(target, text, drafter.needs.hidden_layers)
    start(drafter, text[:8])
    tell(drafter, states, 0, 7)
    draft_of(drafter, text[:8])
    tell(drafter, states, 7, 11)
    late = draft_of(drafter, text)
    drafter.stop("r")
    start(drafter, text)
    tell(drafter, states, 0, 11)
    assert draft_of(drafter, text) == late


# -- vocabularies and files --------------------------------------------------------------------


def test_drafts_hold_only_tokens_that_the_head_knows(target, folder):
    drafter = make_drafter(target, write_head(folder, "eagle", 7, draft_vocab=5), min_gain=0.0)
    engine = make_engine(target, {"eagle": drafter})
    trees = []
    propose = drafter.propose
    drafter.propose = lambda contexts: [trees.append(it.tree) or it for it in propose(contexts)]
    engine.add_request([1, 2, 3], greedy(20))
    finish(engine)
    drafted = {token_id for tree in trees for token_id in tree.token_ids[1:]}
    assert drafted
    assert drafted <= set(range(5))


def test_head_of_another_kind_or_target_is_refused(target, folder, tmp_path):
    with pytest.raises(ModelError, match="of the kind 'parallel'"):
        make_drafter(target, write_head(folder, "parallel"))
    other = write_target(tmp_path, hidden_size=48)
    with pytest.raises(ModelError, match="hidden_size 48"):
        make_drafter(target, write_head(other, "eagle"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_head_runs_in_the_type_asked_for(folder, path, dtype):
    target = load_model(str(folder), dtype=dtype)
    drafter = make_drafter(target, path, dtype=dtype)
    assert str(drafter._cache.keys[0].dtype) == f"torch.{dtype}"
    engine = make_engine(target, {"eagle": drafter})
    request = engine.add_request([3, 1, 4], PARAMS["sampled"])
    finish(engine)
    assert request.output_ids == plain_ids(target, [3, 1, 4], PARAMS["sampled"])
