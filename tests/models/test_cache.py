"""The KV cache: random histories against plain lists, and what errors leave behind."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken.errors import CapacityError
from foretoken.models.cache import BLOCK_SIZE, KVCache, LayerShape
from foretoken.models.layout import unpack
from tests.fakes import random_parents

# Layers 0 and 2 share one pool; layer 1 has wider keys than values.
LAYERS = (LayerShape(2, 3, 3), LayerShape(1, 5, 2), LayerShape(2, 3, 3))


def make_cache(num_blocks=12):
    return KVCache(LAYERS, num_blocks, dtype=torch.float64, device=torch.device("cpu"))


def pools(cache):
    """Yield each layer's keys and values with a number that tells them apart."""
    for layer in range(len(LAYERS)):
        yield 2 * layer, cache.keys[layer]
        yield 2 * layer + 1, cache.values[layer]


def write(cache, slots, marks):
    """Write one recognisable number per slot into every layer, as a pass does."""
    for pool_id, pool in pools(cache):
        values = torch.tensor(marks, dtype=torch.float64) * 10 + pool_id
        pool[torch.from_numpy(slots)] = values.view(-1, 1, 1).expand(-1, *pool.shape[1:])


def read(cache, sequence, start, stop):
    """Return the marks at logical positions; all layers and all their numbers must agree."""
    slots = torch.from_numpy(cache.slots(sequence, start, stop))
    found = set()
    for pool_id, pool in pools(cache):
        rows = (pool[slots] - pool_id) / 10
        assert (rows == rows[:, :1, :1]).all(), "one position holds values of several"
        found.add(tuple(rows[:, 0, 0].tolist()))
    assert len(found) == 1, "layers disagree"
    return [int(mark) for mark in found.pop()]


class Twin:
    """A sequence and what it should hold, in plain lists."""

    def __init__(self, sequence, cached=()):
        self.sequence = sequence
        self.cached = list(cached)
        self.staged = []
        self.parents = []

    def check(self, cache):
        num_cached, num_staged = len(self.cached), len(self.staged)
        assert (self.sequence.num_cached, self.sequence.num_staged) == (num_cached, num_staged)
        assert read(cache, self.sequence, 0, num_cached) == self.cached
        assert read(cache, self.sequence, num_cached, num_cached + num_staged) == self.staged
        row = cache.tables.parents[self.sequence.index]
        assert row[:num_staged].tolist() == self.parents
        depths = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        assert cache.tables.depths[self.sequence.index][:num_staged].tolist() == depths

    def random_path(self, random):
        """Return a path from the cached past downward, perhaps empty."""
        path, parent = [], -1
        while children := [node for node, above in enumerate(self.parents) if above == parent]:
            if random.random() < 0.2:
                break
            parent = random.choice(children)
            path.append(parent)
        return path

    def commit(self, path):
        self.cached += [self.staged[node] for node in path]
        self.rollback()

    def advance(self, path, kept):
        self.cached += [self.staged[node] for node in path]
        self.parents = [
            kept.index(self.parents[node]) if self.parents[node] in kept else -1 for node in kept
        ]
        self.staged = [self.staged[node] for node in kept]

    def rollback(self):
        self.staged, self.parents = [], []


class Machine:
    """Does random things to a cache and to its model in plain lists alike."""

    def __init__(self, seed, num_blocks):
        self.random = random.Random(seed)
        self.cache = make_cache(num_blocks)
        self.twins = []
        self.next_mark = 1

    def run(self, num_steps):
        actions = [
            self.open,
            self.stage,
            self.stage,
            self.commit,
            self.advance,
            self.advance,
            self.rollback,
            self.fork,
            self.close,
        ]
        for _ in range(num_steps):
            self.random.choice(actions)()
            self.cache.check_integrity()
            for twin in self.twins:
                twin.check(self.cache)
            assert self.cache.num_sequences == len(self.twins)

    def open(self):
        self.twins.append(Twin(self.cache.open()))

    def stage(self):
        if not self.twins:
            return
        twin = self.random.choice(self.twins)
        count = self.random.choice([1, 2, 5, 9, BLOCK_SIZE, 2 * BLOCK_SIZE + 1])
        new = random_parents(self.random, count, first=len(twin.parents))
        if self.random.random() < 0.4:  # a prompt chunk
            new = [*range(len(twin.parents) - 1, len(twin.parents) + count - 1)]
        free_before = self.cache.num_free_blocks
        try:
            slots = self.cache.stage(twin.sequence, new)
        except CapacityError:
            assert self.cache.num_free_blocks == free_before
            return
        marks = [*range(self.next_mark, self.next_mark + count)]
        self.next_mark += count
        write(self.cache, slots, marks)
        twin.staged += marks
        twin.parents += new

    def commit(self):
        chosen = self.random.sample(self.twins, self.random.randint(0, len(self.twins)))
        accepted = [(twin, twin.random_path(self.random)) for twin in chosen]
        self.cache.commit([(twin.sequence, path) for twin, path in accepted])
        for twin, path in accepted:
            twin.commit(path)

    def advance(self):
        if not self.twins:
            return
        twin = self.random.choice(self.twins)
        path, kept = twin.random_path(self.random), []
        top = path[-1] if path else -1
        for node, parent in enumerate(twin.parents):
            is_below = node not in path and (parent == top or parent in kept)
            if is_below and self.random.random() < 0.7:
                kept.append(node)
        self.cache.advance(twin.sequence, path, kept)
        twin.advance(path, kept)

    def rollback(self):
        if self.twins:
            twin = self.random.choice(self.twins)
            self.cache.rollback(twin.sequence)
            twin.rollback()

    def fork(self):
        if not self.twins:
            return
        twin = self.random.choice(self.twins)
        free_before = self.cache.num_free_blocks
        try:
            fork = self.cache.fork(twin.sequence)
        except CapacityError:
            assert self.cache.num_free_blocks == free_before
            return
        self.twins.append(Twin(fork, twin.cached))

    def close(self):
        if self.twins:
            twin = self.twins.pop(self.random.randrange(len(self.twins)))
            self.cache.close(twin.sequence)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 6, 14]))
