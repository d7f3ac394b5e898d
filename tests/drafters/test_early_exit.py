"""Early exit: the first layers draft, and no row goes through them twice."""

import random

import pytest
import torch

from foretoken.core.draft import Draft, DraftBudget
from foretoken.core.options import ComponentSpec, build_options
from foretoken.core.sampling import Sampler
from foretoken.core.tree import TokenTree
from foretoken.drafters.base import DraftContext, RequestView
from foretoken.drafters.early_exit import EarlyExitDrafter, EarlyExitOptions
from foretoken.errors import ConfigError, DrafterError
from foretoken.models.batch import Segment
from foretoken.models.decoder import CompiledDecoder
from foretoken.models.loading import load_model
from tests.engines import (
    OracleDrafter,
    check_idle,
    finish,
    greedy,
    make_engine,
    make_host,
    plain_ids,
    sampled,
)
from tests.fakes import VOCAB_SIZE, build_module, tiny_config, tiny_language_model

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [7], [2, 7, 1, 8, 2, 8]]
PARAMS = {"greedy": greedy(20), "sampled": sampled(20, seed=3, temperature=0.8, top_k=20)}
NUM_LAYERS = 4


def make_checkpoint(path, *, first_noop=NUM_LAYERS, num_layers=NUM_LAYERS):
    """Write a model whose layers from `first_noop` on add nothing."""
    module = build_module(
        tiny_config("llama", num_hidden_layers=num_layers, max_position_embeddings=1024),
        5,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    for layer in module.model.layers[first_noop:]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    module.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("whole"))


@pytest.fixture(params=["float32", "bfloat16", "modules"])
def target(request, folder):
    if request.param == "modules":
        return tiny_language_model("gemma3", dtype=torch.float32)
    return load_model(folder, dtype=request.param)


def make_drafter(target, **options):
    return EarlyExitDrafter.create(EarlyExitOptions(**options), make_host(target))


def outputs(engine, params):
    requests = [engine.add_request(prompt, params) for prompt in PROMPTS]
    finish(engine)
    check_idle(engine)
    return [request.output_ids for request in requests]


class Passes:
    """Which layers of a compiled decoder ran over how many rows.

    Args:
        monkeypatch: Undoes the watching.
    """

    def __init__(self, monkeypatch):
        self.ran = []
        original = CompiledDecoder.forward

        def watch(decoder, batch, rows, *args):
            layers = tuple((decoder._plan[:, 1] >= 0).nonzero()[0].tolist())
            self.ran.append((layers, batch.num_rows))
            return original(decoder, batch, rows, *args)

        monkeypatch.setattr(CompiledDecoder, "forward", watch)

    def rows_of(self, layer):
        return sum(num_rows for layers, num_rows in self.ran if layer in layers)


# -- same tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("options", [{}, {"layers": 1, "width": 1}, {"expansion": (2, 1, 2)}])
def test_output_equals_plain_decoding_in_batches_and_chunks(target, kind, options):
    drafter = make_drafter(target, **options, **({} if "expansion" in options else {"min_gain": 0}))
    engine = make_engine(target, {"it": drafter}, max_nodes=9, prefill_chunk=4)
    expected = [plain_ids(target, prompt, PARAMS[kind]) for prompt in PROMPTS]
    assert outputs(engine, PARAMS[kind]) == expected


@pytest.mark.parametrize("kind", PARAMS)
def test_output_equals_plain_decoding_beside_other_drafters(target, kind):
    """Merged trees hold nodes that the view has not run, above and below those that it has."""
    expected = [plain_ids(target, prompt, PARAMS[kind]) for prompt in PROMPTS]
    truths = [prompt + ids for prompt, ids in zip(PROMPTS, expected, strict=True)]
    drafters = {
        "oracle": OracleDrafter(truths, VOCAB_SIZE),
        "one": make_drafter(target, layers=1, min_gain=0),
        "two": make_drafter(target, layers=2, min_gain=0),
    }
    engine = make_engine(target, drafters, max_nodes=12)
    assert outputs(engine, PARAMS[kind]) == expected


def test_requests_without_the_drafter_share_the_batch(target):
    engine = make_engine(target, {"it": make_drafter(target, min_gain=0)}, max_nodes=6)
    requests = [
        engine.add_request(prompt, PARAMS["greedy"], drafters=names)
        for prompt, names in zip(PROMPTS, (None, [], None), strict=True)
    ]
    finish(engine)
    for prompt, request in zip(PROMPTS, requests, strict=True):
        assert request.output_ids == plain_ids(target, prompt, PARAMS["greedy"])


