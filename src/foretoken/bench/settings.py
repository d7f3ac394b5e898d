"""What a bench run measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from foretoken.bench.workloads import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What is measured; a bench run is a pure function of this and of the machine.

    Args:
        model: Directory or hub id of the target.
        model_name: What reports call it.
        drafters: Specs; each is a setting of its own. Empty measures plain decoding alone.
        max_nodes: Most draft tokens per step; each number is a setting of its own.
        workload: Prompts.
        max_new_tokens: Made per prompt, fewer where the context ends.
        temperatures: Each is a set of rounds of its own.
        batch_sizes: Prompts at once; likewise.
        rounds: How often every system does all the work.
        seed: Prompt number i is sampled with seed + i.
        dtype: As of `LLM`.
        device: As of `LLM`.
        threads: CPU threads of every system.
        peers: Names of other systems.
        draft: Directory of the draft model that peers use; None compares them plainly only.
        num_draft_tokens: Draft tokens per step of peers.
        work_dir: Where peers keep converted models.
        in_process: Run every system in this process.
    """

    model: str
    model_name: str
    drafters: tuple[str, ...]
    max_nodes: tuple[int, ...]
    workload: Workload
    max_new_tokens: int
    temperatures: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    rounds: int
    seed: int
    dtype: str
    device: str
    threads: int
    peers: tuple[str, ...]
    draft: Path | None
    num_draft_tokens: int
    work_dir: Path
    in_process: bool


__all__ = ["BenchSettings"]
