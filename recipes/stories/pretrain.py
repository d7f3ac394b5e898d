"""Train the target from scratch: Muon for the hidden matrices, AdamW for the rest."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class PretrainSettings:
    """Hyperparameters of the target's training."""

    epochs: float = 6.0
    batch_tokens: int = 4096
    short_context: int = 256
    long_context: int = 512
    long_share: float = 0.25
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    muon_decay: float = 0.1
    warmup_steps: int = 60
    dropout: float = 0.0
    seed: int = 17
    checkpoint_steps: int = 100


@dataclass(frozen=True)
class Worker:
    """One of the processes that train together."""

    rank: int
    count: int
    compiled: bool


class Packed:
    """Stories in a shuffled stream, cut into rows; a new shuffle for every pass."""

    def __init__(self, stories: list[list[int]], seed: int) -> None:
        self._stories = stories
        self._seed = seed
        self._epoch = -1
        self._stream = torch.empty(0, dtype=torch.long)
        self._at = 0

    def rows(self, rows: int, context: int) -> Tensor:
        """The next `rows` rows of `context` + 1 tokens."""
        need = rows * context + 1
        while self._stream.numel() - self._at < need:
            self._refill()
        flat = self._stream[self._at : self._at + need]
        self._at += rows * context
        return torch.stack([flat[i * context : (i + 1) * context + 1] for i in range(rows)])

    def _refill(self) -> None:
        self._epoch += 1
        shuffle = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(len(self._stories), generator=shuffle).tolist()
        fresh = torch.tensor([token for index in order for token in self._stories[index]])
        self._stream = torch.cat([self._stream[self._at :], fresh])
        self._at = 0


def add_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Drop activations out behind the embedding and both halves of every layer."""

    def hook(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return functional.dropout(output, probability, training=module.training)

    model.model.embed_tokens.register_forward_hook(hook)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(hook)
        layer.mlp.down_proj.register_forward_hook(hook)


def make_optimizers(
    model: LlamaForCausalLM, muon_rate: float, adam_rate: float, decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    norms = [weight for weight in model.parameters() if weight.ndim < 2]
    embedding = [model.model.embed_tokens.weight]
    muon = torch.optim.Muon(
        matrices, lr=muon_rate, weight_decay=decay, momentum=0.95, adjust_lr_fn="original"
    )
    adam = torch.optim.AdamW(
        [{"params": embedding, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}],
        lr=adam_rate,
        betas=(0.9, 0.95),
    )
    return [muon, adam]


def rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(1, steps - warmup)


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Scale every group's rate by `factor`, relative to what it was created with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            base = group.setdefault("base_lr", group["lr"])
            group["lr"] = base * factor


def loss_of(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean next-token loss of a batch of rows, in bfloat16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


class Gradients:
    """Averages the gradients of all workers, in one message."""

    def __init__(self, model: LlamaForCausalLM, workers: int) -> None:
        self._weights = list(model.parameters())
        self._workers = workers

    def average(self) -> None:
        """Replace every gradient by its mean over the workers."""
        if self._workers == 1:
            return
        grads = [weight.grad for weight in self._weights if weight.grad is not None]
        flat = nn.utils.parameters_to_vector(grads)
        distributed.all_reduce(flat)
        nn.utils.vector_to_parameters(flat / self._workers, grads)


def pretrain(
    model: LlamaForCausalLM,
    stories: list[list[int]],
    settings: PretrainSettings,
    checkpoint: Path,
    worker: Worker,
    validate: Callable[[], float],
) -> dict[str, object]:
    """Train `model` in place; resumes from `checkpoint`, returns the losses and the duration.

    Every worker runs this with its own part of every batch.
    """
    if settings.dropout > 0:
        add_dropout(model, settings.dropout)
    optimizers = make_optimizers(model, settings.muon_rate, settings.adam_rate, settings.muon_decay)
    if worker.compiled:
        for layer in model.model.layers:
            layer.compile()
    data, gradients = Packed(stories, settings.seed), Gradients(model, worker.count)
    tokens = sum(map(len, stories))
    steps = math.ceil(settings.epochs * tokens / settings.batch_tokens)
    history: list[dict[str, float]] = []
    start, seconds = _resume(checkpoint, model, optimizers, history)
    began, losses = time.monotonic() - seconds, []
    model.train()
    for step in range(steps):
        late = step >= steps * (1 - settings.long_share)
        context = settings.long_context if late else settings.short_context
        rows = data.rows(settings.batch_tokens // context, context)
        if step < start:
            continue
        torch.manual_seed((settings.seed * 1_000_003 + step) * worker.count + worker.rank)
        set_rates(optimizers, rate_factor(step, steps, settings.warmup_steps))
        loss = loss_of(model, rows.chunk(worker.count)[worker.rank])
        loss.backward()
        gradients.average()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if worker.rank == 0 and ((step + 1) % settings.checkpoint_steps == 0 or step + 1 == steps):
            entry = {"step": step + 1, "seconds": time.monotonic() - began}
            entry |= {"train": sum(losses) / len(losses), "held_out_bpc": validate()}
            history.append({key: round(value, 4) for key, value in entry.items()})
            print(f"target {history[-1]} of {steps} steps", flush=True)
            losses.clear()
            _save(checkpoint, model, optimizers, history)
    return {"steps": steps, "tokens_per_epoch": tokens, "history": history}


def _save(
    path: Path,
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    history: list[dict[str, float]],
) -> None:
    """Write a checkpoint in one step: a crash leaves the previous one whole."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "history": history,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _resume(
    path: Path,
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    history: list[dict[str, float]],
) -> tuple[int, float]:
    """Load a checkpoint if there is one: the next step and the seconds spent so far."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    history.extend(state["history"])
    return int(history[-1]["step"]), float(history[-1]["seconds"])
