"""Optimizers: which weights each has, and that a checkpoint holds both."""

import copy

import pytest
import torch
from torch import nn

from foretoken.training.optimizers import OPTIMIZERS, adamw, muon
from tests.fakes import build_module, tiny_config


@pytest.fixture
def module():
    config = tiny_config("llama")
    return build_module(config, attn_implementation="eager", dtype=torch.float32)


def names_by_decay(module, optimizer):
    names = {id(weight): name for name, weight in module.named_parameters()}
    return {
        (type(group.get("nesterov")).__name__, group["weight_decay"]): {
            names[id(weight)] for weight in group["params"]
        }
        for group in optimizer.param_groups
    }


def step(module, optimizer, seed=0):
    """Update by gradients that the seed fixes."""
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        if weight.requires_grad:
            weight.grad = torch.randn(weight.shape, generator=generator)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    optimizer.zero_grad()


def test_muon_has_the_matrices_between_embedding_and_head(module):
    module.requires_grad_(True)
    groups = names_by_decay(module, muon(module, 0.1))
    matrices = {
        f"model.layers.{layer}.{name}.weight"
        for layer in range(3)
        for name in (
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
    }
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    every = {name for name, _ in module.named_parameters()}
    assert groups == {
        ("bool", 0.1): matrices,
        ("NoneType", 0.1): tables,
        ("NoneType", 0.0): every - matrices - tables,
    }


def test_adamw_decays_matrices_only(module):
    module.requires_grad_(True)
    groups = names_by_decay(module, adamw(module, 0.1))
    every = dict(module.named_parameters())
    assert groups == {
        ("NoneType", 0.1): {name for name, weight in every.items() if weight.dim() == 2},
        ("NoneType", 0.0): {name for name, weight in every.items() if weight.dim() == 1},
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_weights_stay(module, name):
    for layer in module.model.layers[1:]:
        layer.requires_grad_(True)
    before = {key: weight.clone() for key, weight in module.named_parameters()}
    step(module, OPTIMIZERS[name](module, 0.1))
    for key, weight in module.named_parameters():
        assert torch.equal(weight, before[key]) is not weight.requires_grad


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_goes_on_where_it_was(module, name):
    module.requires_grad_(True)
    optimizer = OPTIMIZERS[name](module, 0.1)
    step(module, optimizer, 1)
    weights = {key: weight.clone() for key, weight in module.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())
    step(module, optimizer, 2)
    expected = {key: weight.clone() for key, weight in module.state_dict().items()}

    module.load_state_dict(weights)
    fresh = OPTIMIZERS[name](module, 0.1)
    step(module, fresh, 2)
    assert any(not torch.equal(module.state_dict()[key], expected[key]) for key in expected)
    module.load_state_dict(weights)
    fresh = OPTIMIZERS[name](module, 0.1)
    fresh.load_state_dict(state)
    step(module, fresh, 2)
    assert all(torch.equal(module.state_dict()[key], expected[key]) for key in expected)


def test_a_rate_set_in_the_groups_is_the_one_that_counts(module):
    """What is set after a state was loaded too: loading replaces the groups."""
    module.requires_grad_(True)
    optimizer = muon(module, 0.0)
    step(module, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    before = {key: weight.clone() for key, weight in module.named_parameters()}
    for weight in module.parameters():
        weight.grad = torch.ones_like(weight)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(weight, before[key]) for key, weight in module.named_parameters())


def test_without_matrices_there_is_nothing_for_muon():
    module = nn.LayerNorm(4)
    assert isinstance(muon(module, 0.1), torch.optim.AdamW)
