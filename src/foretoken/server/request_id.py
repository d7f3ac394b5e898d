"""Every answer names its request, also one to a request that made the server fail."""

from __future__ import annotations

import logging
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foretoken.server.errors import describe

HEADER = "X-Request-Id"

_ALLOWED = re.compile(r"[A-Za-z0-9._:-]{1,64}")  # what may go into logs and headers as it stands
_log = logging.getLogger("foretoken.server")


class RequestIdMiddleware:
    """Takes over the id that a client gives its request, or makes one up.

    The id stands in `scope["state"]["request_id"]` and in the answer's header. An exception that
    nobody has caught becomes an answer with status 500 that says nothing about it; the log does.

    Args:
        app: Who answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _ALLOWED.fullmatch(given) else secrets.token_hex(12)
        scope.setdefault("state", {}).update(request_id=request_id, is_id_given=request_id == given)
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            _log.exception("request %s failed", request_id)
            if has_started:  # too late to say so; the connection ends where the answer does
                raise
            await describe(error).response()(scope, receive, send_with_id)


def unique_id(scope: Scope) -> str:
    """Return an id for the engine: a client may give the same one to several requests."""
    state = scope.get("state", {})
    request_id = state.get("request_id", "") or secrets.token_hex(12)
    return f"{request_id}-{secrets.token_hex(4)}" if state.get("is_id_given") else str(request_id)


__all__ = ["HEADER", "RequestIdMiddleware", "unique_id"]
