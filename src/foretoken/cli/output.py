"""Results on their way out: as text or JSON, in the order of the prompts, to a stream or a file."""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from foretoken.cli.errors import FileError
from foretoken.cli.terminal import FAINT, PROMPT, harmless, is_terminal, paint
from foretoken.errors import ConfigError

if TYPE_CHECKING:
    from io import FileIO

    from foretoken.engine.llm import RequestOutput
    from foretoken.engine.logprobs import TokenLogprobs

Decode = Callable[[Sequence[int]], str]

# JSON has no infinity; OpenAI's API says this of tokens that cannot come.
LOWEST_LOGPROB = -9999.0
WRITE_HINT = "make room or write elsewhere; results that were written before are whole"


def as_json(output: RequestOutput, decode: Decode | None = None) -> str:
    """Return one result as a line of JSON.

    Args:
        output: The result.
        decode: Token ids to text, for the tokens of log-probabilities; they have none without.
    """
    record = {
        "prompt": output.prompt,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason.value,
        "seed": output.seed,
        "exactness": output.exactness.value,
        "stats": output.stats.as_dict(),
    }
    for name in ("logprobs", "prompt_logprobs"):
        entries = getattr(output, name)
        if entries is not None:
            record[name] = [_logprob_record(entry, decode) for entry in entries]
    if output.error is not None:
        record["error"] = {"message": str(output.error), "hint": output.error.hint}
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _logprob_record(entry: TokenLogprobs, decode: Decode | None) -> dict[str, Any]:
    """Return what is known of one token, under the names of OpenAI's API and with ids."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        text = decode([token_id]) if decode else ""
        return {"token": text, "id": token_id, "logprob": max(logprob, LOWEST_LOGPROB)}

    top = [token(token_id, logprob) for token_id, logprob in entry.top]
    return {**token(entry.token_id, entry.logprob), "top_logprobs": top}


def as_text(output: RequestOutput, num_prompts: int, *, on_terminal: bool = False) -> str:
    """Return one result for reading: prompt and continuation, under a heading if there are more."""
    heading = f"--- {output.index + 1} of {num_prompts} ---\n" if num_prompts > 1 else ""
    if not on_terminal:
        return f"{heading}{output.prompt}{output.text}\n"
    prompt, text = harmless(output.prompt), harmless(output.text)
    heading = paint(heading, FAINT, sys.stdout)
    return f"{heading}{paint(prompt, PROMPT, sys.stdout)}{text}\n"


class Sink(Protocol):
    """Where finished records go."""

    def write(self, record: str) -> None:
        """Write one record, so that it survives whatever comes after."""

    def close(self) -> None:
        """Write no more."""


class StdoutSink:
    """Standard output."""

    def write(self, record: str) -> None:
        """Write and flush.

        Raises:
            FileError: There is no space, or the device fails.
        """
        try:
            sys.stdout.write(record)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has seen enough
            raise
        except OSError as error:
            _forget_stdout()
            raise _unwritable("standard output", error) from error

    def close(self) -> None:
        """Leave it open; it is the process's own."""


class FileSink:
    """A file that holds whole records only, whatever interrupts the work.

    It is created with the first record, so a run that fails before leaves nothing behind.

    Args:
        path: The file; devices and pipes may exist, other files not.
        force: Overwrite an existing file.

    Raises:
        ConfigError: The file exists.
        FileError: It could not be written.
    """

    def __init__(self, path: Path, *, force: bool) -> None:
        self._path = path
        self._file: FileIO | None = None
        self._num_bytes = 0
        self._is_special = _check_target(path, force=force)
        self._mode = "wb" if force or self._is_special else "xb"

    def write(self, record: str) -> None:
        """Write one record; a part of one is taken back.

        Raises:
            FileError: There is no space, or the device fails.
        """
        try:
            if self._file is None:
                self._file = self._path.open(self._mode, buffering=0)  # type: ignore[assignment]
            self._write_all(record.encode(errors="replace"))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _unwritable(f"output file {str(self._path)!r}", error) from error

    def close(self) -> None:
        """Close the file if it was created."""
        if self._file is not None:
            self._file.close()

    def _write_all(self, record: bytes) -> None:
        rest = memoryview(record)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]  # type: ignore[union-attr]
        except BaseException:
            self._take_back()
            raise
        self._num_bytes += len(record)

    def _take_back(self) -> None:
        if self._is_special or self._file is None:
            return
        with suppress(OSError):
            self._file.truncate(self._num_bytes)
            self._file.seek(self._num_bytes)
            if not self._num_bytes:
                self._path.unlink()


class OrderedWriter:
    """Writes results in the order of the prompts, each as soon as those before it are written.

    Args:
        render: Result to record.
        sink: Where records go.
    """

    def __init__(self, render: Callable[[RequestOutput], str], sink: Sink) -> None:
        self._render = render
        self._sink = sink
        self._waiting: dict[int, RequestOutput] = {}
        self._next_index = 0

    def add(self, output: RequestOutput) -> None:
        """Take a finished result."""
        self._waiting[output.index] = output
        while self._next_index in self._waiting:
            self._write(self._next_index)

    def finish(self) -> None:
        """Write what still waits for prompts that will not finish."""
        for index in sorted(self._waiting):
            self._write(index)

    def _write(self, index: int) -> None:
        self._next_index = index + 1
        self._sink.write(self._render(self._waiting.pop(index)))


def make_render(
    format_name: str, num_prompts: int, *, to_stdout: bool, decode: Decode | None = None
) -> Callable[..., str]:
    """Return the function that turns a result into a record.

    Args:
        format_name: "text" or "json".
        num_prompts: Whether headings are needed.
        to_stdout: Whether a terminal may show it.
        decode: Token ids to text, None without a tokenizer.
    """
    if format_name == "json":
        return lambda output: as_json(output, decode)
    on_terminal = to_stdout and is_terminal(sys.stdout)
    return lambda output: as_text(output, num_prompts, on_terminal=on_terminal)


def _check_target(path: Path, *, force: bool) -> bool:
    """Check that the file can be written, without creating it; return whether it is special."""
    try:
        mode = path.stat().st_mode if path.exists() else None
        if mode is None or stat.S_ISREG(mode):
            if mode is not None and not force:
                raise ConfigError(
                    f"output file {str(path)!r} exists",
                    hint="choose another name, or overwrite it with --force",
                )
            if not path.parent.is_dir():
                raise ConfigError(
                    f"output directory {str(path.parent)!r} does not exist", hint="create it"
                )
            _try_to_write(path, is_new=mode is None)
            return False
    except OSError as error:
        what, hint = f"output file {str(path)!r}", "check its directory and permissions"
        raise _unwritable(what, error, hint=hint) from error
    if stat.S_ISDIR(mode):
        raise ConfigError(f"output file {str(path)!r} is a directory", hint="name a file in it")
    return True


def _try_to_write(path: Path, *, is_new: bool) -> None:
    """Open what will be opened later; permission bits alone do not tell."""
    handle: BinaryIO
    if is_new:
        with tempfile.TemporaryFile(dir=path.parent) as handle:
            handle.write(b"\n")
    else:
        with path.open("r+b"):
            pass


def _unwritable(what: str, error: OSError, *, hint: str = WRITE_HINT) -> FileError:
    return FileError(f"{what} cannot be written: {error.strerror or error}", hint=hint)


def _forget_stdout() -> None:
    """Keep what stdout still buffers from failing once more when the interpreter ends."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


__all__ = ["FileSink", "OrderedWriter", "Sink", "StdoutSink", "as_json", "as_text", "make_render"]
