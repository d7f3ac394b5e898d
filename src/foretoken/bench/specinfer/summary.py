"""What the paper and our own design lead to expect, and whether the counts show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from foretoken.bench.specinfer import paper
from foretoken.bench.specinfer.estimates import Bootstrap, Estimate
from foretoken.bench.specinfer.settings import COUPLED, GROWN, MSS, NAIVE, Tree
from foretoken.core.draft import SiblingDraw

Entry = Mapping[str, Any]
WANTED_GAIN = 1.1  # of best-first trees over static ones of as many nodes


class Cells:
    """The cells of a record, found by what they are.

    Args:
        cells: As in the record.
        bootstrap: Draws prompts.
    """

    def __init__(self, cells: Sequence[Entry], bootstrap: Bootstrap) -> None:
        self._cells = {
            (
                cell["tree"],
                cell["verifier"],
                cell["siblings"] if cell["verifier"] == NAIVE else "",
                cell["temperature"],
                cell["width"],
            ): cell
            for cell in cells
        }
        self._bootstrap = bootstrap
        self.widths = sorted({cell["width"] for cell in cells})

    def cell(self, tree: Tree, verifier: str, temperature: float, width: int) -> Entry:
        """Return a cell; of naive sampling the one with i.i.d. draws."""
        draw = SiblingDraw.IID.value if verifier == NAIVE else ""
        return self._cells[tree.value, verifier, draw, temperature, width]

    def gain(self, ours: Entry, theirs: Entry) -> Estimate:
        """Return how many times as many tokens per step a cell has as another one."""
        return self._bootstrap.gain(
            (ours["tokens_by_prompt"], ours["steps_by_prompt"]),
            (theirs["tokens_by_prompt"], theirs["steps_by_prompt"]),
        )


def summarize(cells: Sequence[Entry], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """Return one entry per expectation: what it says, whether it holds, and the numbers.

    Args:
        cells: As in the record.
        bootstrap: Draws prompts.
    """
    found = Cells(cells, bootstrap)
    return [
        _same_tokens(cells),
        _coupled_over_mss(found, Tree.STATIC, Tree.STATIC),
        _coupled_over_mss(found, Tree.FULL, Tree.FULL),
        _coupled_over_mss(found, Tree.BEST_FIRST, Tree.STATIC),
        *(
            _best_first_over_static(found, tree, temperature)
            for temperature in (0.0, 1.0)
            for tree in GROWN
        ),
        _wider_is_better(found, COUPLED, 0.0, "greedy"),
        _wider_is_better(found, MSS, 1.0, "stochastic"),
        _wider_is_better(found, COUPLED, 1.0, "stochastic"),
        _mss_over_naive(found),
    ]


def _same_tokens(cells: Sequence[Entry]) -> dict[str, Any]:
    exact = [cell for cell in cells if cell["verifier"] == COUPLED]
    num_changed = sum(cell["outputs_with_other_tokens_than_plain"] for cell in exact)
    return _entry(
        "coupled: the tokens are those of plain decoding, greedy and sampled",
        holds=num_changed == 0,
        shown=f"{num_changed} outputs with other tokens, in {len(exact)} cells",
    )


def _coupled_over_mss(found: Cells, tree: Tree, mss_tree: Tree) -> dict[str, Any]:
    gains = {
        width: found.gain(
            found.cell(tree, COUPLED, 1.0, width), found.cell(mss_tree, MSS, 1.0, width)
        )
        for width in found.widths[1:]
    }
    return _entry(
        f"temperature 1: coupled on {tree} trees emits at least what MSS does on {mss_tree} ones, "
        "each width from 2",
        holds=all(gain.value >= 1 for gain in gains.values()),
        shown="coupled / MSS " + _by_width(gains),
        gains=gains,
    )


def _best_first_over_static(found: Cells, tree: Tree, temperature: float) -> dict[str, Any]:
    gains = {
        width: found.gain(
            found.cell(tree, COUPLED, temperature, width),
            found.cell(Tree.STATIC, COUPLED, temperature, width),
        )
        for width in found.widths
    }
    return _entry(
        f"{_mode(temperature)}: {tree} trees emit 10 % more than static ones of as many nodes, "
        "each width",
        holds=all(gain.value >= WANTED_GAIN for gain in gains.values()),
        shown="gain " + _by_width(gains),
        gains=gains,
    )


def _wider_is_better(
    found: Cells, verifier: str, temperature: float, paper_mode: str
) -> dict[str, Any]:
    cells = [found.cell(Tree.STATIC, verifier, temperature, width) for width in found.widths]
    rates = [cell["tokens_per_step"]["value"] for cell in cells]
    gain = found.gain(cells[-1], cells[0])
    low, high = paper.WIDTH_GAIN[paper_mode]
    return _entry(
        f"{_mode(temperature)}: wider static trees emit more, {verifier}",
        holds=all(narrow <= wide for narrow, wide in pairwise(rates)) and gain.low > 1,
        shown=f"width {found.widths[-1]} / width 1 {_times(gain)}; the paper has {low}–{high}",
        gains={found.widths[-1]: gain},
    )


def _mss_over_naive(found: Cells) -> dict[str, Any]:
    width = found.widths[-1]
    gain = found.gain(
        found.cell(Tree.STATIC, MSS, 1.0, width), found.cell(Tree.STATIC, NAIVE, 1.0, width)
    )
    low, high = paper.MSS_GAIN
    return _entry(
        "temperature 1: MSS emits more than naive sampling does on the same kind of draws",
        holds=gain.low > 1,
        shown=f"MSS / naive at width {width} {_times(gain)}; the paper has {low}–{high}",
        gains={width: gain},
    )


def _entry(
    expected: str, *, holds: bool, shown: str, gains: Mapping[int, Estimate] | None = None
) -> dict[str, Any]:
    entry: dict[str, Any] = {"expected": expected, "holds": bool(holds), "shown": shown}
    if gains:
        entry["by_width"] = {str(width): gain.as_record() for width, gain in gains.items()}
    return entry


def _by_width(gains: Mapping[int, Estimate]) -> str:
    return ", ".join(f"w={width} {_times(gain)}" for width, gain in gains.items())


def _times(gain: Estimate) -> str:
    return f"{gain.value:.2f} [{gain.low:.2f}, {gain.high:.2f}]"


def _mode(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


__all__ = ["summarize"]
