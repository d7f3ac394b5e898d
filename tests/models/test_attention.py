"""The compiled attention against the reference, and against itself in other company."""

import random

import pytest
import torch

from foretoken.models.attention import AttentionCall, CompiledAttention, ReferenceAttention
from foretoken.models.batch import RaggedBatch, Segment
from foretoken.models.cache import KVCache, LayerShape
from tests.fakes import random_parents

# Heads, key heads, key size, value size: vectors filled and not, groups of one and of many.
SHAPES = [
    (4, 2, 32, 32),
    (6, 1, 64, 64),
    (3, 3, 8, 8),
    (8, 2, 80, 80),
    (2, 1, 22, 37),
    (4, 4, 128, 96),
]
CONTROLS = {
    "plain": {},
    "window": {"window": 5},
    "long window": {"window": 40},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "all": {"window": 17, "softcap": 3.0, "sinks": True},
}
DTYPES = [torch.float32, torch.bfloat16]
SEEDS = range(4)


def new_cache(shape, dtype):
    _, kv_heads, key_size, value_size = shape
    return KVCache(
        [LayerShape(kv_heads, key_size, value_size)], 40, dtype=dtype, device=torch.device("cpu")
    )


class Rows:
    """Random queries, keys and values for every row that a scenario feeds."""

    def __init__(self, shape, dtype, seed):
        self.shape, self.dtype = shape, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count):
        heads, kv_heads, key_size, value_size = self.shape
        sizes = [(heads, key_size), (kv_heads, key_size), (kv_heads, value_size)]
        return [
            torch.randn(count, *size, generator=self.generator).to(self.dtype) for size in sizes
        ]


def attend(backend_class, cache, segments, rows, controls):
    batch = RaggedBatch(cache, segments)
    query, key, value = rows
    sinks = torch.linspace(-2, 2, query.shape[1]).to(query.dtype) if controls.get("sinks") else None
    call = AttentionCall(
        layer=0,
        query=query,
        key=key,
        value=value,
        scaling=query.shape[-1] ** -0.5,
        window=controls.get("window"),
        softcap=controls.get("softcap"),
        sinks=sinks,
    )
    return backend_class(batch).attend(call)


def play(backend_class, shape, dtype, controls, seed):
    """Run a prompt and trees of two sequences through a backend; return all outputs."""
    rng = random.Random(seed)
    rows, cache = Rows(shape, dtype, seed), new_cache(shape, dtype)
    cache.flat_pools[0][:] = 0  # masked keys are multiplied too by the reference
    cache.flat_pools[1][:] = 0
    sequences = [cache.open(), cache.open()]
    outputs = []
    for step in range(4):
        chosen = sequences if step != 2 else sequences[:1]
        trees = [
            list(range(-1, rng.randint(2, 40)))
            if step == 0
            else random_parents(rng, rng.randint(1, 12))
            for _ in chosen
        ]
        with cache.speculate(chosen):
            segments = [Segment(s, [0] * len(t), t) for s, t in zip(chosen, trees, strict=True)]
            drawn = rows.draw(sum(map(len, trees)))
            outputs.append(attend(backend_class, cache, segments, drawn, controls))
            if step != 1:  # a tree that nobody accepts leaves nothing behind
                kept = [range(len(t)) if step == 0 else [0] for t in trees]
                cache.commit(list(zip(chosen, kept, strict=True)))
    return torch.cat([output.float() for output in outputs])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("controls", CONTROLS.values(), ids=list(CONTROLS))
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_attention_is_the_reference(shape, controls, dtype):
    for seed in SEEDS:
        compiled = play(CompiledAttention, shape, dtype, controls, seed)
        reference = play(ReferenceAttention, shape, dtype, controls, seed)
        # Weighted means of numbers near 1; bfloat16 outputs are rounded to 8 bits, the reference
        # rounds scores and weights as well.
        tolerance = 2e-6 if dtype == torch.float32 else 4e-2
        torch.testing.assert_close(compiled, reference, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("controls", CONTROLS.values(), ids=list(CONTROLS))
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_of_a_node_depend_on_its_path_alone(shape, controls, dtype):
    rng = random.Random(5)
    num_cached, parents = rng.randint(0, 40), random_parents(rng, 14)
    prompt, tree = Rows(shape, dtype, 1).draw(num_cached), Rows(shape, dtype, 2).draw(14)
    cache = new_cache(shape, dtype)
    cache.open()  # somebody else's block, so that this one's lie elsewhere
    sequence, other = cache.open(), cache.open()
    if num_cached:
        chain = Segment(sequence, [0] * num_cached, range(-1, num_cached - 1))
        attend(CompiledAttention, cache, [chain], prompt, controls)
        cache.commit([(sequence, range(num_cached))])
    company = Rows(shape, dtype, 3).draw(3)
    segments = [Segment(other, [0] * 3, [-1, 0, 0]), Segment(sequence, [0] * 14, parents)]
    both = [torch.cat(pair) for pair in zip(company, tree, strict=True)]
    together = attend(CompiledAttention, cache, segments, both, controls)[3:]
    for node in range(14):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        alone = new_cache(shape, dtype)
        lonely = alone.open()
        for row in [*range(num_cached), *(num_cached + step for step in path)]:
            fed = [torch.cat(pair)[row : row + 1] for pair in zip(prompt, tree, strict=True)]
            segment = Segment(lonely, [0], [-1])
            output = attend(CompiledAttention, alone, [segment], fed, controls)
            alone.commit([(lonely, [0])])
        assert torch.equal(together[node], output[0]), node
