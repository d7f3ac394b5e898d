"""One load: rounds in which both servers get the same requests, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from foretoken.bench.serve.client import Ask, LoadClient, Reply
from foretoken.bench.serve.process import ServerProcess
from foretoken.bench.serve.settings import DRAFTS, PLAIN, ServeSettings
from foretoken.bench.statistics import ratio_interval, rounded, spread
from foretoken.errors import ForetokenError

LATENCY_BOUND = 0.7  # of plain decoding's mean latency, below saturation
GOODPUT_BOUND = 1.0  # of plain decoding's goodput, everywhere
MAX_SHOWN_ERRORS = 3


class Served(NamedTuple):
    """A server and who asks it."""

    server: ServerProcess
    client: LoadClient


class Level(NamedTuple):
    """A load and its requests.

    Args:
        load: The rate of requests as a part of what plain decoding can do.
        requests_per_s: That rate.
        duration_s: Of a round.
        rounds: The requests of each.
    """

    load: float
    requests_per_s: float
    duration_s: float
    rounds: Sequence[Sequence[Ask]]


@dataclass(slots=True)
class Turn:
    """What a server did with the requests of a round.

    Args:
        replies: Of all requests.
        seconds: From the first arrival to the end of the round or of the last answer.
        server_cpu_s: Of the server's process; None where the system does not tell.
        client_cpu_s: Of this process.
        speed_up: What the server itself says that drafts gain; None if it does not know.
    """

    replies: list[Reply]
    seconds: float
    server_cpu_s: float | None
    client_cpu_s: float
    speed_up: float | None

    @property
    def complete(self) -> list[Reply]:
        """Those that were answered."""
        return [reply for reply in self.replies if reply.is_complete]

    @property
    def mean_latency_s(self) -> float:
        """Seconds from when a request was due to its last token."""
        return float(np.mean([reply.last_s for reply in self.complete] or [np.nan]))

    @property
    def goodput(self) -> float:
        """Output tokens of answered requests per second."""
        return sum(reply.num_tokens for reply in self.complete) / self.seconds


def take_turn(served: Served, ask: Callable[[], list[Reply]], at_least_s: float) -> Turn:
    """Return what becomes of some requests, and what that took.

    Args:
        served: Who is asked.
        ask: Asks, and returns when all have ended.
        at_least_s: Length of the round.
    """
    server_s, client_s = served.server.cpu_s(), time.process_time()
    start_s = time.perf_counter()
    replies = ask()
    seconds = time.perf_counter() - start_s
    now_s = served.server.cpu_s()
    return Turn(
        replies=replies,
        seconds=max(at_least_s, seconds),
        server_cpu_s=None if now_s is None or server_s is None else now_s - server_s,
        client_cpu_s=time.process_time() - client_s,
        speed_up=served.server.get("/stats").get("speedup"),
    )


def measure_level(
    systems: Mapping[str, Served], level: Level, say: Callable[[str, str], None]
) -> list[dict[str, Turn]]:
    """Return the turn of each server in each round.

    Args:
        systems: By name.
        level: What they are asked.
        say: Is told which round and whose turn it is.

    Raises:
        ForetokenError: A server answered nothing in a round.
    """
    turns = []
    for number, asks in enumerate(level.rounds):
        # Who comes first changes, so that a machine that gets slower harms both.
        names = list(systems)[:: -1 if number % 2 else 1]
        by_name = {}
        for name in names:
            say(f"round {number + 1} of {len(level.rounds)}", name)
            replay = partial(systems[name].client.replay, asks)
            by_name[name] = take_turn(systems[name], replay, level.duration_s)
            _check_answers(name, by_name[name])
        turns.append(by_name)
    return turns


def _check_answers(name: str, turn: Turn) -> None:
    if not turn.complete:
        errors = [reply.error for reply in turn.replies if reply.error]
        raise ForetokenError(
            f"{name} answered none of {len(turn.replies)} requests: "
            f"{errors[0] if errors else 'it had no room for them'}",
            hint="try the same options with foretoken serve",
        )


def as_entry(
    level: Level, turns: Sequence[Mapping[str, Turn]], settings: ServeSettings
) -> dict[str, Any]:
    """Return a finished load as a JSON object.

    Args:
        level: What was asked.
        turns: By name, for each round.
        settings: Of the bench.
    """
    latency = _ratio([_pair(it, "mean_latency_s") for it in turns])
    goodput = _ratio([_pair(it, "goodput") for it in turns])
    num_wanted = sum(ask.num_new_tokens for asks in level.rounds for ask in asks)
    return {
        "load": level.load,
        "requests_per_s": rounded(level.requests_per_s),
        "duration_s": rounded(level.duration_s),
        "num_requests": [len(asks) for asks in level.rounds],
        "wanted_tokens_per_s": rounded(num_wanted / level.duration_s / len(turns)),
        "num_different_texts": sum(_num_different(it) for it in turns),
        "exactness": sorted({it.exactness for turn in turns for it in turn[DRAFTS].complete}),
        "systems": {
            name: _system([it[name] for it in turns], settings) for name in (PLAIN, DRAFTS)
        },
        "latency_ratio": latency,
        "goodput_ratio": goodput,
        "goals": _goals(level.load, latency, goodput),
    }


def _goals(
    load: float, latency: Mapping[str, Any], goodput: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    low, high = goodput["interval_95"]
    goals = {
        "goodput": {
            "bound": GOODPUT_BOUND,
            "holds": goodput["median"] >= GOODPUT_BOUND,
            "is_clear": not low < GOODPUT_BOUND <= high,
        }
    }
    if load < 1:
        low, high = latency["interval_95"]
        goals["latency"] = {
            "bound": LATENCY_BOUND,
            "holds": latency["median"] <= LATENCY_BOUND,
            "is_clear": not low <= LATENCY_BOUND < high,
        }
    return goals


def _pair(turns: Mapping[str, Turn], name: str) -> tuple[float, float]:
    return getattr(turns[DRAFTS], name), getattr(turns[PLAIN], name)


def _ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return the median of rounds of a quantity with drafts over the same without."""
    ours, theirs = np.array(pairs).T
    ratios = (ours / theirs).tolist()
    interval = ratio_interval(theirs[:, None], ours[:, None])
    return {
        **spread(ratios),
        "interval_95": list(interval),
        "rounds": [rounded(value) for value in ratios],
    }


