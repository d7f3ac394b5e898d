"""Prefix caching: who shares what, who makes room for whom, and the same bits as without."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken.errors import CapacityError
from foretoken.models.cache import BLOCK_SIZE
from foretoken.models.prefix import ROOT, BlockPool
from tests.fakes import VOCAB_SIZE, random_parents
from tests.models.test_cache import make_cache, read, write

# -- random histories against a simple reference ---------------------------------------------


TEXTS = [random.Random(seed).choices([0, 1], k=70) for seed in range(2)]


class Block:
    """A block of the reference; who holds it is seen from who has it in its list."""

    def __init__(self):
        self.prefix = None  # all tokens up to its end, if it is registered
        self.last_use = (0, 0)


class Twin:
    """A sequence of the cache, its tokens, and its blocks in the reference."""

    def __init__(self, sequence):
        self.sequence = sequence
        self.text = []
        self.staged, self.parents = [], []  # paths down to the staged nodes, and their parents
        self.blocks = []
        self.num_shared = 0


class Reference:
    """Says by search and comparison which blocks there are, and which go when there is no room.

    Args:
        num_blocks: Of the cache.
    """

    def __init__(self, num_blocks):
        self.num_blocks = num_blocks
        self.twins = []
        self.registered = []
        self.clock = itertools.count(1)

    def held(self):
        return {block for twin in self.twins for block in twin.blocks}

    def num_free(self):
        return self.num_blocks - len(self.held())

    def touch(self, before):
        """Note when the blocks that nobody holds any more were last held; the deepest first."""
        now = next(self.clock)
        for block in before - self.held():
            block.last_use = (now, -len(block.prefix or ()))

    def resize(self, twin):
        """Give a twin as many blocks as its positions need."""
        before = self.held()
        needed = -(-(len(twin.text) + len(twin.staged)) // BLOCK_SIZE)
        while len(twin.blocks) < needed:
            if len(self.held() | set(self.registered)) == self.num_blocks:
                unused = set(self.registered) - self.held()
                self.registered.remove(min(unused, key=lambda block: block.last_use))
            twin.blocks.append(Block())
        del twin.blocks[needed:]
        self.touch(before)

    def find(self, prefix):
        found = [block for block in self.registered if block.prefix == tuple(prefix)]
        assert len(found) < 2
        return found[0] if found else None

    def known_blocks(self, text):
        """Return the registered blocks that a sequence opened with a text begins with."""
        blocks = []
        for stop in range(BLOCK_SIZE, len(text), BLOCK_SIZE):
            block = self.find(text[:stop])
            if block is None:
                break
            blocks.append(block)
        return blocks

    def share(self, twin, text):
        before = self.held()
        while (stop := (twin.num_shared + 1) * BLOCK_SIZE) <= len(text):
            own, first = twin.blocks[twin.num_shared], self.find(text[:stop])
            if first is None:
                own.prefix = tuple(text[:stop])
                self.registered.append(own)
            elif first is not own:
                if sum(own in other.blocks for other in self.twins) > 1:
                    break
                twin.blocks[twin.num_shared] = first
            twin.num_shared += 1
        self.touch(before)


class Machine:
    """Does random things to a cache and to the reference alike, with texts that often coincide.

    Each slot holds a number that stands for the tokens down to it, so that a block shared with
    the wrong sequence would show.
    """

    def __init__(self, seed, num_blocks):
        self.random = random.Random(seed)
        self.cache = make_cache(num_blocks)
        self.reference = Reference(num_blocks)
        self.marks = {}
        self.num_queries = self.num_hits = 0

    @property
    def twins(self):
        return self.reference.twins

    def run(self, num_steps):
        often = [self.open, self.open, self.share, self.share, self.close]
        actions = [*often, *often, self.stage, self.stage, self.commit, self.rollback, self.fork]
        for _ in range(num_steps):
            self.random.choice(actions)()
            self.check()

    def check(self):
        self.cache.check_integrity()
        reference = self.reference
        assert self.cache.num_free_blocks == reference.num_free()
        assert self.cache.num_cached_blocks == len(reference.registered)
        assert self.cache.num_prefix_queries == self.num_queries
        assert self.cache.num_prefix_hits == self.num_hits
        numbers = {}
        for twin in self.twins:
            assert twin.sequence.num_cached == len(twin.text)
            assert twin.sequence.num_shared == twin.num_shared
            for block, number in zip(twin.blocks, twin.sequence.blocks, strict=True):
                assert numbers.setdefault(block, number) == number, "they share the same blocks"
            paths = [twin.text[: stop + 1] for stop in range(len(twin.text))] + twin.staged
            held = read(self.cache, twin.sequence, 0, len(paths)) if paths else []
            assert held == self.marks_of(paths)
        assert len(set(numbers.values())) == len(numbers), "and no others"

    def marks_of(self, paths):
        return [self.marks.setdefault(tuple(path), len(self.marks) + 1) for path in paths]

    def some_twin(self):
        return self.random.choice(self.twins) if self.twins else None

    def some_ids(self, count):
        return self.random.choices([0, 1], weights=[0.98, 0.02], k=count)

    def open(self):
        text = self.random.choice(TEXTS)[: self.random.choice([0, 17, 50, 70])]
        text = text + self.some_ids(self.random.choice([0, 1, 20]))
        expected = self.reference.known_blocks(text)
        twin = Twin(self.cache.open(text))
        twin.blocks, twin.num_shared = expected, len(expected)
        twin.text = text[: len(expected) * BLOCK_SIZE]
        self.twins.append(twin)
        self.num_queries += len(text)
        self.num_hits += len(twin.text)
        rest = text[len(twin.text) :]
        if rest and self.feed(twin, rest, range(-1, len(rest) - 1)) and self.random.random() < 0.8:
            self.commit(twin)

    def stage(self):
        twin = self.some_twin()
        if twin is not None:
            count = self.random.choice([1, 5, BLOCK_SIZE])
            parents = random_parents(self.random, count, first=len(twin.parents))
            self.feed(twin, self.some_ids(count), parents)

    def feed(self, twin, token_ids, parents):
        count, first = len(token_ids), len(twin.staged)
        needed = -(-(len(twin.text) + first + count) // BLOCK_SIZE) - len(twin.blocks)
        if needed > self.reference.num_free():
            with pytest.raises(CapacityError):
                self.cache.stage(twin.sequence, parents)
            return False
        slots = self.cache.stage(twin.sequence, parents)
        for parent, token_id in zip(parents, token_ids, strict=True):
            above = twin.text if parent < 0 else twin.staged[parent]
            twin.staged.append([*above, token_id])
        twin.parents += parents
        write(self.cache, slots, self.marks_of(twin.staged[first:]))
        self.reference.resize(twin)
        return True

    def commit(self, twin=None):
        twin = twin or self.some_twin()
        if twin is None or not twin.staged:
            return
        node, path = self.random.choice([len(twin.staged) - 1, 0]), []
        text = twin.staged[node]
        while node >= 0:
            path.insert(0, node)
            node = twin.parents[node]
        self.cache.commit([(twin.sequence, path)])
        twin.text = text
        self.forget_staged(twin)

    def rollback(self):
        twin = self.some_twin()
        if twin is not None:
            self.cache.rollback(twin.sequence)
            self.forget_staged(twin)

    def forget_staged(self, twin):
        twin.staged, twin.parents = [], []
        self.reference.resize(twin)

    def share(self, twin=None):
        twin = twin or self.some_twin()
        if twin is not None:
            known = twin.text[: self.random.choice([20, 1000, 1000])]
            more = twin.staged[-1][len(known) :] if twin.staged and known == twin.text else []
            self.cache.share(twin.sequence, known + more)
            self.reference.share(twin, known)

    def fork(self):
        twin = self.some_twin()
        if twin is None:
            return
        num_full, num_rest = divmod(len(twin.text), BLOCK_SIZE)
        if num_rest and not self.reference.num_free():
            with pytest.raises(CapacityError):
                self.cache.fork(twin.sequence)
            return
        fork = Twin(self.cache.fork(twin.sequence))
        fork.text, fork.num_shared = twin.text, twin.num_shared
        fork.blocks = twin.blocks[:num_full]
        self.twins.append(fork)
        self.reference.resize(fork)

    def close(self):
        twin = self.some_twin()
        if twin is not None:
            before = self.reference.held()
            self.cache.close(twin.sequence)
            self.twins.remove(twin)
            self.reference.touch(before)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 9, 14, 25]))
def test_random_histories_share_what_they_should(seed, num_blocks):
    machine = Machine(seed, num_blocks)
    machine.run(60)
    while machine.twins:
        machine.close()
        machine.check()
    assert machine.cache.num_free_blocks == num_blocks, "nothing leaks"


# -- who gets what ---------------------------------------------------------------------------


def ids(count, seed=0):
    return random.Random(seed).choices(range(VOCAB_SIZE), k=count)


def fill(cache, text, *, is_shared=True):
    """Return an open sequence that holds a text, as if it had been fed."""
    sequence = cache.open(text if is_shared else ())
    rest = len(text) - sequence.num_cached
    cache.stage(sequence, range(-1, rest - 1))
    cache.commit([(sequence, range(rest))])
    if is_shared:
        cache.share(sequence, text)
    return sequence


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 32, 33, 40, 48, 49, 60])
def test_open_takes_full_blocks_and_leaves_the_last_token(length):
    cache = make_cache()
    text = ids(48)
    first = fill(cache, text)
    second = cache.open([*text, *ids(12, seed=1)][:length])
    num_blocks = min(3, max(0, length - 1) // BLOCK_SIZE)
    assert second.blocks == first.blocks[:num_blocks]
    assert second.num_cached == num_blocks * BLOCK_SIZE
    assert cache.slots(second, 0, second.num_cached).tolist() == [*range(second.num_cached)]
    assert (cache.num_prefix_queries, cache.num_prefix_hits) == (48 + length, second.num_cached)
    cache.check_integrity()


def test_a_block_is_known_by_all_that_comes_before_it():
    """The second block has the same tokens in three texts, and another past in one of them."""
    cache = make_cache()
    past, other, block = ids(16, seed=1), ids(16, seed=2), ids(16, seed=3)
    first = fill(cache, past + block)
    second = fill(cache, other + block)
    assert not set(first.blocks) & set(second.blocks)
    assert cache.open([*past, *block, 0]).blocks == first.blocks
    assert cache.open([*other, *block, 0]).blocks == second.blocks
    assert cache.open([*block, 0]).blocks == []


@pytest.mark.parametrize("place", [0, 15, 16, 31])
def test_one_other_token_ends_what_is_shared(place):
    cache = make_cache()
    text = ids(40)
    fill(cache, text)
    text[place] += 1
    assert cache.open(text).num_cached == place // BLOCK_SIZE * BLOCK_SIZE


def test_token_ids_are_compared_whatever_their_hash():
    """-1 and -2 have one hash in Python; large ids differ from their remainders."""
    cache = make_cache()
    fill(cache, [-1] * 17)
    assert cache.open([-2] * 17).num_cached == 0
    assert cache.open([2**32 - 1] * 17).num_cached == 0
    assert cache.open([-1] * 17).num_cached == 16


def test_nothing_is_shared_unasked():
    cache = make_cache()
    text = ids(40)
    first = fill(cache, text, is_shared=False)
    assert cache.open(text).blocks == []
    cache.share(first, text)
    assert cache.open().blocks == []
    assert cache.open(text).blocks == first.blocks[:2]


def test_only_what_was_committed_is_shared():
    """Staged nodes and positions without a token are not, nor is the block that goes on."""
    cache = make_cache()
    text = ids(60)
    sequence = fill(cache, text[:40])
    cache.stage(sequence, range(-1, 19))
    cache.share(sequence, text)
    assert cache.num_cached_blocks == 2
    cache.commit([(sequence, range(20))])
    cache.share(sequence, text[:47])
    assert cache.num_cached_blocks == 2
    cache.share(sequence, text)
    cache.share(sequence, text)
    assert cache.num_cached_blocks == 3


def test_new_positions_go_to_new_blocks():
    cache = make_cache()
    text = ids(33)
    first = fill(cache, text)
    second, third = cache.open(text), cache.open(text)
    for mark, sequence in enumerate((second, third)):
        slots = cache.stage(sequence, [-1, 0, 0])
        assert not set(slots // BLOCK_SIZE) & set(first.blocks)
        write(cache, slots, [mark] * 3)
        cache.commit([(sequence, [0, 2])])
    assert read(cache, second, 32, 34) == [0, 0]
    assert read(cache, third, 32, 34) == [1, 1]
    cache.check_integrity()


def test_who_computed_the_same_takes_the_first_block():
    """Requests of one prompt that ran side by side hold it once from then on."""
    cache = make_cache()
    text = ids(40)
    sequences = [fill(cache, text, is_shared=False) for _ in range(3)]
    assert cache.num_free_blocks == 12 - 9
    for sequence in sequences:
        cache.share(sequence, text)
        cache.check_integrity()
    assert cache.num_free_blocks == 12 - 5
    assert {tuple(sequence.blocks[:2]) for sequence in sequences} == {(0, 1)}
    assert cache.slots(sequences[2], 0, 40).tolist() == [*range(32), *range(128, 136)]


def test_forks_keep_the_blocks_they_have_in_common():
    cache = make_cache()
    text = ids(40)
    sequence = fill(cache, text, is_shared=False)
    fork = cache.fork(sequence)
    first = fill(cache, text)
    cache.share(sequence, text)
    cache.check_integrity()
    assert sequence.blocks[:2] == fork.blocks[:2] != first.blocks[:2]
    cache.close(fork)
    cache.share(sequence, text)
    assert sequence.blocks[:2] == first.blocks[:2]


def test_forks_share_what_is_shared():
    cache = make_cache()
    text = ids(50)
    sequence = fill(cache, text[:40])
    fork = cache.fork(sequence)
    cache.close(sequence)
    cache.stage(fork, range(-1, 9))
    cache.commit([(fork, range(10))])
    cache.share(fork, text)
    assert cache.num_cached_blocks == 3
    assert cache.open(text).blocks == fork.blocks[:3]


def test_other_tokens_than_a_block_stands_for_are_refused():
    cache = make_cache()
    sequence = fill(cache, ids(40), is_shared=False)
    fork = cache.fork(sequence)
    cache.share(sequence, ids(40))
    with pytest.raises(ValueError, match="block 0 is registered for another prefix"):
        cache.share(fork, ids(40, seed=1))
    cache.check_integrity()
    assert cache.num_cached_blocks == 2


# -- who makes room --------------------------------------------------------------------------


def test_blocks_without_a_prefix_are_handed_out_first():
    cache = make_cache(num_blocks=6)
    shared = fill(cache, ids(32))
    cache.close(fill(cache, ids(40, seed=1), is_shared=False))
    cache.close(shared)
    assert cache.num_free_blocks == 6
    assert fill(cache, ids(64, seed=2), is_shared=False).blocks == [2, 3, 4, 5]
    assert cache.open(ids(33)).blocks == [0, 1]


def test_the_prefix_that_was_used_last_stays_longest():
    cache = make_cache(num_blocks=6)
    texts = [ids(32, seed=seed) for seed in range(3)]
    for text in texts:
        cache.close(fill(cache, text))
    cache.close(cache.open([*texts[0], 0]))
    kept = []
    for num_blocks in range(1, 7):
        cache.close(fill(cache, ids(16 * num_blocks, seed=9), is_shared=False))
        cache.check_integrity()
        kept.append([len(cache._blocks.find(text)) for text in texts])
    # The first text was looked at again; of each text the last block goes first.
    assert kept == [[2, 1, 2], [2, 0, 2], [2, 0, 1], [2, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert cache.num_cached_blocks == 0


def test_a_common_prefix_outlives_what_hangs_on_it():
    cache = make_cache(num_blocks=4)
    past = ids(16)
    for seed in (1, 2, 3):
        cache.close(fill(cache, past + ids(16, seed=seed)))
    cache.close(fill(cache, ids(32, seed=4), is_shared=False))
    assert cache.num_cached_blocks == 2
    assert cache.open([*past, *ids(16, seed=3), 0]).num_cached == 32
    cache.check_integrity()


def test_a_prefix_is_not_lost_when_there_is_no_room_for_more():
    cache = make_cache(num_blocks=3)
    text = ids(33)
    cache.close(fill(cache, text))
    sequence = cache.open(text)
    with pytest.raises(CapacityError):
        cache.stage(sequence, range(-1, 16))
    cache.check_integrity()
    assert sequence.num_cached == 32
    assert cache.num_cached_blocks == 2


def test_pool_hands_out_what_was_released():
    pool = BlockPool(3, BLOCK_SIZE)
    assert [pool.take(), pool.take()] == [0, 1]
    assert pool.register(0, ROOT, ids(16)) == 0
    assert pool.register(1, ROOT, ids(16)) == 0
    pool.release([0])
    pool.release([1])
    assert (pool.num_free, pool.num_registered) == (3, 1)
    assert [pool.take(), pool.take(), pool.take()] == [1, 2, 0]
    assert (pool.num_free, pool.num_registered) == (0, 0)
    assert pool.find(ids(16)) == []


# -- integrity -------------------------------------------------------------------------------


def forget(pool, block):
    del pool._blocks[pool._keys.pop(block)]


def lose_parent(pool):
    forget(pool, 4)
    del pool._kept[4]
    pool._blank.append(4)


# Blocks 0 to 2 are held, two of them registered; 3 to 5 are kept. What breaks which rule:
DAMAGES = {
    "block 1 is not registered below 0": lambda pool: forget(pool, 1),
    "block 5 is registered without its parent 4": lose_parent,
    "for no prefix": lambda pool: pool._blocks.popitem(),
    "or for several": lambda pool: pool._blocks.setdefault((ROOT, b""), 0),
    "among the wrong ones": lambda pool: pool._blank.append(pool._kept.popitem()[0]),
    "block 4 would be handed out before its child 5": lambda pool: pool._kept.move_to_end(5),
    "block 2 is held more often than its parent 4": lambda pool: pool.register(2, 4, ids(16)),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_integrity_check_finds_damage(message):
    cache = make_cache()
    fill(cache, ids(40))
    cache.close(fill(cache, ids(48, seed=1)))
    cache.check_integrity()
    DAMAGES[message](cache._blocks)
    with pytest.raises(RuntimeError, match=message):
        cache.check_integrity()


def test_integrity_check_finds_shared_blocks_that_are_not_full():
    cache = make_cache()
    fill(cache, ids(40)).num_shared = 3
    with pytest.raises(RuntimeError, match="3 blocks are shared and not all are full"):
        cache.check_integrity()
