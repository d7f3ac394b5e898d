"""Peak resident memory of loading and generating, against weights and KV cache.

    python benchmarks/memory.py [--model DIR [--inflate SHAPE]] [--dtype D] [--output FILE]

Every case is a process of its own: a bare one that has only imported torch and numba, and the
model on the compiled path and through transformers' modules. Peaks are the system's own count for
the process since its last reset (VmHWM; unlike getrusage's it begins anew with the program), and
what has no file behind it is sampled meanwhile: mapped checkpoints are in the first and not in the
second. A goal is a peak of at most 1.15 times weights and KV cache above the bare process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numba
import torch

PATHS = ("compiled", "modules")
SAMPLE_S = 0.002
MIB = 1 << 20
PROMPT_IDS = 512
NUM_NEW = 64
MAX_NODES = 8


class Watch:
    """Peaks of this process's memory while it lasts, in bytes."""

    def __init__(self) -> None:
        self.resident = self.anonymous = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Watch:
        from foretoken.bench.memory import reset_peak_memory

        reset_peak_memory()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        from foretoken.bench.memory import memory

        self._done.set()
        self._thread.join()
        self.resident = memory()["peak_resident_bytes"]

    def _sample(self) -> None:
        from foretoken.bench.memory import memory

        while not self._done.wait(SAMPLE_S):
            self.anonymous = max(self.anonymous, memory()["anonymous_bytes"])


def measure(path: str, model: str, dtype: str, threads: int) -> dict[str, Any]:
    """Load a model and generate with it in this process; return sizes and peaks in bytes."""
    torch.set_num_threads(threads)
    with Watch() as bare:
        numba.njit(lambda x: x + 1)(1)  # compiling is part of what importing numba is for
        threading.Event().wait(10 * SAMPLE_S)
    if path == "bare":
        return {"bare": _peaks(bare)}
    from foretoken import LLM, SamplingParams
    from foretoken.models import loading

    if path == "modules":
        # A configuration that no compiled path takes.
        loading.read_plain_config = lambda _: None  # type: ignore[assignment]
        loading.is_plain_decoder = lambda _: False  # type: ignore[assignment]
        import foretoken.models.modules  # noqa: F401 - transformers' imports count as bare
    with Watch() as imported:
        threading.Event().wait(10 * SAMPLE_S)
    with Watch() as load:
        llm = LLM(model, drafters="prompt-lookup", max_nodes=MAX_NODES, max_requests=1, dtype=dtype)
    info = llm.engine.parts.target.info
    num_prompt = min(PROMPT_IDS, info.context_limit - NUM_NEW - 1)
    params = SamplingParams(temperature=0, max_new_tokens=NUM_NEW, ignore_eos=True)
    prompt_ids = [3 + index % 97 for index in range(num_prompt)]
    with Watch() as generate:
        request = llm.engine.add_request(prompt_ids, params)
        while request.finish_reason is None:
            llm.engine.step()
    return {
        "parameters": info.num_parameters,
        "dtype": str(info.dtype).removeprefix("torch."),
        "weights_bytes": info.num_parameters * info.dtype.itemsize,
        "kv_bytes": (num_prompt + NUM_NEW + MAX_NODES) * info.kv_bytes_per_token,
        "imported": _peaks(imported),
        "loading": _peaks(load),
        "generating": _peaks(generate),
    }


def _peaks(watch: Watch) -> dict[str, int]:
    return {"resident_bytes": watch.resident, "anonymous_bytes": watch.anonymous}


def run_case(path: str, args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Measure in a new process."""
    words = [sys.executable, __file__, "--case", path, "--model", model, "--dtype", args.dtype]
    words += ["--threads", str(args.threads)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summarize(case: dict[str, Any], bare_bytes: int) -> dict[str, Any]:
    """Return a case in MiB, and its peaks above the bare process over weights and KV cache."""
    needed = case["weights_bytes"] + case["kv_bytes"]
    phases = ("imported", "loading", "generating")
    found: dict[str, Any] = {
        "parameters": case["parameters"],
        "dtype": case["dtype"],
        "weights_mib": round(case["weights_bytes"] / MIB, 1),
        "kv_mib": round(case["kv_bytes"] / MIB, 1),
    }
    for phase in phases:
        peaks = case[phase]
        found[f"{phase}_mib"] = {
            name.removesuffix("_bytes"): round(value / MIB, 1) for name, value in peaks.items()
        }
    for phase in phases[1:]:
        above = case[phase]["resident_bytes"] - bare_bytes
        above_imports = case[phase]["resident_bytes"] - case["imported"]["resident_bytes"]
        found[f"{phase}_over_needed"] = {
            "above_bare": round(above / needed, 3),
            "above_imports": round(above_imports / needed, 3),
        }
    return found


def main() -> None:
    """Run the benchmark and print or write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="stories")
    parser.add_argument("--inflate", help="such as hidden=1536,layers=20,head_dim=64")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=("bare", *PATHS), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.model, args.dtype, args.threads)))
        return
    import record

    from foretoken.assets import EMBEDDED
    from foretoken.bench.inflate import Shape, cache_folder, inflate

    model = str(EMBEDDED[args.model].target) if args.model in EMBEDDED else args.model
    if args.inflate:
        dtype = "bfloat16" if args.dtype == "auto" else args.dtype
        shape, folder = Shape.parse(args.inflate), cache_folder() / "inflated"
        model = str(inflate(Path(model), shape, dtype=dtype, folder=folder))
    for path in PATHS:  # compiles what is not yet kept on disk, which takes memory of its own
        run_case(path, args, model)
    bare = run_case("bare", args, model)["bare"]
    cases = {path: run_case(path, args, model) for path in PATHS}
    result = {
        "model": args.model if args.model in EMBEDDED else Path(model).name,
        "prompt_tokens": PROMPT_IDS,
        "new_tokens": NUM_NEW,
        "bare_mib": {
            name.removesuffix("_bytes"): round(value / MIB, 1) for name, value in bare.items()
        },
        **{path: summarize(case, bare["resident_bytes"]) for path, case in cases.items()},
    }
    record.write("peak memory in MiB, and over weights and KV cache", result, args.output)


if __name__ == "__main__":
    main()
