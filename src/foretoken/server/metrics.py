"""What operators see of the server: its metrics in Prometheus' terms, see docs/metrics.md."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.registry import Collector

from foretoken import __version__
from foretoken.engine.engine import Engine
from foretoken.engine.request import FinishReason, Request
from foretoken.models.adapter import LanguageModel
from foretoken.planner.cost import CostCurve
from foretoken.planner.cost_cache import load_or_measure
from foretoken.server.families import PREFIX, SECONDS, TOKENS, Distribution, counter, gauge
from foretoken.server.meter import Meter, MeteringPlanner
from foretoken.server.observer import Observer
from foretoken.server.speedup import PlainPace
from foretoken.server.windows import Totals

OPENMETRICS = "application/openmetrics-text"
_COMPLETE = {FinishReason.LENGTH, FinishReason.EOS, FinishReason.STOP}


class Load(Protocol):
    """What is going on now."""

    @property
    def num_running(self) -> int:
        """Requests in the steps."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests that are not yet."""
        ...

    @property
    def kv_used_share(self) -> float:
        """Share of the KV cache's blocks that are held."""
        ...


@dataclass(slots=True)
class _Running:
    """A request that has not finished: when it came, and when it was last given tokens."""

    request: Request
    submitted_s: float
    last_s: float | None = None


