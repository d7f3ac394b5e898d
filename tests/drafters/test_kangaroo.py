"""Kangaroo: first layers and an adapter draft, and what is unsure of itself stops early."""

import random
from dataclasses import replace

import pytest
import torch

from foretoken.core.draft import DraftBudget, SiblingDraw
from foretoken.core.sampling import Sampler
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.drafters import kangaroo
from foretoken.drafters.base import DraftContext, RequestView
from foretoken.drafters.early_exit import EarlyExitDrafter, EarlyExitOptions
from foretoken.drafters.kangaroo import KangarooDrafter, KangarooOptions
from foretoken.drafters.levels import RACE_TEMPERATURE
from foretoken.engine import scheduler
from foretoken.errors import ConfigError, ModelError
from foretoken.models.adapter import LayerView
from foretoken.models.batch import Segment
from foretoken.models.heads.kangaroo import AdapterOptions, KangarooAdapter, default_exit
from foretoken.models.heads.target import TargetShape, target_tensors
from foretoken.models.loading import load_model
from tests.engines import (
    OracleDrafter,
    check_idle,
    finish,
    greedy,
    make_engine,
    make_host,
    outcome_of,
    plain_ids,
    sampled,
)
from tests.fakes import VOCAB_SIZE, build_module, tiny_config, tiny_language_model
from tests.heads import random_tensors, randomize, write_head

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [7], [2, 7, 1, 8, 2, 8]]
PARAMS = {"greedy": greedy(20), "sampled": sampled(20, seed=3, temperature=0.8, top_k=20)}
EXIT, NUM_LAYERS = 2, 4
NEVER = {"eta": 0.0, "min_gain": 0.0}  # neither exit ends a branch
# Both compute in the target's type, in other orders of summation.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.05, torch.float64: 2e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("target")
    config = tiny_config("llama", num_hidden_layers=NUM_LAYERS, max_position_embeddings=2048)
    build_module(config, 5, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture(params=["float32", "bfloat16", "float64", "gemma3"])
def target(request, folder):
    if request.param == "gemma3":
        return tiny_language_model("gemma3", dtype=torch.float32)
    return load_model(str(folder), dtype=request.param)


def make_adapter(target, seed=0, **options):
    shape = TargetShape.of(target.info)
    options = AdapterOptions(**{"heads": 2, "kv_heads": 1, **options})
    adapter = KangarooAdapter.new(shape, random_tensors(shape), options)
    return randomize(adapter, seed).eval().requires_grad_(False)


def make_drafter(target, adapter=None, host=None, **options):
    adapter = adapter or make_adapter(target, layers=1 if target.info.num_layers < 4 else EXIT)
    return KangarooDrafter(
        KangarooOptions(path="unused", **options), host or make_host(target), adapter
    )


def outputs(engine, params, prompts=PROMPTS):
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    finish(engine)
    check_idle(engine)
    for drafter in engine.drafters.values():
        if isinstance(drafter, KangarooDrafter):
            cache = drafter._adapter_cache
            cache.check_integrity()
            assert (cache.num_sequences, cache.num_free_blocks) == (0, cache.num_blocks)
    return [request.output_ids for request in requests]


def context_of(text, request_id="r", params=None, **budget):
    params = params or greedy(50)
    return DraftContext(
        request_id=request_id,
        token_ids=text,
        sampler=Sampler(params, 0, len(text)),
        budget=DraftBudget(**{"max_nodes": 8, "max_depth": 8, **budget}),
    )


def start(drafter, text, request_id="r"):
    drafter.start(RequestView(request_id=request_id, prompt_ids=text))


def states_after(target, token_ids, layer):
    """Return the target's states of a text, from one pass of its own."""
    cache = target.new_cache(len(token_ids) + 16)
    segment = Segment(cache.open(), token_ids, range(-1, len(token_ids) - 1))
    return target.forward(target.batch(cache, [segment]), [], hidden_layers=[layer]).hidden[layer]


def next_probs(target, adapter, head, text):
    """Return what the adapter says of the next token, by the module that is trained."""
    states = states_after(target, text, adapter.options.layers).float()
    output = adapter(states[None])[0, -1]
    return (head.float() @ output).softmax(dim=0)


class Watched(KangarooDrafter):
    """Remembers what it drafted of which text."""

    def propose(self, contexts):
        drafts = super().propose(contexts)
        self.seen = getattr(self, "seen", [])
        self.seen += [
            (list(context.token_ids), draft)
            for context, draft in zip(contexts, drafts, strict=True)
            if draft.tree.num_draft_tokens
        ]
        return drafts


def watched(target, adapter):
    return Watched(KangarooOptions(path="unused", **NEVER), make_host(target), adapter)


def check_drafts(drafter, target, adapter, count=15):
    """Check that drafts of a running engine are those of the bare text, to rounding."""
    assert len(drafter.seen) >= count
    for text, draft in random.Random(1).sample(drafter.seen, count):
        fresh = make_drafter(target, adapter, **NEVER)
        start(fresh, text)
        budget = {"max_nodes": draft.tree.num_draft_tokens, "max_depth": max(draft.tree.depths)}
        [other] = fresh.propose([context_of(text, **budget)])
        assert other.tree == draft.tree
        assert other.draft_logprobs == pytest.approx(draft.draft_logprobs, rel=1e-4, abs=1e-5)


# -- the module and its served form ----------------------------------------------------------


@pytest.mark.parametrize("mlp", [0, 24])
def test_served_adapter_agrees_with_the_module_that_is_trained(target, mlp):
    adapter = make_adapter(target, mlp=mlp, layers=1)
    served, dtype = adapter.serve(target), target.info.dtype
    states = torch.randn(13, 32, generator=torch.Generator().manual_seed(3)).to(dtype).float()
    cache = served.new_cache(64)
    first, second = cache.open(), cache.open()
    # Chunks of two requests in turn: 9 rows, then 4; and a tree below them.
    parts = []
    for begin, stop in ((0, 9), (9, 13)):
        chain = range(-1, stop - begin - 1)
        segments = [Segment(it, [0] * len(chain), chain) for it in (first, second)]
        batch = served.batch(cache, segments)
        both = torch.cat((states[begin:stop], -states[begin:stop]))
        parts.append(served.forward(batch, range(batch.num_rows), states=both, hidden_layers=[1]))
        cache.commit([(it, range(stop - begin)) for it in (first, second)])
    for index, sign in enumerate((1, -1)):
        found = [part.hidden[1].float().view(2, -1, 32)[index] for part in parts]
        expected = adapter(sign * states[None])[0]
        assert expected.std() > 0.5, "states that hardly differ prove nothing"
        torch.testing.assert_close(
            torch.cat(found), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_drafts_are_what_the_module_says(folder, dtype):
    """Every node's probability, by the trained module and the target's head from its files."""
    target = load_model(str(folder), dtype=dtype)
    adapter, head = make_adapter(target, layers=EXIT), target_tensors(str(folder)).head
    drafter = make_drafter(target, adapter, width=3, **NEVER)
    text = PROMPTS[0]
    start(drafter, text)
    [draft] = drafter.propose([context_of(text, max_nodes=12)])
    assert max(draft.tree.depths) > 1
    for node in range(1, len(draft.tree)):
        *path, token_id = draft.tree.sequence(node)[1:]
        probs = next_probs(target, adapter, head, [*text, *path])
        raced = (probs.log() / RACE_TEMPERATURE).log_softmax(dim=0)
        assert draft.draft_logprobs[node] == pytest.approx(float(raced[token_id]), abs=1e-4)


def test_untrained_adapter_is_an_early_exit(folder):
    target = load_model(str(folder))
    shape = TargetShape.of(target.info)
    options = AdapterOptions(layers=EXIT, epsilon=1e-6)
    adapter = KangarooAdapter.new(shape, target_tensors(str(folder)), options)
    exits = EarlyExitDrafter(EarlyExitOptions(layers=EXIT, min_gain=0), make_host(target))
    own = make_drafter(target, adapter, max_depth=4, **NEVER)
    for text in PROMPTS:
        for drafter in (exits, own):
            start(drafter, text)
        [expected], [draft] = (it.propose([context_of(text)]) for it in (exits, own))
        assert draft.tree == expected.tree
        assert draft.draft_logprobs == pytest.approx(expected.draft_logprobs, abs=1e-5)
        for drafter in (exits, own):
            drafter.stop("r")


# -- same tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("options", [{}, {"width": 1, **NEVER}, {"expansion": (2, 1, 2)}, NEVER])
def test_output_equals_plain_decoding_in_batches_and_chunks(target, kind, options):
    engine = make_engine(
        target, {"it": make_drafter(target, **options)}, max_nodes=9, prefill_chunk=4
    )
    expected = [plain_ids(target, prompt, PARAMS[kind]) for prompt in PROMPTS]
    assert outputs(engine, PARAMS[kind]) == expected


@pytest.mark.parametrize("kind", PARAMS)
def test_output_equals_plain_decoding_beside_other_drafters(target, kind):
    """Merged trees hold nodes that it has not run, above and below those that it has."""
    expected = [plain_ids(target, prompt, PARAMS[kind]) for prompt in PROMPTS]
    truths = [prompt + ids for prompt, ids in zip(PROMPTS, expected, strict=True)]
    drafters = {
        "oracle": OracleDrafter(truths, VOCAB_SIZE),
        "it": make_drafter(target, **NEVER),
        "exit": EarlyExitDrafter(EarlyExitOptions(layers=1, min_gain=0), make_host(target)),
    }
    assert outputs(make_engine(target, drafters, max_nodes=12), PARAMS[kind]) == expected


def test_crowded_requests_are_thrown_back_and_go_on(folder, monkeypatch):
    monkeypatch.setattr(scheduler, "GROWTH_BLOCKS", 0)
    target = load_model(str(folder))
    rng = random.Random(2)
    common = [rng.randrange(9) for _ in range(40)]
    prompts = [[*common[: rng.randint(17, 40)], rng.randrange(40)] for _ in range(6)]
    host = make_host(target, kv_cache_tokens=16 * 12)
    drafter = make_drafter(target, host=host, **NEVER)
    engine = make_engine(target, {"it": drafter}, kv_tokens=16 * 12, max_requests=4)
    requests = [engine.add_request(prompt, greedy(40)) for prompt in prompts]
    finish(engine)
    check_idle(engine)
    assert sum(request.stats.num_preemptions for request in requests) > 0
    assert [request.output_ids for request in requests] == [
        plain_ids(target, prompt, greedy(40)) for prompt in prompts
    ]


# -- the adapter's past ----------------------------------------------------------------------


def test_drafts_in_an_engine_are_those_of_the_bare_text(folder):
    """Whatever came from the target's passes, from its cache, or from its own layers."""
    target = load_model(str(folder))
    adapter = make_adapter(target, layers=EXIT)
    drafter = watched(target, adapter)
    expected = [plain_ids(target, prompt, PARAMS["greedy"]) for prompt in PROMPTS]
    truths = [prompt + ids for prompt, ids in zip(PROMPTS, expected, strict=True)]
    drafters = {"oracle": OracleDrafter(truths, VOCAB_SIZE), "it": drafter}
    outputs(make_engine(target, drafters, prefill_chunk=5), PARAMS["greedy"])
    check_drafts(drafter, target, adapter)


def test_drafts_after_a_shared_prefix_are_those_of_the_bare_text(folder):
    """The target finds the prefix in its cache, so its states are never told."""
    target = load_model(str(folder))
    adapter = make_adapter(target, layers=EXIT)
    drafter = watched(target, adapter)
    engine = make_engine(target, {"it": drafter})
    prefix = [random.Random(4).randrange(VOCAB_SIZE) for _ in range(50)]
    for end in (1, 2, 3):
        outputs(engine, greedy(12), [[*prefix, end]])
    assert engine.cache.num_prefix_hits == 2 * 48
    assert drafter._adapter_cache.num_prefix_hits == 2 * 48
    check_drafts(drafter, target, adapter)


def test_a_prefix_that_only_the_target_has_is_run_through_the_first_layers_once(folder):
    target = load_model(str(folder))
    adapter = make_adapter(target, layers=EXIT)
    drafter = watched(target, adapter)
    engine = make_engine(target, {"it": drafter})
    prompt = [random.Random(4).randrange(VOCAB_SIZE) for _ in range(50)]
    engine.add_request(prompt, greedy(2), drafters=[])
    finish(engine)
    rows = []
    forward = drafter._view.forward

    def watch(batch, *args, **values):
        rows.append(batch.num_rows)
        return forward(batch, *args, **values)

    drafter._view.forward = watch
    outputs(engine, greedy(12), [prompt])
    assert engine.cache.num_prefix_hits == 48
    assert rows[0] == 50
    assert max(rows[1:]) <= 8  # nodes of a level
    check_drafts(drafter, target, adapter, count=3)


def test_long_prompts_are_taken_in_pieces(folder, monkeypatch):
    """States that wait, and texts of which none were told."""
    monkeypatch.setattr(kangaroo, "PREFILL_ROWS", 16)
    target = load_model(str(folder))
    adapter = make_adapter(target, layers=EXIT)
    drafter = watched(target, adapter)
    rng = random.Random(8)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (70, 33)]
    outputs(make_engine(target, {"it": drafter}, prefill_chunk=12), greedy(12), prompts)
    check_drafts(drafter, target, adapter, count=6)


def test_states_that_wait_are_bounded_while_nobody_drafts(folder, monkeypatch):
    monkeypatch.setattr(kangaroo, "PREFILL_ROWS", 16)
    target = load_model(str(folder))
    drafter = make_drafter(target, **NEVER)
    engine = make_engine(target, {"it": drafter}, max_nodes=0)
    engine.add_request(PROMPTS[0], greedy(90))
    longest = 0
    while engine.num_unfinished:
        engine.step()
        for place in drafter._places.values():
            longest = max(longest, sum(map(len, place.told)))
    assert 10 < longest <= 17


def test_a_cache_without_room_drafts_nothing(folder):
    target = load_model(str(folder))
    drafter = make_drafter(target, **NEVER)
    blocker = drafter._adapter_cache.open()
    num_blocks = drafter._adapter_cache.num_free_blocks
    drafter._adapter_cache.stage(blocker, range(-1, 16 * num_blocks - 1))
    text = PROMPTS[0]
    start(drafter, text)
    [draft] = drafter.propose([context_of(text)])
    assert draft.tree.num_draft_tokens == 0
    drafter._adapter_cache.close(blocker)
    [draft] = drafter.propose([context_of(text)])
    assert draft.tree.num_draft_tokens == 8


def test_rows_that_stand_are_not_run_again(folder, monkeypatch):
    """Neither by the first layers nor by the adapter, once they were committed."""
    target = load_model(str(folder))
    drafter = make_drafter(target, width=1, **NEVER)
    text = PROMPTS[0]
    start(drafter, text)
    [draft] = drafter.propose([context_of(text, max_nodes=3)])
    path = (1, 2)
    tokens = tuple(draft.tree.token_ids[node] for node in path)
    verdict = Verdict(path, (*tokens, 9), FinalKind.BONUS)
    drafter.commit([outcome_of(verdict, draft=draft)])
    rows = []
    forward = LayerView.forward

    def watch(view, batch, *args, **values):
        rows.append(batch.num_rows)
        return forward(view, batch, *args, **values)

    monkeypatch.setattr(LayerView, "forward", watch)
    drafter.propose([context_of([*text, *tokens, 9], max_nodes=3)])
    assert rows[:2] == [1, 1]


# -- the second exit -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARAMS)
def test_branches_end_below_nodes_that_are_unsure(folder, kind):
    target = load_model(str(folder))
    adapter, head = make_adapter(target, layers=EXIT), target_tensors(str(folder)).head
    eta, text = 0.12, PROMPTS[0]
    num_ended = num_gone_on = 0
    for siblings in (SiblingDraw.DETERMINISTIC, SiblingDraw.COUPLED, SiblingDraw.IID):
        whole = make_drafter(target, adapter, width=3, **NEVER)
        drafter = make_drafter(target, adapter, width=3, eta=eta, min_gain=0)
        drafts = []
        for it in (whole, drafter):
            start(it, text)
            context = replace(
                context_of(text, params=PARAMS[kind], max_nodes=20), siblings=siblings
            )
            drafts += it.propose([context])
        draft = drafts[1]
        for node, children in enumerate(draft.tree.children):
            probs = next_probs(target, adapter, head, [*text, *draft.tree.sequence(node)[1:]])
            goes_on = any(draft.tree.children[child] for child in children)
            if probs.max() < eta:
                assert not goes_on
                num_ended += bool(children)
            num_gone_on += goes_on
    assert num_ended > 0
    assert num_gone_on > 0


@pytest.mark.parametrize(("eta", "depth"), [(1.0, 1), (0.0, 6)])
def test_eta_from_never_to_at_once(folder, eta, depth):
    target = load_model(str(folder))
    drafter = make_drafter(target, eta=eta, min_gain=0, width=1)
    start(drafter, PROMPTS[0])
    [draft] = drafter.propose([context_of(PROMPTS[0])])
    assert max(draft.tree.depths) == depth


# -- files and options -----------------------------------------------------------------------


def test_exit_is_after_two_layers_unless_there_are_no_more():
    assert [default_exit(count) for count in (2, 3, 4, 32)] == [1, 2, 2, 2]


def test_adapter_of_files_drafts_as_before(folder):
    path = write_head(folder, "kangaroo", heads=2, mlp=24, layers=3)
    target = load_model(str(folder))
    drafter = KangarooDrafter.create(KangarooOptions(path=path), make_host(target))
    assert drafter.needs.shared_layers == 3
    assert drafter.needs.hidden_layers == (3,)
    expected = [plain_ids(target, prompt, PARAMS["greedy"]) for prompt in PROMPTS]
    assert outputs(make_engine(target, {"it": drafter}), PARAMS["greedy"]) == expected


def test_adapters_of_other_targets_and_other_heads_are_refused(folder):
    path = write_head(folder, "kangaroo", heads=2)
    other = tiny_language_model("llama", num_hidden_layers=5)
    with pytest.raises(ModelError, match="num_layers 4"):
        KangarooDrafter.create(KangarooOptions(path=path), make_host(other))
    medusa = write_head(folder, "medusa")
    with pytest.raises(ModelError, match="'medusa'; 'kangaroo' is needed"):
        KangarooDrafter.create(KangarooOptions(path=medusa), make_host(load_model(str(folder))))


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_is_a_probability(eta):
    with pytest.raises(ConfigError, match="kangaroo:eta is a probability"):
        KangarooOptions(path="x", eta=eta)


@pytest.mark.parametrize(
    "options", [{"layers": 4}, {"layers": -1}, {"heads": 3, "kv_heads": 2}, {"mlp": 7}]
)
def test_options_that_fit_no_adapter_are_refused(options):
    with pytest.raises(ConfigError, match=r"kangaroo:(layers|heads)"):
        AdapterOptions(**options).for_target(TargetShape(61, 32, 4))
