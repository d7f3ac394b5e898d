"""Views of some layers, and passes that go on where a view of the first layers stopped."""

import copy
import random

import numpy as np
import pytest
import torch

from foretoken.errors import UnsupportedModelError
from foretoken.models.adapter import LayerView
from foretoken.models.batch import RowStates, Segment
from foretoken.models.decoder import CompiledDecoder
from foretoken.models.loading import load_model
from foretoken.models.modules import adapt_module
from foretoken.models.partial import CachedPast, LayerSet, copy_past
from tests.fakes import (
    FAMILIES,
    VOCAB_SIZE,
    build_module,
    plain_module,
    random_parents,
    tiny_config,
    tiny_language_model,
)

NUM_LAYERS = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# float64 agrees to its last bits except where transformers rounds to float32 in between.
TOLERANCE = 2e-5
SKIPS = [(), (1,), (2,), (0, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    config = tiny_config("qwen3", sliding_window=None)
    build_module(config, 3, attn_implementation="eager", dtype=torch.float32).save_pretrained(path)
    return str(path)


@pytest.fixture(params=["compiled", "modules"])
def model(request, folder):
    """Return a function from a dtype to a model: compiled, or through packed modules."""

    def load(dtype):
        if request.param == "compiled":
            whole = load_model(folder, dtype=dtype)
            assert isinstance(whole._forward_pass, CompiledDecoder)
            return whole
        return tiny_language_model("gemma2", dtype=DTYPES[dtype])

    return load


def some_ids(count, seed=0):
    return random.Random(seed).choices(range(VOCAB_SIZE), k=count)


def chain_output(model, token_ids, **options):
    cache = model.new_cache(len(token_ids))
    segment = Segment(cache.open(), token_ids, range(-1, len(token_ids) - 1))
    batch = model.batch(cache, [segment])
    return model.forward(batch, range(len(token_ids)), **options)


def layers_of(module):
    """Return the list of layers of a transformers module."""
    num_layers = module.config.num_hidden_layers
    lists = [m for m in module.modules() if isinstance(m, torch.nn.ModuleList)]
    return next(found for found in lists if len(found) == num_layers)


def pass_on(hidden_states, *_, **__):
    return hidden_states


def add_nothing_attention(*args, **kwargs):
    return torch.zeros_like(args[0] if args else kwargs["hidden_states"]), None


# -- views -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_view_of_all_layers_has_the_models_bits(model, dtype):
    whole = model(dtype)
    view = whole.with_layers(LayerSet.all(NUM_LAYERS))
    expected = chain_output(whole, some_ids(30), hidden_layers=range(NUM_LAYERS + 1))
    found = chain_output(view, some_ids(30), hidden_layers=range(NUM_LAYERS + 1))
    assert torch.equal(found.logits, expected.logits)
    for layer in range(NUM_LAYERS + 1):
        assert torch.equal(found.hidden[layer], expected.hidden[layer])


@pytest.mark.parametrize("skipped", SKIPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_view_is_the_function_of_transformers_without_some_layers(family, skipped):
    whole = tiny_language_model(family)
    view = whole.with_layers(LayerSet.without(NUM_LAYERS, skipped, skipped))
    reference = copy.deepcopy(plain_module(family))
    for layer in skipped:
        layers_of(reference)[layer].forward = pass_on
    token_ids = some_ids(24)
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids]), use_cache=False).logits[0]
    found = chain_output(view, token_ids).logits
    assert (found - expected).abs().max() < TOLERANCE
    if skipped:
        assert (found - chain_output(whole, token_ids).logits).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "mixtral", "granite"])
def test_parts_of_layers_can_be_left_out(family):
    whole = tiny_language_model(family)
    view = whole.with_layers(LayerSet((0, 2), (0, 1)))
    reference = copy.deepcopy(plain_module(family))
    layers = layers_of(reference)
    [attention] = [part for part in layers[1].children() if hasattr(part, "layer_idx")]
    attention.forward = add_nothing_attention
    layers[2].mlp.forward = torch.zeros_like
    token_ids = some_ids(24)
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids]), use_cache=False).logits[0]
    assert (chain_output(view, token_ids).logits - expected).abs().max() < TOLERANCE