def _num_different(turns: Mapping[str, Turn]) -> int:
    """Return how many texts are not the same with drafts as without; there should be none."""
    pairs = zip(turns[DRAFTS].replies, turns[PLAIN].replies, strict=True)
    return sum(
        ours.is_complete and theirs.is_complete and ours.digest != theirs.digest
        for ours, theirs in pairs
    )


def _system(turns: Sequence[Turn], settings: ServeSettings) -> dict[str, Any]:
    replies = [reply for turn in turns for reply in turn.replies]
    complete = [reply for reply in replies if reply.is_complete]
    errors = [reply.error for reply in replies if reply.error]
    seconds = sum(turn.seconds for turn in turns)
    entry: dict[str, Any] = {
        "num_complete": len(complete),
        "num_rejected": sum(reply.is_rejected for reply in replies),
        "num_errors": len(errors),
        "goodput_tokens_per_s": {
            **spread([turn.goodput for turn in turns]),
            "rounds": [rounded(turn.goodput) for turn in turns],
        },
        "requests_per_s": rounded(len(complete) / seconds),
        "latency_ms": {
            **_distribution([reply.last_s for reply in complete]),
            "rounds": [rounded(1000 * turn.mean_latency_s) for turn in turns],
        },
        "first_token_ms": _distribution([it.first_s for it in complete]),
        "inter_token_ms": _distribution([it.inter_token_s for it in complete]),
        "late_ms": _distribution([reply.late_s for reply in replies]),
        **_counts(complete),
        "server_cores": _cores([turn.server_cpu_s for turn in turns], seconds),
        "client_cores": _cores([turn.client_cpu_s for turn in turns], seconds),
        "own_speed_up": [turn.speed_up for turn in turns],
        "seconds": [rounded(turn.seconds) for turn in turns],
    }
    if settings.has_slo:
        good = sum(_is_good(reply, settings) for reply in complete)
        entry["good_requests_per_s"] = rounded(good / seconds)
        entry["good_share"] = rounded(good / len(replies)) if replies else None
    if errors:
        entry["errors"] = list(dict.fromkeys(errors))[:MAX_SHOWN_ERRORS]
    return entry


def _distribution(seconds: Sequence[float | None]) -> dict[str, float | None]:
    """Return mean, median and the 95th percentile in milliseconds; None where there is nothing."""
    known = [1000 * value for value in seconds if value is not None]
    if not known:
        return {"mean": None, "p50": None, "p95": None}
    p50, p95 = np.percentile(known, [50, 95]).tolist()
    return {"mean": rounded(float(np.mean(known))), "p50": rounded(p50), "p95": rounded(p95)}


def _counts(replies: Sequence[Reply]) -> dict[str, float | None]:
    """Return tokens per step and acceptance, from what the server says of each request."""
    stats = [reply.stats for reply in replies if reply.stats is not None]
    totals = {
        name: sum(entry[name] for entry in stats)
        for name in ("num_steps", "num_draft_tokens", "num_accepted")
    }
    num_tokens = sum(reply.num_tokens for reply in replies if reply.stats is not None)
    steps, drafted = totals["num_steps"], totals["num_draft_tokens"]
    return {
        "tokens_per_step": rounded(num_tokens / steps) if steps else None,
        "acceptance_rate": rounded(totals["num_accepted"] / drafted) if drafted else None,
    }


def _cores(cpu_s: Sequence[float | None], seconds: float) -> float | None:
    known = [value for value in cpu_s if value is not None]
    return rounded(sum(known) / seconds) if len(known) == len(cpu_s) else None


def _is_good(reply: Reply, settings: ServeSettings) -> bool:
    """Tell whether an answer came as fast as asked for."""
    bounds = [
        (reply.first_s, settings.slo_first_token_ms),
        (reply.inter_token_s, settings.slo_inter_token_ms),
    ]
    return all(value is None or bound is None or 1000 * value <= bound for value, bound in bounds)


__all__ = [
    "GOODPUT_BOUND",
    "LATENCY_BOUND",
    "Level",
    "Served",
    "Turn",
    "as_entry",
    "measure_level",
    "take_turn",
]
