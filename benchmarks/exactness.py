"""Random cases of trees, batches, prompt chunks and shared prefixes, compared bit for bit.

    python benchmarks/exactness.py [--cases N] [--output FILE]

Every case is a random history of one to three requests of a small random model; the logits of every
row that was scored have to equal plain decoding's, one token at a time, in every bit. Four of five
cases run compiled decoders, the rest the other architectures through transformers' modules.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import record
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from foretoken.core.verdict import Exactness
from foretoken.models.adapter import LanguageModel
from foretoken.models.decoder_config import MODEL_TYPES
from foretoken.models.loading import load_model
from foretoken.models.modules import adapt_module
from tests.bits import Histories
from tests.fakes import FAMILIES, build_module, tiny_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMPILED_SHARE = 0.8


def models(folder: Path) -> list[tuple[str, bool, LanguageModel]]:
    """Return name, whether it is compiled, and model, for every family and dtype."""
    found = []
    for name, dtype in DTYPES.items():
        for family in MODEL_TYPES:
            path = folder / family
            if not path.exists():
                module = build_module(
                    tiny_config(family), attn_implementation="eager", dtype=torch.float32
                )
                module.save_pretrained(path)
            found.append((f"{family} {name}", True, load_model(str(path), dtype=name)))
        for family in FAMILIES:
            module = build_module(tiny_config(family), dtype=dtype)
            found.append((f"{family} {name}, modules", False, adapt_module(module, name=family)))
    return found


def main() -> None:
    """Run the cases and print or write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    counts: dict[str, dict[str, int | str]] = {}
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        loaded = models(Path(folder))
    for is_compiled in (True, False):
        group = [(name, model) for name, kind, model in loaded if kind == is_compiled]
        share = COMPILED_SHARE if is_compiled else 1 - COMPILED_SHARE
        num_cases = -(-round(args.cases * share) // len(group))
        for name, model in group:
            num_rows = 0
            for case in range(num_cases):
                histories = Histories(model, seed=args.seed + case)
                num_rows += histories.check_random_history(1 + case % 3, num_steps=3)
            exactness = model.info.exactness
            counts[name] = {"cases": num_cases, "rows": num_rows, "exactness": exactness.value}
            print(f"{name}: {num_cases} cases, {num_rows} rows equal", flush=True)
            if exactness is not Exactness.BITWISE:
                sys.exit(f"{name} reports {exactness.value}")
    record.write(
        "random cases whose every row has the bits of plain decoding",
        {
            "cases": sum(int(count["cases"]) for count in counts.values()),
            "rows": sum(int(count["rows"]) for count in counts.values()),
            "seconds": round(time.perf_counter() - start_s, 1),
            "models": counts,
        },
        args.output,
    )


if __name__ == "__main__":
    main()
