"""A system in a process of its own: its memory, its threads and its crashes stay there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from foretoken.bench.systems import Host, HostBuilder, HostInfo, Task, Turn
from foretoken.errors import ConfigError, ForetokenError, ModelError, RequestError

CLOSE_TIMEOUT_S = 10.0
_KINDS = (ConfigError, ModelError, RequestError, ForetokenError)  # the first that fits


class WorkerHost:
    """A `Host` whose calls are served by another process.

    Args:
        label: For messages.
        build: Makes the host over there; it and its arguments are pickled.

    Raises:
        ForetokenError: What building it raised, or its process ended.
    """

    def __init__(self, label: str, build: HostBuilder) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self._label = label
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build), daemon=True)
        self._process.start()
        self._is_answering = True
        theirs.close()  # so that the end of the process is the end of the pipe
        self.info: HostInfo = self._receive()

    def run(self, tasks: Sequence[Task], *, batch_size: int, speculative: bool) -> Turn:
        """Continue all tasks over there."""
        self._is_answering = True
        try:
            self._pipe.send({"tasks": tasks, "batch_size": batch_size, "speculative": speculative})
        except OSError as error:
            raise self._ended() from error
        turn: Turn = self._receive()
        return turn

    def close(self) -> None:
        """End the process, in the middle of its work if that goes on."""
        if self._is_answering:
            self._process.terminate()
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(CLOSE_TIMEOUT_S)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()
        self._pipe.close()

    def _receive(self) -> Any:
        try:
            is_error, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        self._is_answering = False
        if is_error:
            kind, message, hint = value
            raise _KINDS[kind](message, hint=hint)
        return value

    def _ended(self) -> ForetokenError:
        self._process.join(CLOSE_TIMEOUT_S)
        code = self._process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"
        return ForetokenError(
            f"the process of {self._label} ended {how}",
            hint="look at what it printed; run with --in-process to see it fail here",
        )


def _serve(pipe: Connection, build: HostBuilder) -> None:
    """Build a host and answer calls until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries chat; results go elsewhere
    host: Host | None = None
    try:
        host = build()
        pipe.send((False, host.info))
        while (call := pipe.recv()) is not None:
            pipe.send(_answer(host, **call))
    except (EOFError, BrokenPipeError):  # nobody asks any more
        pass
    except ForetokenError as error:
        pipe.send(_as_message(error))
    except Exception as error:  # noqa: BLE001 - whatever a peer's library raises
        message = f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        hint = "run again with --in-process --debug for the traceback"
        pipe.send((True, (len(_KINDS) - 1, message, hint)))
    finally:
        if host is not None:
            host.close()


def _answer(host: Host, tasks: Sequence[Task], **how: Any) -> tuple[bool, Any]:
    try:
        return False, host.run(tasks, **how)
    except RequestError as error:  # of this request: the next one may go well
        return _as_message(error)


def _as_message(error: ForetokenError) -> tuple[bool, Any]:
    """Return what the other side needs to raise the error anew."""
    kind = next(number for number, kind in enumerate(_KINDS) if isinstance(error, kind))
    return True, (kind, str(error), error.hint)


__all__ = ["WorkerHost"]
