"""Compiled code that grows draft trees best first: all levels of all requests in one call.

It does what `BestFirst`, `GrowingTree` and the race of `levels` do in `foretoken.drafters` level
by level, and gives the same trees to the last bit; tests hold the two together.
"""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

from foretoken.core.jit import jit
from foretoken.core.ranking import rank_row
from foretoken.models.addresses import call_at, doubles_at
from foretoken.models.layout import packed_size_compiled, unpack_compiled
from foretoken.models.layout_kernels import stage_segment

TREE = np.dtype(
    [
        ("index", np.int64),  # of its sequence in the cache's tables
        ("num_cached", np.int64),  # positions of the sequence
        ("num_staged", np.int64),  # nodes of the sequence that have been run
        ("num_fed", np.int64),  # the same, with those that are to be run next
        ("room", np.int64),  # nodes that may be staged
        ("max_nodes", np.int64),
        ("max_depth", np.int64),
        ("width", np.int64),
        ("depth", np.int64),  # of the frontier
        ("num_nodes", np.int64),  # added so far, the root included; 0 before anything was done
        ("num_best", np.int64),  # of them that are among the best
        ("num_frontier", np.int64),  # 0 if the tree is complete
        ("min_gain", np.float64),
        ("temperature", np.float64),  # 0 for no noise
    ],
    align=True,
)
NODE = np.dtype(
    [
        ("token_id", np.int64),
        ("parent", np.int64),
        ("place", np.int64),  # among the staged, once it is fed; at last, in the draft
        ("logprob", np.float64),
        ("total", np.float64),  # of the log-probabilities of its path
    ],
    align=True,
)

# Arrays of B trees. numba knows named tuples, not dataclasses.
Forest = namedtuple(
    "Forest",
    "trees "  # [B] TREE
    "nodes "  # [B, any] NODE
    "best "  # [B, max_nodes], nodes worth keeping so far, the best first
    "frontiers "  # [B, max_nodes], nodes whose children come next, ascending
    "fed_ids "  # [B, staged], token ids of the nodes fed: tokens that stand, then draft tokens
    "fed_parents "  # [B, staged], likewise
    "noise",  # [B, max_depth], where the noise of each level's choices is; 0 if it is not there
)


@jit
def _begin(tree, nodes, frontier, fed_parents):
    """Plant the root behind the tokens that stand, which are a chain."""
    for place in range(tree.num_fed):
        fed_parents[place] = place - 1
    root = nodes[0]
    root.parent, root.place = -1, tree.num_fed - 1
    root.logprob = root.total = 0.0
    frontier[0] = 0
    tree.num_nodes = tree.num_frontier = 1


@jit
def _admit(tree, nodes, best, total):
    """Note the next node if it is among the best so far; it may push out another."""
    place = tree.num_best
    if place == tree.max_nodes:
        # Ties go to the older node, so a parent is never pushed out before its child.
        if not total > nodes[best[place - 1]].total:
            return False
        place -= 1
    tree.num_best = place + 1
    while place > 0 and nodes[best[place - 1]].total < total:
        best[place] = best[place - 1]
        place -= 1
    best[place] = tree.num_nodes
    return True


@jit
def _select(tree, nodes, best, frontier, first):
    """Expand the newest nodes, those from `first` on, that are worth a pass."""
    # Children of the worst node of a full tree could only replace it by something worse.
    is_full = tree.num_best == tree.max_nodes
    worth_more_than = nodes[best[tree.num_best - 1]].total if is_full else -np.inf
    count, gain = 0, 0.0
    for node in range(first, tree.num_nodes):
        if nodes[node].total > worth_more_than:  # those pushed out are not
            frontier[count] = node
            count += 1
            gain += math.exp(nodes[node].total)
    return count if gain >= tree.min_gain else 0


@jit
def _keep_best(tree, nodes, best):
    """Move the root and the best nodes to the front, in order; count them in `num_nodes`."""
    count = 1
    nodes[0].place = 0
    worst = best[max(0, tree.num_best - 1)]
    least = nodes[worst].total
    for node in range(1, tree.num_nodes if tree.num_best > 0 else 0):
        total = nodes[node].total
        if total > least or (total == least and node <= worst):
            kept = nodes[count]
            kept.token_id = nodes[node].token_id
            kept.logprob = nodes[node].logprob
            kept.parent = nodes[nodes[node].parent].place
            nodes[node].place = count
            count += 1
    tree.num_nodes = count


@jit
def _feed(tree, nodes, frontier, fed_ids, fed_parents):
    """Note what is to be run for the frontier."""
    for place in range(tree.num_frontier):
        node = nodes[frontier[place]]
        node.place = tree.num_fed
        fed_ids[tree.num_fed] = node.token_id
        fed_parents[tree.num_fed] = nodes[node.parent].place
        tree.num_fed += 1


