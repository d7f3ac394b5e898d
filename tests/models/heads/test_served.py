"""Compiled heads say what the modules say, row by row the same whatever shares the call."""

import pytest
import torch

from foretoken.models.heads import served
from foretoken.models.heads.files import TargetShape
from foretoken.models.heads.hydra import HydraDesign, HydraHeads
from foretoken.models.heads.medusa import MedusaDesign, MedusaHeads
from foretoken.models.heads.served import CompiledHeads, ModuleHeads, serve_heads
from tests.heads import random_tensors, randomize

CPU = torch.device("cpu")
NUM_HEADS = 3


def make_heads(kind, *, hidden_size=33, vocab_size=50, **design):
    shape = TargetShape(vocab_size, hidden_size, 1)
    tensors = random_tensors(shape)
    if kind == "medusa":
        return randomize(MedusaHeads(shape, MedusaDesign(heads=NUM_HEADS, **design), tensors.head))
    return randomize(HydraHeads(shape, HydraDesign(heads=NUM_HEADS, **design), tensors))


def seen_by(kind, head, num_rows, hidden_size=33):
    width = hidden_size * (head + 2 if kind == "hydra" else 1)
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(head))


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
@pytest.mark.parametrize("own_lm_heads", [True, False])
@pytest.mark.parametrize(
    ("hidden_size", "vocab_size", "layers"), [(33, 50, 1), (16, 32, 2), (7, 131, 3), (64, 9, 1)]
)
@pytest.mark.parametrize("num_rows", [1, 2, 9, 30])
def test_compiled_heads_agree_with_the_modules(
    kind, own_lm_heads, hidden_size, vocab_size, layers, num_rows
):
    heads = make_heads(
        kind,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        layers=layers,
        own_lm_heads=own_lm_heads,
    )
    compiled = serve_heads(heads, torch.float32, CPU)
    assert isinstance(compiled, CompiledHeads)
    for head in range(NUM_HEADS):
        seen = seen_by(kind, head, num_rows, hidden_size)
        logits = compiled.logits(seen, head, 1)
        assert logits.shape == (1, num_rows, vocab_size)
        # float32, sums of up to 256 terms of about 1 in another order.
        torch.testing.assert_close(logits[0], heads.say(head, seen), rtol=1e-4, atol=1e-4)


def test_heads_without_layers_are_products_alone():
    heads = make_heads("medusa", layers=0)
    seen = seen_by("medusa", 0, 4)
    logits = serve_heads(heads, torch.float32, CPU).logits(seen, 1, 2)
    torch.testing.assert_close(logits, heads(seen)[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_rows_have_the_same_bits_alone_and_together(kind, dtype):
    compiled = serve_heads(make_heads(kind, layers=2), dtype, CPU)
    seen = seen_by(kind, 1, 13)
    together = compiled.logits(seen, 1, 1)[0]
    for row in range(13):
        assert torch.equal(compiled.logits(seen[row : row + 1], 1, 1)[0, 0], together[row])


@pytest.mark.parametrize("own_lm_heads", [True, False])
def test_heads_say_the_same_alone_and_together(own_lm_heads):
    compiled = serve_heads(make_heads("medusa", own_lm_heads=own_lm_heads), torch.float32, CPU)
    seen = seen_by("medusa", 0, 3)
    together = compiled.logits(seen, 0, NUM_HEADS)
    for head in range(NUM_HEADS):
        assert torch.equal(compiled.logits(seen, head, 1)[0], together[head])


@pytest.mark.parametrize("own_lm_heads", [True, False])
@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_threads_change_no_bit(kind, own_lm_heads, monkeypatch):
    heads = make_heads(kind, hidden_size=70, vocab_size=300, layers=2, own_lm_heads=own_lm_heads)
    seen = seen_by(kind, 1, 5, 70)
    alone = CompiledHeads(heads, torch.float32).logits(seen, 1, 1)
    monkeypatch.setattr(served, "BYTES_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    several = CompiledHeads(heads, torch.float32)
    assert several._num_threads(1) == 3
    for _ in range(20):
        assert torch.equal(several.logits(seen, 1, 1), alone)


def test_what_is_not_compiled_runs_as_modules():
    heads = make_heads("medusa")
    modules = serve_heads(heads, torch.float64, CPU)
    assert isinstance(modules, ModuleHeads)
    seen = seen_by("medusa", 0, 4).double()
    logits = modules.logits(seen, 0, NUM_HEADS)
    assert logits.dtype == torch.float64
    assert torch.equal(logits, heads(seen))
