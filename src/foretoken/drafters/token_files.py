"""Files of token ids: a versioned header, arrays of int32 and their checksum.

A file is written beside its final place and moved there, so that whoever reads it finds the old
one or the new one. It is refused unless its kind, version, vocabulary and checksums are right.
Nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretoken.errors import ConfigError
from foretoken.models.tokenizer import Tokenizer

_MAGIC = b"foretokn"
_VERSION = 1
# Magic, kind, version, arrays, tokens in each, vocabulary, checksum of the arrays; then the
# checksum of these fields, and zeros up to the arrays.
_FIELDS = struct.Struct("<8s16sIIQ32s32s")
_DIGEST_BYTES = 32
_HEADER_BYTES = 192
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class FileKind:
    """One kind of file.

    Args:
        name: Stands in the header; at most 16 ASCII characters.
        num_arrays: Arrays of equal length that it holds.
        owner: What the file is for, for messages: "suffix:path".
        remedy: What to do about a file that is refused.
    """

    name: str
    num_arrays: int
    owner: str
    remedy: str


def vocabulary_digest(vocab_size: int, tokenizer: Tokenizer | None) -> bytes:
    """Return what tells a vocabulary from others: 32 bytes of all tokens and their ids.

    Args:
        vocab_size: Of the target's logits; what counts where there is no tokenizer.
        tokenizer: The target's.
    """
    content = sorted(tokenizer.vocabulary.items()) if tokenizer is not None else vocab_size
    return _digest(repr(content).encode("utf-8", "backslashreplace"))


def check_token_ids(token_ids: NDArray[Any], vocab_size: int, owner: str) -> None:
    """Check that the target has logits for every token id.

    Raises:
        ConfigError: It has none for some, as when a tokenizer has more tokens than its model.
    """
    highest = int(token_ids.max(initial=-1))
    if highest >= vocab_size:
        raise ConfigError(
            f"{owner} holds token id {highest}; the target's are below {vocab_size}",
            hint="leave out texts with tokens that the model was not made for",
        )


def write_token_file(
    path: Path, kind: FileKind, vocabulary: bytes, arrays: Sequence[NDArray[np.int32]]
) -> None:
    """Write arrays of equal length; afterwards there is the old file or the new one, whole.

    Raises:
        OSError: It cannot be written; the old file is untouched.
    """
    payload = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    blocks = [_bytes_of(array) for array in arrays]
    for block in blocks:
        payload.update(block)
    fields = _FIELDS.pack(
        _MAGIC,
        kind.name.encode(),
        _VERSION,
        len(arrays),
        len(arrays[0]),
        vocabulary,
        payload.digest(),
    )
    header = (fields + _digest(fields)).ljust(_HEADER_BYTES, b"\0")
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(header)
            for block in blocks:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def map_token_file(path: Path, kind: FileKind, vocabulary: bytes) -> list[NDArray[np.int32]]:
    """Return the arrays of a file, mapped into memory, after everything was checked.

    Raises:
        ConfigError: It cannot be read, is damaged, of another kind or for another vocabulary.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
            num_tokens, checksum = _check_header(path, kind, vocabulary, header)
            wanted = _HEADER_BYTES + 4 * kind.num_arrays * num_tokens
            if size != wanted:
                raise _refused(path, kind, f"is damaged: {size} bytes instead of {wanted}")
            payload = hashlib.blake2b(digest_size=_DIGEST_BYTES)
            while chunk := file.read(_CHUNK_BYTES):
                payload.update(chunk)
            if payload.digest() != checksum:
                raise _refused(path, kind, "is damaged: its checksum is wrong")
        if not num_tokens:
            return [np.empty(0, np.int32) for _ in range(kind.num_arrays)]
        # Copy on write rather than read only, for which compiled code would be compiled again.
        mapped: NDArray[np.int32] = np.memmap(
            path, "<i4", mode="c", offset=_HEADER_BYTES, shape=(kind.num_arrays, num_tokens)
        )
    except OSError as error:
        raise _refused(path, kind, f"cannot be read: {error.strerror or error}") from error
    return list(np.asarray(mapped))


def _check_header(
    path: Path, kind: FileKind, vocabulary: bytes, header: bytes
) -> tuple[int, bytes]:
    """Return the number of tokens and the checksum that a header states."""
    fields = header[: _FIELDS.size]
    if len(header) < _HEADER_BYTES or not fields.startswith(_MAGIC):
        raise _refused(path, kind, "was not written by Foretoken")
    if header[_FIELDS.size : _FIELDS.size + _DIGEST_BYTES] != _digest(fields):
        raise _refused(path, kind, "is damaged: the checksum of its header is wrong")
    _, name, version, num_arrays, num_tokens, found, checksum = _FIELDS.unpack(fields)
    if name.rstrip(b"\0") != kind.name.encode() or num_arrays != kind.num_arrays:
        raise _refused(path, kind, f"holds {name.rstrip(bytes(1)).decode('ascii', 'replace')!r}")
    if version != _VERSION:
        raise _refused(path, kind, f"has version {version}; this one reads {_VERSION}")
    if found != vocabulary:
        raise _refused(path, kind, "was made with another vocabulary than the target's")
    return num_tokens, checksum


def _refused(path: Path, kind: FileKind, reason: str) -> ConfigError:
    return ConfigError(f"{kind.owner} {str(path)!r} {reason}", hint=kind.remedy)


def _bytes_of(array: NDArray[np.int32]) -> memoryview:
    return np.ascontiguousarray(array, "<i4").view(np.uint8).data


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
