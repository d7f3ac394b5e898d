"""Random histories of one model, every row compared bit for bit with plain decoding."""

import random

import torch

from foretoken.models.batch import Segment
from tests.fakes import VOCAB_SIZE, random_parents


class Histories:
    """Random histories of one model, and plain decoding of every path in them.

    Each path's plain logits come from one pass of one token, after a fork of its parent's.
    """

    def __init__(self, model, seed):
        self.model, self.random = model, random.Random(seed)
        self.plain_cache = model.new_cache(16_000)
        self.plain = {(): (self.plain_cache.open(), None)}

    def expected(self, path):
        """Return the logits after a path, by plain decoding."""
        path = tuple(path)
        if path not in self.plain:
            self.expected(path[:-1])
            sequence = self.plain_cache.fork(self.plain[path[:-1]][0])
            batch = self.model.batch(self.plain_cache, [Segment(sequence, path[-1:], [-1])])
            logits = self.model.forward(batch, [0]).logits[0]
            self.plain_cache.commit([(sequence, [0])])
            self.plain[path] = (sequence, logits)
        return self.plain[path][1]

    def check_random_history(self, num_sequences, num_steps):
        """Feed a prompt and then trees to some sequences; return how many rows were compared."""
        num_rows = 0
        cache = self.model.new_cache(2000)
        sequences = [cache.open() for _ in range(num_sequences)]
        texts = [[] for _ in sequences]
        for step in range(num_steps):
            segments, paths = [], []
            for sequence, text in zip(sequences, texts, strict=True):
                count = self.random.randint(1, 20 if step == 0 else 8)
                chain = list(range(-1, count - 1))
                parents = chain if step == 0 else random_parents(self.random, count, first=0)
                token_ids = [self.random.randrange(VOCAB_SIZE) for _ in parents]
                segments.append(Segment(sequence, token_ids, parents))
                paths.append(paths_of(text, token_ids, parents))
            batch = self.model.batch(cache, segments)
            rows = self.random.sample(range(batch.num_rows), batch.num_rows)
            logits = self.model.forward(batch, rows).logits
            flat = [path for nodes in paths for path, _ in nodes]
            num_rows += len(rows)
            for row, found in zip(rows, logits, strict=True):
                assert torch.equal(found, self.expected(flat[row])), flat[row]
            for index, nodes in enumerate(paths):
                path, kept = nodes[-1] if step == 0 else self.random.choice(nodes)
                cache.commit([(sequences[index], kept)])
                texts[index] = list(path)
        return num_rows


def paths_of(text, token_ids, parents):
    """Return for each node the tokens down to it, the text included, and the nodes."""
    paths = []
    for node, parent in enumerate(parents):
        above, nodes = (list(text), []) if parent < 0 else paths[parent]
        paths.append(([*above, token_ids[node]], [*nodes, node]))
    return paths
