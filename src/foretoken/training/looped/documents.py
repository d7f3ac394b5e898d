"""Texts to train a language model on: read from files, held out in part, cut into rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from foretoken.errors import ConfigError

SEPARATOR = "<|endoftext|>"
HELD_OUT_PER_MILLE = 30
_OPENING = 80  # letters and digits; two versions of a text rarely differ in them
_ENDING = 100
_SEED_STRIDE = 1_000_003  # keeps the shuffles of neighbouring seeds apart


class Encoder(Protocol):
    """Turns a text into token ids, as `models.tokenizer.Tokenizer` does."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the special tokens that begin it."""
        ...


@dataclass(frozen=True, slots=True)
class Split:
    """Texts without copies.

    Args:
        train: To train on.
        held_out: To measure on.
    """

    train: list[str]
    held_out: list[str]

    def fingerprint(self) -> str:
        """Return a short text that changes when a text does."""
        digest = hashlib.sha256(json.dumps([self.train, self.held_out]).encode())
        return digest.hexdigest()[:16]


def read_texts(files: Sequence[Path]) -> list[str]:
    """Return the texts of files, in order.

    Args:
        files: .jsonl files, an object with a "text" in each line; others are plain, with a line
            `<|endoftext|>` between texts.

    Raises:
        ConfigError: A file cannot be read.
    """
    return [text for file in files for text in _read(file) if text.strip()]


def split_texts(texts: Sequence[str], held_out: Sequence[str] | None = None) -> Split:
    """Drop copies, and hold texts out by the hash of their opening if none are held out already.

    Two texts are copies if they have the same letters and digits. Versions of one text share their
    opening and so fall on one side; a held-out text that ends like one to train on is dropped.

    Args:
        texts: To train on, and if `held_out` is None to hold 3 % of them out.
        held_out: Texts to measure on.

    Raises:
        ConfigError: One side has no text.
    """
    if held_out is None:
        held_out = [text for text in texts if _is_held_out(text)]
        texts = [text for text in texts if not _is_held_out(text)]
    train = {_letters(text): text for text in texts}
    kept = {_letters(text): text for text in held_out}
    endings = {letters[-_ENDING:] for letters in train}
    kept = {letters: text for letters, text in kept.items() if letters[-_ENDING:] not in endings}
    if not train or not kept:
        raise ConfigError(
            f"training and measuring need texts; there are {len(train)} and {len(kept)}",
            hint="give more texts with --text FILE, or those to measure on with --held-out FILE",
        )
    return Split(list(train.values()), list(kept.values()))


def encode_texts(texts: Sequence[str], encoder: Encoder, end_id: int | None) -> list[list[int]]:
    """Return the token ids of texts, with the token that ends them.

    Args:
        texts: Some.
        encoder: What encodes them.
        end_id: Goes behind every text, None for nothing.
    """
    end = [] if end_id is None else [end_id]
    return [[*encoder.encode(text), *end] for text in texts]


class TokenRows:
    """Texts one behind the other, in another order every epoch, cut into rows of one length.

    What fills no row at the end of an epoch is left out of it.

    Args:
        texts: Token ids.
        context: Tokens of a row that predict one.
        batch_size: Rows of a step.
        seed: Of the orders.

    Raises:
        ConfigError: The texts do not fill one batch.
    """

    def __init__(
        self, texts: Sequence[Sequence[int]], context: int, batch_size: int, seed: int
    ) -> None:
        self._texts = texts
        self._context = context
        self._batch_size = batch_size
        self._seed = seed
        self._epoch: tuple[int, Tensor] | None = None
        if self.num_steps_per_epoch < 1:
            raise ConfigError(
                f"the texts have {self.num_tokens} tokens, fewer than a step takes: "
                f"{batch_size} x {context} + 1",
                hint="give more texts with --text FILE, or lower --batch-size or --context",
            )

    @cached_property
    def num_tokens(self) -> int:
        """Of all texts."""
        return sum(map(len, self._texts))

    @property
    def num_steps_per_epoch(self) -> int:
        """Batches in which every text comes once."""
        return (self.num_tokens - 1) // (self._batch_size * self._context)

    def batch(self, step: int) -> Tensor:
        """Return the rows of a step, [B, context + 1]; neighbouring rows share one token.

        Args:
            step: From 0; the same one has the same rows.
        """
        epoch, place = divmod(step, self.num_steps_per_epoch)
        stream = self._stream(epoch)
        size = self._batch_size * self._context
        part = stream[place * size : (place + 1) * size + 1]
        return part.unfold(0, self._context + 1, self._context)

    def _stream(self, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * _SEED_STRIDE + epoch)
            order = torch.randperm(len(self._texts), generator=generator).tolist()
            ids = [token_id for place in order for token_id in self._texts[place]]
            self._epoch = epoch, torch.tensor(ids)
        return self._epoch[1]


def _read(file: Path) -> list[str]:
    try:
        content = file.read_text(encoding="utf-8")
        if file.suffix != ".jsonl":
            return [text.strip() for text in content.split(SEPARATOR)]
        return [str(json.loads(line)["text"]) for line in content.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(
            f"text file {file.name!r} cannot be read: {reason}", hint="check the path"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"text file {file.name!r} has a line that is no JSON object with a text",
            hint='write one {"text": "..."} per line, or use a .txt file',
        ) from error


def _letters(text: str) -> str:
    """Return what two copies of a text have in common."""
    return "".join(character for character in text.casefold() if character.isalnum())


def _is_held_out(text: str) -> bool:
    digest = hashlib.sha256(_letters(text)[:_OPENING].encode()).digest()
    return int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_MILLE


__all__ = ["SEPARATOR", "Split", "TokenRows", "encode_texts", "read_texts", "split_texts"]
