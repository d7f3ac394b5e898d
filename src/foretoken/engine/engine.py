"""The engine: takes requests, runs steps, hands out tokens."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from foretoken.core.grammar import GrammarState
from foretoken.core.params import SamplingParams
from foretoken.core.verdict import Exactness
from foretoken.drafters.base import Drafter, RequestView
from foretoken.engine.fit import agree_on_draws, most_sharing, observed_layers
from foretoken.engine.loops import choose_loop
from foretoken.engine.request import Emission, FinishReason, Request
from foretoken.engine.scheduler import Scheduler
from foretoken.engine.sizing import default_mixed_chunk
from foretoken.engine.step import StepParts
from foretoken.engine.text import Decode
from foretoken.errors import ConfigError, RequestError, UnknownNameError, interruption_in
from foretoken.models.adapter import LanguageModel
from foretoken.models.cache import KVCache
from foretoken.planner.base import FixedPlanner, Planner
from foretoken.planner.in_flight import FlightPlanner
from foretoken.planner.plan import Plan
from foretoken.verifiers.base import Verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes of an engine.

    Args:
        max_requests: Requests that run at once; others wait.
        prefill_chunk: Most prompt tokens fed per step, all requests together.
        mixed_chunk: The same in steps in which other requests decode, whose tokens wait for it;
            None for 64 on CPU and as many as `prefill_chunk` elsewhere.
        prefix_caching: Whether requests take over the keys and values of prefixes that others had.
    """

    max_requests: int = 16
    prefill_chunk: int = 512
    mixed_chunk: int | None = None
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in ("max_requests", "prefill_chunk", "mixed_chunk"):
            value = getattr(self, name)
            if value is None and name == "mixed_chunk":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"{name} is an integer >= 1; got {value!r}", hint=f"change {name}"
                )
        if not isinstance(self.prefix_caching, bool):
            raise ConfigError(
                f"prefix_caching is true or false; got {self.prefix_caching!r}",
                hint="change prefix_caching",
            )


CompileGrammar = Callable[[SamplingParams, int], GrammarState | None]
"""Makes the grammar state of a request from its parameters and the length of its prompt."""


