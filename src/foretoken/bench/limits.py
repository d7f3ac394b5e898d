"""What this process may use of the machine: cores, memory, instructions.

Read from Linux' own files; where there are none, what is not known is None.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}  # the last two are ARM's


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on this process.

    Args:
        num_cores: Logical cores that it may run on.
        num_physical_cores: Physical ones among them.
        cpu_quota: Cores' worth of time that its control group grants.
        memory_bytes: What it can still take, of the machine and of its control group.
        has_bfloat16: Whether the processor multiplies bfloat16 by itself.
    """

    num_cores: int
    num_physical_cores: int | None = None
    cpu_quota: float | None = None
    memory_bytes: int | None = None
    has_bfloat16: bool | None = None

    @property
    def usable_cores(self) -> int:
        """Threads that can run at the same time."""
        bounds = [float(self.num_cores)]
        bounds += [bound for bound in (self.num_physical_cores, self.cpu_quota) if bound]
        return max(1, int(min(bounds)))


def read_limits(root: Path = Path("/")) -> Limits:
    """Return the bounds as they are now.

    Args:
        root: Where `proc` and `sys` are.
    """
    cores = _affinity()
    blocks = list(_processors(root))
    flags = {flag for block in blocks for flag in _flags(block)}
    return Limits(
        num_cores=len(cores),
        num_physical_cores=_num_physical(blocks, cores),
        cpu_quota=min(_quotas(root), default=None),
        memory_bytes=min(_memory(root), default=None),
        has_bfloat16=bool(flags & _BFLOAT16) if flags else None,
    )


def _affinity() -> set[int]:
    try:
        return set(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return set(range(os.cpu_count() or 1))


# -- the processor -------------------------------------------------------------------------------


def _processors(root: Path) -> Iterator[dict[str, str]]:
    """Yield the fields of each logical core."""
    for block in _text(root / "proc/cpuinfo").split("\n\n"):
        fields = (line.partition(":") for line in block.splitlines() if ":" in line)
        yield {name.strip(): value.strip() for name, _, value in fields}


def _flags(block: dict[str, str]) -> list[str]:
    return (block.get("flags") or block.get("Features") or "").split()


def _num_physical(blocks: list[dict[str, str]], cores: set[int]) -> int | None:
    places = {
        (block["physical id"], block["core id"])
        for block in blocks
        if "core id" in block and "physical id" in block and int(block["processor"]) in cores
    }
    return len(places) or None


# -- control groups ------------------------------------------------------------------------------


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of those around it, innermost first."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        # In a container the path may be that outside, of which only the top is there.
        folder = top / path.strip("/")
        while folder != top:
            yield folder
            folder = folder.parent
        yield top


def _quotas(root: Path) -> Iterator[float]:
    for folder in _groups(root, "cpu"):
        quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
        if not period:  # version 1
            quota = _text(folder / "cpu.cfs_quota_us").strip()
            period = _text(folder / "cpu.cfs_period_us").strip()
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)


def _memory(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024
    for folder in _groups(root, "memory"):
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _text(folder / limit_file).strip(), _text(folder / usage_file).strip()
            if limit.isdecimal() and used.isdecimal():
                yield max(0, int(limit) - int(used) + _reclaimable(folder))


def _reclaimable(folder: Path) -> int:
    """Return the bytes of files that the group holds and would give up."""
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


__all__ = ["Limits", "read_limits"]
