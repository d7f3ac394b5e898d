"""The target's hidden states at recorded texts, as it computes them when it serves.

States take far more room than texts: a text's tokens times the layers times the width of the
target. They are kept on disk where they are used more than once and fit; otherwise they are
computed again for every batch. Which of the two changes the time and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.errors import ConfigError
from foretoken.models.adapter import LanguageModel
from foretoken.models.batch import Segment
from foretoken.models.cache import BLOCK_SIZE, CachedSequence, KVCache
from foretoken.training.storage import write_atomically

LOGITS = "logits"
STAGE = "computing states"
PASS_ROWS = 1024  # tokens of a pass, unless it returns logits of all of them
PASS_LOGITS = 2**26  # most numbers of a pass that does
SHARD_BYTES = 2**26  # what a crash loses at most

TextStates = Mapping[str, Tensor]
"""Of one text's tokens: [n, D] by the names of the layers, and [n, V] as "logits" if held."""


def layer_name(layer: int) -> str:
    """Return the name under which a layer's states are held."""
    return f"hidden.{layer}"


@dataclass(frozen=True, slots=True)
class StateLayout:
    """What is held of every token.

    Args:
        layers: Whose states.
        hidden_size: D.
        num_logits: V if the logits are held, else 0.
        dtype: Of all of it.
    """

    layers: tuple[int, ...]
    hidden_size: int
    num_logits: int
    dtype: torch.dtype

    @property
    def names(self) -> list[str]:
        """Names of a text's tensors."""
        return [layer_name(layer) for layer in self.layers] + [LOGITS] * bool(self.num_logits)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes."""
        return (len(self.layers) * self.hidden_size + self.num_logits) * self.dtype.itemsize


class States(Protocol):
    """The target's states at numbered texts, wherever they come from."""

    def read(self, places: Sequence[int]) -> list[TextStates]:
        """Return the states of the texts at these places."""
        ...