class Engine:
    """Serves requests that join and leave at any step, each with its own parameters.

    Args:
        target: The model whose output is wanted.
        cache: Its KV cache.
        drafters: Label to drafter; requests name those they want.
        verifier: The acceptance rule.
        plan: How much to draft at most.
        planner: Who drafts how much in each step; None for everybody, always, all of it.
        flight_planner: How many rows are in flight, where a drafter drafts in flight; None for as
            many as it says.
        decode: Token ids to text; None when there is no tokenizer.
        compile_grammar: Makes the state of a request's grammar; None when there is no way to.
        config: Sizes.

    Attributes:
        parts: What a step is made of; those who measure put watched ones in their place.
        loop: How steps follow one another.

    Raises:
        ConfigError: A drafter cannot draw siblings in a way that the verifier takes, or drafters
            do not go together.
    """

    def __init__(  # noqa: PLR0913 - one parameter is one part
        self,
        target: LanguageModel,
        cache: KVCache,
        drafters: Mapping[str, Drafter],
        verifier: Verifier,
        plan: Plan,
        *,
        planner: Planner | None = None,
        flight_planner: FlightPlanner | None = None,
        decode: Decode | None = None,
        compile_grammar: CompileGrammar | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        config = config or EngineConfig()
        self.cache = cache
        self.drafters = dict(drafters)
        scheduler = Scheduler(
            cache,
            plan,
            max_requests=config.max_requests,
            prefill_chunk=config.prefill_chunk,
            mixed_chunk=config.mixed_chunk or default_mixed_chunk(target.info.device),
            prefix_caching=config.prefix_caching,
            max_width=verifier.max_width,
        )
        draws = agree_on_draws(plan.verifier, verifier, self.drafters)
        in_flight = [label for label, it in self.drafters.items() if it.needs.in_flight]
        planner = planner or FixedPlanner(aside=in_flight)
        self.parts = StepParts(
            target,
            cache,
            scheduler,
            planner,
            self.drafters,
            verifier,
            draws,
            hidden_layers=observed_layers(self.drafters),
            sharer=most_sharing(self.drafters),
        )
        self.loop = choose_loop(target, self.drafters, plan.verifier, verifier, flight_planner)
        self._decode = decode
        self._compile_grammar = compile_grammar
        self._requests: dict[str, Request] = {}
        self._ids = itertools.count()

    @property
    def exactness(self) -> Exactness:
        """How closely output follows plain decoding, by the target's arithmetic and the rule."""
        return Exactness.weakest(self.parts.target.info.exactness, self.parts.verifier.exactness)

    @property
    def max_requests(self) -> int:
        """Requests that run at once."""
        return self.parts.scheduler.max_requests

    @property
    def num_waiting(self) -> int:
        """Requests that wait, those thrown back for want of KV cache among them."""
        return self.parts.scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Requests that run."""
        return self.parts.scheduler.num_running

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return self.parts.scheduler.num_unfinished

    def add_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        drafters: Sequence[str] | None = None,
        request_id: str | None = None,
        reference_ids: Sequence[int] = (),
        max_nodes: int | None = None,
    ) -> Request:
        """Queue a request; it joins at one of the next steps. Arguments as for `new_request`."""
        request = self.new_request(
            prompt_ids,
            params,
            drafters=drafters,
            request_id=request_id,
            reference_ids=reference_ids,
            max_nodes=max_nodes,
        )
        self.submit(request)
        return request

    def new_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        drafters: Sequence[str] | None = None,
        request_id: str | None = None,
        reference_ids: Sequence[int] = (),
        max_nodes: int | None = None,
    ) -> Request:
        """Build a request with everything checked, without queueing it.

        Args:
            prompt_ids: At least one token id.
            params: What it asks; the defaults if None.
            drafters: Labels of the drafters to use; None for all, empty for plain decoding.
            request_id: Unique among unfinished requests; made up if None.
            reference_ids: A text that the output may copy from, such as a predicted output; for
                drafters, never for the target.
            max_nodes: Most draft tokens per step, no more than the plan's; 0 for plain decoding,
                None for the plan's.

        Raises:
            RequestError: The prompt is empty or too long, a parameter does not fit the model, or
                the request could never fit into the cache.
            UnknownNameError: There is no such drafter.
        """
        params = params or SamplingParams()
        self._check_prompt(prompt_ids, params, reference_ids)
        _check_max_nodes(max_nodes)
        labels = self._labels(drafters, params, has_reference=bool(reference_ids))
        request = Request(
            request_id if request_id is not None else f"request-{next(self._ids)}",
            prompt_ids,
            params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            drafters=labels if max_nodes != 0 else (),
            info=self.parts.target.info,
            decode=self._decode,
            grammar=self._grammar(params, len(prompt_ids)),
            reference_ids=reference_ids,
            max_nodes=max_nodes,
        )
        self.parts.scheduler.check(request)
        return request

    def submit(self, request: Request) -> None:
        """Queue a request that `new_request` built.

        Raises:
            RequestError: Its id belongs to an unfinished request.
        """
        if request.request_id in self._requests:
            raise RequestError(
                f"request id {request.request_id!r} is in use", hint="choose another, or none"
            )
        self.parts.scheduler.add(request)
        self._requests[request.request_id] = request
        self._start_drafters(request, request.drafters)

    def step(self) -> list[Emission]:
        """Advance every running request; finished ones have left when this returns."""
        self._rearrange()
        try:
            emissions = self.loop.step(self.parts) if self.num_unfinished else []
        except BaseException as error:
            # What a drafter that fails at commit has kept from being reported still stands.
            self._release_all([key for key, kept in self._requests.items() if kept.finish_reason])
            interruption = interruption_in(error)
            if interruption is not None:
                raise interruption from None
            raise
        self._release_all([item.request_id for item in emissions if item.finish_reason])
        return emissions

    def abort(self, request_id: str) -> None:
        """End a request now and free what it holds; unknown ones are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            request.finish_reason = FinishReason.ABORT
            self._release(request_id)

    def close(self) -> None:
        """End all requests and close the drafters; nothing comes after it."""
        for request_id in list(self._requests):
            self.abort(request_id)
        for drafter in self.drafters.values():
            drafter.close()

    def _rearrange(self) -> None:
        """Throw back requests that no longer fit and admit those that do."""
        for request in self.parts.scheduler.preempt():
            self.parts.planner.forget(request.request_id)
            self.loop.forget(request.request_id)
            for label in self._caching_drafters(request):
                self.drafters[label].stop(request.request_id)
        for request in self.parts.scheduler.admit():
            if request.stats.num_preemptions:
                self._start_drafters(request, self._caching_drafters(request))

    def _caching_drafters(self, request: Request) -> list[str]:
        """Return its drafters that hold keys and values, which a waiting request may not."""
        return [label for label in request.drafters if self.drafters[label].needs.draft_cache]

    def _start_drafters(self, request: Request, labels: Sequence[str]) -> None:
        """Let drafters learn of a request; it ends if one of them fails."""
        view = RequestView(
            request_id=request.request_id,
            prompt_ids=request.prompt_ids,
            reference_ids=request.reference_ids,
            token_ids=request.token_ids,
        )
        try:
            for label in labels:
                self.drafters[label].start(view)
        except BaseException:
            self.abort(request.request_id)
            raise

    def _release_all(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._release(request_id)

    def _release(self, request_id: str) -> None:
        request = self._requests.pop(request_id)
        self.parts.scheduler.remove(request_id)
        try:
            self.parts.planner.finish(request)
        finally:  # it asks drafters, which may fail
            self.parts.planner.forget(request_id)
            self.loop.forget(request_id)
            for label in request.drafters:
                self.drafters[label].stop(request_id)

    def _labels(
        self, drafters: Sequence[str] | None, params: SamplingParams, *, has_reference: bool
    ) -> tuple[str, ...]:
        """Return the labels of the drafters that a request names and that serve it."""
        labels = tuple(dict.fromkeys(self.drafters if drafters is None else drafters))
        for label in labels:
            if label not in self.drafters:
                raise UnknownNameError("loaded drafter", label, self.drafters)
        labels = tuple(
            label
            for label in labels
            if self.drafters[label].serves(params, has_reference=has_reference)
        )
        max_drafters = self.parts.verifier.max_drafters
        if max_drafters is not None and len(labels) > max_drafters and not params.is_greedy:
            raise RequestError(
                f"the verifier takes drafts of at most {max_drafters} drafter when sampling; got "
                f"{', '.join(labels)}",
                hint="name one drafter, or use the verifier coupled",
            )
        return labels

    def _grammar(self, params: SamplingParams, num_prompt_ids: int) -> GrammarState | None:
        if self._compile_grammar is not None:
            return self._compile_grammar(params, num_prompt_ids)
        if any(text is not None for text in (params.json_schema, params.regex, params.lark)):
            raise RequestError(
                "a grammar needs the model's tokenizer, and this engine has none",
                hint="leave the grammar out, or give the engine compile_grammar",
            )
        return None

    def _check_prompt(
        self, prompt_ids: Sequence[int], params: SamplingParams, reference_ids: Sequence[int]
    ) -> None:
        """Check what only the model can tell about a request."""
        info = self.parts.target.info
        if not prompt_ids:
            raise RequestError("the prompt is empty", hint="give at least one token of text")
        if len(prompt_ids) >= info.context_limit:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens; the model's context holds "
                f"{info.context_limit}, at least one of them for output",
                hint="shorten the prompt",
            )
        self._check_token_ids("the prompt", prompt_ids)
        self._check_token_ids("the reference", reference_ids)
        for name, token_id in params.named_token_ids():
            self._check_token_ids(name, (token_id,))
        if params.stop and self._decode is None:
            raise RequestError(
                "stop texts need a tokenizer, and the model has none",
                hint="leave stop out or add the tokenizer's files to the model directory",
            )

    def _check_token_ids(self, name: str, token_ids: Sequence[int]) -> None:
        vocab_size = self.parts.target.info.vocab_size
        for token_id in token_ids:
            if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"token id {token_id!r} in {name} is outside the model's vocabulary "
                    f"[0, {vocab_size})",
                    hint=f"check the token ids of {name}",
                )


def _check_max_nodes(max_nodes: int | None) -> None:
    is_count = isinstance(max_nodes, int) and not isinstance(max_nodes, bool)
    if max_nodes is not None and (not is_count or max_nodes < 0):
        raise RequestError(
            f"max_nodes is an integer >= 0; got {max_nodes!r}", hint="change max_nodes"
        )
