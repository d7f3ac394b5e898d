"""Tiny random models on disk, without tokenizers: prompts are token ids."""

from types import SimpleNamespace

import pytest
import torch

from foretoken import LLM
from tests.fakes import VOCAB_SIZE, build_module, tiny_config

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}


def save_tiny(folder, *, seed, noise=0.0, **changes):
    """Write a random model of a few thousand parameters; return the folder."""
    config = tiny_config("llama", **{**SMALL, **changes})
    module = build_module(config, seed, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(noise * torch.randn(weight.shape, generator=generator))
    module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A target, one nearly like it to start from, one of more tokens, one of a short context."""
    folder = tmp_path_factory.mktemp("models")
    return SimpleNamespace(
        target=save_tiny(folder / "target", seed=0),
        start=save_tiny(folder / "start", seed=0, noise=0.05),
        stranger=save_tiny(folder / "stranger", seed=2, vocab_size=VOCAB_SIZE + 3),
        short=save_tiny(folder / "short", seed=3, max_position_embeddings=16),
    )


@pytest.fixture(scope="session")
def target(models):
    return LLM(str(models.target), drafters="none")


@pytest.fixture
def progress():
    """Collects progress reports."""
    return []
