"""Heads with random weights, for the tests of what reads and serves them."""

import torch

from foretoken.models.heads.files import TargetShape, TargetTensors, target_tensors
from foretoken.models.loading import load_config
from foretoken.training.heads.kinds import KINDS
from tests.fakes import build_module, tiny_config


def randomize(module, seed=0):
    """Add noise to every parameter, so that nothing is the identity or zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * 0.5 * parameter.shape[-1] ** -0.5)
    return module


def random_tensors(shape, seed=1):
    """Return random tensors of a target that has no files."""
    generator = torch.Generator().manual_seed(seed)
    embedding, head = torch.randn(2, shape.vocab_size, shape.hidden_size, generator=generator)
    return TargetTensors(embedding, head, torch.ones(shape.hidden_size))


def shape_of(folder):
    """Return the shape of the model in a folder."""
    config = load_config(str(folder))
    return TargetShape(config.vocab_size, config.hidden_size, config.num_hidden_layers)


def write_head(folder, kind_name, seed=0, **options):
    """Write a head of random weights for the model in a folder; return its path."""
    kind, shape = KINDS.load(kind_name), shape_of(folder)
    tensors = target_tensors(str(folder))
    torch.manual_seed(seed)
    path = folder / f"{kind_name}-{seed}"
    kind.save(randomize(kind.build(shape, tensors, options), seed), shape, path, "# Random\n")
    return str(path)


def write_counting_target(folder, vocab_size=32):
    """Write a model that says t + 1 after t, whatever was before; return its path and shape.

    Its last state is the token itself: a vector with one number that is not zero.
    """
    config = tiny_config(
        "llama",
        vocab_size=vocab_size,
        hidden_size=vocab_size,
        intermediate_size=16,
        num_hidden_layers=2,
        max_position_embeddings=128,
    )
    module = build_module(config, dtype=torch.float32)
    tokens = torch.arange(vocab_size)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.zero_()
        module.model.embed_tokens.weight.copy_(torch.eye(vocab_size))
        module.model.norm.weight.fill_(1.0)
        module.lm_head.weight[(tokens + 1) % vocab_size, tokens] = 10.0
    path = str(folder / "target")
    module.save_pretrained(path)
    return path, TargetShape(vocab_size, vocab_size, 2)
