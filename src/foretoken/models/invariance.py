"""Shows, when a model is loaded, whether a row's logits depend on what shares its pass.

The same tokens go through the model as one chunk, in several, one at a time, along a branch of a
tree and beside another request. Logits, keys and values must be the same bits each time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from foretoken.core.verdict import Exactness
from foretoken.models.adapter import LanguageModel
from foretoken.models.audit import find_dependence
from foretoken.models.batch import Segment
from foretoken.models.cache import CachedSequence
from foretoken.models.packing import is_packable

# More than a vector has elements, so that the rest of one shows even where a row is one number.
NUM_TOKENS = 36
CHUNKS = (31, 2, 1, 1, 1)
SHARED = 32  # tokens that the tree's sequence has behind it
NEIGHBOUR = 5  # tokens of the other request before the tree
# The tree's root, two decoys, the path again, another decoy, the path's end; -1 is the past.
TREE_PARENTS = (-1, 0, 0, 0, 3, 3, 5)
TREE_PATH = (0, 3, 5, 6)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class InvarianceReport:
    """How far a model's logits can be relied on to be the same bits.

    Args:
        exactness: Bitwise or numerical.
        reason: Why not bitwise: the first layer or operation found; empty if it is.
    """

    exactness: Exactness
    reason: str = ""


def check_invariance(model: LanguageModel, module: PreTrainedModel) -> InvarianceReport:
    """Find out whether a packed transformers module is invariant.

    Bitwise is reported only if every operation is of a kind known to be invariant, and the
    passes of the self-test agree in every bit.

    Args:
        model: The model to be run.
        module: The module that it runs.
    """
    if not is_packable(module.device, module.dtype):
        where = f"{module.dtype} on {module.device.type}".removeprefix("torch.")
        return InvarianceReport(Exactness.NUMERICAL, f"{where} runs on torch's kernels")
    difference = find_difference(model)
    # The operation says more, but is watched last: the first passes measure what was left to.
    reason = find_dependence(module, _SelfTest(model).run_tree) or difference
    return InvarianceReport(Exactness.NUMERICAL if reason else Exactness.BITWISE, reason or "")


def find_difference(model: LanguageModel) -> str | None:
    """Run the self-test; return what differed first, or None if every bit agreed."""
    if model.info.context_limit < NUM_TOKENS:
        return f"a context of {model.info.context_limit} positions is too short for the self-test"
    return _SelfTest(model).run()


class _SelfTest:
    """One text, fed to a model in several ways."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._cache = model.new_cache(5 * NUM_TOKENS)
        generator = torch.Generator().manual_seed(NUM_TOKENS)
        size = (NUM_TOKENS + len(TREE_PARENTS),)
        ids = torch.randint(model.info.vocab_size, size, generator=generator).tolist()
        self._text, self._tree_ids = ids[:NUM_TOKENS], ids[NUM_TOKENS:]
        for node, token_id in zip(TREE_PATH, self._text[SHARED:], strict=True):
            self._tree_ids[node] = token_id
        self._logits = torch.empty(0)  # what every pass has to repeat, with what stands here
        self._slots = np.empty(0, np.int64)

    def run_tree(self) -> None:
        """Make one pass over the tree beside another request."""
        self._feed(self._tree(self._cache.open()), self._chunk(self._cache.open(), NEIGHBOUR))

    def run(self) -> str | None:
        """Make all passes; return what differed first, or None."""
        sequence = self._cache.open()
        self._logits = self._feed(self._chunk(sequence, NUM_TOKENS))
        self._slots = self._staged(sequence)
        return self._run_chunks() or self._run_beside_another()

    def _run_chunks(self) -> str | None:
        """Feed the text in pieces, the last ones of one token as in plain decoding."""
        sequence = self._cache.open()
        for size in CHUNKS:
            logits = self._feed(self._chunk(sequence, size))
            difference = self._check_chunk(sequence, logits)
            if difference:
                return difference
        return None

    def _run_beside_another(self) -> str | None:
        """Feed most of the text, then a tree with the rest as a branch, beside a neighbour."""
        sequence, neighbour = self._cache.open(), self._cache.open()
        logits = self._feed(self._chunk(sequence, SHARED), self._chunk(neighbour, NEIGHBOUR))
        difference = self._check_chunk(sequence, logits[:SHARED])
        difference = difference or self._check_chunk(neighbour, logits[SHARED:])
        if difference:
            return difference
        logits = self._feed(self._tree(sequence), self._chunk(neighbour, NEIGHBOUR))
        path = list(TREE_PATH)
        difference = self._check(SHARED, self._staged(sequence)[path], logits[path])
        return difference or self._check_chunk(neighbour, logits[len(TREE_PARENTS) :])

    def _chunk(self, sequence: CachedSequence, size: int) -> Segment:
        """Return the next tokens of the text."""
        start = sequence.num_cached
        return Segment(sequence, self._text[start : start + size], range(-1, size - 1))

    def _tree(self, sequence: CachedSequence) -> Segment:
        return Segment(sequence, self._tree_ids, TREE_PARENTS)

    def _feed(self, *segments: Segment) -> Tensor:
        """Return the logits of all rows."""
        batch = self._model.batch(self._cache, segments)
        return self._model.forward(batch, range(batch.num_rows)).logits

    def _staged(self, sequence: CachedSequence) -> np.ndarray:
        start = sequence.num_cached
        return self._cache.slots(sequence, start, start + sequence.num_staged)

    def _check_chunk(self, sequence: CachedSequence, logits: Tensor) -> str | None:
        """Check a chunk that was fed, and keep it."""
        start, slots = sequence.num_cached, self._staged(sequence)
        self._cache.commit([(sequence, range(len(slots)))])
        return self._check(start, slots, logits)

    def _check(self, start: int, slots: np.ndarray, logits: Tensor) -> str | None:
        """Say what differs from the first pass over the text at some of its positions."""
        found, known = torch.from_numpy(slots), torch.from_numpy(self._slots[start:][: len(slots)])
        for layer, pools in enumerate(zip(self._cache.keys, self._cache.values, strict=True)):
            if any(_differ(pool[found], pool[known]) for pool in pools):
                return f"the keys and values of layer {layer} depend on what shares the pass"
        if _differ(logits, self._logits[start : start + len(slots)]):
            return "the logits depend on what shares the pass"
        return None


def _differ(first: Tensor, second: Tensor) -> bool:
    """Whether any bit differs; 0 is not -0, and NaN may be NaN."""
    bits = _BITS[first.element_size()]
    return not torch.equal(first.contiguous().view(bits), second.contiguous().view(bits))