class ServerMetrics(Observer, Collector):
    """Counts requests, steps and latencies, and tells them in a registry of its own.

    Args:
        model_name: As clients know it.
        measure: Gives the target's cost curve, for the speed-up; the one on disk, or measured.
        clock: Seconds, those of the moments that the observer is told.

    Attributes:
        registry: What the text formats are made from.
        meter: Counts of the steps.
    """

    def __init__(
        self,
        model_name: str = "",
        *,
        measure: Callable[[LanguageModel], CostCurve] = load_or_measure,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._info = {"version": __version__, "model": model_name}
        self._measure = measure
        self._clock = clock
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._drafters: tuple[str, ...] = ()
        self._load: Load | None = None
        self._outcomes: Counter[str] = Counter()
        self._rejections: Counter[str] = Counter()
        self._sums: Counter[str] = Counter()
        self._first_token, self._between = Distribution(SECONDS), Distribution(SECONDS)
        self._whole, self._queued = Distribution(SECONDS), Distribution(SECONDS)
        self.meter = Meter(clock=clock)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    # -- what the server tells ---------------------------------------------------------------

    def watch(self, engine: Engine) -> None:
        """Have every step counted; with drafters, know first what plain decoding costs."""
        parts = engine.parts
        self._drafters = tuple(engine.drafters)
        self._info |= {
            "exactness": engine.exactness.value,
            "dtype": str(parts.target.info.dtype).removeprefix("torch."),
            "device": parts.target.info.device.type,
        }
        # Loop by loop there are no steps of plain decoding to compare with.
        is_pipelined = any(it.needs.in_flight for it in engine.drafters.values())
        if engine.drafters and not is_pipelined:
            self.meter.pace = PlainPace(self._measure(parts.target))
        planner = MeteringPlanner(parts.planner, self.meter)
        engine.parts = dataclasses.replace(parts, planner=planner)

    def follow(self, load: Load) -> None:
        """Tell how busy the server is when it is asked."""
        self._load = load

    @property
    def load(self) -> Load | None:
        """Who knows how busy the server is."""
        return self._load

    def submitted(self, request: Request) -> None:
        """Begin to measure a request's latencies."""
        with self._lock:
            self._running[request.request_id] = _Running(request, self._clock())

    def rejected(self, reason: str) -> None:
        """Count it."""
        with self._lock:
            self._rejections[reason] += 1

    def emitted(self, request_id: str, num_tokens: int, at_s: float) -> None:
        """Share the time since the last tokens among the new ones.

        The first step's tokens come together, so they have a time to the first token alone.
        """
        with self._lock:
            running = self._running.get(request_id)
            if running is None or not num_tokens:
                return
            if running.last_s is None:
                self._first_token.add(at_s - running.submitted_s)
                stats = running.request.stats
                self._sums["prompt"] += running.request.num_prompt_ids
                self._sums["cached"] += stats.num_cached_prompt_tokens
            else:
                self._between.add((at_s - running.last_s) / num_tokens, num_tokens)
            running.last_s = at_s

    def finished(self, request: Request, outcome: str, waited_s: float) -> None:
        """Count how it ended; only whole outputs have a latency."""
        with self._lock:
            self._outcomes[outcome] += 1
            self._sums["preemptions"] += request.stats.num_preemptions
            self._queued.add(waited_s)
            running = self._running.pop(request.request_id, None)
            if running is not None and request.finish_reason in _COMPLETE:
                self._whole.add(self._clock() - running.submitted_s)

    # -- what operators are told -------------------------------------------------------------

    def encode(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics and their content type: Prometheus' text, or OpenMetrics if asked."""
        encoder, content_type = choose_encoder(accept)
        if content_type.startswith(OPENMETRICS):
            # Colons are allowed in names, but the default escaping replaces those of samples.
            encoder = partial(openmetrics.generate_latest, escaping=ALLOWUTF8)
        return encoder(self.registry), content_type

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        totals = self.meter.totals()
        yield InfoMetricFamily(f"{PREFIX}server", "What is served, and by what", self._info)
        yield from self._request_families()
        yield from self._speculation_families(totals)
        yield from self._step_families(totals)
        yield from self._speedup_families(totals)

    def _request_families(self) -> Iterator[Metric]:
        with self._lock:
            sums, outcomes = self._sums.copy(), self._outcomes.copy()
            rejections = self._rejections.copy()
            histograms = [
                self._first_token.family(
                    "time_to_first_token_seconds",
                    "From accepting a request to its first tokens",
                    "seconds",
                ),
                self._between.family(
                    "inter_token_latency_seconds",
                    "Between tokens after the first step's; a step's time is shared by its tokens",
                    "seconds",
                ),
                self._whole.family(
                    "e2e_request_latency_seconds",
                    "From accepting a request to its last token, whole outputs only",
                    "seconds",
                ),
                self._queued.family(
                    "request_queue_time_seconds",
                    "From accepting a request to its first scheduling",
                    "seconds",
                ),
            ]
        yield from histograms
        yield counter(
            "finished_requests",
            "Requests that ended, by how",
            outcomes,
            ["outcome"],
            unit="requests",
        )
        yield counter(
            "rejected_requests", "Requests turned away", rejections, ["reason"], unit="requests"
        )
        yield counter("prompt_tokens", "Tokens of prompts", sums["prompt"], unit="tokens")
        yield counter(
            "prefix_cache_queries", "Prompt tokens looked for in the prefix cache", sums["prompt"]
        )
        yield counter(
            "prefix_cache_hits", "Prompt tokens found in the prefix cache", sums["cached"]
        )
        yield counter(
            "num_preemptions",
            "Times a request lost its KV and went back to the queue",
            sums["preemptions"],
            unit="preemptions",
        )
        if self._load is not None:
            yield gauge("num_requests_running", "Requests in the steps", self._load.num_running)
            yield gauge("num_requests_waiting", "Requests that wait to run", self._load.num_waiting)
            yield gauge(
                "kv_cache_usage_perc",
                "Share of the KV cache's blocks in use, 0 to 1",
                self._load.kv_used_share,
            )

    def _speculation_families(self, totals: Totals) -> Iterator[Metric]:
        start = dict.fromkeys(self._drafters, 0)  # so that rates begin at the first draft
        yield counter(
            "spec_decode_num_drafts",
            "Drafts that were scored, by the drafters that had a part in them",
            start | totals.drafts,
            ["drafter"],
            unit="drafts",
        )
        yield counter(
            "spec_decode_num_draft_tokens",
            "Draft tokens that were scored",
            start | totals.draft_tokens,
            ["drafter"],
            unit="tokens",
        )
        yield counter(
            "spec_decode_num_accepted_tokens",
            "Draft tokens that were emitted",
            start | totals.accepted_by_source,
            ["drafter"],
            unit="tokens",
        )
        yield counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens that were emitted, by position in the draft from 0",
            {(str(position), name): count for (position, name), count in totals.accepted.items()},
            ["position", "drafter"],
        )
        yield counter(
            "spec_decode_num_judged_per_pos",
            "Drafts of which this position was judged: all before it was right",
            {str(depth - 1): count for depth, count in totals.judged.items()},
            ["position"],
        )

    def _step_families(self, totals: Totals) -> Iterator[Metric]:
        yield counter(
            "generation_tokens", "Tokens that were emitted", totals.num_tokens, unit="tokens"
        )
        sizes = Distribution(TOKENS)
        for size, count in totals.tokens_per_step.items():
            sizes.add(size, count)
        yield sizes.family("request_step_tokens", "Tokens that a step gave a request", "tokens")
        yield counter("num_steps", "Steps by kind", totals.steps, ["kind"], unit="steps")
        yield counter("num_rows", "Rows of the target's passes", totals.rows, ["kind"], unit="rows")
        yield counter(
            "step_phase_seconds",
            "Time of the steps by phase: draft, pass or other",
            totals.phase_s,
            ["phase", "drafter"],
            unit="seconds",
        )

    def _speedup_families(self, totals: Totals) -> Iterator[Metric]:
        yield counter("step_seconds", "Time of the steps", totals.step_s, ["kind"], unit="seconds")
        if self.meter.pace is None:
            return
        yield counter(
            "plain_step_seconds",
            "Estimated time of plain decoding for the same tokens",
            totals.plain_s,
            ["kind"],
            unit="seconds",
        )
        speedup = self.meter.recent()[0].speedup
        if speedup is not None:
            yield gauge(
                "speedup_ratio",
                "Estimated time of plain decoding by the time taken, last ten seconds",
                speedup,
                unit="ratio",
            )


__all__ = ["Load", "ServerMetrics"]