# -- nothing twice ---------------------------------------------------------------------------


def test_no_row_goes_through_a_layer_twice(folder, monkeypatch):
    target = load_model(folder)
    engine = make_engine(target, {"it": make_drafter(target, layers=2, width=1, min_gain=0)})
    passes = Passes(monkeypatch)
    outputs(engine, greedy(20))
    num_rows = passes.rows_of(NUM_LAYERS - 1)
    assert num_rows > 60
    # Chains within the budget are scored whole: every row has been through every layer once.
    assert {passes.rows_of(layer) for layer in range(NUM_LAYERS)} == {num_rows}
    # The last node of each chain is all that is left for the target's first layers.
    first = sum(rows for layers, rows in passes.ran if layers == (0, 1))
    assert (0, 1, 2, 3) not in {layers for layers, _ in passes.ran}
    assert first == num_rows


def test_prompt_is_not_computed_twice(folder, monkeypatch):
    target = load_model(folder)
    engine = make_engine(target, {"it": make_drafter(target, layers=2, width=1)}, prefill_chunk=8)
    passes = Passes(monkeypatch)
    engine.add_request([5] * 30, greedy(1))
    engine.step()  # three chunks of the target alone, then the last with a draft
    for _ in range(3):
        engine.step()
    assert passes.rows_of(0) == passes.rows_of(3) == 30


def test_nodes_that_were_pruned_cost_the_first_layers_only(folder, monkeypatch):
    target = load_model(folder)
    engine = make_engine(
        target, {"it": make_drafter(target, layers=2, min_gain=0, width=4)}, max_nodes=3
    )
    passes = Passes(monkeypatch)
    outputs(engine, greedy(20))
    assert passes.rows_of(0) == passes.rows_of(1) > passes.rows_of(2) == passes.rows_of(3)


def test_states_are_those_of_the_targets_own_pass(folder):
    """Bit for bit: what is handed over is what the target would have computed."""
    target = load_model(folder)
    drafter = make_drafter(target, layers=2, min_gain=0)
    text = PROMPTS[0]
    drafter.start(RequestView(request_id="r", prompt_ids=text))
    [draft] = drafter.propose([context_of(text)])
    states = drafter.row_states("r", range(len(text)), draft)
    known = [row - (len(text) - 1) for row in states.rows if row >= len(text)]
    assert states.rows[: len(text)] == list(range(len(text)))
    assert known
    paths = [draft.tree.sequence(node)[1:] for node in known]
    for row, path in [(len(text) - 1, ()), *zip(states.rows[len(text) :], paths, strict=True)]:
        expected = hidden_after(target, [*text, *path], 2)
        assert torch.equal(states.hidden[states.rows.index(row)], expected)


def context_of(text, request_id="r", **budget):
    params = greedy(50)
    return DraftContext(
        request_id=request_id,
        token_ids=text,
        sampler=Sampler(params, 0, len(text)),
        budget=DraftBudget(**{"max_nodes": 8, "max_depth": 8, **budget}),
    )


def hidden_after(target, token_ids, layer):
    cache = target.new_cache(len(token_ids))
    segment = Segment(cache.open(), token_ids, range(-1, len(token_ids) - 1))
    output = target.forward(target.batch(cache, [segment]), [], hidden_layers=[layer])
    return output.hidden[layer][-1]


def test_nothing_is_handed_over_for_another_step_than_the_drafts(folder):
    target = load_model(folder)
    drafter = make_drafter(target)
    text = PROMPTS[0]
    drafter.start(RequestView(request_id="r", prompt_ids=text))
    empty = Draft.empty(text[-1])
    assert drafter.row_states("r", range(len(text)), empty) is None  # nothing was drafted
    drafter.propose([context_of(text)])
    assert drafter.row_states("r", range(len(text)), empty) is not None
    assert drafter.row_states("r", range(len(text) + 1), empty) is None
    drafter.propose([context_of(text, max_nodes=0)])
    assert drafter.row_states("r", range(len(text)), empty) is None


def test_tokens_that_the_target_has_already_are_left_out(folder):
    """A drafter that was not shown the target's past has run more of the text than is fed."""
    target = load_model(folder)
    drafter = make_drafter(target)
    text = PROMPTS[0]
    drafter.start(RequestView(request_id="r", prompt_ids=text))
    drafter.propose([context_of(text)])
    states = drafter.row_states("r", range(6, len(text)), Draft.empty(text[-1]))
    assert list(states.rows) == list(range(len(text) - 6))
    for row in states.rows:
        expected = hidden_after(target, text[: 6 + row + 1], 2)
        assert torch.equal(states.hidden[row], expected)


