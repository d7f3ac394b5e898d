"""Who runs in a step: continuous batching with chunked prefill, preemption and shared prefixes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from foretoken.core.draft import DraftBudget
from foretoken.engine.request import Request
from foretoken.errors import RequestError
from foretoken.models.cache import BLOCK_SIZE, CachedSequence, KVCache
from foretoken.planner.plan import Plan

GROWTH_BLOCKS = 2  # per running request, that admitting one more leaves free; see decision 0014


class Work(NamedTuple):
    """One request's share of a step.

    Args:
        request: Whose it is.
        sequence: Its place in the cache.
        start: Position of the first token to be fed: as many are cached.
        num_known: Tokens that stand but are not cached, to be fed now; >= 1.
        budget: Bounds of the draft behind them; None while the prompt goes on.
    """

    request: Request
    sequence: CachedSequence
    start: int
    num_known: int
    budget: DraftBudget | None

    @property
    def request_id(self) -> str:
        """Of its request."""
        return self.request.request_id

    @property
    def drafters(self) -> tuple[str, ...]:
        """Labels of the drafters that its request may have."""
        return self.request.drafters

    @property
    def temperature(self) -> float:
        """Of its request's sampling; 0 if greedy."""
        return self.request.temperature

    @property
    def text(self) -> Request:
        """Its request, which has the text."""
        return self.request

    @property
    def num_rows(self) -> int:
        """Rows of the pass without a draft."""
        return self.num_known

    @property
    def num_keys(self) -> int:
        """Positions that its rows look back on, themselves included."""
        return self.start + self.num_known


@dataclass(slots=True)
class _Running:
    """A running request and its place in the cache."""

    request: Request
    sequence: CachedSequence
    is_shared: bool = False  # whether others may have the blocks of its prompt

    @property
    def num_unseen(self) -> int:
        """Tokens that stand but are not cached; one when it decodes."""
        return len(self.request.token_ids) - self.sequence.num_cached

    @property
    def num_missing_blocks(self) -> int:
        """Blocks that its tokens need and that it does not hold."""
        return _num_blocks(len(self.request.token_ids)) - len(self.sequence.blocks)


