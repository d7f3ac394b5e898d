"""The numbers of the SpecInfer paper, for orientation: other models, other prompts.

LLaMA-7B as target and LLaMA-68M as draft, 128 new tokens, expansion <1,1,w,1,1,1,1,1>.
Source: Miao et al., ASPLOS 2024, arXiv:2305.09781, success rates, verified tokens per step by
tree width, and multi-step speculative sampling against naive sampling.
"""

from __future__ import annotations

from typing import Any

DATASETS = ("Alpaca", "CP", "WebQA", "CIP", "PIQA")

# Share of tokens, for k = 1 to 5, one row per data set.
GREEDY_SUCCESS = (
    (0.68, 0.77, 0.81, 0.84, 0.85),
    (0.69, 0.79, 0.83, 0.86, 0.87),
    (0.62, 0.72, 0.77, 0.80, 0.82),
    (0.70, 0.81, 0.85, 0.88, 0.89),
    (0.63, 0.75, 0.79, 0.83, 0.85),
)
STOCHASTIC_SUCCESS = (
    (0.54, 0.81, 0.91, 0.95, 0.97),
    (0.56, 0.82, 0.90, 0.95, 0.97),
    (0.52, 0.80, 0.90, 0.94, 0.96),
    (0.57, 0.84, 0.92, 0.95, 0.97),
    (0.55, 0.82, 0.91, 0.95, 0.97),
)
# Verified tokens per step of the target, for widths 1 to 5.
GREEDY_TOKENS = (
    (2.95, 3.07, 3.21, 3.33, 3.43),
    (2.58, 3.24, 3.46, 3.59, 3.69),
    (2.27, 2.69, 2.86, 2.98, 3.07),
    (2.73, 3.40, 3.62, 3.79, 3.91),
    (2.18, 2.80, 2.97, 3.10, 3.21),
)
MSS_TOKENS = (
    (1.79, 2.11, 2.26, 2.32, 2.38),
    (1.69, 1.99, 2.15, 2.23, 2.28),
    (1.64, 1.93, 2.08, 2.15, 2.21),
    (1.72, 2.05, 2.19, 2.28, 2.29),
    (1.67, 1.93, 2.08, 2.15, 2.21),
)
# At width 5.
NAIVE_TOKENS = (1.87, 1.80, 1.73, 1.79, 1.73)

# As the paper's text states them: tokens per step of width 5 over width 1, and MSS over naive.
WIDTH_GAIN = {"greedy": (1.2, 1.5), "stochastic": (1.3, 1.4)}
MSS_GAIN = (1.26, 1.28)


def as_record() -> dict[str, Any]:
    """Return the numbers as they stand in a record."""
    return {
        "what": "SpecInfer's own numbers (arXiv:2305.09781), LLaMA-7B with LLaMA-68M as draft",
        "datasets": list(DATASETS),
        "greedy_success_rate": [list(row) for row in GREEDY_SUCCESS],
        "stochastic_success_rate": [list(row) for row in STOCHASTIC_SUCCESS],
        "greedy_tokens_per_step": [list(row) for row in GREEDY_TOKENS],
        "mss_tokens_per_step": [list(row) for row in MSS_TOKENS],
        "naive_tokens_per_step_at_width_5": list(NAIVE_TOKENS),
        "width_5_over_1": {mode: list(bounds) for mode, bounds in WIDTH_GAIN.items()},
        "mss_over_naive_at_width_5": list(MSS_GAIN),
    }


__all__ = ["as_record"]
