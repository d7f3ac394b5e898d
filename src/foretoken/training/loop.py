"""A plain training loop: any module, any loss, resumed to the bit.

The batch of a step is a function of the step's number, so the position in the data is that number
and needs no state of its own. A checkpoint holds the rest: weights, optimizer, step, random state,
losses. Training that is cut off and resumed ends with the weights of training that is not.

What cannot go on stops before it spoils anything: a loss, gradients or weights that are no finite
numbers, and a disk without room, leave the last good checkpoint as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from foretoken.errors import ConfigError
from foretoken.training.optimizers import OPTIMIZERS, Optimizer
from foretoken.training.precision import PRECISIONS, accelerated
from foretoken.training.storage import write_atomically

BatchT = TypeVar("BatchT")

CHECKPOINT_FORMAT = 1
_EPOCH_STRIDE = 1_000_003  # keeps the shuffles of neighbouring seeds apart
_STRETCH = 16  # batches that are sorted by length among themselves


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """How to train.

    Args:
        num_steps: Updates of the weights.
        learning_rate: The highest.
        num_warmup_steps: Steps in which the rate rises linearly; after them it falls along a
            cosine.
        final_share: Share of the highest rate that the cosine ends with.
        weight_decay: Of matrices; vectors such as norms have none.
        max_grad_norm: Longer gradients are shortened to it.
        num_checkpoint_steps: Steps between checkpoints.
        seed: Of everything random in the modules, such as dropout.
        precision: "float32", "bfloat16" (weights and their updates stay in float32), or "auto":
            bfloat16 on GPUs that compute with it.
        optimizer: One of `training.optimizers.OPTIMIZERS`.
    """

    num_steps: int
    learning_rate: float = 5e-4
    num_warmup_steps: int = 20
    final_share: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    num_checkpoint_steps: int = 50
    seed: int = 0
    precision: str = "float32"
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} is an integer >= 1; got {getattr(self, name)}", hint=f"change {name}"
                )
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(
                    f"{name} is a number above 0; got {value!r}", hint=f"change {name}"
                )
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"precision is {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}; "
                f"got {self.precision!r}",
                hint="change precision",
            )
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(
                f"optimizer is {' or '.join(OPTIMIZERS)}; got {self.optimizer!r}",
                hint="change optimizer",
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, the first one being 0."""
        if step < self.num_warmup_steps:
            return self.learning_rate * (step + 1) / self.num_warmup_steps
        done = (step - self.num_warmup_steps) / max(1, self.num_steps - self.num_warmup_steps)
        falling = 0.5 + 0.5 * math.cos(math.pi * done)
        return self.learning_rate * (self.final_share + (1 - self.final_share) * falling)


@dataclass(frozen=True, slots=True)
class ShuffledBatches:
    """Which items make up the batch of each step: a new shuffle every epoch.

    Args:
        num_items: How many there are, at least one.
        batch_size: Items of a batch; an epoch's last one may have fewer.
        seed: Of the shuffles.
    """

    num_items: int
    batch_size: int
    seed: int

    @property
    def num_per_epoch(self) -> int:
        """Batches that hold every item once."""
        return math.ceil(self.num_items / self.batch_size)

    def indices(self, step: int) -> list[int]:
        """Return the items of a step's batch."""
        epoch, place = divmod(step, self.num_per_epoch)
        order = _shuffled(self.num_items, self.seed, epoch)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


@dataclass(frozen=True, slots=True)
class BucketedBatches:
    """The same for items of different lengths: a batch holds items of about one length.

    An epoch's shuffle is cut into stretches of some batches; a stretch is sorted by length, and
    the batches of all stretches are shuffled. Less is padding, and which items meet still changes.

    Args:
        lengths: Of the items, at least one.
        batch_size: Items of a batch; the last one of a stretch may have fewer.
        seed: Of the shuffles.
    """

    lengths: Sequence[int]
    batch_size: int
    seed: int

    def indices(self, step: int) -> list[int]:
        """Return the items of a step's batch."""
        epoch, place = divmod(step, math.ceil(len(self.lengths) / self.batch_size))
        order = _shuffled(len(self.lengths), self.seed, epoch)
        stretches = [
            sorted(stretch, key=self.lengths.__getitem__)
            for stretch in _cut(order, _STRETCH * self.batch_size)
        ]
        batches = [batch for stretch in stretches for batch in _cut(stretch, self.batch_size)]
        return batches[_shuffled(len(batches), self.seed + 1, epoch)[place]]