class Scheduler:
    """Admits waiting requests in order and gives every running one its share of each step.

    The tokens of all running requests always fit into the cache. Where they grow out of it, first
    drafts shrink, then the request admitted last goes back to the head of the queue: it loses its
    keys and values, never its tokens, which are fed again like a prompt. Between steps the engine
    calls `preempt`, then `admit`; the step calls `schedule`.

    Args:
        cache: The target's.
        plan: How much to draft.
        max_requests: Requests that run at once.
        prefill_chunk: Most prompt tokens fed per step, all requests together.
        mixed_chunk: The same in steps in which others decode; None for no difference.
        prefix_caching: Whether requests take over the keys and values of prefixes that others had.
        max_width: Most children of a node that the verifier takes; None for any number.
    """

    def __init__(
        self,
        cache: KVCache,
        plan: Plan,
        *,
        max_requests: int,
        prefill_chunk: int,
        mixed_chunk: int | None = None,
        prefix_caching: bool = False,
        max_width: int | None = None,
    ) -> None:
        self._max_width = max_width
        self._cache = cache
        self._plan = plan
        self._max_requests = max_requests
        self._prefill_chunk = prefill_chunk
        self._mixed_chunk = min(mixed_chunk or prefill_chunk, prefill_chunk)
        self._prefix_caching = prefix_caching
        self._waiting: deque[Request] = deque()
        self._running: dict[str, _Running] = {}  # in the order of admission
        self._is_full = False  # for the request at the head, since it was last looked at

    @property
    def max_requests(self) -> int:
        """Requests that run at once."""
        return self._max_requests

    @property
    def num_waiting(self) -> int:
        """Requests that wait, those thrown back among them."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that run."""
        return len(self._running)

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return self.num_waiting + self.num_running

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def check(self, request: Request) -> None:
        """Check that a request can be admitted at some time.

        Raises:
            RequestError: It could never fit into the cache.
        """
        needed, capacity = _num_blocks(request.max_tokens), self._cache.num_blocks
        if needed > capacity:
            raise RequestError(
                f"the request needs up to {needed * BLOCK_SIZE} positions of KV cache; "
                f"there are {capacity * BLOCK_SIZE}",
                hint="lower max_new_tokens, shorten the prompt or raise kv_cache_tokens",
            )

    def remove(self, request_id: str) -> None:
        """Take out a request, waiting or running, and free what it holds."""
        self._is_full = False
        if request_id in self._running:
            self._close(self._running.pop(request_id))
        else:
            left = (request for request in self._waiting if request.request_id != request_id)
            self._waiting = deque(left)

    # -- between steps -----------------------------------------------------------------------

    def preempt(self) -> list[Request]:
        """Throw back requests, the last first, until the tokens of the others fit; return them."""
        preempted = []
        while len(self._running) > 1 and self._num_spare() < 0:
            _, last = self._running.popitem()
            self._close(last)
            last.request.stats.num_preemptions += 1
            self._waiting.appendleft(last.request)
            preempted.append(last.request)
            self._is_full = True  # the others have grown into what it leaves
        return preempted

    def admit(self) -> list[Request]:
        """Let waiting requests run, in order, as long as there is room; return them."""
        admitted = []
        while self._waiting and len(self._running) < self._max_requests and not self._is_full:
            running = self._open(self._waiting[0])
            if self._running and not self._has_room(running):
                self._cache.close(running.sequence)
                self._is_full = True
                break
            request = self._waiting.popleft()
            self._running[request.request_id] = running
            request.stats.start(running.sequence.num_cached)
            admitted.append(request)
        return admitted

    def _num_spare(self) -> int:
        """Return how many blocks are left when all tokens of running requests have theirs."""
        num_missing = sum(running.num_missing_blocks for running in self._running.values())
        return self._cache.num_free_blocks - num_missing

    def _has_room(self, candidate: _Running) -> bool:
        """Return whether a request may join: its tokens fit, and everybody can grow a while.

        A request waits for twice the room with each time that it was thrown back, in the end for
        all that those before it may come to need: then it stays.
        """
        num_growth = GROWTH_BLOCKS << candidate.request.stats.num_preemptions
        num_reserved = sum(
            min(num_growth, _num_future_blocks(running.request))
            for running in (*self._running.values(), candidate)
        )
        return self._num_spare() - candidate.num_missing_blocks >= num_reserved

    def _open(self, request: Request) -> _Running:
        params, num_scored = request.params, len(request.prompt_logprobs)
        # The log-probabilities of a prompt come from the rows of all of it.
        is_scored = params.prompt_logprobs is None or num_scored == request.num_prompt_ids - 1
        known = request.token_ids if self._prefix_caching and is_scored else ()
        return _Running(request, self._cache.open(known))

    def _share(self, running: _Running) -> None:
        """Let others that begin with the same tokens have its blocks."""
        if self._prefix_caching:
            self._cache.share(running.sequence, running.request.token_ids)

    def _share_prompts(self, fed: Sequence[_Running], prefilling: Sequence[_Running]) -> None:
        """Let others have the blocks of prompts that have been fed, those that run first."""
        for running in fed:
            self._share(running)
            running.is_shared = True
        if not (fed and self._prefix_caching):
            return
        self._is_full = False
        for running in prefilling:
            found = self._open(running.request).sequence
            if found.num_cached > running.sequence.num_cached:
                found, running.sequence = running.sequence, found
                running.request.stats.start(running.sequence.num_cached)
            self._cache.close(found)

    def _close(self, running: _Running) -> None:
        self._share(running)
        self._cache.close(running.sequence)

    # -- a step ------------------------------------------------------------------------------

    def schedule(self) -> list[Work]:
        """Return the work of the next step; decoding requests first, each in order of admission."""
        decoding: list[_Running] = []
        prefilling: list[_Running] = []
        for running in self._running.values():
            (decoding if running.num_unseen == 1 else prefilling).append(running)
        self._share_prompts([it for it in decoding if not it.is_shared], prefilling)
        fed = [(it, 1) for it in decoding]
        if prefilling:
            chunk = self._mixed_chunk if decoding else self._prefill_chunk
            shares = share_chunk([it.num_unseen for it in prefilling], chunk)
            fed += [pair for pair in zip(prefilling, shares, strict=True) if pair[1]]
        return self._works(fed)

    def _works(self, fed: Sequence[tuple[_Running, int]]) -> list[Work]:
        """Return the works of requests that are fed some tokens; drafts get what room is left."""
        num_spare = self._num_spare()
        works = []
        for running, num_known in fed:
            request, sequence = running.request, running.sequence
            start, num_tokens, budget = sequence.num_cached, len(request.token_ids), None
            if start + num_known == num_tokens:
                num_blocks = _num_blocks(num_tokens)
                num_free = (num_blocks + num_spare) * BLOCK_SIZE - num_tokens
                budget = self._budget(request, num_free)
                num_drafted = 0 if budget.is_empty else budget.max_nodes
                num_spare -= _num_blocks(num_tokens + num_drafted) - num_blocks
            works.append(Work(request, sequence, start, num_known, budget))
        return works

    def _budget(self, request: Request, num_free: int) -> DraftBudget:
        """Return the bounds of a draft for which so many positions of the cache are free."""
        budget = self._plan.budget(request.num_wanted, max_width=self._max_width)
        max_nodes = min(budget.max_nodes, num_free)
        if request.max_nodes is not None:
            max_nodes = min(max_nodes, request.max_nodes)
        return budget if max_nodes == budget.max_nodes else replace(budget, max_nodes=max_nodes)


def share_chunk(num_unseen: Sequence[int], chunk: int) -> list[int]:
    """Return how many tokens of each prompt are fed in a step.

    Half of the chunk is for the oldest prompt, the rest for those that are nearest to their end: a
    short prompt does not wait for long ones before it, and no stream of short ones stops a long
    one. Prompts of one length are fed one after the other.

    Args:
        num_unseen: Tokens of each prompt that are still to be fed, the oldest prompt first.
        chunk: Tokens to be fed at most.
    """
    left = list(num_unseen)
    if left:
        left[0] -= min(left[0], -(-chunk // 2))
    num_free = chunk - (sum(num_unseen) - sum(left))
    for index in sorted(range(len(left)), key=left.__getitem__):
        num_fed = min(left[index], num_free)
        left[index] -= num_fed
        num_free -= num_fed
    return [before - after for before, after in zip(num_unseen, left, strict=True)]


def _num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


def _num_future_blocks(request: Request) -> int:
    """Return how many blocks a request may come to need beyond those of its tokens."""
    return _num_blocks(request.max_tokens) - _num_blocks(len(request.token_ids))
