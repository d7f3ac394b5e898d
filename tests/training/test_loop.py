"""The training loop: resumed to the bit, and clear about what is wrong."""

import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from foretoken.errors import ConfigError
from foretoken.training.loop import (
    BucketedBatches,
    LoopConfig,
    ShuffledBatches,
    train,
    write_atomically,
)

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


def test_buckets_have_every_item_once_and_about_one_length():
    lengths = torch.randint(5, 200, (203,), generator=torch.Generator().manual_seed(1)).tolist()
    batches = BucketedBatches(lengths, batch_size=4, seed=3)
    num = math.ceil(203 / 4)
    epochs = [[batches.indices(num * epoch + step) for step in range(num)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(index for batch in epoch for index in batch) == list(range(203))
    assert epochs[0] != epochs[1]
    assert {len(batch) for batch in epochs[0]} == {3, 4}
    # Sorted among 64 items, 4 of them span a sixteenth of the range on average; unsorted, half.
    spans = [max(lengths[it] for it in b) - min(lengths[it] for it in b) for b in epochs[0]]
    assert sum(spans) / num < 195 / 8
    # The shortest batches do not all come first.
    firsts = [lengths[batch[0]] for batch in epochs[0]]
    assert firsts != sorted(firsts)


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


def fails_from(module, step, *, spoil):
    """Train with a loss that is spoiled from the given step on; the first step is 0."""

    def loss_of(number):
        loss = module(DATA[:8]).square().mean()
        return spoil(loss) if number >= step else loss

    return lambda **more: train(module, lambda number: number, loss_of, CONFIG, **more)


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(ConfigError, match=r"loss of step 7 is inf.*step 4 is kept"):
        fails_from(new_module(), 6, spoil=lambda loss: loss * torch.inf)(checkpoint=checkpoint)
    kept = torch.load(checkpoint, weights_only=True)
    assert len(kept["losses"]) == 4
    assert all(weight.isfinite().all() for weight in kept["module"].values())


class SpoiledGradient(torch.autograd.Function):
    """A finite value with a gradient that is no number, as of a square root at 0."""

    @staticmethod
    def forward(_context, loss):
        return loss.clone()

    @staticmethod
    def backward(_context, gradient):
        return gradient * torch.nan


def test_a_gradient_that_is_no_number_changes_no_weight(tmp_path):
    checkpoint, module = tmp_path / "checkpoint", new_module()
    with pytest.raises(ConfigError, match=r"gradients of step 5 are not finite.*step 4 is kept"):
        fails_from(module, 4, spoil=SpoiledGradient.apply)(checkpoint=checkpoint)
    assert same(torch.load(checkpoint, weights_only=True)["module"], weights(module))


def test_without_a_checkpoint_nothing_is_said_of_one():
    with pytest.raises(ConfigError) as caught:
        fails_from(new_module(), 0, spoil=SpoiledGradient.apply)()
    assert "kept" not in str(caught.value)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    checkpoint, module = tmp_path / "checkpoint", new_module()

    def spoil(num_done, _loss):
        if num_done == 7:
            with torch.no_grad():
                module[3].bias.fill_(torch.nan)

    with pytest.raises(ConfigError, match="step 4 is kept"):
        run(module, checkpoint=checkpoint, on_step=spoil)
    assert len(torch.load(checkpoint, weights_only=True)["losses"]) == 4


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    partial = tmp_path / "checkpoint.partial"

    def fill_the_disk(num_done, _loss):
        if num_done == 5:
            partial.symlink_to("/dev/full")  # every write to it says that the device is full

    with pytest.raises(
        ConfigError, match=r"^checkpoint cannot be written: No space left"
    ) as caught:
        run(new_module(), checkpoint=checkpoint, on_step=fill_the_disk)
    assert "free some space" in caught.value.hint
    assert not partial.is_symlink()
    assert len(torch.load(checkpoint, weights_only=True)["losses"]) == 4
    # With room again, training goes on and ends as if nothing had been.
    whole, resumed = new_module(), new_module()
    run(whole)
    run(resumed, checkpoint=checkpoint)
    assert same(weights(resumed), weights(whole))


# -- precision -----------------------------------------------------------------------------------


def test_bfloat16_computes_in_bfloat16_and_keeps_weights_in_float32():
    config = LoopConfig(num_steps=200, learning_rate=0.02, precision="bfloat16")
    module, seen = new_module(), set()
    module[0].register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    losses = run(module, config)
    assert seen == {torch.bfloat16}
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_trainings_of_different_precisions_follow_each_other():
    """accelerate keeps one state per process and refuses a second one of another precision."""
    from accelerate.state import is_initialized

    for precision in ("float32", "bfloat16", "auto"):
        run(new_module(), LoopConfig(num_steps=1, precision=precision))
        assert not is_initialized()


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="precision is auto, float32 or bfloat16; got 'int8'"):
        LoopConfig(num_steps=1, precision="int8")


def test_without_accelerate_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ConfigError, match="accelerate is not installed") as caught:
        run(new_module())
    assert "foretoken[train]" in caught.value.hint
