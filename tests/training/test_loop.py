"""The training loop: resumed to the bit, and clear about what is wrong."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from foretoken.errors import ConfigError
from foretoken.training.loop import LoopConfig, ShuffledBatches, train, write_atomically

CONFIG = LoopConfig(num_steps=12, num_warmup_steps=3, num_checkpoint_steps=4, seed=5)
DATA = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


class CrashError(Exception):
    """Stands for a crash."""


def new_module():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.LayerNorm(16), nn.Linear(16, 1))


def run(module, config=CONFIG, **more):
    batches = ShuffledBatches(len(DATA), 8, seed=2)

    def loss_of(batch):
        return functional.mse_loss(module(batch).squeeze(1), batch.sum(dim=1))

    return train(module, lambda step: DATA[batches.indices(step)], loss_of, config, **more)


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def stop_after(num_steps):
    def on_step(num_done, _loss):
        if num_done == num_steps:
            raise CrashError

    return on_step


@pytest.mark.parametrize("stop", [2, 4, 7, 12])
def test_resumed_training_ends_with_the_same_bits(tmp_path, stop):
    """Dropout makes the random state matter, momentum the optimizer's, shuffles the position."""
    whole = new_module()
    losses = run(whole)
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(CrashError):
        run(new_module(), checkpoint=checkpoint, on_step=stop_after(stop))
    torch.manual_seed(99)  # another process starts with other random numbers
    resumed, steps = new_module(), []
    assert run(resumed, checkpoint=checkpoint, on_step=lambda n, _: steps.append(n)) == losses
    assert steps == list(range(stop // 4 * 4 + 1, 13))
    assert same(weights(resumed), weights(whole))


def test_dropout_follows_the_seed():
    one, other = new_module(), new_module()
    run(one)
    run(other, LoopConfig(num_steps=12, num_warmup_steps=3, num_checkpoint_steps=4, seed=6))
    assert not same(weights(one), weights(other))


def test_training_lowers_the_loss_and_leaves_the_module_in_eval_mode():
    module = new_module()
    losses = run(module, LoopConfig(num_steps=200, learning_rate=0.02))
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    assert not module.training


def test_the_process_keeps_its_random_state():
    before = torch.get_rng_state()
    run(new_module())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_parameter_that_needs_no_gradient_stays():
    module = new_module()
    module[0].weight.requires_grad_(False)
    before = weights(module)
    run(module)
    after = weights(module)
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["3.weight"], after["3.weight"])


def test_the_rate_rises_then_falls_to_a_tenth():
    rates = [CONFIG.rate(step) for step in range(13)]
    assert rates[:4] == sorted(rates[:4])
    assert rates[3] == max(rates) == CONFIG.learning_rate
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[12] == pytest.approx(CONFIG.learning_rate / 10)


def test_every_epoch_has_every_item_once_in_another_order():
    batches = ShuffledBatches(num_items=10, batch_size=4, seed=3)
    epochs = [
        [index for step in range(3) for index in batches.indices(3 * epoch + step)]
        for epoch in range(2)
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert batches.indices(4) == batches.indices(4)
    assert len(batches.indices(2)) == 2


# -- what goes wrong -----------------------------------------------------------------------------


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    run(new_module(), checkpoint=checkpoint)
    other = LoopConfig(num_steps=20, num_warmup_steps=3, num_checkpoint_steps=4, seed=5)
    with pytest.raises(ConfigError, match=r"other settings: num_steps 12, now 20$"):
        run(new_module(), other, checkpoint=checkpoint)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut short"])
def test_a_broken_checkpoint_is_refused(tmp_path, content):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        run(new_module(), checkpoint=checkpoint)
    assert "delete the checkpoint" in caught.value.hint


def test_a_checkpoint_of_another_module_is_refused(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    run(new_module(), checkpoint=checkpoint)
    other = nn.Sequential(nn.Linear(6, 1))
    with pytest.raises(ConfigError, match="cannot be read"):
        run(other, checkpoint=checkpoint)


def test_a_loss_that_is_no_number_ends_training():
    module = new_module()
    with pytest.raises(ConfigError, match="loss of step 1 is nan") as caught:
        train(module, lambda step: step, lambda _: module[0].bias.sum() * torch.nan, CONFIG)
    assert "learning rate" in caught.value.hint


@pytest.mark.parametrize(
    "wrong", [{"num_steps": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LoopConfig(**{"num_steps": 3, **wrong})


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(partial):
        partial.write_text("half of the n")
        raise CrashError

    with pytest.raises(CrashError):
        write_atomically(path, write)
    assert path.read_text() == "old"