def test_random_histories_hold_what_was_accepted(seed, num_blocks):
    machine = Machine(seed, num_blocks)
    machine.run(30)
    for twin in machine.twins:
        machine.cache.close(twin.sequence)
    machine.cache.check_integrity()
    assert machine.cache.num_free_blocks == num_blocks, "nothing leaks"


def filled(cache, num_cached, first_mark=100):
    """Return an open sequence with that many cached positions, marked in order."""
    sequence = cache.open()
    slots = cache.stage(sequence, range(-1, num_cached - 1))
    write(cache, slots, [*range(first_mark, first_mark + num_cached)])
    cache.commit([(sequence, range(num_cached))])
    return sequence


def test_staging_over_two_passes_grows_one_tree():
    cache = make_cache()
    sequence = filled(cache, 3)
    write(cache, cache.stage(sequence, [-1, 0, 0]), [1, 2, 3])
    layout = unpack(cache.stage_all([sequence], [[0, 0, 0]], [[1, 2, 3]]))
    write(cache, layout.new_slots, [4, 5, 6])
    assert layout.depths.tolist() == [0, 1, 1, 2, 2, 3]
    cache.commit([(sequence, [0, 1, 3, 5])])
    assert read(cache, sequence, 0, sequence.num_cached) == [100, 101, 102, 1, 2, 4, 6]


def test_commit_moves_a_path_that_overlaps_its_target():
    """Node 2 goes where node 1 was and node 3 where node 2 was, in one move."""
    cache = make_cache()
    sequence = filled(cache, BLOCK_SIZE - 2)
    write(cache, cache.stage(sequence, [-1, -1, 1, 2, 3]), [1, 2, 3, 4, 5])
    cache.commit([(sequence, [1, 2, 3, 4])])
    assert read(cache, sequence, BLOCK_SIZE - 2, sequence.num_cached) == [2, 3, 4, 5]


def test_a_chain_advances_without_moving_anything(monkeypatch):
    cache = make_cache()
    sequence = filled(cache, BLOCK_SIZE - 2)
    write(cache, cache.stage(sequence, [-1, 0, 1, 2]), [1, 2, 3, 4])
    monkeypatch.setattr(cache._pools, "move", None)
    cache.advance(sequence, [0], [1, 2, 3])
    assert (sequence.num_cached, sequence.num_staged) == (BLOCK_SIZE - 1, 3)
    cache.advance(sequence, [0, 1], [2])
    write(cache, cache.stage(sequence, [0]), [5])
    cache.advance(sequence, [0], [])
    assert (sequence.num_cached, sequence.num_staged) == (BLOCK_SIZE + 2, 0)
    assert read(cache, sequence, BLOCK_SIZE - 2, sequence.num_cached) == [1, 2, 3, 4]
    cache.check_integrity()