def test_nodes_of_others_are_not_taken_for_its_own(folder):
    target = load_model(folder)
    drafter = make_drafter(target, min_gain=0)
    text = PROMPTS[0]
    drafter.start(RequestView(request_id="r", prompt_ids=text))
    [own] = drafter.propose([context_of(text)])
    first = own.tree.token_ids[1]
    stranger = next(token for token in range(VOCAB_SIZE) if token not in own.tree.token_ids)
    tree = TokenTree((text[-1], stranger, first, stranger), (-1, 0, 0, 2))
    states = drafter.row_states("r", range(len(text)), Draft.from_drafter("x", tree))
    assert list(states.rows) == [*range(len(text)), len(text) + 1]


# -- drafts ----------------------------------------------------------------------------------


def test_a_target_whose_last_layers_add_nothing_accepts_every_draft(tmp_path):
    """Then the first layers say what the target says, under its own noise too."""
    target = load_model(make_checkpoint(tmp_path, first_noop=2))
    for params in PARAMS.values():
        drafter = make_drafter(target, layers=2, width=1, min_gain=0, max_depth=4)
        engine = make_engine(target, {"it": drafter})
        request = engine.add_request(PROMPTS[0], params)
        finish(engine)
        assert request.stats.num_accepted == request.stats.num_draft_tokens > 10
        assert request.output_ids == plain_ids(target, PROMPTS[0], params)


def test_drafts_do_not_depend_on_where_the_past_comes_from(folder):
    """The target's keys and values, or its own from the text alone."""
    target = load_model(folder)
    seen = []

    class Watched(EarlyExitDrafter):
        def propose(self, contexts):
            drafts = super().propose(contexts)
            seen.extend(
                (list(context.token_ids), draft)
                for context, draft in zip(contexts, drafts, strict=True)
            )
            return drafts

    drafter = Watched(EarlyExitOptions(min_gain=0), make_host(target))
    outputs(make_engine(target, {"it": drafter}, prefill_chunk=5), PARAMS["greedy"])
    assert len(seen) > 20
    for text, draft in random.Random(1).sample(seen, 12):
        fresh = make_drafter(target, min_gain=0)
        fresh.start(RequestView(request_id="r", prompt_ids=text))
        budget = {"max_nodes": draft.tree.num_draft_tokens, "max_depth": max(draft.tree.depths)}
        [other] = fresh.propose([context_of(text, **budget)])
        assert other.tree == draft.tree
        assert (
            max(abs(a - b) for a, b in zip(other.draft_logprobs, draft.draft_logprobs, strict=True))
            == 0
        )


def test_half_of_the_layers_draft_unless_told():
    target = tiny_language_model("llama", num_hidden_layers=5)
    assert make_drafter(target).needs.shared_layers == 2
    assert make_drafter(target, layers=4).needs.shared_layers == 4


# -- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [0, 3, -1])
def test_layers_that_leave_nothing_to_verify_are_refused(layers):
    with pytest.raises(ConfigError, match=r"early-exit:layers is from 1 to 2 .* got -?\d"):
        make_drafter(tiny_language_model("llama"), layers=layers)


def test_errors_name_the_drafter():
    spec = ComponentSpec.parse("early-exit:max_depth=0")
    with pytest.raises(ConfigError, match="early-exit:max_depth is at least 1; got 0"):
        build_options(EarlyExitOptions, spec)


def test_a_pass_that_fails_leaves_nothing_behind(folder, monkeypatch):
    """A step that failed must not hand its states to the next."""
    target = load_model(folder)
    engine = make_engine(target, {"it": make_drafter(target, min_gain=0)})
    request = engine.add_request(PROMPTS[0], PARAMS["greedy"])
    engine.step()
    original = type(target).forward

    def fail(*_, **__):
        raise RuntimeError("the device fell off")

    monkeypatch.setattr(type(target), "forward", fail)
    with pytest.raises((RuntimeError, DrafterError)):
        engine.step()
    monkeypatch.setattr(type(target), "forward", original)
    finish(engine)
    assert request.output_ids == plain_ids(target, PROMPTS[0], PARAMS["greedy"])
    check_idle(engine)
