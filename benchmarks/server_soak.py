"""Hours of random load on `foretoken serve`: does it leak, and does it still say the same?

    python benchmarks/server_soak.py [--minutes M] [--load CORES] [--output FILE] [--picture FILE]

The server is a process of its own. It gets calls of all kinds at random: streams and whole
answers, several choices, stop texts, grammars, log-probabilities, predictions, clients that leave,
bad calls, bursts above what its queue holds, pauses. Its KV cache is small, so that requests are
thrown back and come again; it fills up once and stays full, because blocks are kept for their
prefix.

All along, and once more at the end, a fixed set of calls has to get the answers that it got at the
beginning, down to the log-probabilities. Then the server is told to stop while streams run; they
finish, and the process looks at what its engine still holds before it ends. Memory is flat if its
trend after the warm-up (Theil and Sen's: the median of the slopes between all pairs of samples)
adds up to less than a bound. So that this is about what the server keeps, and not about gaps
between it, glibc gives large pieces back at once and has two arenas; with its own habits
(--own-malloc) resident memory creeps up for as long as the largest calls keep meeting in new ways.

The exit code is 1 if anything is not as it should be; the record, written each minute, says what.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import record
from soak_traffic import (
    CHAT_TEMPLATE,
    Call,
    Result,
    bad_call,
    body_of,
    fixed_calls,
    good_call,
    send,
)

from foretoken.assets import EMBEDDED

# Room for the longest call, and for four long ones not at once.
SERVE = ["--threads", "1", "--max-requests", "4", "--max-queue", "8", "--kv-cache-tokens", "640"]
# The drafters of `auto`; `suffix` keeps few outputs, so that its store is full after a minute. By
# default it grows to 40 MB in some hours, as it should, and would hide a leak as large.
DRAFT = EMBEDDED["stories"].draft
SERVE += ["--drafter", f"draft-model:path={DRAFT}"]
SERVE += ["--drafter", "suffix:max_tokens=8192", "--adaptive"]
MALLOC = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
START_S = 120.0
DRAIN_S = 30.0
SETTLE_S = 10.0  # connections close when both sides have noticed
CHECKPOINT_S = 60.0
WARM_UP_SHARE = 0.2  # caches, pools and arenas fill up ...
WARM_UP_S = 60.0  # ... which takes so long at least, or half of a run that is shorter
NUM_BURST = 40
MAX_KEPT = 20  # unexpected results whose text is kept
MIB = 1 << 20


# -- the server's process ------------------------------------------------------------------------


def serve(arguments: Sequence[str]) -> int:
    """Run `foretoken serve`, and print what its engine holds when the last request has gone."""
    import foretoken.server.app
    from foretoken.cli.main import run

    run_server = foretoken.server.app.run_server

    def run_and_look(llm: Any, *rest: Any, **callbacks: Any) -> bool:
        has_drained = run_server(llm, *rest, **callbacks)
        print(json.dumps(holdings(llm.engine)), flush=True)
        return has_drained

    foretoken.server.app.run_server = run_and_look
    return run(["serve", *arguments])


def holdings(engine: Any) -> dict[str, Any]:
    """Return what an engine without requests still holds: zeros, and no damage."""
    damage = ""
    caches = [engine.cache]
    caches += [drafter._cache for drafter in engine.drafters.values() if hasattr(drafter, "_cache")]
    try:
        for cache in caches:
            cache.check_integrity()
    except RuntimeError as error:
        damage = str(error)
    return {
        "damage": damage,
        "requests": engine.num_unfinished,
        "sequences": sum(cache.num_sequences for cache in caches),
        "blocks": sum(cache.num_blocks - cache.num_free_blocks for cache in caches),
        # Drafters keep a dictionary by request.
        "drafter_entries": sum(
            len(value)
            for drafter in engine.drafters.values()
            for value in vars(drafter).values()
            if isinstance(value, dict)
        ),
    }


class ServerProcess:
    """The server, as its parent sees it.

    Args:
        folder: For what it reads.
        malloc: Variables of the C library.
    """

    def __init__(self, folder: Path, malloc: Mapping[str, str]) -> None:
        template = folder / "chat.jinja"
        template.write_text(CHAT_TEMPLATE, encoding="utf-8")
        own = ["--port", "0", "--log-format", "json", "--chat-template", str(template)]
        self._popen = subprocess.Popen(
            [sys.executable, __file__, "--serve", *SERVE, *own],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **malloc},
        )
        self.pid = self._popen.pid
        self.base_url = ""
        self.complaints: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> None:
        """Wait until it takes requests."""
        end_s = time.monotonic() + START_S
        while not self.base_url or httpx.get(f"{self.base_url}/ready").status_code != 200:
            if self._popen.poll() is not None or time.monotonic() > end_s:
                raise SystemExit(f"the server did not start: {self.complaints}")
            time.sleep(0.05)

    def begin_to_stop(self) -> None:
        """Tell it to finish what runs and to end."""
        self._popen.send_signal(signal.SIGTERM)

    def end(self) -> dict[str, Any]:
        """Return its exit code and what it held at its end."""
        assert self._popen.stdout is not None
        try:
            self._popen.wait(DRAIN_S + START_S)
        except subprocess.TimeoutExpired:
            return {"exit_code": None}
        self._reader.join(SETTLE_S)
        output = self._popen.stdout.read()
        held = json.loads(output.splitlines()[-1]) if output.strip() else None
        return {"exit_code": self._popen.returncode, "held": held}

    def kill(self) -> None:
        """End it in any case."""
        self._popen.kill()
        self._popen.wait()

    def _read_log(self) -> None:
        assert self._popen.stderr is not None
        for line in self._popen.stderr:
            try:
                entry = json.loads(line)
            except ValueError:  # a warning of the interpreter, a traceback
                entry = {"level": "error", "event": line.rstrip()}
            said = str(entry.get("event"))
            if not self.base_url and " on http://" in said:
                self.base_url = "http://" + said.partition(" on http://")[2].split()[0]
            if entry.get("level") not in ("debug", "info") and len(self.complaints) < MAX_KEPT:
                self.complaints.append(line.rstrip()[:500])


class Watch:
    """Samples of a process.

    Args:
        pid: The process's.
    """

    def __init__(self, pid: int) -> None:
        self._process = Path(f"/proc/{pid}")
        self._start_s = time.monotonic()
        self.samples: list[dict[str, float]] = []

    def take(self) -> dict[str, float]:
        """Take a sample, keep it and return it."""
        status = (self._process / "status").read_text(encoding="utf-8")
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        sample = {
            "s": round(time.monotonic() - self._start_s, 2),
            "rss_mib": int(fields["VmRSS"].split()[0]) / 1024,
            "files": sum(1 for _ in (self._process / "fd").iterdir()),
            "threads": int(fields["Threads"]),
        }
        self.samples.append(sample)
        return sample

    def cpu_s(self) -> float:
        """Return the processor time that the process has taken."""
        words = (self._process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


# -- the load ------------------------------------------------------------------------------------


class Soak:
    """Random load, and what came of it.

    Args:
        watch: The server's.
        args: The command line's.

    Attributes:
        client: Of the server.
    """

    def __init__(self, watch: Watch, args: argparse.Namespace) -> None:
        self.client: httpx.AsyncClient
        self.outcomes: Counter[str] = Counter()
        self.unexpected: list[dict[str, str]] = []
        self.num_unexpected = self.num_tokens = self.num_compared = self.num_different = 0
        self._watch, self._args = watch, args
        self._rng = random.Random(args.seed)
        self._fixed = fixed_calls()
        self._expected: list[Any] = []

    async def learn(self) -> None:
        """Get the answers that the fixed calls have to get from now on."""
        for call in self._fixed:
            self._expected.append((await self._send(call)).choices)
        if None in self._expected:
            raise SystemExit(f"the server does not answer: {self.unexpected}")

    async def compare(self, index: int) -> None:
        """Make a fixed call again."""
        result = await self._send(self._fixed[index])
        if result.outcome == "200":
            self.num_compared += 1
            self.num_different += result.choices != self._expected[index]

    async def compare_all(self) -> None:
        """Make all fixed calls again, one after the other, so that none is refused."""
        for index in range(len(self._fixed)):
            await self.compare(index)

    async def run(self) -> None:
        """Make waves of calls until the time is over."""
        end_s = time.monotonic() + 60 * self._args.minutes
        start = time.monotonic(), self._cpu_s()
        while time.monotonic() < end_s:
            await self._wave()
            while time.monotonic() < end_s and self._is_above_load(*start):
                await asyncio.sleep(0.2)

    async def stop_amid_streams(self, server: ServerProcess) -> int:
        """Stop the server while it streams; return how many of the streams came to their end."""
        body = body_of("text", "Once upon a time", max_tokens=300, ignore_eos=True, stream=True)
        call = Call("at the end", "/v1/completions", json.dumps(body).encode(), frozenset({200}))
        sending = [asyncio.create_task(self._send(call)) for _ in range(4)]
        await asyncio.sleep(0.3)
        server.begin_to_stop()
        results = await asyncio.gather(*sending)
        return sum(result.outcome == "200" and result.is_expected for result in results)

    async def _wave(self) -> None:
        rng = self._rng
        shape = rng.choices(("few", "many", "burst", "bad", "pause"), (8, 4, 1, 2, 2))[0]
        if shape == "pause":
            await asyncio.sleep(rng.random() * 3)
        elif shape == "bad":
            await asyncio.gather(*(self._send(bad_call(rng)) for _ in range(rng.randint(1, 6))))
        elif shape == "burst":
            await asyncio.gather(
                *(self._send(good_call(rng, is_short=True)) for _ in range(NUM_BURST))
            )
        else:
            num_calls = rng.randint(1, 4) if shape == "few" else rng.randint(5, 9)
            index = rng.randrange(len(self._fixed))
            calls = [self._later(good_call(rng)) for _ in range(num_calls)]
            await asyncio.gather(*calls, self.compare(index))
            await self.client.get(rng.choice(("/metrics", "/stats", "/health", "/")))

    async def _later(self, call: Call) -> None:
        await asyncio.sleep(self._rng.random() * 0.2)
        await self._send(call)

    async def _send(self, call: Call) -> Result:
        result = await send(self.client, call)
        self.outcomes[f"{call.kind}: {result.outcome}"] += 1
        self.num_tokens += result.num_tokens
        if not result.is_expected:
            self.num_unexpected += 1
            if len(self.unexpected) < MAX_KEPT:
                body = call.content[:600].decode()
                found = {"outcome": result.outcome, "text": result.text, "body": body}
                self.unexpected.append(found)
        return result

    def _is_above_load(self, start_s: float, start_cpu_s: float) -> bool:
        load = (self._cpu_s() - start_cpu_s) / (time.monotonic() - start_s)
        return bool(self._args.load) and load > self._args.load

    def _cpu_s(self) -> float:
        return self._watch.cpu_s() + time.process_time()


async def soak(args: argparse.Namespace, server: ServerProcess) -> dict[str, Any]:
    """Load a server, stop it and return the record."""
    watch = Watch(server.pid)
    first = watch.take()
    run = Soak(watch, args)
    async with client_of(server) as run.client:
        await run.learn()
        recording = asyncio.create_task(record_all_along(run, watch, args, server))
        await run.run()
        recording.cancel()
        await run.compare_all()
        metrics = (await run.client.get("/metrics")).text
    end_s = time.monotonic() + SETTLE_S
    while (last := watch.take())["files"] > first["files"] and time.monotonic() < end_s:
        await asyncio.sleep(0.2)
    async with client_of(server) as run.client:
        num_ended = await run.stop_amid_streams(server)
    at_end = {
        "files_before_and_after": [first["files"], last["files"]],
        "streams_ended_of_4": num_ended,
        "preemptions": _counter(metrics, "foretoken:num_preemptions"),
        "prefix_hits": _counter(metrics, "foretoken:prefix_cache_hits"),
        **await asyncio.to_thread(server.end),
    }
    return {**result_of(run, watch, args, server), "end": at_end}


def client_of(server: ServerProcess) -> httpx.AsyncClient:
    """Return a client that makes as many calls at once as it is asked to."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    return httpx.AsyncClient(base_url=server.base_url, timeout=120, limits=limits)