def test_advancing_keeps_a_subtree_and_frees_what_is_dropped():
    """Of two children the second is accepted; what hung on the first goes."""
    cache = make_cache()
    sequence = filled(cache, BLOCK_SIZE - 3)
    parents = [-1, 0, 0, 1, 2, 2, 4]
    write(cache, cache.stage(sequence, parents), [10, 11, 12, 13, 14, 15, 16])
    assert len(sequence.blocks) == 2
    cache.advance(sequence, [0, 2], [4, 6])
    assert len(sequence.blocks) == 2
    assert read(cache, sequence, BLOCK_SIZE - 3, BLOCK_SIZE + 1) == [10, 12, 14, 16]
    layout = unpack(cache.stage_all([sequence], [[0, 0]], [[-1, 1]]))
    assert layout.parents.tolist() == [-1, 0, -1, 1]
    assert layout.depths.tolist() == [0, 1, 0, 2]
    cache.advance(sequence, [], [])
    assert (sequence.num_cached, sequence.num_staged) == (BLOCK_SIZE - 1, 0)
    assert len(sequence.blocks) == 1
    cache.check_integrity()


@pytest.mark.parametrize("num_cached", [0, 1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 40])
def test_fork_shares_full_blocks_only(num_cached):
    cache = make_cache()
    sequence = filled(cache, num_cached)
    free_before = cache.num_free_blocks
    fork = cache.fork(sequence)
    cache.check_integrity()
    num_full = num_cached // BLOCK_SIZE
    assert fork.blocks[:num_full] == sequence.blocks[:num_full]
    assert not set(fork.blocks[num_full:]) & set(sequence.blocks)
    assert free_before - cache.num_free_blocks == (num_cached % BLOCK_SIZE > 0)


@pytest.mark.parametrize("num_cached", [BLOCK_SIZE, BLOCK_SIZE + 5])
def test_fork_and_parent_do_not_see_each_other(num_cached):
    cache = make_cache()
    parent = filled(cache, num_cached)
    cache.stage(parent, [-1, 0])
    fork = cache.fork(parent)
    assert fork.num_staged == 0, "staged nodes are not taken"
    cache.rollback(parent)
    for sequence, mark in ((parent, 1), (fork, 2)):
        write(cache, cache.stage(sequence, range(-1, BLOCK_SIZE - 1)), [mark] * BLOCK_SIZE)
        cache.commit([(sequence, range(BLOCK_SIZE))])
    past = [*range(100, 100 + num_cached)]
    assert read(cache, parent, 0, parent.num_cached) == past + [1] * BLOCK_SIZE
    cache.close(parent)
    cache.check_integrity()
    assert read(cache, fork, 0, fork.num_cached) == past + [2] * BLOCK_SIZE


def test_blocks_are_handed_out_lowest_first():
    """Resident memory follows the highest load, not the number of requests served."""
    cache = make_cache()
    first, second = filled(cache, 20), filled(cache, 20)
    cache.close(first)
    assert filled(cache, 20).blocks == [0, 1]
    assert second.blocks == [2, 3]


