"""What the server costs beside `LLM.generate`: throughput of a batch, and time to a first token.

    python benchmarks/server_overhead.py [--requests N] [--rounds N] [--output FILE]

One model in one process does the same work in both ways, turn by turn, so that both see the same
machine. Throughput: prompts at once, by `LLM.generate`, and as one HTTP call each over loopback
from a client in a process of its own, not streamed. First token: one prompt at a time, by
`LLM.stream`, and from sending a streamed call to its first chunk with text. The planner is off and
the seeds are fixed, so that both take the same steps; the tokens are compared.

The limits are 5 % of throughput and 5 ms to the first token.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import record
import torch

from foretoken import LLM, SamplingParams
from foretoken.server.app import create_app
from foretoken.server.lifecycle import Server, bind, uvicorn_config
from foretoken.server.settings import ServerSettings

MODEL = "stories"
MAX_REQUESTS = 64
LIMITS = {"throughput_percent": 5.0, "first_token_ms": 5.0}


# -- the client's process ------------------------------------------------------------------------


def run_client(port: int, orders: Connection) -> None:
    """Carry out orders until there are no more: ("all" or "first", bodies) -> seconds, texts.

    The standard library's client, which takes little time: what is measured is the server.
    """
    with ThreadPoolExecutor(MAX_REQUESTS) as pool:
        while (order := orders.recv()) is not None:
            kind, bodies = order
            if kind == "all":
                start_s = time.perf_counter()
                texts = list(pool.map(partial(_whole, port), bodies))
                orders.send(([time.perf_counter() - start_s], texts))
            else:
                with closing(HTTPConnection("127.0.0.1", port)) as connection:
                    results = [_first(connection, body) for body in bodies]
                orders.send(([it[0] for it in results], [it[1] for it in results]))


def _whole(port: int, body: dict[str, Any]) -> str:
    """Return the text of an answer."""
    with closing(HTTPConnection("127.0.0.1", port)) as connection:
        return str(json.loads(_post(connection, body).read())["choices"][0]["text"])


def _first(connection: HTTPConnection, body: dict[str, Any]) -> tuple[float, str]:
    """Return the seconds to the first text of a streamed answer, and all of its text."""
    start_s, first_s, text = time.perf_counter(), 0.0, ""
    for line in _post(connection, body):
        if line.startswith(b"data: {"):
            text += json.loads(line[6:])["choices"][0]["text"]
            first_s = first_s or (time.perf_counter() - start_s if text else 0.0)
    return first_s, text


def _post(connection: HTTPConnection, body: dict[str, Any]) -> HTTPResponse:
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"status {answer.status}: {answer.read()!r}")
    return answer


class Client:
    """A client in a process of its own, so that it takes no time of the server's.

    Args:
        port: Of the server.
    """

    def __init__(self, port: int) -> None:
        self._orders, theirs = multiprocessing.Pipe()
        # Not forked: this process has threads.
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=run_client, args=(port, theirs), daemon=True)
        self._process.start()

    def run(self, kind: str, bodies: Sequence[dict[str, Any]]) -> tuple[list[float], list[str]]:
        """Return seconds and texts."""
        self._orders.send((kind, bodies))
        seconds, texts = self._orders.recv()
        return seconds, texts

    def close(self) -> None:
        """End the process."""
        self._orders.send(None)
        self._process.join(10)


# -- both ways -----------------------------------------------------------------------------------


@contextmanager
def serving(llm: LLM, port: int) -> Iterator[None]:
    """Serve a model in a thread; the engine is free again afterwards."""
    settings = ServerSettings(model_name=MODEL, port=port, drain_s=5.0)
    app = create_app(llm, settings)
    server = Server(uvicorn_config(app, settings), app.state.engine_thread)
    sockets = [bind(settings.host, port)]
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets}, daemon=True)
    thread.start()
    while app.state.engine_thread.state != "ready":
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


def run_batch(llm: LLM, prompts: Sequence[str], params: SamplingParams) -> list[str]:
    """Return the texts of a batch."""
    return [output.text for output in llm.generate(prompts, params)]


def first_offline(llm: LLM, prompt: str, params: SamplingParams) -> float:
    """Return the seconds to the first text of one prompt."""
    start_s, first_s = time.perf_counter(), 0.0
    for chunk in llm.stream(prompt, params):
        first_s = first_s or (time.perf_counter() - start_s if chunk.text else 0.0)
    return first_s


def body_of(prompt: str, params: SamplingParams, *, is_stream: bool) -> dict[str, Any]:
    """Return the call that asks for the same."""
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "ignore_eos": params.ignore_eos,
        "seed": params.seed,
        "stream": is_stream,
    }


class Clock:
    """Seconds by the wall, and of processor time of this process, since it was made."""

    def __init__(self) -> None:
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Return both."""
        return time.perf_counter() - self._wall_s, time.process_time() - self._cpu_s


