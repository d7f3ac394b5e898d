"""`foretoken serve`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretoken.cli import control_options as controls
from foretoken.cli import options
from foretoken.cli.generate import EXIT_INTERRUPTED, load_llm
from foretoken.cli.terminal import note
from foretoken.errors import ConfigError
from foretoken.server.settings import LOG_FORMATS, ServerSettings

if TYPE_CHECKING:
    from foretoken.engine.llm import LLM

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "structlog")
SERVER_PANEL = "Server"
LIMITS_PANEL = "Limits"
KEYS_VARIABLE = "FORETOKEN_API_KEYS"
DEFAULTS = ServerSettings(model_name="stories")

EXAMPLES = """
[bold]Examples[/]

foretoken serve

foretoken serve --model ./big --drafter draft-model:path=./small --port 8080

FORETOKEN_API_KEYS=$(cat keys.txt) foretoken serve --host 0.0.0.0 --deadline 60
"""


def _server(name: str, metavar: str, help_text: str, **more: Any) -> Any:
    return options._option(name, metavar, help_text, SERVER_PANEL, **more)


def _limits(name: str, metavar: str, help_text: str, **more: Any) -> Any:
    return options._option(name, metavar, help_text, LIMITS_PANEL, **more)


Host = Annotated[
    str,
    _server("--host", "HOST", f"Address to listen on (default {DEFAULTS.host}: this machine)."),
]
Port = Annotated[
    int,
    _server(
        "--port",
        "N",
        f"Port to listen on; 0: a free one (default {DEFAULTS.port}).",
        parser=options._integer,
    ),
]
ApiKeys = Annotated[
    list[str] | None,
    _server(
        "--api-key",
        "KEY",
        f"Ask for this key; may be repeated. Better: {KEYS_VARIABLE}, with commas or lines, which "
        "others on this machine do not see.",
    ),
]
ModelName = Annotated[
    str | None,
    _server("--model-name", "NAME", "What clients call the model (default: as --model)."),
]
CorsOrigins = Annotated[
    list[str] | None,
    _server(
        "--cors-origin",
        "ORIGIN",
        "Let pages of this origin call, as https://app.example; may be repeated (default: none).",
    ),
]
ChatTemplate = Annotated[
    Path | None,
    _server("--chat-template", "FILE", "Jinja template of chats, instead of the model's own."),
]
LogFormat = Annotated[
    str, _server("--log-format", "FORMAT", f"{LOG_FORMATS[0]} (default) or {LOG_FORMATS[1]}.")
]
LogPrompts = Annotated[
    bool, _server("--log-prompts", "", "Let logs hold prompts and outputs (default: no text).")
]
Drain = Annotated[
    float,
    _server(
        "--drain",
        "S",
        f"Seconds that requests have to finish after a stop (default {DEFAULTS.drain_s:g}).",
        parser=options._number,
    ),
]
MaxRequests = Annotated[
    int,
    _limits(
        "--max-requests", "N", "Requests that run at once (default 16).", parser=options._integer
    ),
]
MaxQueue = Annotated[
    int,
    _limits(
        "--max-queue",
        "N",
        f"Requests that wait beyond these (default {DEFAULTS.max_queue}); more are sent away.",
        parser=options._integer,
    ),
]
MaxChoices = Annotated[
    int,
    _limits(
        "--max-choices",
        "N",
        f"Most outputs of one call (default {DEFAULTS.max_choices}).",
        parser=options._integer,
    ),
]
KvCacheTokens = Annotated[
    int | None,
    _limits(
        "--kv-cache-tokens",
        "N",
        "Tokens that the KV cache holds (default: by the free memory).",
        parser=options._integer,
    ),
]
MaxNewTokensLimit = Annotated[
    int | None,
    _limits(
        "--max-new-tokens-limit",
        "N",
        "Most new tokens that a request may ask for (default: the model's context).",
        parser=options._integer,
    ),
]
Deadline = Annotated[
    float | None,
    _limits(
        "--deadline",
        "S",
        "Seconds after which a request is given up (default: never).",
        parser=options._number,
    ),
]
MaxBodyBytes = Annotated[
    int,
    _limits(
        "--max-body-bytes",
        "N",
        f"Largest body of a call (default {DEFAULTS.max_body_bytes}).",
        parser=options._integer,
    ),
]
MaxGrammarBytes = Annotated[
    int,
    _limits(
        "--max-grammar-bytes",
        "N",
        f"Largest JSON schema, regex or Lark grammar (default {DEFAULTS.max_grammar_bytes}).",
        parser=options._integer,
    ),
]
MaxConnections = Annotated[
    int,
    _limits(
        "--max-connections",
        "N",
        f"Open connections (default {DEFAULTS.max_connections}); more are sent away.",
        parser=options._integer,
    ),
]
ReadTimeout = Annotated[
    float,
    _limits(
        "--read-timeout",
        "S",
        "Seconds in which a call's head, and then its body, must arrive (default "
        f"{DEFAULTS.read_timeout_s:g}).",
        parser=options._number,
    ),
]


def serve(
    model: options.Model = "stories",
    drafter: options.Drafters = None,
    verifier: options.Verifier = None,
    max_nodes: options.MaxNodes = None,
    adaptive: options.Adaptive = None,
    plan: options.PlanFile = None,
    host: Host = DEFAULTS.host,
    port: Port = DEFAULTS.port,
    api_key: ApiKeys = None,
    model_name: ModelName = None,
    cors_origin: CorsOrigins = None,
    chat_template: ChatTemplate = None,
    log_format: LogFormat = DEFAULTS.log_format,
    log_prompts: LogPrompts = DEFAULTS.log_prompts,
    drain: Drain = DEFAULTS.drain_s,
    max_requests: MaxRequests = 16,
    max_queue: MaxQueue = DEFAULTS.max_queue,
    max_choices: MaxChoices = DEFAULTS.max_choices,
    max_new_tokens_limit: MaxNewTokensLimit = DEFAULTS.max_new_tokens_limit,
    max_body_bytes: MaxBodyBytes = DEFAULTS.max_body_bytes,
    max_grammar_bytes: MaxGrammarBytes = DEFAULTS.max_grammar_bytes,
    max_connections: MaxConnections = DEFAULTS.max_connections,
    read_timeout: ReadTimeout = DEFAULTS.read_timeout_s,
    deadline: Deadline = DEFAULTS.deadline_s,
    kv_cache_tokens: KvCacheTokens = None,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Serve a model to clients of OpenAI's API, and a page to try it on."""
    if not debug:
        warnings.simplefilter("ignore")
    settings = ServerSettings(
        host=host,
        port=port,
        model_name=model_name or (Path(model).resolve().name if Path(model).is_dir() else model),
        api_keys=_keys(api_key),
        max_queue=max_queue,
        max_choices=max_choices,
        deadline_s=deadline,
        max_body_bytes=max_body_bytes,
        max_grammar_bytes=max_grammar_bytes,
        max_connections=max_connections,
        read_timeout_s=read_timeout,
        max_new_tokens_limit=max_new_tokens_limit,
        cors_origins=tuple(cors_origin or ()),
        log_prompts=log_prompts,
        drain_s=drain,
        chat_template=None
        if chat_template is None
        else controls.read_text("chat-template", chat_template),
        log_format=log_format,
    )
    chosen = {
        "drafters": tuple(drafter or ()),
        "verifier": verifier,
        "max_nodes": max_nodes,
        "adaptive": adaptive,
    }
    machine = {
        "dtype": dtype,
        "device": device,
        "threads": threads,
        "max_requests": max_requests,
        "kv_cache_tokens": kv_cache_tokens,
    }
    _check_packages()
    from foretoken.server.lifecycle import bind, url_of

    # Whether the address is free is known before a large model is loaded, not after.
    with closing(bind(settings.host, settings.port)) as listener:
        llm = load_llm(model, plan, chosen, machine, is_quiet=not debug)
        from foretoken.server.app import run_server
        from foretoken.server.logs import configure_logging

        configure_logging(settings.log_format, log_prompts=settings.log_prompts)
        url = url_of(listener, settings.host)
        has_drained = run_server(
            llm,
            settings,
            listener,
            on_start=lambda: _announce(llm, settings, url),
            on_signal=lambda: _tell(settings, "finishing what runs; once more stops at once"),
        )
    if not has_drained:
        _tell(settings, "stopped at once")
        raise typer.Exit(EXIT_INTERRUPTED)
    llm.close()


