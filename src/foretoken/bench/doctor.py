"""What is wrong with a model, its drafters and this machine together, and what to do about it."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from foretoken.bench.limits import Limits
from foretoken.core.options import ComponentSpec
from foretoken.core.params import SamplingParams
from foretoken.core.verdict import Exactness
from foretoken.engine.llm import LLM, Prompt
from foretoken.errors import CapacityError, ModelError
from foretoken.models.adapter import ModelInfo
from foretoken.models.cache import BLOCK_SIZE
from foretoken.models.tokenizer import Tokenizer
from foretoken.planner.base import FixedPlanner

MIN_DRAFTED = 64  # draft tokens before a drafter is called dead
DEAD_RATE = 0.01  # accepted per draft token
NUM_CONTEXTS = 2  # full-length requests that a cache should hold
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Level(enum.StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Args:
        level: How bad it is.
        what: What was found, in one line.
        do: What to do about it; empty if nothing.
    """

    level: Level
    what: str
    do: str = ""

    def __str__(self) -> str:
        return f"{self.level}: {self.what}" + (f"; do: {self.do}" if self.do else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterCounts:
    """What a drafter did when it drafted alone.

    Args:
        num_steps: Passes of the target.
        num_draft_tokens: Tokens it proposed.
        num_accepted: Of them taken.
    """

    num_steps: int
    num_draft_tokens: int
    num_accepted: int


def load_failure(error: Exception) -> Finding:
    """Return what a model that could not be loaded comes to.

    Raises:
        Exception: `error` itself, if it is none that loading is known for.
    """
    if isinstance(error, (ModelError, CapacityError)):
        return Finding(Level.BAD, str(error), error.hint)
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return Finding(
            Level.BAD,
            f"memory: it does not suffice to load the models: {' '.join(str(error).split())[:200]}",
            "use a smaller model or context, or --dtype bfloat16",
        )
    raise error


def examine(
    llm: LLM,
    specs: Sequence[ComponentSpec],
    limits: Limits,
    variables: Mapping[str, str],
) -> Iterator[Finding]:
    """Yield what can be said without generating.

    Args:
        llm: Loaded with these drafters.
        specs: Drafters as named, without what is added by itself.
        limits: Of this process.
        variables: Environment.
    """
    yield check_exactness(llm)
    yield check_dtype(llm.info, limits)
    yield check_threads(torch.get_num_threads(), limits, variables)
    yield check_memory(llm, limits)
    for spec in specs:
        folder = Path(str(spec.options.get("path", ""))).expanduser()
        if (folder / "config.json").is_file():
            yield check_template(llm.tokenizer, Tokenizer.load(str(folder)), spec.name)


# -- the model -----------------------------------------------------------------------------------


def check_exactness(llm: LLM) -> Finding:
    """Say how closely output follows plain decoding, and what stands against more."""
    rule, target = llm.engine.parts.verifier.exactness, llm.info
    if rule is Exactness.LOSSY:
        what = "exactness: lossy; the rule that keeps draft tokens changes what is said"
        return Finding(Level.WARN, what, "use --verifier coupled, unless you want that")
    if rule is Exactness.DISTRIBUTION:
        what = "exactness: distribution; other tokens than plain decoding, equally likely"
        return Finding(Level.OK, what)
    if target.exactness is Exactness.BITWISE:
        return Finding(Level.OK, "exactness: bitwise; the tokens are those of plain decoding")
    because = target.inexact_because or (
        f"nothing makes sums in {_name(target.dtype)} on {target.device.type} independent of how "
        "many tokens share a pass"
    )
    return Finding(
        Level.WARN,
        f"exactness: numerical only; at near ties a token may differ from plain decoding, "
        f"because {because}",
        "use --dtype float32 on CPU, or measure with foretoken verify how often it happens",
    )


def check_dtype(info: ModelInfo, limits: Limits) -> Finding:
    """Say whether the processor knows the type of the weights."""
    name = _name(info.dtype)
    if info.device.type != "cpu" or info.dtype != torch.bfloat16:
        return Finding(Level.OK, f"dtype: {name} on {info.device.type}")
    if limits.has_bfloat16 is False:
        return Finding(
            Level.WARN,
            "dtype: bfloat16, which this processor does not multiply; it halves the memory that "
            "weights are read from, and costs arithmetic",
            "compare with --dtype float32, for example by foretoken bench",
        )
    return Finding(Level.OK, "dtype: bfloat16 on cpu")


# -- the machine ---------------------------------------------------------------------------------


def check_threads(num_threads: int, limits: Limits, variables: Mapping[str, str]) -> Finding:
    """Say whether threads and cores go together.

    Args:
        num_threads: Of torch.
        limits: Of this process.
        variables: Environment.
    """
    usable = limits.usable_cores
    use = f"use --threads {usable}"
    asked = {name: variables[name] for name in THREAD_VARIABLES if variables.get(name)}
    set_by = f" ({', '.join(map('='.join, asked.items()))})" if asked else ""
    greedy = [name for name, value in asked.items() if _count(value) > limits.num_cores]
    if num_threads > limits.num_cores:
        what = f"threads: {num_threads}{set_by} take turns on {limits.num_cores} cores"
        return Finding(Level.BAD, what, use)
    if limits.cpu_quota is not None and num_threads > max(1.0, limits.cpu_quota):
        quota = f"{limits.cpu_quota:g} cores' worth of time"
        what = f"threads: {num_threads}{set_by}, but the control group grants {quota}"
        return Finding(Level.BAD, what, f"{use}, or raise the quota")
    if num_threads > usable:
        what = f"threads: {num_threads}{set_by} share {usable} physical cores"
        return Finding(Level.WARN, what, use)
    if greedy:  # torch takes no more than there are, other libraries do
        what = f"threads: {' and '.join(greedy)} ask for more than the {limits.num_cores} cores"
        return Finding(Level.WARN, f"{what}{set_by}", f"unset {' and '.join(greedy)}")
    if 2 * num_threads <= usable:
        what = f"threads: {num_threads}{set_by} of {usable} cores are used"
        return Finding(Level.WARN, what, use)
    return Finding(Level.OK, f"threads: {num_threads} on {usable} cores")


def check_memory(llm: LLM, limits: Limits) -> Finding:
    """Say whether the KV cache can be filled, and how many requests it holds."""
    info, cache = llm.info, llm.engine.cache
    num_tokens = cache.num_blocks * BLOCK_SIZE
    num_bytes = num_tokens * info.kv_bytes_per_token
    size = f"memory: the KV cache of {num_tokens} tokens takes {_gib(num_bytes)} when it is full"
    fewer = "use a model of shorter context, fewer other programs, or --dtype bfloat16"
    free = limits.memory_bytes if info.device.type == "cpu" else None
    if free is not None and num_bytes > free:
        return Finding(Level.BAD, f"{size}; {_gib(free)} are free", fewer)
    num_contexts = num_tokens / info.context_limit
    if num_contexts < NUM_CONTEXTS:
        what = f"{size} and holds {num_contexts:.1f} requests of full length; others wait"
        return Finding(Level.WARN, what, fewer)
    return Finding(Level.OK, size)


# -- the drafters --------------------------------------------------------------------------------


def check_template(target: Tokenizer | None, draft: Tokenizer | None, label: str) -> Finding:
    """Say whether a draft model knows conversations as the target does."""
    ours = target.chat_template if target else None
    theirs = draft.chat_template if draft else None
    if ours == theirs:
        kind = "no chat template, as the target" if ours is None else "the target's chat template"
        return Finding(Level.OK, f"{label}: {kind}")
    what = "another chat template than the target"
    if theirs is None or ours is None:
        who = "the draft" if theirs is None else "the target"
        what = f"a chat template in one of the two only: {who} has none"
    return Finding(
        Level.WARN,
        f"{label}: {what}; conversations look foreign to it, and few guesses are taken",
        "use a draft model of the same family and the same tuning, or train one: foretoken train",
    )


def probe_drafter(
    llm: LLM, label: str, prompts: Sequence[Prompt], params: Sequence[SamplingParams]
) -> DrafterCounts:
    """Let a drafter draft alone, as much as it may, and return what it did.

    Args:
        llm: Used by nobody else meanwhile.
        label: Of a loaded drafter.
        prompts: What is continued.
        params: How, one for each prompt.
    """
    engine = llm.engine
    parts = engine.parts
    # A planner would stop asking a drafter that is no good.
    engine.parts = replace(parts, planner=FixedPlanner())
    try:
        stats = [output.stats for output in llm.generate(prompts, params, drafters=label)]
    finally:
        engine.parts = parts
    return DrafterCounts(
        num_steps=sum(item.num_steps for item in stats),
        num_draft_tokens=sum(item.num_draft_tokens for item in stats),
        num_accepted=sum(item.num_accepted for item in stats),
    )


def check_drafter(label: str, counts: DrafterCounts, *, is_trained: bool) -> Finding:
    """Say whether a drafter earns its place.

    Args:
        label: Which.
        counts: What it did alone.
        is_trained: Whether it has weights of its own, so that it should know something anywhere.
    """
    if not counts.num_draft_tokens:
        return Finding(
            Level.WARN,
            f"{label}: proposed nothing in {counts.num_steps} steps; nothing here is of its kind",
            "leave it out, or give prompts of your own with --input",
        )
    share = counts.num_accepted / counts.num_draft_tokens
    taken = f"{counts.num_accepted} of {counts.num_draft_tokens} draft tokens accepted"
    if counts.num_draft_tokens < MIN_DRAFTED:
        return Finding(Level.OK, f"{label}: {taken}; too few to judge by")
    if share >= DEAD_RATE:
        return Finding(Level.OK, f"{label}: {taken} ({share:.0%}) in {counts.num_steps} steps")
    if is_trained:
        do = "leave it out; use a draft model of the same family, or train one: foretoken train"
    else:
        do = "leave it out where outputs are like these"
    level = Level.BAD if is_trained else Level.WARN
    return Finding(level, f"{label}: dead: {taken} in {counts.num_steps} steps", do)


def _count(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


__all__ = [
    "DrafterCounts",
    "Finding",
    "Level",
    "check_drafter",
    "check_dtype",
    "check_exactness",
    "check_memory",
    "check_template",
    "check_threads",
    "examine",
    "load_failure",
    "probe_drafter",
]
