"""The routes of OpenAI's API."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from foretoken.engine.llm import LLM
from foretoken.server.answer import Answerer
from foretoken.server.chat import CHAT, chat_call
from foretoken.server.completions import COMPLETION, completion_call, listed_prompts
from foretoken.server.engine_thread import EngineThread
from foretoken.server.models_api import models_router
from foretoken.server.params import check_call
from foretoken.server.request_id import unique_id
from foretoken.server.response_schemas import ChatCompletion, Completion, generation_responses
from foretoken.server.schemas import ChatRequest, CompletionRequest
from foretoken.server.settings import ServerSettings
from foretoken.server.validation import strict_route


def api_router(thread: EngineThread, llm: LLM, settings: ServerSettings) -> APIRouter:
    """Return the routes below /v1.

    Args:
        thread: Runs the engine.
        llm: The model; its tokenizer is used beside the engine.
        settings: The served model's name, and limits.
    """
    num_token_ids = settings.max_choices * llm.info.context_limit + llm.info.vocab_size
    router = APIRouter(route_class=strict_route(num_token_ids), tags=["completions"])
    answerer = Answerer(thread, llm)

    async def create_completion(request: Request, body: CompletionRequest) -> Response:
        """Continue prompts."""
        check_call(body, len(listed_prompts(body)), settings)
        response_id = f"{COMPLETION.prefix}-{unique_id(request.scope)}"
        # Long prompts take a while to become tokens; the event loop has other things to do.
        call = await asyncio.to_thread(completion_call, llm, settings, body, response_id)
        return await answerer.answer(request, call, COMPLETION)

    async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
        """Continue a conversation."""
        check_call(body, 1, settings)
        response_id = f"{CHAT.prefix}-{unique_id(request.scope)}"
        call = await asyncio.to_thread(chat_call, llm, settings, body, response_id)
        return await answerer.answer(request, call, CHAT)

    for path, endpoint, answer in (
        ("/v1/completions", create_completion, Completion),
        ("/v1/chat/completions", create_chat_completion, ChatCompletion),
    ):
        responses = generation_responses(answer)
        router.add_api_route(path, endpoint, methods=["POST"], responses=responses)
    router.include_router(models_router(llm, settings))
    return router


__all__ = ["api_router"]
