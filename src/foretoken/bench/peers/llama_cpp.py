"""Peer: llama.cpp, through the C functions of the package llama-cpp-python.

The package's own `Llama` class copies logits and samples in Python, and its hook for draft models
evaluates the prompt again at each step. So the loops here are those of llama.cpp's own programs,
on its own C functions: the draft model's cache is kept, logits are read where they lie, and only
the rows that are used are computed.

Drafting is greedy at any temperature and a drafted token is kept when the target, sampled as it
would be without a draft, gives the same token: llama.cpp's speculation, whose output is the
target's by construction.
"""

from __future__ import annotations

import ctypes
import importlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from foretoken.bench.peers.base import PeerOutput, PeerSpec, missing_package
from foretoken.bench.peers.checkpoint import check_pair
from foretoken.bench.peers.gguf_export import export_gguf
from foretoken.errors import ConfigError, ModelError

__all__ = ["LlamaCppPeer"]

_BATCH_SIZE = 512
_CONTEXT_STEP = 256  # contexts grow in steps, so that few requests make a new one

_Pick = Callable[["_Context", int], int]

_log: deque[str] = deque(maxlen=8)
_log_functions: list[Any] = []  # C holds the pointer only


class LlamaCppPeer:
    """llama.cpp on the CPU with weights of the spec's dtype; see the module's text.

    The KV cache is float32 beside float32 weights; beside bfloat16 weights it is float16, the
    engine's default, of the same size.

    Args:
        api: The module of the C functions.
        spec: What to load.
        version: Package and version.
    """

    name: ClassVar[str] = "llama.cpp"

    def __init__(self, api: Any, spec: PeerSpec, version: str) -> None:
        self._api = api
        self._spec = spec
        wide = spec.dtype == "float32"
        cache_type = api.GGML_TYPE_F32 if wide else api.GGML_TYPE_F16
        self.version = f"{version}, KV cache {'float32' if wide else 'float16'}"
        check_pair(spec.model, spec.draft)
        files = [export_gguf(spec.model, spec.dtype, spec.work_dir)]
        if spec.draft is not None:
            files.append(export_gguf(spec.draft, spec.dtype, spec.work_dir))
        self._contexts = [_Context(api, str(file), spec.threads, cache_type) for file in files]

    @classmethod
    def load(cls, spec: PeerSpec) -> LlamaCppPeer:
        """Convert and load the models.

        Raises:
            ConfigError: A package is missing, or the model is not a plain Llama.
            VocabularyMismatchError: Draft model and target do not share token ids.
            ModelError: llama.cpp refuses a file.
        """
        try:
            package = importlib.import_module("llama_cpp")
            importlib.import_module("gguf")
        except ImportError as error:
            raise missing_package(cls.name, "llama-cpp-python gguf") from error
        # The package publishes the C functions twice; this module has them all.
        api = importlib.import_module("llama_cpp.llama_cpp")
        _collect_errors(api)
        return cls(api, spec, f"llama-cpp-python {package.__version__}")

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        speculative: bool,
    ) -> PeerOutput:
        """Continue one prompt; see the contract."""
        if speculative and len(self._contexts) == 1:
            raise ConfigError(
                "speculation was asked of llama.cpp without a draft model",
                hint="name a draft model, or compare plain decoding",
            )
        used = self._contexts if speculative else self._contexts[:1]
        for context in used:
            context.prepare(len(prompt_ids) + max_new_tokens)
        sampler = self._new_sampler(temperature, seed) if temperature > 0 else None
        try:
            pick: _Pick = _argmax
            if sampler is not None:
                pick = self._sampled(sampler)
            if speculative:
                num_drafts = self._spec.num_draft_tokens
                return _generate_drafted(used, prompt_ids, max_new_tokens, num_drafts, pick)
            return _generate_plain(used[0], prompt_ids, max_new_tokens, pick)
        finally:
            if sampler is not None:
                self._api.llama_sampler_free(sampler)

    def _sampled(self, sampler: Any) -> _Pick:
        sample = self._api.llama_sampler_sample

        def pick(context: _Context, row: int) -> int:
            # Counted from the end: rows without logits come before those with.
            return int(sample(sampler, context.handle, row - context.num_rows))

        return pick

    def _new_sampler(self, temperature: float, seed: int) -> Any:
        api = self._api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_temp(temperature))
        # The highest seed means "draw one by chance" there.
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_dist(seed % 0xFFFFFFFF))
        return chain

    def close(self) -> None:
        """Free models and caches."""
        for context in self._contexts:
            context.close()
        self._contexts = []