async def record_all_along(
    run: Soak, watch: Watch, args: argparse.Namespace, server: ServerProcess
) -> None:
    """Sample the server's process, and write the record each minute."""
    written_s = time.monotonic()
    while True:
        await asyncio.sleep(args.interval)
        watch.take()
        if args.output and time.monotonic() - written_s >= CHECKPOINT_S:
            written_s = time.monotonic()
            so_far = {"is_complete": False, **result_of(run, watch, args, server)}
            await asyncio.to_thread(save, so_far, args.output)


# -- the record ----------------------------------------------------------------------------------


def result_of(
    run: Soak, watch: Watch, args: argparse.Namespace, server: ServerProcess
) -> dict[str, Any]:
    """Return the numbers so far."""
    return {
        "minutes": args.minutes,
        "load_limit_cores": args.load,
        "server": [word.replace(str(DRAFT), DRAFT.name) for word in SERVE],
        "seed": args.seed,
        "malloc": "its own" if args.own_malloc else MALLOC,
        "num_calls": sum(run.outcomes.values()),
        "num_tokens": run.num_tokens,
        "outcomes": dict(sorted(run.outcomes.items())),
        "num_unexpected": run.num_unexpected,
        "unexpected": run.unexpected,
        "complaints": server.complaints,
        "num_compared": run.num_compared,
        "num_different": run.num_different,
        "memory": memory_trend(watch.samples, args.growth_limit),
        "samples": watch.samples,
    }


