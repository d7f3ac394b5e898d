"""Ticks: rows at different depths share passes, and every row has the bits of an ordinary pass."""

import itertools
import random

import pytest
import torch

from foretoken.core.verdict import Exactness
from foretoken.errors import UnsupportedModelError
from foretoken.models.batch import Segment
from foretoken.models.decoder import CompiledDecoder
from foretoken.models.in_flight import InFlight, InFlightBatch
from foretoken.models.loading import load_model
from foretoken.models.loops import LoopShape
from foretoken.models.modules import adapt_module
from foretoken.models.partial import LayerSet
from tests.bits import Histories
from tests.fakes import VOCAB_SIZE, random_parents, tiny_language_model
from tests.looped import looped_module, make_looped

# Prelude, group, loops, coda.
SHAPES = {
    "loops only": (0, 2, 3, 0),
    "prelude": (1, 1, 4, 0),
    "coda": (0, 1, 2, 1),
    "both": (1, 2, 3, 2),
    "one loop": (1, 2, 1, 1),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def sizes_of(name):
    return dict(zip(("prelude", "group", "loops", "coda"), SHAPES[name], strict=True))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Return a function from a shape's name and a dtype to a compiled model."""
    folder, models = tmp_path_factory.mktemp("looped"), {}

    def get(name, dtype="float32"):
        if (name, dtype) not in models:
            path = folder / name.replace(" ", "-")
            if not path.exists():
                make_looped(path, **sizes_of(name))
            models[name, dtype] = load_model(str(path), dtype=dtype)
        return models[name, dtype]

    return get


class Flight:
    """A sequence with a tree of nodes in flight, in plain lists."""

    def __init__(self, sequence, text):
        self.sequence, self.text = sequence, text
        self.token_ids, self.parents, self.depths, self.states = [], [], [], []

    def path(self, node):
        """Return the tokens down to a node, the text included."""
        above = self.parents[node]
        return (self.path(above) if above >= 0 else self.text) + [self.token_ids[node]]

    def segments(self):
        """Return the nodes in flight, those of one depth together."""
        first = 0
        for depth, nodes in itertools.groupby(self.depths):
            count = len(list(nodes))
            ids = self.token_ids[first : first + count]
            yield InFlight(self.sequence, first, ids, depth)
            first += count

    def keep(self, path, kept):
        """Do what `KVCache.advance` does."""
        self.text = self.path(path[-1]) if path else self.text
        place_of = {node: place for place, node in enumerate(kept)}
        self.parents = [place_of.get(self.parents[node], -1) for node in kept]
        for name in ("token_ids", "depths", "states"):
            setattr(self, name, [getattr(self, name)[node] for node in kept])


class Traffic:
    """Random flights of several sequences; every logit is compared with ordinary passes."""

    def __init__(self, model, seed, check):
        self.model, self.random, self.check = model, random.Random(seed), check
        self.loops = model.info.loops
        self.histories = Histories(model, seed)
        self.early = {}  # a view of the layers before each depth, with its own histories
        self.cache = model.new_cache(4000)
        self.flights = []
        self.num_final = self.num_early = 0

    def expected(self, path, depth):
        """Return the logits of a path's end at a depth, one token at a time."""
        if depth == self.loops.loops:
            return self.histories.expected(path)
        if depth not in self.early:
            layers = LayerSet.all(self.loops.layers_of_loop(depth - 1).stop)
            self.early[depth] = Histories(self.model.with_layers(layers), 0)
        return self.early[depth].expected(path)

    def open(self):
        """Begin a sequence; an ordinary pass caches its prompt."""
        sequence = self.cache.open()
        prompt = [self.random.randrange(VOCAB_SIZE) for _ in range(self.random.randint(0, 20))]
        if prompt:
            segment = Segment(sequence, prompt, range(-1, len(prompt) - 1))
            self.model.forward(self.model.batch(self.cache, [segment]), [])
            self.cache.commit([(sequence, range(len(prompt)))])
        self.flights.append(Flight(sequence, prompt))

    def grow(self, flight):
        """Let some nodes enter below those in flight."""
        count = self.random.randint(0, 3)
        if len(flight.parents) + count > 9 or not count:
            return
        parents = random_parents(self.random, count, first=len(flight.parents))
        self.cache.stage(flight.sequence, parents)
        flight.parents += parents
        flight.token_ids += [self.random.randrange(VOCAB_SIZE) for _ in parents]
        flight.depths += [0] * count
        flight.states += [torch.full((self.model.info.hidden_size,), float("nan"))] * count

    def tick(self, flights):
        """Run a tick of some sequences and compare what it gives."""
        rows = [(flight, node) for flight in flights for node in range(len(flight.depths))]
        if not rows:
            return
        batch = InFlightBatch(self.cache, [it for flight in flights for it in flight.segments()])
        assert batch.num_rows == len(rows)
        wanted = self.random.sample(range(len(rows)), self.random.randint(0, len(rows)))
        states = torch.stack([flight.states[node] for flight, node in rows])
        given = states.clone()
        output = self.model.tick(batch, states, wanted)
        assert torch.equal(states.nan_to_num(), given.nan_to_num()), "what is given is not written"
        for (flight, node), state in zip(rows, output.states, strict=True):
            flight.depths[node] += 1
            flight.states[node] = state
        assert len(output.logits) == len(wanted)
        for row, logits in zip(wanted, output.logits, strict=True):
            flight, node = rows[row]
            depth = flight.depths[node]
            self.check(logits, self.expected(flight.path(node), depth))
            self.num_final += depth == self.loops.loops
            self.num_early += depth < self.loops.loops

    def settle(self, flight):
        """Accept a random path of nodes that are through and drop some of the others."""
        path, above = [], -1
        while candidates := [
            node
            for node, parent in enumerate(flight.parents)
            if parent == above and flight.depths[node] == self.loops.loops
        ]:
            above = self.random.choice(candidates)
            path.append(above)
        kept = []
        for node, parent in enumerate(flight.parents):
            is_below = parent == above or parent in kept
            is_through = node in path or flight.depths[node] == self.loops.loops
            if is_below and not is_through and self.random.random() < 0.8:
                kept.append(node)
        self.cache.advance(flight.sequence, path, kept)
        flight.keep(path, kept)
        self.cache.check_integrity()

    def run(self, num_ticks):
        for _ in range(num_ticks):
            if len(self.flights) < 3 and self.random.random() < 0.5:
                self.open()
            for flight in self.flights:
                self.grow(flight)
            chosen = [flight for flight in self.flights if self.random.random() < 0.8]
            self.tick(chosen)
            for flight in chosen:
                self.settle(flight)


def check_same_bits(found, expected):
    assert torch.equal(found, expected)


def check_close(found, expected):
    """float64 in another order of sums; a wrong key or state differs by more than a thousandth."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# -- the same bits ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_has_the_bits_of_an_ordinary_pass(compiled, shape, dtype):
    model = compiled(shape, dtype)
    assert isinstance(model.forward_pass, CompiledDecoder)
    assert model.info.exactness is Exactness.BITWISE
    traffic = Traffic(model, 1, check_same_bits)
    traffic.run(40)
    assert traffic.num_final > 10
    assert traffic.num_early > 10 or model.info.loops.loops == 1


def test_threads_change_no_bit(compiled, threads, monkeypatch):
    threads(3)
    monkeypatch.setattr("foretoken.models.decoder.BYTES_PER_THREAD", 1)
    Traffic(compiled("both"), 2, check_same_bits).run(10)


@pytest.mark.parametrize("shape", SHAPES)
def test_so_it_is_through_modules(shape):
    module = looped_module(dtype=torch.float64, attn_implementation="foretoken", **sizes_of(shape))
    traffic = Traffic(adapt_module(module, name="looped"), 3, check_close)
    traffic.run(25)
    assert traffic.num_final > 5


@pytest.mark.parametrize("shape", ["loops only", "both"])
def test_packed_modules_give_the_same_bits_and_share_their_packed_layers(shape):
    module = looped_module(attn_implementation="foretoken", **sizes_of(shape))
    model = adapt_module(module, name="looped")
    assert model.info.exactness is Exactness.BITWISE, model.info.inexact_because
    Traffic(model, 4, check_same_bits).run(10)
    loops = model.info.loops
    layers = module.model.layers
    projections = {id(layer.self_attn.q_proj) for layer in layers}
    assert len(layers) == loops.num_layers
    assert len(projections) == loops.num_stored


def test_modules_and_compiled_code_agree(compiled):
    model = compiled("both")
    module = looped_module(dtype=torch.float64, attn_implementation="foretoken", **sizes_of("both"))
    exact = adapt_module(module, name="looped")
    token_ids = [7, 3, 50]
    found = [flown(each, token_ids) for each in (model, exact)]
    # Weights are rounded to float32 in both; its arithmetic is good for about 1e-6 of each layer.
    torch.testing.assert_close(found[0].double(), found[1], rtol=0, atol=1e-4)


def flown(model, token_ids):
    """Return the final logits of some tokens that enter one tick after the other."""
    cache = model.new_cache(64)
    sequence, num_loops = cache.open(), model.info.loops.loops
    found = []
    states = torch.empty(0, model.info.hidden_size)
    for tick in range(len(token_ids) + num_loops - 1):
        if tick < len(token_ids):
            cache.stage(sequence, [tick - 1])
        first, stop = max(0, tick - num_loops + 1), min(tick + 1, len(token_ids))
        batch = InFlightBatch(
            cache,
            [
                InFlight(sequence, node, [token_ids[node]], tick - node)
                for node in range(first, stop)
            ],
        )
        if tick < len(token_ids):
            states = torch.cat((states, states.new_zeros(1, states.shape[1])))
        output = model.tick(batch, states, range(batch.num_rows))
        states = output.states
        if first == tick - num_loops + 1:
            found.append(output.logits[0])
            states = states[1:]
    return torch.stack(found)


# -- what is refused -------------------------------------------------------------------------


def test_models_whose_layers_share_nothing_are_refused():
    model = tiny_language_model()
    cache = model.new_cache(16)
    sequence = cache.open()
    cache.stage(sequence, [-1])
    batch = InFlightBatch(cache, [InFlight(sequence, 0, [1], 0)])
    with pytest.raises(UnsupportedModelError, match="no layers share their weights") as caught:
        model.tick(batch, None, [0])
    assert caught.value.hint
    view = model.with_layers(LayerSet.all(2))
    with pytest.raises(UnsupportedModelError, match="no layers share"):
        view.tick(batch, None, [0])


def staged(model, parents):
    cache = model.new_cache(64)
    sequence = cache.open()
    cache.stage(sequence, parents)
    return cache, sequence


def test_views_of_a_looped_model_have_no_loops_of_their_own(compiled):
    model = compiled("loops only")
    assert model.with_layers(LayerSet.all(2)).info.loops is None


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([(0, 1, 0), (1, 1, 0)], "no two at one depth"),
        ([(0, 1, 0), (1, 1, 1)], "node 0 at depth 0 before node 1 at depth 1"),
        ([(0, 2, 1), (1, 1, 0)], "come from the deepest up"),
        ([(1, 3, 0)], "with 3 staged nodes has no nodes 1 to 3"),
        ([(0, 0, 0)], "has no nodes 0 to -1"),
        ([(-1, 1, 0)], "has no nodes -1 to -1"),
    ],
)
def test_nodes_that_cannot_share_a_tick(compiled, nodes, message):
    cache, sequence = staged(compiled("loops only"), [-1, 0, 1])
    with pytest.raises(ValueError, match=message):
        InFlightBatch(cache, [InFlight(sequence, at, [1] * n, depth) for at, n, depth in nodes])


def test_rows_beyond_the_last_loop_and_rows_without_states(compiled):
    model = compiled("loops only")
    cache, sequence = staged(model, [-1, 0])
    beyond = InFlightBatch(cache, [InFlight(sequence, 0, [1], 3)])
    with pytest.raises(ValueError, match="depths are 0 to 2; got 3"):
        model.tick(beyond, torch.zeros(1, model.info.hidden_size), [0])
    going_on = InFlightBatch(cache, [InFlight(sequence, 0, [1], 1), InFlight(sequence, 1, [2], 0)])
    with pytest.raises(ValueError, match="go on from their states"):
        model.tick(going_on, None, [0])


def test_states_may_be_left_out_where_all_rows_enter(compiled):
    model = compiled("prelude")
    cache, sequence = staged(model, [-1, 0])
    batch = InFlightBatch(cache, [InFlight(sequence, 0, [1, 2], 0)])
    free, given = (
        model.tick(batch, states, [0, 1])
        for states in (None, torch.full((2, model.info.hidden_size), float("inf")))
    )
    assert torch.equal(free.logits, given.logits)
    assert torch.equal(free.states, given.states)


def test_loops_are_known_however_a_model_is_loaded(compiled):
    expected = LoopShape(prelude=1, group=2, loops=3, coda=2)
    assert compiled("both").info.loops == expected
    assert compiled("both").info.num_layers == expected.num_layers
