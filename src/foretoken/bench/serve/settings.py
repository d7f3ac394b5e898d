"""What a load bench of the server measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretoken.bench.record import portable
from foretoken.bench.serve.trace import Trace
from foretoken.errors import ConfigError

PLAIN = "plain"
DRAFTS = "drafts"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """What is measured: a server without drafters and one with, under the same load.

    Args:
        model: Name, directory or hub id of the target.
        model_name: What reports call it.
        weights: What changes when the weights of the models do: their fingerprints.
        drafters: Names or specs of the server with drafters.
        max_nodes: Its most draft tokens per step; None: as `foretoken serve`.
        adaptive: Whether it chooses among them; None: as `foretoken serve`.
        trace: When requests come and how long they are, not yet scaled.
        text: A file of text that prompts are taken from; None for stories by the embedded target.
        max_prompt_tokens: Bound of prompts, to which they are scaled; None: by the context alone.
        max_new_tokens: The same of outputs.
        loads: Rates of requests, as parts of what plain decoding can do.
        rounds: Of every load.
        duration_s: Of one replay.
        temperature: 0 is greedy.
        seed: Of the first request; each has its own.
        slo_first_token_ms: Bound of the time to the first token, for requests that count as good;
            None for none.
        slo_inter_token_ms: Bound of the mean time between tokens, likewise.
        max_requests: That a server runs at once.
        max_queue: That wait beyond these.
        kv_cache_tokens: Of each server; None: by the free memory.
        dtype: As of `LLM`.
        device: As of `LLM`.
        threads: CPU threads of each server.
    """

    model: str
    model_name: str
    weights: tuple[str, ...]
    drafters: tuple[str, ...]
    max_nodes: int | None
    adaptive: bool | None
    trace: Trace
    text: Path | None
    max_prompt_tokens: int | None
    max_new_tokens: int | None
    loads: tuple[float, ...]
    rounds: int
    duration_s: float
    temperature: float
    seed: int
    slo_first_token_ms: float | None
    slo_inter_token_ms: float | None
    max_requests: int
    max_queue: int
    kv_cache_tokens: int | None
    dtype: str
    device: str
    threads: int

    def __post_init__(self) -> None:
        """Check what the command line cannot know.

        Raises:
            ConfigError: There is nothing to compare, or a number is not above 0.
        """
        if not self.drafters or self.drafters == ("none",):
            raise ConfigError(
                "a server with drafters is compared with one without; got no drafter",
                hint="name one or more with --drafter, or leave it out",
            )
        above_zero = {
            "load": min(self.loads),
            "duration": self.duration_s,
            "slo_first_token": self.slo_first_token_ms,
            "slo_inter_token": self.slo_inter_token_ms,
        }
        for name, value in above_zero.items():
            if value is not None and not value > 0:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} is a number > 0; got {value}", hint=f"change {option}")

    @property
    def has_slo(self) -> bool:
        """Whether anything is asked of a request beside its end."""
        return (self.slo_first_token_ms, self.slo_inter_token_ms) != (None, None)

    def as_json(self) -> dict[str, Any]:
        """Return all that the numbers depend on; two equal ones may share a record."""
        return {
            "model": self.model_name,
            "weights": list(self.weights),
            "drafters": [portable(drafter) for drafter in self.drafters],
            "max_nodes": self.max_nodes,
            "adaptive": self.adaptive,
            "trace": self.trace.name,
            "trace_minutes": self.trace.length_s / 60,
            "trace_requests": len(self.trace.arrivals),
            "text": None if self.text is None else self.text.name,
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_new_tokens": self.max_new_tokens,
            "loads": list(self.loads),
            "rounds": self.rounds,
            "duration_s": self.duration_s,
            "temperature": self.temperature,
            "seed": self.seed,
            "slo_first_token_ms": self.slo_first_token_ms,
            "slo_inter_token_ms": self.slo_inter_token_ms,
            "max_requests": self.max_requests,
            "max_queue": self.max_queue,
            "kv_cache_tokens": self.kv_cache_tokens,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
        }


__all__ = ["DRAFTS", "PLAIN", "ServeSettings"]
