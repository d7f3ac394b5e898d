"""The application: the engine's thread, the routes, and what stands before them."""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable

from fastapi import FastAPI

from foretoken import __version__
from foretoken.core.params import SamplingParams
from foretoken.engine.llm import LLM
from foretoken.server.api import api_router
from foretoken.server.engine_thread import EngineThread
from foretoken.server.errors import add_error_handlers
from foretoken.server.head import HeadAsGet
from foretoken.server.lifecycle import (
    HEALTH_PATHS,
    Server,
    health_router,
    make_lifespan,
    uvicorn_config,
)
from foretoken.server.logs import RequestLog, RequestLogMiddleware
from foretoken.server.metrics import ServerMetrics
from foretoken.server.observer import Observers
from foretoken.server.page import PUBLIC_PATHS, page_router
from foretoken.server.request_id import RequestIdMiddleware
from foretoken.server.security import SecurityHeaders, add_security
from foretoken.server.settings import ServerSettings
from foretoken.server.stats_api import metrics_router


def create_app(llm: LLM, settings: ServerSettings) -> FastAPI:
    """Return the server of a model, for any ASGI server with a lifespan.

    The engine's thread runs from the lifespan's start to its end; nobody else may use the engine
    meanwhile. `app.state.engine_thread` is the `EngineThread`.

    Args:
        llm: The model, its drafters and its engine; closing it is the caller's business.
        settings: What the operator chose.
    """
    metrics = ServerMetrics(settings.model_name)
    decode = llm.tokenizer.decode if llm.tokenizer else None
    log = RequestLog(log_prompts=settings.log_prompts, decode=decode)
    thread = EngineThread(llm, settings, Observers([metrics, log]))
    app = FastAPI(
        title="Foretoken",
        version=__version__,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        lifespan=make_lifespan(thread, settings),
    )
    app.state.engine_thread = thread
    add_error_handlers(app)
    app.include_router(health_router(thread, settings))
    app.include_router(metrics_router(metrics, thread))
    app.include_router(page_router(llm, settings))
    app.include_router(api_router(thread, llm, settings))
    # What is added last comes first.
    app.add_middleware(HeadAsGet)
    add_security(app, settings, HEALTH_PATHS | PUBLIC_PATHS)
    app.add_middleware(RequestLogMiddleware, log=log)
    app.add_middleware(RequestIdMiddleware)
    app.add_middleware(SecurityHeaders)
    return app


def run_server(
    llm: LLM,
    settings: ServerSettings,
    listener: socket.socket,
    *,
    on_start: Callable[[], None] = lambda: None,
    on_signal: Callable[[], None] = lambda: None,
) -> bool:
    """Serve a model until a signal comes; return whether requests were let finish.

    They have `settings.drain_s` for it. A second signal stops at once; the engine may still be in
    a step then, so that closing the model is no longer safe.

    Args:
        llm: The model.
        settings: What the operator chose.
        listener: Where to listen, of `lifecycle.bind`.
        on_start: Called when the server listens.
        on_signal: Called when the first signal comes.
    """
    app = create_app(llm, settings)
    thread: EngineThread = app.state.engine_thread
    config = uvicorn_config(app, settings)
    server = Server(config, thread, on_start=on_start, on_signal=on_signal)
    warm_up(llm)
    # What is loaded stays: a full collection that walks through it takes 0.2 s, in which all wait.
    gc.freeze()
    server.run(sockets=[listener])
    return thread.stop() and not server.force_exit


def warm_up(llm: LLM) -> None:
    """Decode a little in both ways, so that the first client does not wait for code to be loaded.

    Args:
        llm: A model that nobody uses yet.
    """
    ways = [
        SamplingParams(max_new_tokens=8, seed=0, temperature=temperature, ignore_eos=True)
        for temperature in (0.0, 1.0)
    ]
    llm.generate([[0]] * len(ways), ways)


__all__ = ["create_app", "run_server", "warm_up"]
