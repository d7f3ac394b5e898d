"""Shows, when a model is loaded, whether a row's logits depend on what shares its pass.

The same tokens go through the model as one chunk, in several, one at a time, along a branch of a
tree and beside another request. Logits, keys and values must be the same bits each time.
"""

from __future__ import annotations

from collections.abc import Sequence
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
SHARED = 32  # tokens before the tree, fed at once
LATER_CHUNKS = (2, 1, 1)  # the same tokens as in the tree; one at a time is plain decoding
NEIGHBOUR = 5  # tokens of the other request, each time
MAX_LOGITS = 4  # rows per segment whose logits are compared; large vocabularies take long
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


@dataclass(frozen=True, slots=True)
class _Part:
    """New nodes of a sequence, and those among them that go on with the text, in order."""

    segment: Segment
    nodes: Sequence[int]

    def positions(self) -> range:
        """Return the positions in the text."""
        start = self.segment.sequence.num_cached
        return range(start, start + len(self.nodes))


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
        tree, neighbour = self._tree(self._cache.open()), self._chunk(self._cache.open(), NEIGHBOUR)
        batch = self._model.batch(self._cache, [tree.segment, neighbour.segment])
        self._model.forward(batch, range(batch.num_rows))

    def run(self) -> str | None:
        """Make all passes; return what differed first, or None."""
        sequence, neighbour = self._cache.open(), self._cache.open()
        self._feed_whole_text()
        difference = self._compare(self._chunk(sequence, SHARED), self._chunk(neighbour, NEIGHBOUR))
        branch = self._cache.fork(sequence)
        for size in LATER_CHUNKS:
            difference = difference or self._compare(self._chunk(sequence, size))
        return difference or self._compare(self._tree(branch), self._chunk(neighbour, NEIGHBOUR))

    def _chunk(self, sequence: CachedSequence, size: int) -> _Part:
        """Return the next tokens of the text."""
        start = sequence.num_cached
        segment = Segment(sequence, self._text[start : start + size], range(-1, size - 1))
        return _Part(segment, range(size))

    def _tree(self, sequence: CachedSequence) -> _Part:
        return _Part(Segment(sequence, self._tree_ids, TREE_PARENTS), TREE_PATH)

    def _feed_whole_text(self) -> None:
        whole = self._cache.open()
        batch = self._model.batch(self._cache, [self._chunk(whole, NUM_TOKENS).segment])
        self._logits = self._model.forward(batch, range(NUM_TOKENS)).logits
        self._cache.commit([(whole, range(NUM_TOKENS))])
        self._slots = self._cache.slots(whole, 0, NUM_TOKENS)

    def _compare(self, *parts: _Part) -> str | None:
        """Make a pass; say what differs from the whole text's, and keep its nodes."""
        batch = self._model.batch(self._cache, [part.segment for part in parts])
        rows = [
            start + node
            for start, part in zip(batch.starts, parts, strict=False)
            for node in part.nodes[-MAX_LOGITS:]
        ]
        logits = self._model.forward(batch, rows).logits
        positions = [position for part in parts for position in part.positions()]
        slots = np.concatenate([self._slots_of(part) for part in parts])
        layer = self._differing_layer(slots, self._slots[positions])
        if layer is not None:
            return f"the keys and values of layer {layer} depend on what shares the pass"
        compared = [position for part in parts for position in part.positions()[-MAX_LOGITS:]]
        if _differ(logits, self._logits[compared]):
            return "the logits depend on what shares the pass"
        self._cache.commit([(part.segment.sequence, part.nodes) for part in parts])
        return None

    def _slots_of(self, part: _Part) -> np.ndarray:
        """Return where the nodes that repeat the text lie."""
        sequence = part.segment.sequence
        start = sequence.num_cached
        return self._cache.slots(sequence, start, start + sequence.num_staged)[list(part.nodes)]

    def _differing_layer(self, found: np.ndarray, known: np.ndarray) -> int | None:
        """Return the first layer whose keys or values differ between two lists of slots."""
        first, second = torch.from_numpy(found), torch.from_numpy(known)
        for layer, pools in enumerate(zip(self._cache.keys, self._cache.values, strict=True)):
            if any(_differ(pool[first], pool[second]) for pool in pools):
                return layer
        return None


def _differ(first: Tensor, second: Tensor) -> bool:
    """Whether any bit differs; 0 is not -0, and NaN may be NaN."""
    bits = _BITS[first.element_size()]
    return not torch.equal(first.contiguous().view(bits), second.contiguous().view(bits))
