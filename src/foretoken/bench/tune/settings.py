"""What `foretoken tune` compares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from foretoken.assets import EMBEDDED
from foretoken.core.options import ComponentSpec
from foretoken.core.params import SamplingParams
from foretoken.drafters import DRAFTERS
from foretoken.engine.names import resolve_drafters
from foretoken.planner.plan import Plan

PLAIN, AUTO = "plain", "auto"
MAX_NODES = (1, 2, 4, 8, 16)
# Those that need nothing but the target: no weights, no files.
FREE_DRAFTERS = ("prompt-lookup", "suffix", "token-recycling")


@dataclass(frozen=True, slots=True, kw_only=True)
class TunePrompt:
    """One of the user's prompts.

    Args:
        prompt: Text or token ids.
        params: How it is to be continued; without a seed it gets one.
        place: Where it comes from, for messages.
    """

    prompt: str | Sequence[int]
    params: SamplingParams
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One way to decode.

    Args:
        name: What reports call it; unique.
        plan: Drafters and sizes.
    """

    name: str
    plan: Plan


PLAIN_SETUP = Setup(name=PLAIN, plan=Plan(drafters=("none",), max_nodes=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A drafter that is considered.

    Args:
        name: What reports call it; unique.
        spec: Its name and options.
    """

    name: str
    spec: str

    def setup(self, max_nodes: int) -> Setup:
        """Return the way to decode with it at one size."""
        plan = Plan(drafters=(self.spec,), max_nodes=max_nodes, adaptive=False)
        return Setup(name=f"{self.name} ≤{max_nodes}", plan=plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSettings:
    """What is compared; everything but the machine's times follows from it.

    Args:
        model: Directory or hub id of the target, or "stories".
        model_name: What reports call it.
        source: Where the prompts come from.
        prompts: At least one.
        candidates: Drafters to consider.
        auto: The adaptive plan to measure beside them.
        max_nodes: Sizes to consider for each, ascending.
        batch_size: Prompts at once.
        rounds: How often the chosen ways are measured.
        seed: Prompt number i that has no seed of its own gets seed + i.
        dtype: As of `LLM`.
        device: As of `LLM`.
        threads: CPU threads.
    """

    model: str
    model_name: str
    source: str
    prompts: tuple[TunePrompt, ...]
    candidates: tuple[Candidate, ...]
    auto: Plan
    max_nodes: tuple[int, ...]
    batch_size: int
    rounds: int
    seed: int
    dtype: str
    device: str
    threads: int


def candidates(specs: Sequence[str], model: str) -> tuple[Candidate, ...]:
    """Return the drafters to consider: those named, or what makes sense for the model.

    Raises:
        UnknownNameError: There is no such drafter.
        ConfigError: A spec cannot be read, or stands for no drafter.
    """
    found = [spec for text in specs for spec in resolve_drafters((text,), model)]
    if not specs:
        found = list(_default_specs(model))
    numbers: Counter[str] = Counter()
    named = []
    for spec in found:
        numbers[spec.name] += 1
        name = f"{spec.name}#{numbers[spec.name]}" if numbers[spec.name] > 1 else spec.name
        named.append(Candidate(name=name, spec=str(spec)))
    return tuple(named)


def auto_plan(specs: Sequence[str]) -> Plan:
    """Return the adaptive plan over the drafters named, or what `auto` is for the model."""
    return Plan(drafters=tuple(specs), adaptive=True) if specs else Plan()


def _default_specs(model: str) -> Iterator[ComponentSpec]:
    for name in FREE_DRAFTERS:
        if name in DRAFTERS:
            yield ComponentSpec(name)
    if model in EMBEDDED:
        pair = EMBEDDED[model]
        # The pair's own bound on nodes is one of the things to be found out.
        options = {key: it for key, it in pair.draft_options.items() if key != "max_nodes"}
        yield ComponentSpec("draft-model", {"path": str(pair.draft), **options})


__all__ = [
    "AUTO",
    "MAX_NODES",
    "PLAIN",
    "PLAIN_SETUP",
    "Candidate",
    "Setup",
    "TunePrompt",
    "TuneSettings",
    "auto_plan",
    "candidates",
]
