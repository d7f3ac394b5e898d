"""Who runs in a step: continuous batching with chunked prefill."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from foretoken.core.draft import DraftBudget
from foretoken.engine.request import Request
from foretoken.errors import RequestError
from foretoken.models.cache import BLOCK_SIZE, CachedSequence, KVCache
from foretoken.planner.plan import Plan


@dataclass(frozen=True, slots=True)
class Work:
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
        sampler = self.request.sampler
        return 0.0 if sampler.is_greedy else sampler.temperature

    @property
    def num_rows(self) -> int:
        """Rows of the pass without a draft."""
        return self.num_known

    @property
    def num_keys(self) -> int:
        """Positions that its rows look back on, themselves included."""
        return self.start + self.num_known


class Scheduler:
    """Admits waiting requests in order and gives every running one its share of each step.

    A request is admitted when the blocks that it can need at most are free of promises, so that
    no running request ever runs out of cache.

    Args:
        cache: The target's.
        plan: How much to draft.
        max_requests: Requests that run at once.
        prefill_chunk: Most prompt tokens fed per step, all requests together.
        max_width: Most children of a node that the verifier takes; None for any number.
    """

    def __init__(
        self,
        cache: KVCache,
        plan: Plan,
        *,
        max_requests: int,
        prefill_chunk: int,
        max_width: int | None = None,
    ) -> None:
        self._max_width = max_width
        self._cache = cache
        self._plan = plan
        self._max_requests = max_requests
        self._prefill_chunk = prefill_chunk
        self._waiting: deque[Request] = deque()
        self._running: dict[str, tuple[Request, CachedSequence]] = {}
        self._num_promised = 0  # blocks

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + len(self._running)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def check(self, request: Request) -> None:
        """Check that a request can be admitted at some time.

        Raises:
            RequestError: It could never fit into the cache.
        """
        needed, capacity = self._num_blocks(request), self._cache.num_blocks
        if needed > capacity:
            raise RequestError(
                f"the request needs up to {needed * BLOCK_SIZE} positions of KV cache; "
                f"there are {capacity * BLOCK_SIZE}",
                hint="lower max_new_tokens, shorten the prompt or raise kv_cache_tokens",
            )

    def schedule(self) -> list[Work]:
        """Return the work of the next step; decoding requests first, then prompts in order."""
        self._admit()
        decoding, prefilling = [], []
        num_left = self._prefill_chunk
        for request, sequence in self._running.values():
            start = sequence.num_cached
            num_unseen = len(request.token_ids) - start
            if num_unseen == 1:
                budget = self._budget(request)
                decoding.append(Work(request, sequence, start, 1, budget))
            elif num_left > 0:
                num_known = min(num_unseen, num_left)
                num_left -= num_known
                is_last = num_known == num_unseen
                prefilling.append(
                    Work(
                        request,
                        sequence,
                        start,
                        num_known,
                        self._budget(request) if is_last else None,
                    )
                )
        return decoding + prefilling

    def remove(self, request_id: str) -> None:
        """Take out a request, waiting or running, and free what it holds."""
        if request_id in self._running:
            request, sequence = self._running.pop(request_id)
            self._num_promised -= self._num_blocks(request)
            self._cache.close(sequence)
        else:
            left = (request for request in self._waiting if request.request_id != request_id)
            self._waiting = deque(left)

    def _budget(self, request: Request) -> DraftBudget:
        return self._plan.budget(request.num_wanted, max_width=self._max_width)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_requests:
            needed = self._num_blocks(self._waiting[0])
            if self._num_promised + needed > self._cache.num_blocks:
                return
            request = self._waiting.popleft()
            request.stats.start()
            self._num_promised += needed
            self._running[request.request_id] = (request, self._cache.open())

    def _num_blocks(self, request: Request) -> int:
        """Return the most blocks a request can hold: all its tokens and the largest draft."""
        num_positions = request.max_tokens + self._plan.node_limit + 1
        return -(-num_positions // BLOCK_SIZE)
