"""A server that answers as `foretoken serve` does, without a model."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

CONTEXT_LIMIT = 64


class FakeServer:
    """Has the methods of a `ServerProcess`; every step takes a while and makes some tokens.

    Args:
        step_s: Seconds of a step.
        tokens_per_step: Of each request.
    """

    def __init__(self, step_s=0.001, tokens_per_step=1):
        self.step_s, self.tokens_per_step = step_s, tokens_per_step
        self.bodies, self.num_running, self.most_running = [], 0, 0
        self.has_room = lambda _: True  # told how many are running
        self.breaks = lambda _: ""  # told the body; how the answer is not as it should be
        self.base_url, self.is_closed = "", False

    # -- what a bench calls ----------------------------------------------------------------------

    def wait(self):
        pass

    def close(self):
        self.is_closed = True

    def cpu_s(self):
        return time.process_time()

    def get(self, path):
        return httpx.get(f"{self.base_url}{path}").raise_for_status().json()

    # -- what it answers -------------------------------------------------------------------------

    async def models(self, _):
        return JSONResponse({"data": [{"id": "target", "max_model_len": CONTEXT_LIMIT}]})

    async def stats(self, _):
        return JSONResponse({"speedup": float(self.tokens_per_step)})

    async def complete(self, request):
        body = await request.json()
        if not self.has_room(self.num_running):
            return JSONResponse({"error": {"message": "full"}}, 429)
        self.bodies.append(body)
        if self.breaks(body) == "status":
            return JSONResponse({"error": {"message": "broken"}}, 500)
        return StreamingResponse(self.events(body), media_type="text/event-stream")

    async def events(self, body):
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            async for event in self.chunks(body):
                yield b"data: " + json.dumps(event).encode() + b"\n\n"
            if self.breaks(body) != "cut":
                yield b"data: [DONE]\n\n"
        finally:
            self.num_running -= 1

    async def chunks(self, body):
        num_wanted, num_steps, num_left = body["max_tokens"], 0, body["max_tokens"]
        while num_left > 0:
            await asyncio.sleep(self.step_s)
            num_steps += 1
            num_new = min(self.tokens_per_step, num_left)
            num_left -= num_new
            text = "".join(f"{body['seed']}," for _ in range(num_new))
            chunk = {"choices": [{"text": text + ("!" if self.breaks(body) == "text" else "")}]}
            if num_left == 0:
                num_drafted = 2 * (num_wanted - num_steps)
                counts = {"num_draft_tokens": num_drafted, "num_accepted": num_wanted - num_steps}
                stats = {"num_steps": num_steps, **counts}
                chunk["foretoken"] = {"stats": [stats], "exactness": "bitwise"}
            yield chunk
            if self.breaks(body) == "event":
                yield {"error": {"message": "it broke"}}
                return
        yield {"choices": [], "usage": {"completion_tokens": num_wanted}}


@contextmanager
def listening(server):
    """Let a fake server answer on a port of its own."""
    app = Starlette(
        routes=[
            Route("/v1/models", server.models),
            Route("/stats", server.stats),
            Route("/v1/completions", server.complete, methods=["POST"]),
        ]
    )
    runner = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.005)
    port = runner.servers[0].sockets[0].getsockname()[1]
    server.base_url = f"http://127.0.0.1:{port}"
    try:
        yield server
    finally:
        runner.should_exit = True
        thread.join(10)
