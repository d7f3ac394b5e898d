"""Distillation: a draft model learns what its target would say behind the target's own outputs.

Off policy, the texts are the target's outputs: what stands when a draft begins. On policy, some
batches hold what the draft itself says behind the same prompts, and the target judges that: it is
asked for its second token behind its own first one, and learns there what it does wrong. Sources:
DistillSpec, arXiv:2310.08461; generalised knowledge distillation, arXiv:2306.13649.

Only what stands at the place of an output counts, as only that will ever be drafted.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.errors import ConfigError
from foretoken.models.continuation import continuations
from foretoken.models.trainable import TrainableModel
from foretoken.training.corpus import Example
from foretoken.training.draft.teacher import Teacher
from foretoken.training.loop import BucketedBatches, LoopConfig, train
from foretoken.training.losses import Divergence, at_temperature, divergence
from foretoken.training.settings import check_counts, check_positive

STAGE = "distilling"
MAX_LOGITS = 2**26  # of one model in one batch: 256 MiB, and a few times that with its gradients
_SEED_STRIDE = 1_000_003
_NUM_PROBES = 4  # steps that are timed, the first of which does not count


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilConfig:
    """How a draft is distilled.

    Args:
        num_steps: Updates of its weights.
        batch_size: Most texts of a step.
        learning_rate: The highest.
        loss: A name of `training.losses.DIVERGENCES`.
        temperature: At which the draft will serve; 0, greedy, is distilled at 1.
        on_policy: Share of the steps whose outputs are the draft's own.
        precision: One of `training.precision.PRECISIONS`.
        seed: Of everything random.

    Raises:
        ConfigError: A value is not allowed.
    """

    num_steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    loss: str = "forward-kl"
    temperature: float = 0.0
    on_policy: float = 0.0
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, ("num_steps", "batch_size"))
        check_positive(self, ("learning_rate",))
        if not 0 <= self.on_policy <= 1:
            raise ConfigError(
                f"on_policy is a share from 0 to 1; got {self.on_policy}", hint="change --on-policy"
            )
        self.divergence()

    def divergence(self) -> Divergence:
        """Return the loss at the temperature."""
        return at_temperature(divergence(self.loss), self.temperature)

    def is_on_policy(self, step: int) -> bool:
        """Return whether a step's outputs are the draft's own; every step has its own answer."""
        return random.Random(self.seed * _SEED_STRIDE + step).random() < self.on_policy

    def loop(self) -> LoopConfig:
        """Return how the loop runs."""
        return LoopConfig(
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            num_warmup_steps=max(1, min(100, self.num_steps // 10)),
            seed=self.seed,
            precision=self.precision,
        )


@dataclass(frozen=True, slots=True)
class DistilBatch:
    """Texts side by side.

    Args:
        token_ids: All but the last token of each, [B, T], filled with 0 at the right.
        is_asked: Behind which of them an output token stands, [B, T].
    """

    token_ids: Tensor
    is_asked: Tensor

    @classmethod
    def of(cls, texts: Sequence[Example], device: torch.device) -> DistilBatch:
        """Lay texts out on a device."""
        width = max(len(text.token_ids) for text in texts) - 1
        token_ids = torch.zeros(len(texts), width, dtype=torch.long)
        is_asked = torch.zeros(len(texts), width, dtype=torch.bool)
        for row, text in enumerate(texts):
            stop = len(text.token_ids) - 1
            token_ids[row, :stop] = torch.tensor(text.token_ids[:-1])
            is_asked[row, len(text.prompt_ids) - 1 : stop] = True
        return cls(token_ids.to(device), is_asked.to(device))


def distil(
    student: TrainableModel,
    target: TrainableModel,
    examples: Sequence[Example],
    config: DistilConfig,
    *,
    checkpoint: Path | None = None,
    teacher: Teacher | None = None,
    on_progress: OnProgress = silent,
) -> list[float]:
    """Train a draft model in place and return the loss of every step, in nats per output token.

    Args:
        student: It may have fewer tokens than the target.
        target: On the same device; it stays as it is.
        examples: Prompts with the target's outputs, at least one.
        config: How.
        checkpoint: File to resume from, and to write now and then; None for neither.
        teacher: The target's on these examples, for several drafts to share what it remembers.
        on_progress: Told about every step.

    Raises:
        ConfigError: As `training.loop.train`; a checkpoint stays as it was.
    """
    lengths = [len(text.token_ids) for text in examples]
    batches = BucketedBatches(lengths, fitting_batch(config, target, examples), config.seed)
    loss_at = config.divergence()
    taught = teacher or Teacher(target, examples)

    def loss_of(batch: tuple[int, list[int]]) -> Tensor:
        step, places = batch
        texts = [examples[place] for place in places]
        if config.is_on_policy(step):
            texts = own_outputs(student, texts, config.temperature)
            laid_out = DistilBatch.of(texts, student.device)
            target_logits = asked_logits(target, laid_out)
        else:
            laid_out = DistilBatch.of(texts, student.device)
            target_logits = taught.logits(places)
        return distil_loss(student, target_logits, laid_out, loss_at, config.temperature)

    def on_step(num_done: int, loss: float) -> None:
        total = config.num_steps
        on_progress(Progress(stage=STAGE, done=num_done, total=total, detail=f"loss {loss:.3f}"))

    return train(
        student.module,
        lambda step: (step, batches.indices(step)),
        loss_of,
        config.loop(),
        checkpoint=checkpoint,
        on_step=on_step,
    )


@torch.no_grad()
def asked_logits(target: TrainableModel, batch: DistilBatch) -> Tensor:
    """Return a target's logits behind all places of output tokens, [N, V]."""
    return target.logits(batch.token_ids)[batch.is_asked].float()