def memory_trend(samples: Sequence[dict[str, float]], limit_mib: float) -> dict[str, Any]:
    """Return how memory moved after the warm-up, by the median of the slopes of all pairs."""
    last_s = samples[-1]["s"]
    begin_s = max(WARM_UP_SHARE * last_s, min(WARM_UP_S, last_s / 2))
    late = [sample for sample in samples if sample["s"] >= begin_s]
    seconds = np.array([sample["s"] for sample in late])
    sizes = np.array([sample["rss_mib"] for sample in late])
    earlier, later = np.triu_indices(len(late), 1)
    apart_s = seconds[later] - seconds[earlier]
    slopes = (sizes[later] - sizes[earlier])[apart_s > 0] / apart_s[apart_s > 0]
    slope = float(np.median(slopes)) if len(slopes) else 0.0
    lasted_s = float(seconds[-1] - seconds[0])
    return {
        "warm_up_s": round(begin_s, 1),
        "after_s": round(lasted_s, 1),
        "median_mib": round(statistics.median(sizes.tolist()), 2),
        "offset_mib": round(float(np.median(sizes - slope * seconds)), 2),
        "slope_mib_per_hour": round(3600 * slope, 3),
        "growth_mib": round(slope * lasted_s, 3),
        "growth_limit_mib": limit_mib,
    }