def _keys(given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the keys of the command line and of the environment, each once."""
    named = os.environ.get(KEYS_VARIABLE, "").replace(",", " ").split()
    return tuple(dict.fromkeys([*(given or ()), *named]))


def _check_packages() -> None:
    """Check that the extra `server` is installed.

    Raises:
        ConfigError: It is not.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"serve needs packages that are not installed: {', '.join(missing)}",
            hint="pip install 'foretoken[server]'",
        )


def _announce(llm: LLM, settings: ServerSettings, url: str) -> None:
    """Say where the server listens, what it serves and how to ask."""
    drafters = ", ".join(llm.engine.drafters) or "no drafters"
    key = ' -H "Authorization: Bearer $KEY"' if settings.api_keys else ""
    body = f'{{"model": "{settings.model_name}", "prompt": "Once upon a time", "max_tokens": 64}}'
    _tell(
        settings,
        f"serving {settings.model_name} with {drafters} on {url} (a page to try it; Ctrl-C stops)",
        f"curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'",
    )
    if not settings.is_loopback and not settings.api_keys:
        warning = f"everybody who reaches {settings.host} may use it; {KEYS_VARIABLE} sets keys"
        _tell(settings, f"warning: {warning}")


def _tell(settings: ServerSettings, *lines: str) -> None:
    """Print lines for a person, or write them to a log that a program reads."""
    from foretoken.server.logs import log_event

    for line in lines:
        note(line) if settings.log_format == "text" else log_event(line)


__all__ = ["EXAMPLES", "serve"]
