"""The page at `/`: a playground, and a race of plain and speculative decoding.

Its files are read once, when the router is made, and each has a route of its own: no part of a
request ever becomes a path. Nothing in them is inline or from elsewhere, so that they work under
the Content-Security-Policy of `security.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Response

from foretoken.core.params import SamplingParams

if TYPE_CHECKING:
    from foretoken.engine.llm import LLM
    from foretoken.server.settings import ServerSettings

INDEX = "index.html"
ASSETS = {
    "page.css": "text/css",
    "icon.svg": "image/svg+xml",
    **dict.fromkeys(
        ("app.js", "api.js", "form.js", "tokens.js", "numbers.js", "playground.js", "race.js"),
        "text/javascript",
    ),
}
PUBLIC_PATHS = frozenset({"/", *(f"/page/{name}" for name in ASSETS)})
"""What is served without an API key: the page has to be there before a key can be typed."""

_HEADERS = {"Cache-Control": "no-cache"}  # after an upgrade, all files are of one version


def page_router(llm: LLM, settings: ServerSettings) -> APIRouter:
    """Return the routes of the page, of its files, and of what it has to know of the model."""
    router = APIRouter(include_in_schema=False)
    folder = files("foretoken.server") / "page_files"
    paths = {"/": (INDEX, "text/html")}
    paths |= {f"/page/{name}": (name, media_type) for name, media_type in ASSETS.items()}
    for path, (name, media_type) in paths.items():
        endpoint = _file_endpoint((folder / name).read_bytes(), media_type)
        router.add_api_route(path, endpoint, methods=["GET", "HEAD"])

    config = page_config(llm, settings)

    async def read_config() -> dict[str, Any]:
        return config

    router.add_api_route("/page/config", read_config, methods=["GET"])
    return router


def page_config(llm: LLM, settings: ServerSettings) -> dict[str, Any]:
    """Return what the page shows before the first request.

    Returns:
        The model's name, whether it has a chat template, the drafters that a request can choose
        among, each with where its drafts come from and whether it may know a text from an earlier
        request, the most new tokens that one can ask for, and how closely output follows plain
        decoding.
    """
    plain_request = SamplingParams()
    return {
        "model": settings.model_name,
        "chat": bool(settings.chat_template or (llm.tokenizer and llm.tokenizer.chat_template)),
        "drafters": [
            {
                "name": label,
                "source": drafter.taxonomy.source,
                "recalls": "past outputs" in drafter.taxonomy.source,
            }
            for label, drafter in llm.engine.drafters.items()
            if drafter.serves(plain_request, has_reference=False)
        ],
        "max_new_tokens": settings.max_new_tokens_limit or llm.info.context_limit,
        "exactness": llm.engine.exactness.value,
    }


def _file_endpoint(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def endpoint() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return endpoint


__all__ = ["PUBLIC_PATHS", "page_config", "page_router"]
