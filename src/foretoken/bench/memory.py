"""Memory of this process, as the system counts it."""

from __future__ import annotations

from pathlib import Path


def reset_peak_memory() -> None:
    """Start a new peak for `memory`, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # another system, or one that forbids it: the peak is the process's own
        return


def memory() -> dict[str, int]:
    """Return bytes of this process: the peak of resident memory, and the anonymous part now.

    Files mapped into memory, such as weights, count in the first and not in the second. Empty
    where the system has no /proc.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {"VmHWM": "peak_resident_bytes", "RssAnon": "anonymous_bytes"}
    return {name: int(found[key].split()[0]) * 1024 for key, name in names.items() if key in found}


__all__ = ["memory", "reset_peak_memory"]
