"""Prefix caching through real models: on a shared prefix come the bits of plain decoding."""

import random

import pytest
import torch

from foretoken.core.verdict import Exactness
from foretoken.models.batch import Segment
from foretoken.models.decoder import CompiledDecoder
from foretoken.models.loading import load_model
from foretoken.models.modules import adapt_module
from tests.bits import Histories, paths_of
from tests.fakes import VOCAB_SIZE, build_module, random_parents, tiny_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIXED_WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}


class Talk:
    """A text that grows by what a pass keeps, and its place in a cache."""

    def __init__(self, cache, text):
        self.cache, self.text = cache, list(text)
        self.sequence = cache.open(text)
        self.num_hits = self.sequence.num_cached

    def segment(self, rng, num_nodes):
        """Return what is not cached yet and a random tree below it, with the paths down to it."""
        start = self.sequence.num_cached
        known = self.text[start:]
        root = len(known) - 1
        tree = random_parents(rng, num_nodes, first=0)
        parents = [*range(-1, root), *(root + 1 + parent for parent in tree)]
        token_ids = known + rng.choices(range(VOCAB_SIZE), k=num_nodes)
        self.paths = paths_of(self.text[:start], token_ids, parents)
        return Segment(self.sequence, token_ids, parents)

    def keep(self, node):
        """Commit the path down to a node, as the engine does: the last token stays to be fed."""
        self.text, path = self.paths[node]
        self.cache.commit([(self.sequence, path[:-1])])
        self.cache.share(self.sequence, self.text)


def advance(model, talks, rng, histories):
    """Make a pass over prompts or trees of all talks; compare every row with plain decoding."""
    cache = talks[0].cache
    segments = [talk.segment(rng, num_nodes=6) for talk in talks]
    batch = model.batch(cache, segments)
    logits = model.forward(batch, range(batch.num_rows)).logits
    paths = [path for talk in talks for path, _ in talk.paths]
    for path, found in zip(paths, logits, strict=True):
        assert torch.equal(found, histories.expected(path)), "other bits than by plain decoding"
    for talk in talks:
        talk.keep(len(talk.paths) - 1 - rng.randrange(7))
    cache.check_integrity()


def check_sharing(model):
    """Serve texts that begin alike, two at a time, in a cache that is too small for all."""
    rng, histories = random.Random(4), Histories(model, seed=4)
    cache = model.new_cache(11 * 16)
    common = rng.choices(range(VOCAB_SIZE), k=70)
    num_hits, last = [], common
    for length in (40, 20, 70, 55, 36, 64):
        own = rng.choices(range(VOCAB_SIZE), k=9)
        talks = [Talk(cache, common[:length] + own), Talk(cache, last)]
        for _ in range(4):
            advance(model, talks, rng, histories)
        num_hits += [talk.num_hits for talk in talks]
        last = talks[0].text  # goes on in the next round
        for talk in talks:
            cache.close(talk.sequence)
            cache.check_integrity()
    assert sum(hits > 0 for hits in num_hits) >= 8, "nearly all texts begin like others"
    assert cache.num_free_blocks == cache.num_blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen3", MIXED_WINDOWS)])
def test_compiled_decoders(tmp_path, family, changes, dtype):
    config = tiny_config(family, **changes)
    module = build_module(config, 3, attn_implementation="eager", dtype=DTYPES[dtype])
    module.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=dtype)
    assert isinstance(model._forward_pass, CompiledDecoder)
    check_sharing(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral"])
def test_modules_of_transformers(family, dtype):
    model = adapt_module(build_module(tiny_config(family), dtype=DTYPES[dtype]), name=family)
    assert model.info.exactness is Exactness.BITWISE
    check_sharing(model)
