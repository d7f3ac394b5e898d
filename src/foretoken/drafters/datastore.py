"""Datastores: texts and their suffix array in a file that is mapped into memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foretoken.drafters.copying import SEPARATOR
from foretoken.drafters.suffix_array import build_suffix_array
from foretoken.drafters.token_files import (
    FileKind,
    check_token_ids,
    map_token_file,
    vocabulary_digest,
    write_token_file,
)
from foretoken.errors import ConfigError
from foretoken.models.tokenizer import Tokenizer

MAX_TOKENS = 2**31 - 1  # places are int32
FILE_KIND = FileKind(
    name="datastore",
    num_arrays=2,
    owner="datastore",
    remedy="build it with this model: foretoken datastore build FILES --model DIR --output FILE",
)


@dataclass(frozen=True, slots=True)
class Datastore:
    """Texts of tokens, each ended by a separator, and their suffix array.

    Args:
        tokens: [T] int32.
        array: [T] int32.
    """

    tokens: NDArray[np.int32]
    array: NDArray[np.int32]

    @classmethod
    def build(cls, texts: Iterable[Sequence[int]]) -> Datastore:
        """Index texts; takes about 40 bytes of memory per token while it sorts.

        Raises:
            ConfigError: There is no token, or there are more than places can number.
        """
        parts = [np.array((*text, SEPARATOR), np.int32) for text in texts if len(text)]
        num_tokens = sum(map(len, parts))
        if not 0 < num_tokens <= MAX_TOKENS:
            raise ConfigError(
                f"a datastore holds from 1 to {MAX_TOKENS} tokens; got {num_tokens}",
                hint="give files with text, or fewer of them",
            )
        tokens = np.concatenate(parts)
        return cls(tokens, build_suffix_array(tokens))

    def save(self, path: Path, tokenizer: Tokenizer) -> None:
        """Write it; whoever reads the path finds the old file or the new one.

        Raises:
            OSError: It cannot be written.
        """
        write_token_file(
            path, FILE_KIND, vocabulary_digest(0, tokenizer), (self.tokens, self.array)
        )

    @classmethod
    def load(cls, path: Path, vocab_size: int, tokenizer: Tokenizer) -> Datastore:
        """Map a file; everything in it is checked once, so nothing in it is out of bounds.

        Raises:
            ConfigError: It is damaged, no datastore, or for another vocabulary.
        """
        tokens, array = map_token_file(path, FILE_KIND, vocabulary_digest(vocab_size, tokenizer))
        check_token_ids(tokens, vocab_size, FILE_KIND.owner)
        is_sound = len(tokens) and tokens[-1] == SEPARATOR
        if not is_sound or array.min() < 0 or array.max() >= len(tokens):
            raise ConfigError(
                f"{FILE_KIND.owner} {str(path)!r} points outside its own texts",
                hint=FILE_KIND.remedy,
            )
        return cls(tokens, array)
