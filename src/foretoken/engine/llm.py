"""`LLM`: a model, its drafters and an engine behind a few methods."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch

from foretoken.core.params import SamplingParams
from foretoken.engine.build import EngineBuilder, check_count
from foretoken.engine.engine import EngineConfig
from foretoken.engine.names import resolve_model
from foretoken.engine.output import RequestOutput, StreamChunk
from foretoken.engine.request import Emission, FinishReason, Request
from foretoken.errors import ConfigError, RequestError
from foretoken.models.adapter import LanguageModel, ModelInfo
from foretoken.models.loading import load_model
from foretoken.models.tokenizer import Tokenizer
from foretoken.planner.plan import Plan

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A request that is checked and ready to be submitted."""

    index: int
    text: str
    request: Request


class LLM:
    """Generates text with a target model and drafters; the output is the target's own.

    Args:
        model: Directory or hub id of a transformers causal language model, or "stories", the
            pair that comes with the package; or one that is loaded, which several may share as
            long as one runs at a time.
        drafters: "auto", "none", or specs such as "prompt-lookup" or
            "draft-model:path=DIR,max_depth=6"; the drafts of several are merged.
        verifier: Name of the acceptance rule.
        max_nodes: Most draft tokens per request and step; None is 8, or 32 if adaptive.
        adaptive: Whether drafters and sizes are chosen anew as costs and acceptance change, down
            to plain decoding; None says so for the drafters "auto" alone.
        dtype: "auto", "float32", "bfloat16", "float16" or "float64".
        device: "auto", "cpu", "cuda" or another torch device.
        threads: CPU threads of torch in this process; None leaves them.
        max_requests: Requests that run at once.
        prefill_chunk: Most prompt tokens fed per step.
        mixed_chunk: The same in steps in which other requests decode, whose tokens wait for it;
            None for 64 on CPU and as many as `prefill_chunk` elsewhere.
        prefix_caching: Whether prompts take over what earlier ones that begin alike have computed.
        kv_cache_tokens: Positions that the KV cache holds over all requests; None sizes it by
            the free memory.

    Raises:
        ConfigError: An option is not allowed.
        ModelError: A model cannot be loaded or served.
    """

    def __init__(  # noqa: PLR0913 - one parameter is one option of the user's
        self,
        model: str | LanguageModel = "stories",
        *,
        drafters: str | Sequence[str] = "auto",
        verifier: str = "coupled",
        max_nodes: int | None = None,
        adaptive: bool | None = None,
        dtype: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        max_requests: int = 16,
        prefill_chunk: int = 512,
        mixed_chunk: int | None = None,
        prefix_caching: bool = True,
        kv_cache_tokens: int | None = None,
    ) -> None:
        names = (drafters,) if isinstance(drafters, str) else tuple(drafters)
        plan = Plan(drafters=names, verifier=verifier, max_nodes=max_nodes, adaptive=adaptive)
        config = EngineConfig(
            max_requests=max_requests,
            prefill_chunk=prefill_chunk,
            mixed_chunk=mixed_chunk,
            prefix_caching=prefix_caching,
        )
        # Everything that can be wrong about the options is found before a model is loaded.
        name = model if isinstance(model, str) else model.info.name
        builder = EngineBuilder(name, plan, config, kv_cache_tokens)
        check_count("threads", threads)
        if threads is not None:
            torch.set_num_threads(threads)
        path = resolve_model(name)
        target = load_model(path, dtype=dtype, device=device) if isinstance(model, str) else model
        self.info: ModelInfo = target.info
        self.tokenizer = Tokenizer.load(path)
        self.engine = builder.build(target, self.tokenizer, device=device, dtype=dtype)
        self._inboxes: dict[str, deque[Emission]] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        drafters: str | Sequence[str] | None = None,
        references: Prompt | Sequence[Prompt] | None = None,
    ) -> list[RequestOutput]:
        """Return the outputs of all prompts, in their order.

        Args:
            prompts: Texts or token id lists; one alone counts as a list of one.
            params: For all prompts, or one per prompt.
            drafters: Names of loaded drafters to use; None for all, "none" or empty for plain
                decoding.
            references: Texts or token id lists that the outputs may copy from, such as predicted
                outputs or the text that is to be edited: one per prompt, empty for none; one
                alone is for all. They change speed, never tokens.

        Raises:
            RequestError: A prompt or its parameters do not fit; nothing is generated then.
        """
        outputs = self.generate_iter(prompts, params, drafters=drafters, references=references)
        return sorted(outputs, key=lambda output: output.index)

    def generate_iter(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        drafters: str | Sequence[str] | None = None,
        references: Prompt | Sequence[Prompt] | None = None,
    ) -> Iterator[RequestOutput]:
        """Yield each output as soon as it is finished; arguments as for `generate`.

        All prompts are checked before the first step. Closing the iterator ends what still runs.
        """
        prepared = self._prepare(_as_list(prompts), params, drafters, references)
        for item in prepared:
            item.request.streams_text = False
        return self._run(prepared)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        drafters: str | Sequence[str] | None = None,
        reference: Prompt | None = None,
    ) -> Iterator[StreamChunk]:
        """Yield what each step adds to one prompt; the last chunk carries the whole output.

        Closing the iterator ends the request and frees what it holds.
        """
        [prepared] = self._prepare([prompt], params, drafters, reference)
        return self._stream(prepared)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids.

        Raises:
            RequestError: It is a text and the model has no tokenizer.
        """
        if not isinstance(prompt, str):
            return [
                it if type(it) is int or not isinstance(it, Integral) else int(it) for it in prompt
            ]
        if not prompt:
            raise RequestError("the prompt is empty", hint="give at least one character of text")
        if self.tokenizer is None:
            raise RequestError(
                "the prompt is a text, but the model has no tokenizer",
                hint="give token ids, or add the tokenizer's files to the model directory",
            )
        return self.tokenizer.encode(prompt)

    def check_prompt(self, prompt: Prompt, params: SamplingParams) -> None:
        """Check that a prompt could be generated from, without doing so.

        Raises:
            RequestError: It is empty or too long, or a parameter does not fit the model.
        """
        self.engine.new_request(self.encode(prompt), params)

    def close(self) -> None:
        """End what still runs and let drafters save what they keep; nothing comes after it."""
        self.engine.close()

    # -- running -----------------------------------------------------------------------------

    def _prepare(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        drafters: str | Sequence[str] | None,
        references: Prompt | Sequence[Prompt] | None,
    ) -> list[_Prepared]:
        """Check every prompt and build its request; nothing runs yet."""
        prepared = []
        if drafters is not None:
            names = (drafters,) if isinstance(drafters, str) else tuple(drafters)
            drafters = () if names == ("none",) else names
        per_prompt = _params_per_prompt(params, len(prompts))
        copied = _references_per_prompt(references, len(prompts))
        for index, (prompt, wanted) in enumerate(zip(prompts, per_prompt, strict=True)):
            prompt_ids = self.encode(prompt)
            reference_ids = self.encode(copied[index]) if len(copied[index]) else ()
            request = self.engine.new_request(
                prompt_ids, wanted, drafters=drafters, reference_ids=reference_ids
            )
            text = prompt if isinstance(prompt, str) else self._decode(prompt_ids)
            prepared.append(_Prepared(index, text, request))
        return prepared

    def _run(self, prepared: Sequence[_Prepared]) -> Iterator[RequestOutput]:
        by_id = {item.request.request_id: item for item in prepared}
        for emission in self._emissions([item.request for item in prepared]):
            if emission.finish_reason is not None:
                yield self._output(by_id[emission.request_id])

    def _stream(self, prepared: _Prepared) -> Iterator[StreamChunk]:
        for emission in self._emissions([prepared.request]):
            is_last = emission.finish_reason is not None
            yield StreamChunk(
                text=emission.text,
                token_ids=emission.token_ids,
                sources=emission.sources,
                logprobs=emission.logprobs,
                output=self._output(prepared) if is_last else None,
            )

    def _emissions(self, requests: Sequence[Request]) -> Iterator[Emission]:
        """Submit requests and yield what they get until all are finished.

        Several such iterators may be read in turn: a step serves the requests of all of them, so
        its emissions go to inboxes, and each iterator empties its own before it runs a step.
        """
        inbox: deque[Emission] = deque()
        unfinished = {request.request_id for request in requests}
        try:
            for request in requests:
                self._inboxes[request.request_id] = inbox
                self.engine.submit(request)
            # Without the second condition, aborting in the engine would leave nothing to wait for.
            while unfinished and (inbox or self.engine.num_unfinished):
                while inbox:
                    emission = inbox.popleft()
                    if emission.finish_reason is not None:
                        unfinished.remove(emission.request_id)
                    yield emission
                if unfinished:
                    self._step()
        finally:
            for request in requests:
                self._inboxes.pop(request.request_id, None)
                self.engine.abort(request.request_id)

    def _step(self) -> None:
        for emission in self.engine.step():
            inbox = self._inboxes.get(emission.request_id)
            if inbox is not None:  # else somebody drives the engine directly and missed it
                inbox.append(emission)

    def _output(self, prepared: _Prepared) -> RequestOutput:
        request, params = prepared.request, prepared.request.params
        return RequestOutput(
            index=prepared.index,
            prompt=prepared.text,
            prompt_ids=request.prompt_ids,
            text=request.text_stream.text,
            token_ids=request.output_ids,
            finish_reason=request.finish_reason or FinishReason.ABORT,
            seed=request.seed,
            exactness=self.engine.exactness,
            stats=request.stats,
            logprobs=None if params.logprobs is None else request.logprobs,
            prompt_logprobs=None if params.prompt_logprobs is None else request.prompt_logprobs,
            error=request.error,
        )

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids) if self.tokenizer else ""


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and isinstance(prompts[0], Integral):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _params_per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise ConfigError(
            f"there are {num_prompts} prompts and {len(params)} sampling parameters",
            hint="give one for all or one for each",
        )
    return list(params)


def _references_per_prompt(
    references: Prompt | Sequence[Prompt] | None, num_prompts: int
) -> list[Prompt]:
    given: list[Prompt] = [""] if references is None else _as_list(references)
    if len(given) == 1:
        return given * num_prompts
    if len(given) != num_prompts:
        raise ConfigError(
            f"there are {num_prompts} prompts and {len(given)} references",
            hint="give one for all or one for each, an empty one where there is none",
        )
    return given


__all__ = ["LLM", "RequestOutput", "StreamChunk"]