def distil_loss(
    student: TrainableModel,
    target_logits: Tensor,  # [N, V]
    batch: DistilBatch,
    loss_at: Divergence,
    temperature: float,
) -> Tensor:
    """Return the mean divergence over the places of output tokens, a scalar.

    A draft of fewer tokens is compared with the target among these, and every place counts as much
    as the target's probability of saying one of them there: the rest is beyond what the draft can
    learn. With forward KL this is, but for a constant, the divergence over all tokens.

    Args:
        student: Gradients flow into it.
        target_logits: The target's behind the asked places of the batch.
        batch: Of texts.
        loss_at: Compares logits, at the temperature.
        temperature: At which the target's probability is taken; 0 as 1.
    """
    draft_logits = student.logits(batch.token_ids)[batch.is_asked].float()
    if student.vocabulary is None:
        return loss_at(draft_logits, target_logits).mean()
    kept = student.vocabulary.d2t.to(target_logits.device)
    share = (target_logits / (temperature or 1.0)).softmax(dim=-1)[:, kept].sum(dim=-1)
    return (share * loss_at(draft_logits, target_logits[:, kept])).mean()


def own_outputs(
    student: TrainableModel, texts: Sequence[Example], temperature: float
) -> list[Example]:
    """Return the prompts with what the draft says behind them, as long as the outputs were.

    Args:
        student: Sampled with torch's own random numbers.
        texts: Whose prompts are taken.
        temperature: 0 is greedy.
    """
    longest = max(len(text.output_ids) for text in texts)
    prompts = [text.prompt_ids for text in texts]
    written = continuations(student, prompts, longest, temperature)
    return [
        Example(text.prompt_ids, tuple(output[: len(text.output_ids)]))
        for text, output in zip(texts, written, strict=True)
    ]


def fitting_batch(config: DistilConfig, target: TrainableModel, examples: Sequence[Example]) -> int:
    """Return how many texts a step has: fewer than asked for where logits would fill the memory.

    Args:
        config: Asks.
        target: Has as many logits per token as tokens.
        examples: The longest one counts.
    """
    longest = max(len(text.token_ids) for text in examples)
    return max(1, min(config.batch_size, MAX_LOGITS // (longest * target.vocab_size)))


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a step takes here.

    Args:
        first_s: While the target sees its texts for the first time.
        later_s: When it remembers them.
        num_first: Steps of the first kind.
    """

    first_s: float
    later_s: float
    num_first: int

    def steps_within(self, budget_s: float) -> int:
        """Return how many steps there is time for, at least one."""
        num_steps = budget_s / self.first_s
        if num_steps > self.num_first:
            left_s = budget_s - self.num_first * self.first_s
            num_steps = self.num_first + left_s / self.later_s
        return max(1, int(num_steps))


def measure_pace(
    student: TrainableModel,
    target: TrainableModel,
    examples: Sequence[Example],
    config: DistilConfig,
) -> Pace:
    """Time some steps of a distillation; the student stays as it is.

    Args:
        student: What would be trained.
        target: By which.
        examples: On which.
        config: How; its number of steps does not matter.
    """
    teacher = Teacher(target, examples)
    share = config.on_policy

    def probe(on_policy: float) -> float:
        times_s: list[float] = []
        distil(
            copy.deepcopy(student),
            target,
            examples,
            replace(config, num_steps=_NUM_PROBES, on_policy=on_policy),
            teacher=teacher,
            on_progress=lambda _progress: times_s.append(time.perf_counter()),
        )
        return (times_s[-1] - times_s[0]) / (_NUM_PROBES - 1)

    own_s = share * probe(1.0) if share else 0.0
    first_s, later_s = (own_s + (1 - share) * probe(0.0) for _ in range(2))
    num_first = math.ceil(len(examples) / fitting_batch(config, target, examples))
    return Pace(first_s, later_s, num_first)


__all__ = [
    "DistilBatch",
    "DistilConfig",
    "Pace",
    "asked_logits",
    "distil",
    "distil_loss",
    "fitting_batch",
    "measure_pace",
    "own_outputs",
]
