"""Distil the target into the draft: full distributions, on real text and on the target's own."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from measure import pad
from pretrain import make_optimizers, rate_factor, set_rates
from torch import Tensor, nn
from transformers import LlamaForCausalLM

IGNORED = -1


@dataclass(frozen=True)
class DistillSettings:
    """Hyperparameters of the draft's training."""

    story_tokens: int = 900_000
    sampled_tokens: int = 200_000
    temperatures: tuple[float, ...] = (0.0, 0.0, 0.5, 0.7, 1.0)
    kept: int = 32
    epochs: float = 10.0
    batch_tokens: int = 2048
    muon_rate: float = 0.02
    adam_rate: float = 0.005
    muon_decay: float = 0.02
    warmup_steps: int = 60
    overlap_weight: float = 1.0
    seed: int = 29


@dataclass(frozen=True)
class Teacher:
    """Token rows and, for every token but a row's last, the target's most likely next tokens."""

    rows: list[list[int]]
    tokens: Tensor
    weights: Tensor
    offsets: Tensor


def some_of(rows: list[list[int]], tokens: int, seed: int) -> list[list[int]]:
    """Randomly chosen rows of `tokens` tokens in all, or every row where there are fewer."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, total = [], 0
    for index in order:
        if total >= tokens:
            break
        chosen.append(rows[index])
        total += len(rows[index])
    return chosen


@torch.no_grad()
def teach(target: LlamaForCausalLM, rows: list[list[int]], kept: int, batch: int = 24) -> Teacher:
    """Run the target over all rows and keep its `kept` most likely tokens at every position."""
    target.eval()
    lengths = torch.tensor([len(row) - 1 for row in rows])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    tokens = torch.empty(int(offsets[-1]), kept, dtype=torch.int16)
    weights = torch.empty(int(offsets[-1]), kept, dtype=torch.bfloat16)
    order = lengths.argsort().tolist()
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        inputs = pad([rows[index][:-1] for index in chosen], 0)
        with torch.autocast("cpu", torch.bfloat16):
            logits = target(input_ids=inputs, use_cache=False).logits
        top = torch.softmax(logits.float(), dim=-1).topk(kept, dim=-1)
        for place, index in enumerate(chosen):
            span = slice(int(offsets[index]), int(offsets[index + 1]))
            tokens[span] = top.indices[place, : len(rows[index]) - 1].to(torch.int16)
            weights[span] = top.values[place, : len(rows[index]) - 1].to(torch.bfloat16)
        if at // batch % 50 == 0:
            print(f"taught {at} of {len(order)} rows", flush=True)
    return Teacher(rows, tokens, weights, offsets)


def batches(teacher: Teacher, batch_tokens: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass: rows of similar length together, the batches in random order.

    Yields the padded rows and the positions of their targets in the teacher's arrays, with
    `IGNORED` where there is none.
    """
    random = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(row) for row in teacher.rows])
    noise = torch.rand(len(lengths), generator=random)
    order = (lengths + 8 * noise).argsort().tolist()
    groups: list[list[int]] = [[]]
    for index in order:
        if groups[-1] and (len(groups[-1]) + 1) * len(teacher.rows[index]) > batch_tokens:
            groups.append([])
        groups[-1].append(index)
    for place in torch.randperm(len(groups), generator=random).tolist():
        group = groups[place]
        spans = [list(range(int(teacher.offsets[i]), int(teacher.offsets[i + 1]))) for i in group]
        yield pad([teacher.rows[i][:-1] for i in group], 0), pad(spans, IGNORED)


def distill_loss(
    logits: Tensor, tokens: Tensor, weights: Tensor, overlap_weight: float
) -> tuple[Tensor, Tensor]:
    """Forward KL with the tail as one outcome, plus weighted distance; and the overlap.

    `logits` is (n, vocabulary); `tokens` and `weights` are the target's most likely (n, kept).
    """
    log_q = torch.log_softmax(logits.float(), dim=-1).gather(1, tokens)
    q = log_q.exp()
    tail_p = (1 - weights.sum(1)).clamp(min=0)
    tail_q = (1 - q.sum(1)).clamp(min=1e-6)
    entropy = (weights * weights.clamp(min=1e-9).log()).sum(1)
    entropy = entropy + tail_p * tail_p.clamp(min=1e-9).log()
    divergence = entropy - (weights * log_q).sum(1) - tail_p * tail_q.log()
    overlap = torch.minimum(weights, q).sum(1) + torch.minimum(tail_p, tail_q)
    loss = divergence.mean() + overlap_weight * (1 - overlap).mean()
    return loss, overlap.mean().detach()


def distill(
    draft: LlamaForCausalLM, teacher: Teacher, settings: DistillSettings
) -> dict[str, object]:
    """Train the draft in place; returns the losses and the duration."""
    optimizers = make_optimizers(draft, settings.muon_rate, settings.adam_rate, settings.muon_decay)
    per_pass = sum(1 for _ in batches(teacher, settings.batch_tokens, 0))
    steps = int(per_pass * settings.epochs)
    history: list[dict[str, float]] = []
    began, step, sums = time.monotonic(), 0, torch.zeros(2)
    torch.manual_seed(settings.seed)
    draft.train()
    while step < steps:
        for inputs, spans in batches(teacher, settings.batch_tokens, settings.seed + step):
            set_rates(optimizers, rate_factor(step, steps, settings.warmup_steps))
            with torch.autocast("cpu", torch.bfloat16):
                logits = draft(input_ids=inputs, use_cache=False).logits
            real = spans != IGNORED
            places = spans[real]
            loss, overlap = distill_loss(
                logits[real],
                teacher.tokens[places].long(),
                teacher.weights[places].float(),
                settings.overlap_weight,
            )
            loss.backward()
            nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            sums += torch.stack([loss.detach(), overlap])
            if step % 200 == 0 or step == steps:
                count = (step - 1) % 200 + 1
                history.append(_entry(step, began, sums / count))
                sums.zero_()
                print(f"draft {history[-1]} of {steps} steps", flush=True)
            if step == steps:
                break
    return {"steps": steps, "history": history}


def _entry(step: int, began: float, means: Tensor) -> dict[str, float]:
    seconds = time.monotonic() - began
    return {
        "step": step,
        "seconds": round(seconds, 1),
        "loss": round(means[0].item(), 4),
        "overlap": round(means[1].item(), 4),
    }


def kept_share(teacher: Teacher) -> float:
    """The share of the target's probability that the kept tokens hold, on average."""
    return round(teacher.weights.float().sum(1).mean().item(), 4)
