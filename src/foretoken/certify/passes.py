"""The target's rows along given texts, by passes that hold one text and no draft."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foretoken.models.adapter import LanguageModel
from foretoken.models.batch import Segment

CHUNK_ROWS = 512


class TextScorer:
    """Runs texts through the target as prompts are run: a chain, alone, in one pass.

    What speculation does is thus compared with passes that have no tree, no neighbours, and
    another shape than those of plain decoding.

    Args:
        target: The model.
        max_tokens: Of the longest prompt and output together.
    """

    def __init__(self, target: LanguageModel, max_tokens: int) -> None:
        self._target = target
        self._cache = target.new_cache(max_tokens + 1)
        self._sequence = self._cache.open()
        self._prompt_ids: list[int] = []

    def rows(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> Tensor:
        """Return the rows that score each output token given all before it, [tokens, V], on CPU.

        Args:
            prompt_ids: At least one token. Consecutive calls with the same prompt run it once.
            output_ids: At least one token.
        """
        if self._prompt_ids != list(prompt_ids):
            self._feed(list(prompt_ids))
        new_ids = [self._prompt_ids[-1], *output_ids[:-1]]
        segment = Segment(self._sequence, new_ids, range(-1, len(new_ids) - 1))
        with self._cache.speculate([self._sequence]) as cache:  # never committed
            batch = self._target.batch(cache, [segment])
            return self._target.forward(batch, range(len(new_ids))).logits.cpu()

    def _feed(self, prompt_ids: list[int]) -> None:
        """Cache all of a prompt but its last token."""
        self._cache.close(self._sequence)
        self._sequence = self._cache.open()
        for start in range(0, len(prompt_ids) - 1, CHUNK_ROWS):
            chunk = prompt_ids[start : min(start + CHUNK_ROWS, len(prompt_ids) - 1)]
            segment = Segment(self._sequence, chunk, range(-1, len(chunk) - 1))
            with self._cache.speculate([self._sequence]) as cache:
                self._target.forward(self._target.batch(cache, [segment]), [])
                cache.commit([(self._sequence, range(len(chunk)))])
        self._prompt_ids = prompt_ids


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two rows of one dtype are the same bit for bit, NaNs and zeros included."""
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def largest_difference(first: Tensor, second: Tensor) -> float:
    """Return the largest absolute difference of two rows; infinite if one is not a number."""
    different = first != second
    if not bool(different.any()):
        return 0.0
    gap = (first[different].double() - second[different].double()).abs()
    return float(gap.masked_fill(gap.isnan(), torch.inf).max())


def ulp(value: float, dtype: torch.dtype) -> float:
    """Return the spacing of a dtype's numbers at a value: one unit in the last place."""
    _, exponent = torch.frexp(torch.tensor(abs(value), dtype=torch.float64))
    return float(torch.finfo(dtype).eps * 2.0 ** (int(exponent) - 1))


__all__ = ["TextScorer", "largest_difference", "same_bits", "ulp"]
