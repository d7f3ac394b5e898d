"""The loss of Kangaroo's adapter against its definition, and that it teaches."""

import pytest
import torch
from torch.nn import functional

from foretoken.errors import ConfigError, UnknownNameError
from foretoken.models.heads.files import read_head
from foretoken.models.heads.kangaroo import AdapterOptions
from foretoken.models.heads.target import TargetShape
from foretoken.training.heads.data import HeadBatch
from foretoken.training.heads.kangaroo import KIND
from foretoken.training.losses import forward_kl, total_variation
from tests.heads import random_tensors, randomize

SHAPE = TargetShape(vocab_size=13, hidden_size=8, num_layers=4)
TENSORS = random_tensors(SHAPE)
EXIT = 2


def random_batch(num_texts=3, length=9, seed=0, layer=EXIT):
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(13, (num_texts, length), generator=generator)
    lengths = torch.tensor([length - 2 * text for text in range(num_texts)]).unsqueeze(1)
    is_token = torch.arange(length) < lengths
    is_output = is_token & (torch.arange(length) >= 3)
    hidden = torch.randn(num_texts, length, 8, generator=generator) * is_token.unsqueeze(2)
    logits = torch.randn(num_texts, length, 13, generator=generator)
    return HeadBatch(token_ids, is_token, is_output, {layer: hidden}, logits)


@pytest.mark.parametrize("options", [{}, {"mlp": "24", "heads": "2", "kv_heads": "1"}])
@pytest.mark.parametrize("divergence", [forward_kl, total_variation])
def test_loss_is_what_its_definition_says(options, divergence):
    """Position by position, every text cut before what is predicted."""
    batch = random_batch()
    adapter = randomize(KIND.build(SHAPE, TENSORS, options))
    found = []
    for text in range(3):
        for position in range(1, 9):
            if batch.is_output[text, position]:
                past = batch.hidden[EXIT][text : text + 1, :position]
                logits = functional.linear(adapter(past)[0, -1], TENSORS.head)
                found.append(divergence(logits, batch.logits[text, position - 1]))
    assert len(found) == 6 + 4 + 2
    loss = KIND.loss(adapter, batch, divergence)
    torch.testing.assert_close(loss, torch.stack(found).mean(), atol=1e-5, rtol=1e-5)


def test_what_is_not_counted_changes_nothing():
    """Padding, and the target's logits in the prompt."""
    batch = random_batch()
    adapter = randomize(KIND.build(SHAPE, TENSORS, {}))
    before = KIND.loss(adapter, batch, forward_kl)
    predicted = batch.is_output.roll(-1, dims=1)
    predicted[:, -1] = False
    batch.logits[~predicted] = 99.0 * torch.randn(int((~predicted).sum()), 13)
    batch.hidden[EXIT][~batch.is_token] = 7.0
    torch.testing.assert_close(KIND.loss(adapter, batch, forward_kl), before)


def test_a_batch_without_outputs_has_no_loss():
    batch = random_batch()
    batch.is_output[:] = False
    adapter = KIND.build(SHAPE, TENSORS, {})
    assert KIND.loss(adapter, batch, forward_kl) == 0


@pytest.mark.parametrize("mlp", ["0", "24"])
def test_training_lowers_the_loss_and_moves_every_tensor(mlp):
    batch = random_batch()
    torch.manual_seed(0)
    adapter = KIND.build(SHAPE, TENSORS, {"mlp": mlp})
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = KIND.loss(adapter, batch, forward_kl)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    for name, tensor in adapter.state_dict().items():
        assert not torch.equal(tensor, before[name]), name


def test_the_targets_head_is_neither_trained_nor_saved(tmp_path):
    adapter = randomize(KIND.build(SHAPE, TENSORS, {"layers": "3"}))
    KIND.save(adapter, SHAPE, tmp_path / "head", "# Card\n")
    head = read_head(tmp_path / "head", "kangaroo", SHAPE)
    assert head.tensors.keys() == dict(adapter.named_parameters()).keys()
    assert not any("head" in name or "embed" in name for name in head.tensors)
    assert AdapterOptions(**head.options).layers == 3
    again = KIND.build(SHAPE, TENSORS, head.options)
    head.fill(again)
    batch = random_batch(layer=3)
    assert KIND.loss(again, batch, forward_kl) == KIND.loss(adapter, batch, forward_kl)


def test_states_are_those_of_the_exit():
    assert KIND.hidden_layers(24, {}) == (2,)
    assert KIND.hidden_layers(2, {}) == (1,)
    assert KIND.hidden_layers(24, {"layers": "5"}) == (5,)


def test_options_are_checked():
    with pytest.raises(UnknownNameError, match="layres"):
        KIND.build(SHAPE, TENSORS, {"layres": "2"})
    with pytest.raises(ConfigError, match=r"from 1 to 3 .* got 4"):
        KIND.build(SHAPE, TENSORS, {"layers": "4"})