def test_compiled_parts_are_left_out_as_in_modules(folder):
    compiled = load_model(folder, dtype="float32")
    module = build_module(tiny_config("qwen3", sliding_window=None), 3, dtype=torch.float32)
    layers = LayerSet((0, 2), (0, 1))
    expected = chain_output(adapt_module(module, name="it").with_layers(layers), some_ids(30))
    found = chain_output(compiled.with_layers(layers), some_ids(30))
    assert (found.logits - expected.logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("opt", "only whole layers can be left out"),
        ("gpt_oss", "tiny-gpt_oss: parts of its layers cannot be left out: ValueError"),
    ],
)
def test_layers_that_do_not_keep_their_parts_apart_say_so(family, message):
    with pytest.raises(UnsupportedModelError, match=message):
        tiny_language_model(family).with_layers(LayerSet((0, 1), (0, 1, 2)))
    tiny_language_model(family).with_layers(LayerSet.of((0, 1)))


@pytest.mark.parametrize(
    "layers", [LayerSet((), (1,)), LayerSet.all(NUM_LAYERS + 1), LayerSet((0,), (5,))]
)
def test_view_of_layers_that_are_not_there_is_refused(folder, layers):
    with pytest.raises(ValueError, match="at least one attention of the layers 0 to 2"):
        load_model(folder).with_layers(layers)


def test_view_of_a_view_is_refused(folder):
    view = load_model(folder).with_layers(LayerSet.all(2))
    assert isinstance(view, LayerView)
    with pytest.raises(ValueError, match="from the whole model"):
        view.with_layers(LayerSet.all(1))


@pytest.mark.parametrize("layers", [(1, 0), (-1, 0), (0, 0)])
def test_layers_are_ascending(layers):
    with pytest.raises(ValueError, match="ascending"):
        LayerSet.of(layers)


# -- what a view shares ----------------------------------------------------------------------


def test_view_has_a_cache_of_its_own_layers_and_no_weights_of_its_own(model):
    whole = model("float32")
    view = whole.with_layers(LayerSet((0, 2), (0, 1)))
    assert view.info.num_layers == 2
    assert view.info.kv_bytes_per_token == whole.info.kv_bytes_per_token * 2 // 3
    assert len(view.new_cache(16).keys) == 2
    chain_output(view, some_ids(5))
    inside, own = whole._forward_pass, view._partial_pass
    if isinstance(inside, CompiledDecoder):
        assert own._weights is inside._weights
    else:
        held = {id(p) for p in [*inside._module.parameters(), *inside._module.buffers()]}
        matrices = {id(m.matrix) for m in inside._module.modules() if hasattr(m, "matrix")}
        assert {id(p) for p in [*own._module.parameters(), *own._module.buffers()]} <= held
        assert {id(m.matrix) for m in own._module.modules() if hasattr(m, "matrix")} <= matrices
        assert matrices


def test_view_leaves_the_model_as_it_was(model):
    whole = model("float32")
    expected = chain_output(whole, some_ids(20), hidden_layers=[1, 3])
    chain_output(whole.with_layers(LayerSet((0, 2), (0, 2))), some_ids(9), hidden_layers=[1, 3])
    found = chain_output(whole, some_ids(20), hidden_layers=[1, 3])
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(found.hidden[layer], expected.hidden[layer]) for layer in (1, 3))


def test_views_of_a_model_that_captures_by_configuration_hook_no_layer_twice():
    """Transformers hooks layers at the first pass that asks; views share the layers."""
    config = tiny_config("llama", output_hidden_states=True)
    whole = adapt_module(build_module(config, 7), name="it")
    view = whole.with_layers(LayerSet.all(2))
    chain_output(view, some_ids(9))
    found = chain_output(whole, some_ids(9), hidden_layers=range(4)).hidden
    fresh = adapt_module(build_module(tiny_config("llama"), 7), name="fresh")
    expected = chain_output(fresh, some_ids(9), hidden_layers=range(4)).hidden
    assert all(torch.equal(found[layer], expected[layer]) for layer in range(4))


# -- passes that go on -----------------------------------------------------------------------