@pytest.mark.parametrize("num_cached", [0, 5, 20, 32])
@pytest.mark.parametrize("num_staged", [0, 1, 16, 100])
def test_room_made_for_compiled_code_is_what_the_tables_have(num_cached, num_staged):
    cache = make_cache()
    sequence = filled(cache, num_cached)
    room = cache.make_room(sequence, num_staged)
    assert num_staged <= room < num_staged + BLOCK_SIZE
    assert cache.tables.slots.shape[1] >= num_cached + room
    assert min(cache.tables.parents.shape[1], cache.tables.depths.shape[1]) >= room
    slots = cache.slots(sequence, 0, num_cached + room)
    assert len(set(slots.tolist())) == num_cached + room
    cache.count_staged(sequence, num_staged // 2)  # as if so many had been written
    assert sequence.num_staged == num_staged // 2
    cache.check_integrity()


# -- errors ----------------------------------------------------------------------------------


def test_full_cache_leaves_everything_unchanged():
    cache = make_cache(num_blocks=2)
    sequence = filled(cache, 20)
    write(cache, cache.stage(sequence, [-1, 0]), [1, 2])
    with pytest.raises(CapacityError, match="needs 1 more blocks of 16 tokens; 0 of 2") as caught:
        cache.stage(sequence, range(1, 1 + BLOCK_SIZE))
    assert caught.value.retryable
    assert caught.value.hint
    cache.check_integrity()
    assert (sequence.num_cached, sequence.num_staged) == (20, 2)
    assert read(cache, sequence, 0, 22) == [*range(100, 120), 1, 2]
    cache.commit([(sequence, [0, 1])])


def test_fork_without_room_opens_nothing():
    cache = make_cache(num_blocks=2)
    sequence = filled(cache, 20)
    with pytest.raises(CapacityError):
        cache.fork(sequence)
    cache.check_integrity()
    assert cache.num_sequences == 1
    assert read(cache, sequence, 0, 20) == [*range(100, 120)]


@pytest.mark.parametrize("path", [[1], [0, 2], [0, 1, 1], [3], [-1], [1, 0]])
def test_only_a_path_from_the_top_is_committed(path):
    cache = make_cache()
    good, bad = filled(cache, 3), filled(cache, 3)
    for sequence in (good, bad):
        write(cache, cache.stage(sequence, [-1, 0, 1]), [1, 2, 3])
    with pytest.raises(ValueError, match="not a path of the tree"):
        cache.commit([(good, [0]), (bad, path)])
    cache.check_integrity()
    assert (good.num_cached, good.num_staged) == (3, 3), "all or nothing"
    assert (bad.num_cached, bad.num_staged) == (3, 3)


@pytest.mark.parametrize(
    ("path", "kept", "message"),
    [
        ([1], [], "node 1 cannot be accepted"),
        ([0, 3], [], "node 3 cannot be accepted"),
        ([0, 1, 9], [], "node 9 cannot be accepted"),
        ([-1], [], "node -1 cannot be accepted"),
        ([0, 2], [3], "node 3 cannot be kept"),
        ([0], [2, 1], "node 1 cannot be kept"),
        ([0], [3], "node 3 cannot be kept"),
        ([0], [1, 1], "node 1 cannot be kept"),
        ([], [1], "node 1 cannot be kept"),
        ([0], [0], "node 0 cannot be kept"),
        ([], [0, 1, 4], "node 4 cannot be kept"),
    ],
)
def test_nodes_that_cannot_stay_change_nothing(path, kept, message):
    cache = make_cache()
    sequence = filled(cache, 3)
    write(cache, cache.stage(sequence, [-1, 0, 0, 1]), [1, 2, 3, 4])
    with pytest.raises(ValueError, match=message):
        cache.advance(sequence, path, kept)
    cache.check_integrity()
    assert (sequence.num_cached, sequence.num_staged) == (3, 4)
    assert read(cache, sequence, 0, 7) == [100, 101, 102, 1, 2, 3, 4]
    assert cache.tables.parents[sequence.index][:4].tolist() == [-1, 0, 0, 1]


@pytest.mark.parametrize("parents", [[0], [-1, 1], [-1, 0, 5], [-2]])
def test_parents_must_be_staged_before_their_children(parents):
    cache = make_cache()
    sequence = filled(cache, 3)
    with pytest.raises(ValueError, match="parent"):
        cache.stage(sequence, parents)
    cache.check_integrity()
    assert sequence.num_staged == 0


def test_closing_twice_does_nothing():
    cache = make_cache()
    sequence, other = filled(cache, 20), filled(cache, 20)
    cache.close(sequence)
    cache.close(sequence)
    cache.check_integrity()
    assert not sequence.is_open
    assert cache.num_sequences == 1
    assert read(cache, other, 0, 20) == [*range(100, 120)]


def test_leaving_a_transaction_rolls_back_what_was_not_committed():
    cache = make_cache()
    first, second = filled(cache, 20), filled(cache, 20)
    with cache.speculate([first, second]):
        for sequence in (first, second):
            write(cache, cache.stage(sequence, range(-1, 20)), [1] * 21)
        cache.commit([(first, [0, 1])])
    cache.check_integrity()
    assert (first.num_cached, second.num_cached) == (22, 20)
    assert (first.num_staged, second.num_staged) == (0, 0)
    assert (len(first.blocks), len(second.blocks)) == (2, 2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, CapacityError])
def test_errors_roll_a_transaction_back(error):
    cache = make_cache()
    sequence, closed = filled(cache, 20), filled(cache, 20)
    arguments = {"hint": "wait"} if error is CapacityError else {}
    free_before = cache.num_free_blocks

    def fail_midway():
        with cache.speculate([sequence, closed]):
            cache.stage(sequence, range(-1, 30))
            cache.stage(closed, [-1])
            cache.close(closed)
            raise error("midway", **arguments)

    with pytest.raises(error, match="midway"):
        fail_midway()
    cache.check_integrity()
    assert (sequence.num_cached, sequence.num_staged) == (20, 0)
    assert cache.num_free_blocks == free_before + 2, "the closed sequence stays closed"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda cache, sequence: sequence.blocks.pop(), "positions holds"),
        (lambda cache, sequence: sequence.blocks.__setitem__(1, 0), "a block twice"),
        (lambda cache, sequence: cache._blocks._references.__setitem__(0, 2), "differ from counts"),
        (lambda cache, sequence: cache._blocks._blank.append(0), "an owned block"),
        (lambda cache, sequence: cache._blocks._blank.append(11), "a block twice"),
        (lambda cache, sequence: cache._blocks._blank.pop(), "neither free nor owned"),
    ],
    ids=["lost", "held twice", "miscounted", "free and owned", "free twice", "vanished"],
)
def test_integrity_check_finds_damage(damage, message):
    cache = make_cache()
    sequence = filled(cache, 20)
    damage(cache, sequence)
    with pytest.raises(RuntimeError, match=message):
        cache.check_integrity()
