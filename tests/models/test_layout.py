"""The layout of a batch, compiled, against plain lists; and what a refused batch leaves behind."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken.errors import CapacityError
from foretoken.models.batch import RaggedBatch, Segment
from foretoken.models.cache import BLOCK_SIZE, KVCache, LayerShape
from foretoken.models.layout import unpack
from tests.fakes import random_parents


def make_cache(num_blocks=200):
    return KVCache(
        [LayerShape(1, 2, 2)], num_blocks, dtype=torch.float32, device=torch.device("cpu")
    )


def filled(cache, num_cached, parents):
    """Return a sequence with so many cached positions and a tree staged in an earlier pass."""
    sequence = cache.open()
    cache.stage(sequence, range(-1, num_cached - 1))
    cache.commit([(sequence, range(num_cached))])
    if parents:
        cache.stage(sequence, parents)
    return sequence


def depths_of(parents):
    depths = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
@settings(max_examples=50, deadline=None)
def test_a_layout_of_staged_nodes_is_the_one_that_staging_them_gave(sizes, seed):
    """Nodes are staged all at once; any stretch of them looks as if staged behind the others."""
    rng, cache = random.Random(seed), make_cache()
    sequences, firsts, ids, expected = [], [], [], []
    for num_cached, num_nodes in sizes:
        parents = random_parents(rng, num_nodes)
        sequence = filled(cache, num_cached, parents)
        depths = depths_of(parents)
        for first in rng.sample(range(num_nodes), min(2, num_nodes)):
            stop = rng.randint(first + 1, num_nodes)
            sequences.append(sequence)
            firsts.append(first)
            ids.append([rng.randrange(1000) for _ in range(first, stop)])
            slots = cache.slots(sequence, 0, num_cached + stop).tolist()
            positions = [num_cached + depth for depth in depths[first:stop]]
            expected.append((positions, slots, parents[:stop], depths[:stop], num_cached, first))
    layout = unpack(cache.lay_out_staged(sequences, firsts, ids))
    assert layout.token_ids.tolist() == [token_id for each in ids for token_id in each]
    assert not layout.shifts.any()
    starts = layout.row_starts, layout.key_starts, layout.node_starts
    assert [int(part[-1]) for part in starts] == [
        len(layout.token_ids),
        len(layout.slots),
        len(layout.parents),
    ]
    for index, (positions, slots, parents, depths, num_cached, first) in enumerate(expected):
        row, key, node = [slice(*map(int, part[index : index + 2])) for part in starts]
        assert layout.positions[row].tolist() == positions
        assert layout.new_slots[row].tolist() == slots[num_cached + first :]
        assert layout.slots[key].tolist() == slots
        assert layout.parents[node].tolist() == parents
        assert layout.depths[node].tolist() == depths
        assert (layout.num_cached[index], layout.first_staged[index]) == (num_cached, first)
        assert len(layout.token_ids[row]) == len(ids[index])


@given(
    st.lists(
        st.tuples(st.integers(0, 150), st.integers(0, 9), st.integers(1, 80)),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_a_layout_says_what_plain_lists_say(sizes, seed):
    """Each segment is (cached positions, nodes staged by an earlier pass, new nodes).

    Up to 150 + 9 + 80 positions make the tables grow, and more than one sequence adds rows.
    """
    rng, cache = random.Random(seed), make_cache()
    segments, staged = [], []
    for num_cached, num_before, num_new in sizes:
        before = random_parents(rng, num_before) if num_before else []
        new = random_parents(rng, num_new, first=num_before)
        ids = [rng.randrange(2**40) for _ in new]
        segments.append(Segment(filled(cache, num_cached, before), ids, new))
        staged.append([*before, *new])
    batch = RaggedBatch(cache, segments)
    layout = batch.layout
    starts = [layout.row_starts, layout.key_starts, layout.node_starts]
    assert all(boundaries[0] == 0 for boundaries in starts)
    rows = slots = 0
    for index, (segment, parents, (num_cached, num_before, num_new)) in enumerate(
        zip(segments, staged, sizes, strict=True)
    ):
        num_keys = num_cached + num_before + num_new
        all_slots = cache.slots(segment.sequence, 0, num_keys).tolist()
        assert len(set(all_slots)) == num_keys, "a slot twice"
        row, key, node = [slice(*map(int, part[index : index + 2])) for part in starts]
        assert layout.token_ids[row].tolist() == list(segment.token_ids)
        depths = depths_of(parents)
        assert layout.positions[row].tolist() == [num_cached + d for d in depths[num_before:]]
        assert layout.new_slots[row].tolist() == all_slots[num_cached + num_before :]
        assert layout.slots[key].tolist() == all_slots
        assert layout.parents[node].tolist() == parents
        assert layout.depths[node].tolist() == depths
        assert (layout.num_cached[index], layout.first_staged[index]) == (num_cached, num_before)
        assert layout.shifts[index] == 0
        assert batch.num_keys[index] == num_keys
        rows, slots = rows + num_new, slots + num_keys
    assert (batch.num_rows, len(layout.token_ids), len(layout.slots)) == (rows, rows, slots)
    cache.check_integrity()


@pytest.mark.parametrize(
    ("ids", "parents", "error"),
    [
        ([7] * 40, range(-1, 39), CapacityError),
        ([7, 7], [0, 2], ValueError),
        ([7], [0, 1], ValueError),
        ([7, 7, 7], [0, 1], ValueError),
        ([7, None], [0, 1], TypeError),
    ],
)
def test_a_refused_batch_changes_nothing(ids, parents, error):
    """The first segment, which is well, used to stay staged when the second was refused."""
    cache = make_cache(num_blocks=4)
    first, second = filled(cache, 15, [-1]), filled(cache, 15, [-1])
    with pytest.raises(error):
        RaggedBatch(cache, [Segment(first, [1, 2], [0, 1]), Segment(second, ids, parents)])
    for sequence in (first, second):
        assert (sequence.num_cached, sequence.num_staged, len(sequence.blocks)) == (15, 1, 1)
    assert cache.num_free_blocks == 2
    cache.check_integrity()
    batch = RaggedBatch(cache, [Segment(first, [1, 2], [0, 1])])
    assert batch.layout.positions.tolist() == [16, 17]
    assert len(first.blocks) == -(-18 // BLOCK_SIZE)


def test_rows_of_closed_sequences_are_used_again():
    cache = make_cache()
    for _ in range(100):
        sequences = [cache.open() for _ in range(3)]
        for sequence in sequences:
            cache.stage(sequence, [-1])
            cache.close(sequence)
    assert {sequence.index for sequence in sequences} <= set(range(4))