def _collect_errors(api: Any) -> None:
    """Keep llama.cpp's error lines for our messages; it logs a screenful for every load."""
    error_level = 4  # GGML_LOG_LEVEL_ERROR of ggml.h; the package's own table is off by one

    def collect(level: int, text: bytes, _: Any) -> None:
        if level == error_level:
            _log.append(text.decode(errors="replace"))

    _log_functions[:] = [api.llama_log_callback(collect)]
    api.llama_log_set(_log_functions[0], ctypes.c_void_p(0))


class _Context:
    """One model and its KV cache of a single sequence."""

    def __init__(self, api: Any, path: str, threads: int, cache_type: int) -> None:
        self._api = api
        self._threads = threads
        self._cache_type = cache_type
        self._capacity = 0
        self.num_rows = 0
        self.handle: Any = None
        self._batch: Any = None
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise ModelError(
                f"llama.cpp cannot load {path}",
                hint=f"it says: {' '.join(''.join(_log).split()) or 'nothing'}",
            )
        vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._row_type = ctypes.c_float * vocab_size
        self._row_bytes = ctypes.sizeof(self._row_type)

    def prepare(self, num_positions: int) -> None:
        """Forget what was decoded and make room for this many positions; not timed."""
        if num_positions > self._capacity:
            self._free_context()
            self._capacity = -(-num_positions // _CONTEXT_STEP) * _CONTEXT_STEP
            self._new_context()
            self.decode([0], 0, num_rows=1)  # touches every weight
        self._api.llama_memory_clear(self._memory, False)

    def _new_context(self) -> None:
        api = self._api
        parameters = api.llama_context_default_params()
        parameters.n_ctx = self._capacity
        parameters.n_batch = _BATCH_SIZE
        parameters.n_ubatch = _BATCH_SIZE
        parameters.n_outputs_max_per_seq = 0  # verification needs a row for each draft token
        parameters.n_threads = self._threads
        parameters.n_threads_batch = self._threads
        parameters.type_k = self._cache_type
        parameters.type_v = self._cache_type
        self.handle = api.llama_init_from_model(self._model, parameters)
        if not self.handle:
            raise ModelError(
                f"llama.cpp cannot make a context of {self._capacity} positions",
                hint="ask for fewer tokens, or free memory",
            )
        self._memory = api.llama_get_memory(self.handle)
        self._batch = api.llama_batch_init(_BATCH_SIZE, 0, 1)
        for row in range(_BATCH_SIZE):
            self._batch.n_seq_id[row] = 1
            self._batch.seq_id[row][0] = 0
        # Arrays over the batch's own memory: a slice is assigned at once.
        self._tokens = np.ctypeslib.as_array(self._batch.token, (_BATCH_SIZE,))
        self._positions = np.ctypeslib.as_array(self._batch.pos, (_BATCH_SIZE,))
        self._wanted = np.ctypeslib.as_array(self._batch.logits, (_BATCH_SIZE,))

    def decode(self, token_ids: Sequence[int], position: int, *, num_rows: int) -> None:
        """Append tokens to the cache and compute the logits of the last `num_rows` of them."""
        num_tokens = len(token_ids)
        if num_tokens > _BATCH_SIZE:
            self.decode(token_ids[:_BATCH_SIZE], position, num_rows=0)
            self.decode(token_ids[_BATCH_SIZE:], position + _BATCH_SIZE, num_rows=num_rows)
            return
        self._batch.n_tokens = num_tokens
        self._tokens[:num_tokens] = token_ids
        self._positions[:num_tokens] = range(position, position + num_tokens)
        self._wanted[: num_tokens - num_rows] = 0
        self._wanted[num_tokens - num_rows : num_tokens] = 1
        code = self._api.llama_decode(self.handle, self._batch)
        if code != 0:
            raise ModelError(
                f"llama_decode returned {code} for {num_tokens} tokens at position {position}",
                hint="report it with the model and the command",
            )
        self.num_rows = num_rows

    def argmax(self, row: int) -> int:
        """Return the most probable token of a computed row; logits are read where they lie."""
        address = ctypes.addressof(self._api.llama_get_logits(self.handle).contents)
        memory = self._row_type.from_address(address + row * self._row_bytes)
        return int(np.frombuffer(memory, np.float32).argmax())

    def truncate(self, num_positions: int) -> None:
        """Forget the positions from this one on."""
        self._api.llama_memory_seq_rm(self._memory, 0, num_positions, -1)

    def _free_context(self) -> None:
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
            self._batch = None
        if self.handle is not None:
            self._api.llama_free(self.handle)
            self.handle = None

    def close(self) -> None:
        """Free the cache and the model."""
        self._free_context()
        if self._model is not None:
            self._api.llama_model_free(self._model)
            self._model = None


def _argmax(context: _Context, row: int) -> int:
    return context.argmax(row)


def _generate_plain(
    target: _Context, prompt_ids: Sequence[int], max_new_tokens: int, pick: _Pick
) -> PeerOutput:
    start = time.perf_counter()
    target.decode(prompt_ids, 0, num_rows=1)
    made = [pick(target, 0)]
    prefill_s = time.perf_counter() - start
    position = len(prompt_ids)
    while len(made) < max_new_tokens:
        target.decode(made[-1:], position, num_rows=1)
        position += 1
        made.append(pick(target, 0))
    seconds = time.perf_counter() - start
    return PeerOutput(
        token_ids=made, seconds=seconds, prefill_s=prefill_s, num_steps=max_new_tokens
    )


def _generate_drafted(
    contexts: Sequence[_Context],
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    num_draft_tokens: int,
    pick: _Pick,
) -> PeerOutput:
    target, draft = contexts
    num_steps, num_drafted, num_accepted = 1, 0, 0
    start = time.perf_counter()
    target.decode(prompt_ids, 0, num_rows=1)
    tokens = [*prompt_ids, pick(target, 0)]
    prefill_s = time.perf_counter() - start
    end = len(prompt_ids) + max_new_tokens
    # Both caches hold a prefix of `tokens`: the target's all but the last, the draft model's
    # `num_cached`.
    num_cached = 0
    while len(tokens) < end:
        size = min(num_draft_tokens, end - len(tokens) - 1)
        guesses = _draft(draft, tokens, num_cached, size)
        num_verified = len(tokens)
        target.decode([tokens[-1], *guesses], num_verified - 1, num_rows=size + 1)
        kept = _accept(target, guesses, pick)
        tokens += kept
        target.truncate(len(tokens) - 1)
        # The draft model never decoded its last guess.
        num_cached = num_verified + min(len(kept), size) - 1
        draft.truncate(num_cached)
        num_steps += 1
        num_drafted += size
        num_accepted += len(kept) - 1
    seconds = time.perf_counter() - start
    return PeerOutput(
        token_ids=tokens[len(prompt_ids) :],
        seconds=seconds,
        prefill_s=prefill_s,
        num_steps=num_steps,
        num_draft_tokens=num_drafted,
        num_accepted=num_accepted,
    )


def _draft(draft: _Context, tokens: Sequence[int], num_cached: int, size: int) -> list[int]:
    """Continue `tokens` greedily by `size` tokens; the cache holds the first `num_cached`."""
    guesses: list[int] = []
    fresh = tokens[num_cached:]
    while len(guesses) < size:
        draft.decode(fresh, num_cached, num_rows=1)
        num_cached += len(fresh)
        guesses.append(draft.argmax(0))
        fresh = guesses[-1:]
    return guesses


def _accept(target: _Context, guesses: Sequence[int], pick: _Pick) -> list[int]:
    """Return the guesses that the target repeats, and the target's own token after them."""
    kept: list[int] = []
    for row, guess in enumerate(guesses):
        kept.append(pick(target, row))
        if kept[-1] != guess:
            return kept
    return [*kept, pick(target, len(guesses))]
