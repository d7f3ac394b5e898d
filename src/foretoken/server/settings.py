"""What an operator chooses about the server."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

from foretoken.errors import ConfigError

LOG_FORMATS = ("text", "json")
MAX_PORT = 65_535
MIN_KEY_LENGTH = 8  # shorter ones are guessed in no time


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Address, limits and habits of a server.

    Args:
        model_name: What clients call the model.
        host: Address to listen on; loopback reaches no other machine.
        port: TCP port; 0 takes a free one.
        api_keys: Any of them opens the server; none leaves it open to all who reach it.
        max_queue: Requests that wait beyond the engine's `max_requests`; more are refused with 429.
        max_choices: Most choices of one call, all its prompts together.
        deadline_s: Seconds after which a request is given up, and the most that a request may
            allow itself; None for no bound.
        max_body_bytes: Largest body of a call.
        max_grammar_bytes: Largest JSON schema, regular expression or Lark grammar of a call.
        max_connections: Open connections; more are refused with 503, but for health checks.
        read_timeout_s: Seconds in which a request's head, and then its body, must have arrived;
            the connection of one that has not is closed, with 408.
        max_new_tokens_limit: Most new tokens that a request may ask for; None for the model's
            context.
        cors_origins: Origins, such as "https://app.example", whose pages may call the server;
            "*" for all.
        log_prompts: Whether logs may hold the text of prompts and outputs.
        drain_s: Seconds that running requests have to finish when the server stops.
        chat_template: Jinja template of conversations, instead of the model's own.
        log_format: "text" or "json".

    Raises:
        ConfigError: A value is not allowed.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_queue: int = 128
    max_choices: int = 8
    deadline_s: float | None = None
    max_body_bytes: int = 4 * 2**20
    max_grammar_bytes: int = 32 * 2**10
    max_connections: int = 512
    read_timeout_s: float = 30.0
    max_new_tokens_limit: int | None = None
    cors_origins: tuple[str, ...] = ()
    log_prompts: bool = False
    drain_s: float = 30.0
    chat_template: str | None = None
    log_format: str = "text"

    def __post_init__(self) -> None:
        for name in ("model_name", "host"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise _wrong(name, "a text that is not empty", getattr(self, name))
        _check_integer("port", self.port, 0, MAX_PORT)
        _check_integer("max_queue", self.max_queue, 0)
        for name in ("max_choices", "max_body_bytes", "max_grammar_bytes", "max_connections"):
            _check_integer(name, getattr(self, name), 1)
        if self.max_new_tokens_limit is not None:
            _check_integer("max_new_tokens_limit", self.max_new_tokens_limit, 1)
        self._check_times()
        for key in self.api_keys:
            _check_key(key)
        for origin in self.cors_origins:
            _check_origin(origin)
        if self.log_format not in LOG_FORMATS:
            raise _wrong("log_format", " or ".join(LOG_FORMATS), self.log_format)

    def _check_times(self) -> None:
        if self.deadline_s is not None and not (_is_seconds(self.deadline_s) and self.deadline_s):
            raise _wrong("deadline_s", "a number of seconds above 0, or None", self.deadline_s)
        if not (_is_seconds(self.read_timeout_s) and self.read_timeout_s):
            raise _wrong("read_timeout_s", "a number of seconds above 0", self.read_timeout_s)
        if not _is_seconds(self.drain_s):
            raise _wrong("drain_s", "a number of seconds, at least 0", self.drain_s)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Return whether a host name or address means this machine and no other.

    Args:
        host: Without port; an IPv6 address with or without brackets.
    """
    name = host.strip("[]").lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _is_seconds(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0  # type: ignore[arg-type, operator]


def _check_integer(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < minimum or (maximum is not None and value > maximum):  # type: ignore[operator]
        bound = f">= {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
        raise _wrong(name, f"an integer {bound}", value)


def _check_key(key: object) -> None:
    """Check that a key can stand in a header; the message does not repeat it."""
    is_text = isinstance(key, str) and key.isascii() and key.isprintable() and " " not in key
    if not is_text or len(key) < MIN_KEY_LENGTH:  # type: ignore[arg-type]
        raise ConfigError(
            f"an API key has at least {MIN_KEY_LENGTH} printable ASCII characters and no spaces; "
            "one that was given has not",
            hint="make one with: python -c 'import secrets; print(secrets.token_urlsafe())'",
        )


def _check_origin(origin: object) -> None:
    is_text = isinstance(origin, str)
    scheme, mark, rest = origin.partition("://") if isinstance(origin, str) else ("", "", "")
    if is_text and origin != "*" and not (scheme and mark and rest and "/" not in rest):
        raise _wrong("cors_origins", 'origins such as "https://app.example", or "*"', origin)


def _wrong(name: str, allowed: str, got: object) -> ConfigError:
    return ConfigError(f"{name} is {allowed}; got {got!r}", hint=f"change {name}")


__all__ = ["ServerSettings", "is_loopback"]