def train(
    module: nn.Module,
    batch_at: Callable[[int], BatchT],
    loss_of: Callable[[BatchT], Tensor],
    config: LoopConfig,
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
) -> list[float]:
    """Train a module in place and return the loss of every step.

    With a checkpoint, training goes on where the file stands, and ends with exactly the weights
    of training in one go, on the same machine with the same number of threads.

    Args:
        module: Its parameters that require gradients are trained.
        batch_at: Returns the batch of a step; the same one whenever it is asked.
        loss_of: Returns a batch's loss, a scalar that depends on the module.
        config: How.
        checkpoint: File to resume from, and to write now and then; None for neither.
        on_step: Called after every step with the number of finished steps and the loss.

    Raises:
        ConfigError: The checkpoint is of other settings, or cannot be read or written; or loss,
            gradients or weights are no longer finite; or accelerate is not installed.
    """
    parameters = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = OPTIMIZERS[config.optimizer](module, config.weight_decay)
    device = _device(module)
    with _own_randomness(device), accelerated(device, config.precision) as accelerator:
        torch.manual_seed(config.seed)
        losses: list[float] = []
        if checkpoint is not None and checkpoint.exists():
            losses = _restore(checkpoint, module, optimizer, config)
        kept = len(losses)
        module.train()
        for step in range(len(losses), config.num_steps):
            for group in optimizer.param_groups:
                group["lr"] = config.rate(step)
            batch = batch_at(step)
            with accelerator.autocast():
                loss = loss_of(batch)
            value = loss.item()
            _check_finite(math.isfinite(value), f"the loss of step {step + 1} is {value}", kept)
            accelerator.backward(loss)
            norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            is_finite = bool(norm.isfinite())
            _check_finite(is_finite, f"the gradients of step {step + 1} are not finite", kept)
            optimizer.step()
            losses.append(value)
            optimizer.zero_grad(set_to_none=True)
            num_done = step + 1
            is_due = num_done % config.num_checkpoint_steps == 0 or num_done == config.num_steps
            if checkpoint is not None and is_due:
                is_finite = all(bool(weight.isfinite().all()) for weight in parameters)
                _check_finite(is_finite, f"the weights after step {num_done} are not finite", kept)
                _save(checkpoint, module, optimizer, config, losses)
                kept = num_done
            on_step(num_done, losses[-1])
    module.eval()
    return losses


def _shuffled(num_items: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * _EPOCH_STRIDE + epoch)
    return torch.randperm(num_items, generator=generator).tolist()


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _own_randomness(device: torch.device) -> AbstractContextManager[None]:
    """Give the process its random state back afterwards: a library is a guest."""
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices=devices)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _check_finite(is_finite: bool, what: str, num_kept: int) -> None:
    """Stop a training that went wrong; `num_kept` steps are in the checkpoint, 0 without one."""
    if not is_finite:
        kept = f"; the checkpoint of step {num_kept} is kept" if num_kept else ""
        raise ConfigError(
            f"{what}, and training cannot go on{kept}", hint="lower the learning rate"
        )


def _save(
    path: Path,
    module: nn.Module,
    optimizer: Optimizer,
    config: LoopConfig,
    losses: list[float],
) -> None:
    device = _device(module)
    state = {
        "format": CHECKPOINT_FORMAT,
        "config": asdict(config),
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "device_random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "losses": losses,
    }
    write_atomically(path, lambda partial: _write(state, partial))


def _write(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # given a path, torch would not say why it cannot write
        torch.save(state, file)


def _restore(
    path: Path, module: nn.Module, optimizer: Optimizer, config: LoopConfig
) -> list[float]:
    """Load a checkpoint into module, optimizer and random state; return the losses so far."""
    device = _device(module)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        is_known = state["format"] == CHECKPOINT_FORMAT
        if is_known and state["config"] == asdict(config):
            module.load_state_dict(state["module"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
            if device.type == "cuda" and state["device_random"] is not None:
                torch.cuda.set_rng_state(state["device_random"], device)
            return list(state["losses"])
    except Exception as error:  # what torch.load raises has no common base
        raise ConfigError(
            f"checkpoint {path.name} cannot be read: {' '.join(str(error).split())[:200]}",
            hint="delete the checkpoint; the model that it is of is then trained again",
        ) from error
    if not is_known:
        raise ConfigError(
            f"checkpoint {path.name} has format {state['format']}, not {CHECKPOINT_FORMAT}",
            hint="delete the checkpoint; the model that it is of is then trained again",
        )
    given = asdict(config)
    other = [name for name in given if state["config"].get(name) != given[name]]
    raise ConfigError(
        f"checkpoint {path.name} was written with other settings: "
        + ", ".join(f"{name} {state['config'].get(name)}, now {given[name]}" for name in other),
        hint="train with the same settings, or delete the checkpoint",
    )


__all__ = ["BucketedBatches", "LoopConfig", "ShuffledBatches", "train", "write_atomically"]