class TargetStates:
    """Computes states anew whenever they are asked for.

    Args:
        target: It runs as it does when it serves: in its own kernels, with its keys and values
            cached, long texts in chunks.
        texts: Token ids, at least one each, none longer than the target's context.
        layout: What to return.
    """

    def __init__(
        self, target: LanguageModel, texts: Sequence[Sequence[int]], layout: StateLayout
    ) -> None:
        self._target = target
        self._texts = texts
        self._layout = layout
        self._max_rows = PASS_ROWS
        if layout.num_logits:
            self._max_rows = max(1, min(PASS_ROWS, PASS_LOGITS // layout.num_logits))

    @cached_property
    def _cache(self) -> KVCache:
        longest = max(map(_num_positions, self._texts))
        return self._target.new_cache(max(longest, PASS_ROWS))

    def read(self, places: Sequence[int]) -> list[TextStates]:
        """Return the states of the texts at these places.

        Raises:
            ConfigError: A state is no finite number in the type in which states are held.
        """
        states: list[TextStates] = []
        for group in self._groups(places):
            sequences = [self._cache.open() for _ in group]
            try:
                states += self._run([self._texts[place] for place in group], sequences)
            finally:
                for sequence in sequences:
                    self._cache.close(sequence)
        return states

    def _groups(self, places: Sequence[int]) -> Iterator[list[int]]:
        """Yield the texts that run together: as many short ones as fit a pass, or a long one."""
        group: list[int] = []
        num_positions = 0
        for place in places:
            num_more = _num_positions(self._texts[place])
            if group and num_positions + num_more > self._max_rows:
                yield group
                group, num_positions = [], 0
            group.append(place)
            num_positions += num_more
        if group:
            yield group

    def _run(
        self, texts: Sequence[Sequence[int]], sequences: Sequence[CachedSequence]
    ) -> list[TextStates]:
        """Feed texts from beginning to end; only one that is alone may need several passes."""
        starts = range(0, max(map(len, texts)), self._max_rows)
        passes = [
            self._pass([text[start : start + self._max_rows] for text in texts], sequences)
            for start in starts
        ]
        return [
            {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            for parts in zip(*passes, strict=True)
        ]

    def _pass(
        self, chunks: Sequence[Sequence[int]], sequences: Sequence[CachedSequence]
    ) -> list[TextStates]:
        layout = self._layout
        segments = [
            Segment(sequence, chunk, range(-1, len(chunk) - 1))
            for sequence, chunk in zip(sequences, chunks, strict=True)
        ]
        batch = self._target.batch(self._cache, segments)
        rows = (
            range(batch.num_rows)
            if layout.num_logits
            else range(batch.num_rows - 1, batch.num_rows)
        )
        output = self._target.forward(batch, rows, hidden_layers=layout.layers)
        nodes = [range(len(chunk)) for chunk in chunks]
        self._cache.commit(list(zip(sequences, nodes, strict=True)))
        found = {layer_name(layer): states for layer, states in output.hidden.items()}
        if layout.num_logits:
            found[LOGITS] = output.logits
        # Copies: a piece of a pass would keep the whole pass alive.
        return [
            {
                name: _finite(states[start:stop].to("cpu", layout.dtype, copy=True), name)
                for name, states in found.items()
            }
            for start, stop in zip(batch.starts[:-1], batch.starts[1:], strict=True)
        ]


class StoredStates:
    """Keeps states on disk, in shards that are there whole or not at all.

    Args:
        folder: Where the shards are.
        texts: Token ids.
        layout: What is held.
    """

    def __init__(self, folder: Path, texts: Sequence[Sequence[int]], layout: StateLayout) -> None:
        self._folder = folder
        self._lengths = [len(text) for text in texts]
        self._layout = layout
        self._shards = self._split()
        self._rows = {}  # place to its shard and to its rows there
        for number, shard in enumerate(self._shards):
            start = 0
            for place in shard:
                self._rows[place] = (number, slice(start, start + self._lengths[place]))
                start += self._lengths[place]
        self._open: dict[int, Any] = {}

    @staticmethod
    def num_bytes(texts: Sequence[Sequence[int]], layout: StateLayout) -> int:
        """Return what the states of these texts take."""
        return sum(map(len, texts)) * layout.bytes_per_token

    def fill(self, source: States, on_progress: OnProgress = silent) -> None:
        """Write the shards that are missing.

        Args:
            source: Computes the states.
            on_progress: Told about every shard.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        missing = [number for number in range(len(self._shards)) if not self._path(number).exists()]
        num_texts, num_missing = len(self._lengths), sum(len(self._shards[it]) for it in missing)
        num_done = num_texts - num_missing
        on_progress(Progress(stage=STAGE, done=num_done, total=num_texts, is_resumed=num_done > 0))
        for number in missing:
            self._write(number, source.read(self._shards[number]))
            num_done += len(self._shards[number])
            on_progress(Progress(stage=STAGE, done=num_done, total=num_texts))

    def read(self, places: Sequence[int]) -> list[TextStates]:
        """Return the states of the texts at these places.

        Raises:
            ConfigError: A shard is missing or broken.
        """
        return [self._read(*self._rows[place]) for place in places]

    def _read(self, number: int, rows: slice) -> TextStates:
        path = self._path(number)
        try:
            if number not in self._open:
                self._open[number] = safe_open(path, framework="pt")
            shard = self._open[number]
            return {name: shard.get_slice(name)[rows] for name in self._layout.names}
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"states in {path.name} cannot be read: {' '.join(str(error).split())[:200]}",
                hint="delete the file and run the command again",
            ) from error

    def _write(self, number: int, states: Sequence[TextStates]) -> None:
        joined = {name: torch.cat([it[name] for it in states]) for name in self._layout.names}
        content = safetensors.torch.save(joined)
        write_atomically(self._path(number), lambda partial: partial.write_bytes(content))

    def _split(self) -> list[list[int]]:
        """Return the texts of each shard."""
        shards: list[list[int]] = []
        num_bytes = SHARD_BYTES
        for place, length in enumerate(self._lengths):
            if num_bytes + length * self._layout.bytes_per_token > SHARD_BYTES:
                shards.append([])
                num_bytes = 0
            shards[-1].append(place)
            num_bytes += length * self._layout.bytes_per_token
        return shards

    def _path(self, number: int) -> Path:
        return self._folder / f"states-{number:05d}.safetensors"


def _finite(states: Tensor, name: str) -> Tensor:
    if not states.isfinite().all():
        raise ConfigError(
            f"the target's {name} is not finite in {str(states.dtype).removeprefix('torch.')}",
            hint="choose another --states-dtype; bfloat16 and float32 hold larger numbers",
        )
    return states


def _num_positions(text: Sequence[int]) -> int:
    """Return the positions that a text takes in a cache of blocks."""
    return -(-len(text) // BLOCK_SIZE) * BLOCK_SIZE


__all__ = ["LOGITS", "StateLayout", "States", "StoredStates", "TargetStates", "layer_name"]