def measure(llm: LLM, client: Client, port: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the record's numbers."""
    prompts = record.OPENINGS.read_text(encoding="utf-8").splitlines()[: args.requests]
    batch = SamplingParams(max_new_tokens=args.tokens, ignore_eos=True, seed=1)
    short = SamplingParams(max_new_tokens=8, ignore_eos=True, seed=1)
    whole = [body_of(prompt, batch, is_stream=False) for prompt in prompts]
    streamed = [body_of(prompt, short, is_stream=True) for prompt in prompts]
    warm_up = [body_of(prompt, short, is_stream=False) for prompt in prompts]
    offline: list[tuple[float, float, float]] = []  # wall, processor, first token
    served: list[tuple[float, float, float]] = []
    for _ in range(args.rounds + 1):  # the first warms up
        clock = Clock()
        texts = run_batch(llm, prompts, batch)
        times = clock.read()
        firsts_s = [first_offline(llm, prompt, short) for prompt in prompts]
        offline.append((*times, statistics.median(firsts_s)))
        with serving(llm, port):
            # The application is new: connections, threads and what is made at first use.
            client.run("all", warm_up)
            client.run("first", streamed[:1])
            clock = Clock()
            _, served_texts = client.run("all", whole)
            times = clock.read()
            firsts_s, _ = client.run("first", streamed)
            served.append((*times, statistics.median(firsts_s)))
        if served_texts != texts:
            raise SystemExit("the server's texts differ from those of LLM.generate")
    return numbers_of(offline[1:], served[1:], args.requests * args.tokens)


def numbers_of(
    offline: Sequence[tuple[float, float, float]],
    served: Sequence[tuple[float, float, float]],
    num_tokens: int,
) -> dict[str, Any]:
    """Return rates and differences; each round is compared with itself."""
    walls, cpus, firsts = (list(zip(*both, strict=True)) for both in _columns(offline, served))
    return {
        "limits": LIMITS,
        "tokens_per_s": {
            "offline": record.spread([num_tokens / a for a, _ in walls]),
            "server": record.spread([num_tokens / b for _, b in walls]),
        },
        "throughput_overhead_percent": record.spread([100 * (1 - a / b) for a, b in walls]),
        # Of the whole process, the event loop's thread included: hardly moved by other programs.
        "processor_time_overhead_percent": record.spread([100 * (b / a - 1) for a, b in cpus]),
        "first_token_ms": {
            "offline": record.spread([1000 * a for a, _ in firsts]),
            "server": record.spread([1000 * b for _, b in firsts]),
        },
        "first_token_overhead_ms": record.spread([1000 * (b - a) for a, b in firsts]),
    }


def _columns(
    offline: Sequence[tuple[float, float, float]], served: Sequence[tuple[float, float, float]]
) -> Iterator[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Yield what was measured of both ways: wall, processor, first token."""
    yield from zip(zip(*offline, strict=True), zip(*served, strict=True), strict=True)


def main() -> None:
    """Run the benchmark and print or write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=16, help="at once")
    parser.add_argument("--tokens", type=int, default=200, help="per request")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    llm = LLM(MODEL, adaptive=False, max_requests=args.requests, prefix_caching=False)
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    client = Client(port)
    numbers = measure(llm, client, port, args)
    client.close()
    record.write(
        "the server beside LLM.generate, embedded pair, fixed plan",
        {
            "requests": args.requests,
            "tokens_per_request": args.tokens,
            "rounds": args.rounds,
            **numbers,
        },
        args.output,
    )


if __name__ == "__main__":
    main()
