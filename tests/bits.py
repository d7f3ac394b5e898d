"""Random histories of one model in which the bits of every row are checked.

Trees of two sequences grow, are kept or dropped; prompts come in chunks; prefixes are shared. At
the end every row that was ever scored must have exactly the logits that plain decoding gives, one
token at a time, alone in a cache of its own.
"""

import random

import torch

from foretoken.models.batch import Segment
from tests.fakes import VOCAB_SIZE, random_parents


class Player:
    """Feeds random trees of several sequences and remembers every row's past and logits.

    Args:
        model: A `LanguageModel`.
        seed: Of everything random.
    """

    def __init__(self, model, seed):
        self.random = random.Random(seed)
        self.model = model
        self.cache = model.new_cache(1000)
        self.pasts = [[]]
        self.sequences = [self.cache.open()]
        self.seen = []  # (token ids up to and with the row's, logits)

    def play(self, num_steps):
        """Feed a prompt, let a second sequence share some of it, then feed trees to both."""
        self.feed([0], self.chunk)
        self.pasts.append(list(self.pasts[0]))
        self.sequences.append(self.cache.fork(self.sequences[0]))
        for _ in range(num_steps):
            chosen = self.random.sample([0, 1], self.random.randint(1, 2))
            self.feed(chosen, self.random.choice([self.chunk, self.tree, self.tree]))

    def chunk(self):
        return list(range(-1, self.random.randint(0, 20))), True

    def tree(self):
        return random_parents(self.random, self.random.randint(1, 12)), False

    def feed(self, chosen, grow):
        shapes = [grow() for _ in chosen]
        ids = [[self.random.randrange(VOCAB_SIZE) for _ in parents] for parents, _ in shapes]
        with self.cache.speculate([self.sequences[i] for i in chosen]):
            segments = [
                Segment(self.sequences[i], tokens, parents)
                for i, tokens, (parents, _) in zip(chosen, ids, shapes, strict=True)
            ]
            batch = self.model.batch(self.cache, segments)
            rows = self.random.sample(range(batch.num_rows), self.random.randint(1, batch.num_rows))
            logits = dict(zip(rows, self.model.forward(batch, rows).logits, strict=True))
            kept, row = [], 0
            for i, tokens, (parents, keep_all) in zip(chosen, ids, shapes, strict=True):
                paths = []
                for node, parent in enumerate(parents):
                    paths.append([*(paths[parent] if parent >= 0 else []), node])
                    if row + node in logits:
                        path_ids = [tokens[step] for step in paths[node]]
                        self.seen.append(([*self.pasts[i], *path_ids], logits[row + node]))
                row += len(tokens)
                path = paths[-1] if keep_all else self.random.choice([[], *paths])
                kept.append((self.sequences[i], path))
                self.pasts[i] += [tokens[step] for step in path]
            self.cache.commit(kept)
        self.cache.check_integrity()

    def check(self):
        """Compare all rows with plain decoding; return how many there were."""
        for token_ids, expected in zip(self.seen, plain_logits(self.model, self.seen), strict=True):
            ids, logits = token_ids
            assert torch.equal(logits, expected), (ids, (logits - expected).abs().max())
        return len(self.seen)


def plain_logits(model, seen):
    """Yield the logits after the last token of each, one token fed at a time.

    Every row gets a cache of its own, but for rows that go on where the row before ended.
    """
    past, cache, sequence, logits = None, None, None, None
    for token_ids, _ in seen:
        if past is None or past != token_ids[: len(past)] or len(past) == len(token_ids):
            past, cache = [], model.new_cache(len(token_ids) + 100)
            sequence = cache.open()
        for token_id in token_ids[len(past) :]:
            batch = model.batch(cache, [Segment(sequence, [token_id], [-1])])
            logits = model.forward(batch, [0]).logits[0]
            cache.commit([(sequence, [0])])
        past = token_ids
        yield logits