class Twins:
    """The same requests in two caches of a model, one fed with what a view has computed.

    Args:
        model: The whole model.
        num_layers: Of the view.
        seed: Of texts and trees.
        num_requests: How many.
    """

    def __init__(self, model, num_layers, seed, num_requests):
        self.random = random.Random(seed)
        self.model, self.num_layers = model, num_layers
        self.view = model.with_layers(LayerSet.all(num_layers))
        self.caches = [whole.new_cache(400) for whole in (model, model, self.view)]
        for cache in self.caches:
            for pool in (*cache.keys, *cache.values):
                pool.fill_(torch.nan)  # what nobody wrote must never be read
        self.requests = [[cache.open() for cache in self.caches] for _ in range(num_requests)]
        self.num_known = self.num_rows = 0

    def step(self, grow, *, which):
        """Feed nodes to all requests; compare a plain pass with one that knows some rows."""
        with_states, plain = [], []
        for number, (plain_sequence, sequence, own) in enumerate(self.requests):
            parents = grow()
            token_ids = self.random.choices(range(VOCAB_SIZE), k=len(parents))
            states = self.run_view(own, token_ids, parents) if which(number) else None
            plain.append(Segment(plain_sequence, token_ids, parents))
            with_states.append(Segment(sequence, token_ids, parents, states))
        outputs = []
        layers = range(self.num_layers, self.model.info.num_layers + 1)
        for cache, segments in zip(self.caches, (plain, with_states), strict=False):
            batch = self.model.batch(cache, segments)
            rows = list(range(batch.num_rows))[::-1]
            outputs.append(self.model.forward(batch, rows, hidden_layers=layers))
        assert torch.equal(outputs[0].logits, outputs[1].logits)
        for layer in layers:
            assert torch.equal(outputs[0].hidden[layer], outputs[1].hidden[layer])
        self.num_rows += len(outputs[0].logits)
        return plain

    def run_view(self, own, token_ids, parents):
        """Run some rows through the view, each below one that it ran; return their states."""
        rows = []
        for row, parent in enumerate(parents):
            if (parent < 0 or parent in rows) and self.random.random() < 0.7:
                rows.append(row)
        if not rows:
            return None
        place = {row: index for index, row in enumerate([-1, *rows], start=-1)}
        nodes = [token_ids[row] for row in rows], [place[parents[row]] for row in rows]
        batch = self.view.batch(self.caches[2], [Segment(own, *nodes)])
        layer = self.num_layers
        hidden = self.view.forward(batch, [], hidden_layers=[layer]).hidden[layer]
        self.num_known += len(rows)
        return RowStates(layer, rows, hidden, self.caches[2], batch.layout.new_slots)

    def commit(self, segments):
        """Keep a random path in all caches."""
        for segment, (plain_sequence, sequence, own) in zip(segments, self.requests, strict=True):
            node = self.random.randrange(len(segment.parents))
            path = []
            while node >= 0:
                path.insert(0, node)
                node = segment.parents[node]
            self.caches[0].commit([(plain_sequence, path)])
            self.caches[1].commit([(sequence, path)])
            self.caches[2].rollback(own)
            past = CachedPast(self.caches[1], sequence)
            layers = self.view.layers.attention
            copy_past(past, layers, self.caches[2], own, sequence.num_cached)
            self.compare_caches(plain_sequence, sequence, own)

    def compare_caches(self, *sequences):
        stop = sequences[0].num_cached
        slots = [
            torch.from_numpy(cache.slots(sequence, 0, stop))
            for cache, sequence in zip(self.caches, sequences, strict=True)
        ]
        for kind in ("keys", "values"):
            for layer, expected in enumerate(getattr(self.caches[0], kind)):
                for cache, own in zip(self.caches[1:], slots[1:], strict=True):
                    found = getattr(cache, kind)
                    if layer < len(found):
                        assert torch.equal(found[layer][own], expected[slots[0]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_pass_that_knows_some_rows_has_the_bits_of_a_full_one(model, dtype, num_layers, seed):
    """Prompts and trees, alone and in batches in which some requests know nothing."""
    twins = Twins(model(dtype), num_layers, seed, num_requests=1 + seed)

    def prompt():
        return list(range(-1, twins.random.randint(1, 20)))

    def tree():
        return random_parents(twins.random, twins.random.randint(1, 9))

    twins.commit(twins.step(prompt, which=lambda number: number != 1))
    for _ in range(6):
        twins.commit(twins.step(tree, which=lambda _: twins.random.random() < 0.7))
    assert 0.2 * twins.num_rows < twins.num_known < twins.num_rows


@pytest.mark.parametrize("family", FAMILIES)
def test_any_architecture_can_go_on_from_known_rows(family):
    whole = tiny_language_model(family)
    view = whole.with_layers(LayerSet.all(2))
    token_ids, parents = some_ids(9), [-1, 0, 1, 1, 3, 0, 5, 4, 6]
    known = [0, 1, 3, 5]
    own_cache, cache = view.new_cache(16), whole.new_cache(16)
    own = Segment(own_cache.open(), [token_ids[row] for row in known], [-1, 0, 1, 0])
    batch = view.batch(own_cache, [own])
    hidden = view.forward(batch, [], hidden_layers=[2]).hidden[2]
    states = RowStates(2, known, hidden, own_cache, batch.layout.new_slots)
    found = whole.forward(
        whole.batch(cache, [Segment(cache.open(), token_ids, parents, states)]), range(9)
    )
    cache = whole.new_cache(16)
    expected = whole.forward(
        whole.batch(cache, [Segment(cache.open(), token_ids, parents)]), range(9)
    )
    # float64 goes through torch's kernels, whose last bits depend on the number of rows.
    assert (found.logits - expected.logits).abs().max() < TOLERANCE


def test_all_rows_known_run_nothing_twice(folder, monkeypatch):
    whole = load_model(folder)
    twins = Twins(whole, 2, 5, num_requests=1)
    monkeypatch.setattr(twins.random, "random", lambda: 0.0)  # every row is run by the view
    ran = []
    original = CompiledDecoder.forward

    def watch(self, batch, rows, *args):
        layers = int((self._plan[:, 1] >= 0).sum())
        ran.append((layers, batch.num_rows))
        return original(self, batch, rows, *args)

    monkeypatch.setattr(CompiledDecoder, "forward", watch)
    twins.step(lambda: [-1, 0, 1, 1], which=lambda _: True)
    assert ran == [(2, 4), (3, 4), (1, 4)]  # the view, the plain pass, the last layer alone


def test_hidden_layers_before_the_known_ones_are_computed_in_full(model):
    whole = model("float32")
    view = whole.with_layers(LayerSet.all(2))
    own_cache, token_ids = view.new_cache(16), some_ids(5)
    batch = view.batch(own_cache, [Segment(own_cache.open(), token_ids, range(-1, 4))])
    hidden = view.forward(batch, [], hidden_layers=[2]).hidden[2]
    states = RowStates(2, range(5), hidden, own_cache, batch.layout.new_slots)
    cache = whole.new_cache(16)
    batch = whole.batch(cache, [Segment(cache.open(), token_ids, range(-1, 4), states)])
    found = whole.forward(batch, range(5), hidden_layers=[0, 1])
    expected = chain_output(whole, token_ids, hidden_layers=[0, 1])
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(found.hidden[layer], expected.hidden[layer]) for layer in (0, 1))


def test_known_row_below_an_unknown_one_is_refused(folder):
    whole = load_model(folder)
    cache, own_cache = whole.new_cache(16), whole.new_cache(16)
    states = RowStates(1, [1], torch.zeros(1, 32), own_cache, np.zeros(1, np.int64))
    segment = Segment(cache.open(), [1, 2], [-1, 0], states)
    with pytest.raises(ValueError, match="hangs on one whose are not"):
        whole.forward(whole.batch(cache, [segment]), [0])


def test_segments_that_know_different_layers_are_refused(folder):
    whole = load_model(folder)
    cache = whole.new_cache(64)
    segments = [
        Segment(
            cache.open(),
            [1],
            [-1],
            RowStates(layers, [0], torch.zeros(1, 32), cache, np.zeros(1, np.int64)),
        )
        for layers in (1, 2)
    ]
    with pytest.raises(ValueError, match="as many layers"):
        whole.forward(whole.batch(cache, segments), [0])
