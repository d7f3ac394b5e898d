"""GET /v1/models: the one model that is served, by the name that clients call it."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from foretoken.engine.llm import LLM
from foretoken.server.errors import UnknownModelError, json_response
from foretoken.server.response_schemas import ERROR_RESPONSES, ModelCard, ModelList
from foretoken.server.settings import ServerSettings


def models_router(llm: LLM, settings: ServerSettings) -> APIRouter:
    """Return the routes of /v1/models."""
    router = APIRouter(tags=["models"])
    card: dict[str, Any] = {
        "id": settings.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "foretoken",
        "max_model_len": llm.info.context_limit,
    }

    async def list_models() -> Response:
        """List the served models."""
        return json_response({"object": "list", "data": [card]})

    async def get_model(model: str) -> Response:
        """Return one served model."""
        if model != settings.model_name:
            raise UnknownModelError(model, settings.model_name)
        return json_response(card)

    for path, endpoint, answer in (
        ("/v1/models", list_models, ModelList),
        ("/v1/models/{model:path}", get_model, ModelCard),
    ):
        responses = {200: {"model": answer}, **ERROR_RESPONSES}
        router.add_api_route(path, endpoint, methods=["GET"], responses=responses)
    return router


__all__ = ["models_router"]
