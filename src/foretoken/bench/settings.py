"""What a bench run measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from foretoken.bench.workloads import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSettings:
    """What every measurement in paired rounds is told.

    Args:
        model: Directory or hub id of the target.
        model_name: What reports call it.
        drafters: Specs; each is a setting of its own. Empty measures plain decoding alone.
        max_nodes: Most draft tokens per step; each number is a setting of its own.
        max_new_tokens: Made per prompt, fewer where the context ends.
        temperatures: Each is a set of rounds of its own.
        batch_sizes: Prompts at once; likewise.
        rounds: How often every system does all the work.
        seed: Of the first prompt's noise; each prompt has its own.
        dtype: As of `LLM`.
        device: As of `LLM`.
        threads: CPU threads of every system.
    """

    model: str
    model_name: str
    drafters: tuple[str, ...]
    max_nodes: tuple[int, ...]
    max_new_tokens: int
    temperatures: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    rounds: int
    seed: int
    dtype: str
    device: str
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings(RoundSettings):
    """What is measured; a bench run is a pure function of this and of the machine.

    Args:
        workload: Prompts; number i is sampled with seed + i.
        peers: Names of other systems.
        draft: Directory of the draft model that peers use; None compares them plainly only.
        num_draft_tokens: Draft tokens per step of peers.
        work_dir: Where peers keep converted models.
        in_process: Run every system in this process.
    """

    workload: Workload
    peers: tuple[str, ...]
    draft: Path | None
    num_draft_tokens: int
    work_dir: Path
    in_process: bool


__all__ = ["BenchSettings", "RoundSettings"]
