"""What the server writes down: a line for each call, and what goes wrong. No prompts, no outputs.

Text of users gets into logs by more ways than a line about a request: exceptions repeat what they
could not read, and their messages come with every traceback. So unless the operator asks for
prompts, the messages of exceptions are withheld too, but for kinds that come from the machine and
not from a request.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TextIO

import structlog
import torch
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import EventDict, Processor, WrappedLogger

from foretoken.engine.request import Request
from foretoken.errors import CapacityError, ModelError
from foretoken.server.observer import Observer

LOGGER = "foretoken.server"
WITHHELD = "(message withheld: it may repeat a prompt)"
# Exceptions whose messages are about the machine or the model.
_HARMLESS = (CapacityError, ModelError, MemoryError, OSError, torch.OutOfMemoryError)
_QUIET = {"httpx", "httpcore", "numba"}  # libraries that tell more than anybody wants

# Independent of structlog's global settings, which belong to the program that imports us.
_log: structlog.stdlib.BoundLogger = structlog.wrap_logger(
    logging.getLogger(LOGGER),
    wrapper_class=structlog.stdlib.BoundLogger,
    processors=[
        structlog.stdlib.filter_by_level,
        structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
    ],
)


# -- settings ------------------------------------------------------------------------------------


def configure_logging(
    log_format: str | None = None,
    *,
    log_prompts: bool = False,
    level: int = logging.INFO,
    stream: TextIO | None = None,
) -> None:
    """Have all log lines of the process written in one format; for commands, not for libraries.

    Args:
        log_format: "text" or "json", a JSON object on each line; None is text on a terminal and
            JSON elsewhere.
        log_prompts: Whether the messages of exceptions are written, which may repeat prompts.
        level: Least level that is written.
        stream: Where to; None is standard error.
    """
    stream = stream or sys.stderr
    is_terminal = stream.isatty()
    is_text = log_format == "text" or (log_format is None and is_terminal)
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=is_terminal, sort_keys=False, pad_event_to=0)
        if is_text
        else structlog.processors.JSONRenderer(default=str)
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.stdlib.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                _Discretion(log_prompts),
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


class _Discretion:
    """Renders exceptions, and leaves out what may repeat a prompt unless that is wanted."""

    def __init__(self, log_prompts: bool) -> None:
        self._log_prompts = log_prompts

    def __call__(self, _: WrappedLogger, __: str, event_dict: EventDict) -> EventDict:
        record = event_dict.get("_record")
        if not self._log_prompts and record is not None and record.name == "asyncio":
            # It describes tasks and callbacks with all their arguments.
            event_dict["event"] = "an error in the event loop"
        exc_info = event_dict.pop("exc_info", None)
        error = exc_info[1] if isinstance(exc_info, tuple) else exc_info
        if error is True:
            error = sys.exc_info()[1]
        if isinstance(error, BaseException):
            event_dict["exception"] = render_exception(error, with_messages=self._log_prompts)
        return event_dict


def render_exception(error: BaseException, *, with_messages: bool) -> str:
    """Return a traceback, causes first; without messages that may repeat what a user sent."""
    parts = []
    for link in _chain(error):
        kind = type(link)
        message = str(link) if with_messages or isinstance(link, _HARMLESS) else WITHHELD
        frames = _frames(link.__traceback__)
        parts.append(f"{frames}{kind.__module__}.{kind.__qualname__}: {message}")
    return "\n".join(reversed(parts))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _frames(trace: TracebackType | None) -> str:
    return "".join(traceback.format_tb(trace))


# -- a line for each call ------------------------------------------------------------------------


@dataclass(slots=True)
class _Call:
    """An HTTP request, and the requests that it made of the engine."""

    began_s: float
    method: str = ""
    endpoint: str = ""
    request_id: str = ""
    status: int | None = None  # none if the client went away first
    num_open: int = 0
    is_answered: bool = False
    duration_s: float = 0.0
    ends: list[tuple[Request, str, float]] = field(default_factory=list)


_call: ContextVar[_Call | None] = ContextVar("foretoken_call", default=None)


class RequestLog(Observer):
    """Writes a line when a call was answered and all that it asked of the engine has ended.

    Args:
        log_prompts: Whether lines hold prompts and outputs.
        decode: Token ids to text, for the prompts.
    """

    def __init__(
        self, *, log_prompts: bool = False, decode: Callable[[Sequence[int]], str] | None = None
    ) -> None:
        self._log_prompts = log_prompts
        self._decode = decode
        self._lock = threading.Lock()
        self._calls: dict[str, _Call] = {}

    def submitted(self, request: Request) -> None:
        """Note to which call a request belongs; without one it is a call by itself."""
        call = _call.get()
        if call is None:
            call = _Call(time.perf_counter(), request_id=request.request_id, is_answered=True)
        with self._lock:
            call.num_open += 1
            self._calls[request.request_id] = call

    def finished(self, request: Request, outcome: str, waited_s: float) -> None:
        """Note how a request ended."""
        with self._lock:
            call = self._calls.pop(request.request_id, None)
            if call is None:
                return
            call.num_open -= 1
            call.ends.append((request, outcome, waited_s))
            is_over = call.is_answered and not call.num_open
        if is_over:
            self._write(call)

    def answered(self, call: _Call) -> None:
        """Note that a call has been answered."""
        call.duration_s = time.perf_counter() - call.began_s
        with self._lock:
            call.is_answered = True
            is_over = not call.num_open
        if is_over:
            self._write(call)

    def _write(self, call: _Call) -> None:
        line: dict[str, Any] = {"request_id": call.request_id}
        if call.method:
            line |= {
                "method": call.method,
                "endpoint": call.endpoint,
                "status": call.status,
                "duration_ms": _ms(call.duration_s),
            }
        if call.ends:
            line |= summary(call.ends)
            if self._log_prompts:
                requests = [request for request, _, _ in call.ends]
                line["prompts"] = [self._prompt(request) for request in requests]
                line["outputs"] = [request.text_stream.text for request in requests]
        # Whoever polls health and metrics is no news.
        is_poll = call.method in ("GET", "HEAD") and (call.status or 500) < 400
        is_news = call.ends or not is_poll
        _log.log(logging.INFO if is_news else logging.DEBUG, "request", **line)

    def _prompt(self, request: Request) -> object:
        return self._decode(request.prompt_ids) if self._decode else request.prompt_ids


def summary(ends: Sequence[tuple[Request, str, float]]) -> dict[str, Any]:
    """Return counts and times of the engine's requests that one call made.

    Args:
        ends: Each request, how it ended, and the seconds that it waited.
    """
    stats = [request.stats for request, _, _ in ends]
    num_tokens = sum(item.num_tokens for item in stats)
    num_steps = sum(item.num_steps for item in stats)
    decode_s = max(item.prefill_s + item.decode_s for item in stats)
    accepted_by: Counter[str] = Counter()
    for item in stats:
        accepted_by.update(item.accepted_by)
    first_s = [
        waited_s + item.prefill_s
        for (_, _, waited_s), item in zip(ends, stats, strict=True)
        if item.num_tokens
    ]
    return {
        "id": ends[0][0].request_id,
        "choices": len(ends),
        "outcome": ",".join(sorted({outcome for _, outcome, _ in ends})),
        "prompt_tokens": sum(request.num_prompt_ids for request, _, _ in ends),
        "cached_tokens": sum(item.num_cached_prompt_tokens for item in stats),
        "output_tokens": num_tokens,
        "queued_ms": _ms(min(waited_s for _, _, waited_s in ends)),
        "ttft_ms": _ms(min(first_s)) if first_s else None,
        "tokens_per_s": round(num_tokens / decode_s, 1) if decode_s else None,
        "tokens_per_step": round(num_tokens / num_steps, 2) if num_steps else None,
        "drafters": sorted({label for request, _, _ in ends for label in request.drafters}),
        "accepted_by": dict(accepted_by),
    }


class RequestLogMiddleware:
    """Tells the log of each HTTP request: what it was, and what it was answered.

    Args:
        app: Who answers.
        log: Who writes.
    """

    def __init__(self, app: ASGIApp, log: RequestLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and watch."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope.get("state", {}).get("request_id", "")
        call = _Call(time.perf_counter(), method=scope["method"], request_id=request_id)

        async def watched_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
            await send(message)

        token = _call.set(call)
        try:
            with structlog.contextvars.bound_contextvars(request_id=request_id):
                await self._app(scope, receive, watched_send)
        except Exception:
            call.status = call.status or 500  # by who catches it further out
            raise
        finally:
            _call.reset(token)
            # The route's own path: what stands in the address may be anything.
            call.endpoint = getattr(scope.get("route"), "path", "unknown")
            self._log.answered(call)


# -- the server's life ---------------------------------------------------------------------------


def log_event(event: str, **values: Any) -> None:
    """Write a line about the server itself, such as "started" and "stopped"."""
    _log.info(event, **values)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)


__all__ = [
    "RequestLog",
    "RequestLogMiddleware",
    "configure_logging",
    "log_event",
    "render_exception",
    "summary",
]
