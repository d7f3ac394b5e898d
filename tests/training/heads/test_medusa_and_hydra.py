"""Losses of Medusa and Hydra against their definition, and that they teach."""

import pytest
import torch
from torch.nn import functional

from foretoken.errors import UnknownNameError
from foretoken.models.heads.files import TargetShape, read_head
from foretoken.training.heads.data import HeadBatch
from foretoken.training.heads.kinds import KINDS
from foretoken.training.losses import forward_kl
from tests.heads import random_tensors, randomize

SHAPE = TargetShape(vocab_size=13, hidden_size=6, num_layers=2)
TENSORS = random_tensors(SHAPE)
NAMES = ("medusa", "hydra")


@pytest.fixture(params=NAMES)
def kind(request):
    return KINDS.load(request.param)


def random_batch(num_texts=3, length=9, seed=0):
    """Return a batch whose states the target's head turns into its logits."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(13, (num_texts, length), generator=generator)
    lengths = torch.tensor([length - 2 * text for text in range(num_texts)]).unsqueeze(1)
    is_token = torch.arange(length) < lengths
    is_output = is_token & (torch.arange(length) >= 3)
    hidden = torch.randn(num_texts, length, 6, generator=generator) * is_token.unsqueeze(2)
    return HeadBatch(token_ids, is_token, is_output, {2: hidden}, hidden @ TENSORS.head.t())


def logits_of(name, module, batch, text, position, head):
    state = batch.hidden[2][text, position]
    if name == "medusa":
        return module.head_logits(head, state)
    return module.head_logits(
        head, state, batch.token_ids[text, position + 1 : position + head + 2]
    )


@pytest.mark.parametrize("num_heads", [1, 3, 12])
def test_loss_is_what_its_definition_says(kind, num_heads):
    """Position by position; twelve heads are more than the texts have room for."""
    batch = random_batch()
    module = randomize(kind.build(SHAPE, TENSORS, {"heads": num_heads}))
    expected = 0.0
    for head in range(num_heads):
        found = [
            forward_kl(
                logits_of(kind.name, module, batch, text, position, head),
                batch.logits[text, position + head + 1],
            )
            for text in range(3)
            for position in range(9 - head - 2)
            if batch.is_output[text, position + head + 2]
        ]
        if found:
            expected += 0.8**head * torch.stack(found).mean()
    expected /= sum(0.8**head for head in range(num_heads))
    torch.testing.assert_close(kind.loss(module, batch, forward_kl), expected)


def test_what_is_not_counted_changes_nothing(kind):
    """Padding, and the target's logits in the prompt."""
    batch = random_batch()
    module = randomize(kind.build(SHAPE, TENSORS, {}))
    before = kind.loss(module, batch, forward_kl)
    predicted = batch.is_output.roll(-1, dims=1)
    predicted[:, -1] = False
    batch.logits[~predicted] = 99.0 * torch.randn(int((~predicted).sum()), 13)
    batch.hidden[2][~batch.is_token] = 7.0
    batch.token_ids[~batch.is_token] = 5
    torch.testing.assert_close(kind.loss(module, batch, forward_kl), before)


def test_a_batch_without_outputs_has_no_loss_and_no_gradient(kind):
    batch = random_batch()
    batch.is_output[:] = False
    module = kind.build(SHAPE, TENSORS, {})
    loss = kind.loss(module, batch, forward_kl)
    loss.backward()
    assert loss == 0
    assert all(parameter.grad.eq(0).all() for parameter in module.parameters())


@pytest.mark.parametrize("own", [True, False])
def test_heads_begin_with_what_the_target_says_of_the_state(kind, own):
    module = kind.build(SHAPE, TENSORS, {"layers": 2, "own_lm_heads": own})
    states = torch.randn(4, 6)
    arguments = (states,) if kind.name == "medusa" else (states, torch.randint(13, (4, 4)))
    expected = functional.linear(states, TENSORS.head).expand(4, 4, 13)
    torch.testing.assert_close(module(*arguments), expected)


@pytest.mark.parametrize("own", [True, False])
def test_what_is_the_targets_is_neither_trained_nor_saved(kind, own, tmp_path):
    module = randomize(kind.build(SHAPE, TENSORS, {"own_lm_heads": own}))
    kind.save(module, SHAPE, tmp_path / "head", "# Card\n")
    head = read_head(tmp_path / "head", kind.name, SHAPE)
    names = dict(module.named_parameters())
    assert head.tensors.keys() == names.keys()
    assert any(name.startswith("lm_heads") for name in names) == own
    assert not any("embedding" in name for name in names)
    again = kind.build(SHAPE, TENSORS, head.options)
    head.fill(again)
    assert kind.loss(again, random_batch(), forward_kl) == kind.loss(
        module, random_batch(), forward_kl
    )


def test_training_teaches_what_can_be_known(kind):
    """Texts that count, with states that say which token it is: every head can be sure."""
    torch.manual_seed(0)
    token_ids = (torch.randint(13, (8, 1)) + torch.arange(10)) % 13
    states = torch.eye(13)[:, :6][token_ids] + 0.3 * torch.randn(13, 6)[token_ids]
    is_output = torch.arange(10).expand(8, 10) >= 2
    logits = 9.0 * functional.one_hot((token_ids + 1) % 13, 13)
    batch = HeadBatch(token_ids, torch.ones_like(is_output), is_output, {2: states}, logits)
    module = kind.build(SHAPE, TENSORS, {"heads": 3, "own_lm_heads": True})
    optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
    losses = []
    for _ in range(200):
        loss = kind.loss(module, batch, forward_kl)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.02 < losses[0]


def test_unknown_options_are_refused(kind):
    with pytest.raises(UnknownNameError, match=r"option of (medusa|hydra) 'head'"):
        kind.build(SHAPE, TENSORS, {"head": 3})


def test_the_last_layer_is_asked_for(kind):
    assert kind.hidden_layers(12, {}) == (12,)