@jit
def _lay_out(forest, growing, slot_table, parent_table, depth_table):
    """Stage what is fed next; return the packed layout of its pass, and the rows wanted."""
    num_rows = num_keys = num_staged = num_wanted = 0
    for index in growing:
        tree = forest.trees[index]
        num_rows += tree.num_fed - tree.num_staged
        num_keys += tree.num_cached + tree.num_fed
        num_staged += tree.num_fed
        num_wanted += tree.num_frontier
    header = len(growing), num_rows, num_keys, num_staged
    packed = np.empty(packed_size_compiled(*header), np.int64)
    packed[0], packed[1], packed[2], packed[3] = header
    layout = unpack_compiled(packed)
    layout.row_starts[0] = layout.key_starts[0] = layout.node_starts[0] = 0
    wanted = np.empty(num_wanted, np.int64)
    place = 0
    for segment in range(len(growing)):
        index = growing[segment]
        tree = forest.trees[index]
        first, stop = tree.num_staged, tree.num_fed
        stage_segment(
            layout,
            segment,
            first,
            forest.fed_ids[index, first:stop],
            forest.fed_parents[index, first:stop],
            tree.num_cached,
            slot_table[tree.index],
            parent_table[tree.index],
            depth_table[tree.index],
        )
        next_row = layout.row_starts[segment + 1]
        for row in range(next_row - tree.num_frontier, next_row):
            wanted[place] = row
            place += 1
    return packed, wanted


@jit
def _add_level(
    tree, nodes, best, frontier, noise_address, rows, num_columns, race_temperature, scores,
    logprobs, ids,
):  # fmt: skip
    """Add the children of the frontier, whose logits are `rows`, and settle the next frontier."""
    first = tree.num_nodes
    temperature, noise = np.float32(1.0), logprobs[:0]
    if tree.temperature > 0:
        temperature = np.float32(tree.temperature)
        noise = doubles_at(noise_address, num_columns)
    for place in range(tree.num_frontier):
        parent = frontier[place]
        count = rank_row(
            rows[place, :num_columns],
            temperature,
            race_temperature,
            noise,
            scores,
            logprobs[: tree.width],
            ids[: tree.width],
        )
        for child in range(count):
            total = nodes[parent].total + logprobs[child]
            if not _admit(tree, nodes, best, total):
                break  # those after it are worth no more
            node = nodes[tree.num_nodes]
            node.token_id, node.parent = ids[child], parent
            node.logprob, node.total = logprobs[child], total
            tree.num_nodes += 1
    tree.depth += 1
    tree.num_frontier = 0
    if tree.depth < tree.max_depth:
        tree.num_frontier = _select(tree, nodes, best, frontier, first)


@jit
def grow_trees(
    forest,
    slot_table,
    parent_table,
    depth_table,
    num_columns,
    race_temperature,
    run_pass,
    num_counters,
    shape,
    weights,
    plan,
    layer_size,
    initial,
    keys,
    values,
    rotary,
    buffers,
    num_padded,
    hidden_index,
    states,
):
    """Grow trees level by level, until all are complete or one lacks what its next level needs.

    Args:
        forest: The trees. At first it holds no more than what is known of them, the tokens that
            stand among the fed ones, and noise; when none waits, the nodes of the drafts are in
            front, counted in `num_nodes`, but for the root's token.
        slot_table: Slot of each position of each sequence.
        parent_table: Parent of each staged node of each sequence; written to.
        depth_table: Its depth; written to.
        num_columns: Tokens that may be drafted, the first of the model's.
        race_temperature: As for `rank_row`.
        run_pass: Address of `decoder_kernels.run_pass` for the types of what follows.
        num_counters: Numbers that its `state` has.
        shape: As for `run_pass`, and so are those below.
        weights: Likewise.
        plan: Likewise.
        layer_size: Likewise.
        initial: Likewise.
        keys: Likewise.
        values: Likewise.
        rotary: Likewise.
        buffers: Likewise, with room for all rows of a level.
        num_padded: Columns of its logits.
        hidden_index: Likewise.
        states: Likewise.

    Returns:
        How many trees wait for the noise of their next level, or for room to stage it.
    """
    trees = forest.trees
    max_width = 0
    for tree in trees:
        max_width = max(max_width, tree.width)
    scores, logprobs = np.empty(num_columns), np.empty(max_width)
    ids, growing = np.empty(max_width, np.int64), np.empty(len(trees), np.int64)
    for index in range(len(trees)):
        if trees[index].num_nodes == 0:
            _begin(
                trees[index],
                forest.nodes[index],
                forest.frontiers[index],
                forest.fed_parents[index],
            )
    while True:
        num_growing = num_waiting = 0
        for index in range(len(trees)):
            tree = trees[index]
            if tree.num_frontier > 0:
                has_noise = tree.temperature == 0 or forest.noise[index, tree.depth] != 0
                growing[num_growing] = index
                num_growing += 1
                num_waiting += not (has_noise and tree.num_fed <= tree.room)
        if num_waiting > 0:
            return num_waiting
        if num_growing == 0:
            break
        packed, wanted = _lay_out(
            forest, growing[:num_growing], slot_table, parent_table, depth_table
        )
        logits = np.empty((len(wanted), num_padded), np.float32)
        call_at(
            run_pass,
            (
                shape, weights, plan, layer_size, packed, initial, wanted, keys, values, rotary,
                buffers, logits.reshape(-1), hidden_index, states,
                np.zeros(num_counters, np.int64), 1,
            ),
        )  # fmt: skip
        row = 0
        for index in growing[:num_growing]:
            tree = trees[index]
            rows = logits[row : row + tree.num_frontier]
            row += tree.num_frontier
            tree.num_staged = tree.num_fed
            nodes, frontier = forest.nodes[index], forest.frontiers[index]
            _add_level(
                tree, nodes, forest.best[index], frontier, forest.noise[index, tree.depth], rows,
                num_columns, race_temperature, scores, logprobs, ids,
            )  # fmt: skip
            _feed(tree, nodes, frontier, forest.fed_ids[index], forest.fed_parents[index])
    for index in range(len(trees)):
        _keep_best(trees[index], forest.nodes[index], forest.best[index])
    return 0