def failures_of(result: dict[str, Any]) -> list[str]:
    """Return what is not as it should be."""
    end, memory = result["end"], result["memory"]
    before, after = end["files_before_and_after"]
    half = len(result["samples"]) // 2
    threads = [int(sample["threads"]) for sample in result["samples"]]
    held = end.get("held")
    checks = {
        "calls ended otherwise than they should": result["num_unexpected"] == 0,
        "no call was answered": result["num_tokens"] > 0,
        "fixed calls got other answers": result["num_different"] == 0,
        "fixed calls were not compared": result["num_compared"] > 0,
        "the server complained": not result["complaints"],
        "memory grew": memory["growth_mib"] <= memory["growth_limit_mib"],
        "files stayed open": after <= before,
        "threads became more": max(threads[half:]) <= max(*threads[:half], threads[0] + 16),
        "streams were cut at the end": end["streams_ended_of_4"] == 4,
        "the exit code is not 0": end["exit_code"] == 0,
        "the engine still held something": held is not None and not any(held.values()),
    }
    return [name for name, is_well in checks.items() if not is_well]


def save(result: dict[str, Any], output: Path) -> None:
    """Write a record so that a reader never sees half of one."""
    unfinished = output.with_suffix(".part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(output)


def draw(result: dict[str, Any], picture: Path) -> None:
    """Draw memory against time, with its trend."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    samples, memory = result["samples"], result["memory"]
    minutes = [sample["s"] / 60 for sample in samples]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    axes.plot(minutes, [sample["rss_mib"] for sample in samples], linewidth=0.9, label="resident")
    ends = [memory["warm_up_s"] / 60, minutes[-1]]
    slope = memory["slope_mib_per_hour"] / 60
    axes.plot(
        ends,
        [memory["offset_mib"] + slope * minute for minute in ends],
        label=f"trend after the warm-up: {memory['slope_mib_per_hour']:+.2f} MiB per hour",
    )
    axes.axvspan(0, ends[0], alpha=0.12, color="gray", label="warm-up")
    axes.set(xlabel="minutes", ylabel="MiB", ylim=(0, None))
    axes.set_title(
        f"foretoken serve under random load: {result['num_calls']} calls, "
        f"{result['num_tokens']} tokens",
        fontsize=11,
    )
    axes.legend(loc="lower right")
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def _counter(metrics: str, name: str) -> float:
    """Return the sum of a counter over its labels."""
    lines = [line for line in metrics.splitlines() if line.startswith((f"{name}_total", name))]
    return sum(float(line.split()[-1]) for line in lines if "_created" not in line)


def main() -> int:
    """Run the soak, print and write its record; return the exit code."""
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument(
        "--load", type=float, default=0.0, help="cores that server and clients take; 0: no limit"
    )
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between samples")
    parser.add_argument(
        "--growth-limit", type=float, default=8.0, help="MiB that memory may grow in all"
    )
    parser.add_argument(
        "--own-malloc", action="store_true", help="leave glibc its own habits, as most servers do"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(Path(folder), {} if args.own_malloc else MALLOC)
        try:
            server.wait_until_ready()
            result = asyncio.run(soak(args, server))
        finally:
            server.kill()
    failures = failures_of(result)
    if args.picture:
        draw(result, args.picture)
    brief = {key: value for key, value in result.items() if key != "samples"}
    what = "random load on foretoken serve, embedded pair"
    record.write(what, {**brief, "failures": failures}, None)
    if args.output:
        environment = record.environment()
        save(
            {"is_complete": True, "environment": environment, "failures": failures, **result},
            args.output,
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
