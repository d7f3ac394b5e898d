"""Peer: OpenVINO, through the pipelines of OpenVINO GenAI.

The arithmetic has the spec's dtype: `INFERENCE_PRECISION_HINT` and `KV_CACHE_PRECISION` say so,
because the runtime would else choose bfloat16 by itself where the processor has it, and an 8-bit
cache. Prefix caching is off: the prompts of a benchmark come again in each round.

A pipeline with a draft model always drafts, so plain decoding has a pipeline of its own, and the
target is in memory twice.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from foretoken.bench.peers.base import PeerOutput, PeerSpec, missing_package
from foretoken.bench.peers.checkpoint import check_pair
from foretoken.bench.peers.openvino_export import export_openvino
from foretoken.errors import ConfigError, ForetokenError, ModelError, RequestError

__all__ = ["OpenVinoPeer"]

_PACKAGES = "openvino openvino-genai"
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
# Up to this release, sampling with a draft model goes wrong after a rejected token: at temperature
# 1, target and draft of 0.94M parameters, the target gave the output a mean log-probability of
# -2.4 a token, and -0.55 to output without a draft.
_LAST_CORRUPT = (2026, 4)
_UNUSED_EOS = 0  # a request has to name an end of sequence, also to ignore it
_MAX_BATCHED_TOKENS = 65536  # a prompt is one pass, as in the pipeline's own default


class OpenVinoPeer:
    """OpenVINO GenAI on the CPU; see the module's text.

    Args:
        ov: The module `openvino`.
        genai: The module `openvino_genai`.
        spec: What to load.
    """

    name: ClassVar[str] = "openvino"

    def __init__(self, ov: Any, genai: Any, spec: PeerSpec) -> None:
        release = genai.__version__.partition("-")[0]
        self.version = f"openvino-genai {release}, KV cache {spec.dtype}"
        self._corrupts = tuple(int(part) for part in release.split(".")[:2]) <= _LAST_CORRUPT
        self._ov = ov
        self._genai = genai
        self._num_draft_tokens = spec.num_draft_tokens
        self._drafting: Any = None
        precision = _PRECISIONS[spec.dtype]
        properties = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            "INFERENCE_NUM_THREADS": spec.threads,
            # One request at a time: all threads on it.
            "PERFORMANCE_HINT": "LATENCY",
        }
        check_pair(spec.model, spec.draft)
        target = export_openvino(spec.model, spec.dtype, spec.work_dir)
        self._plain = self._pipeline(target, properties)
        if spec.draft is not None:
            folder = export_openvino(spec.draft, spec.dtype, spec.work_dir)
            draft = genai.draft_model(str(folder), "CPU", **properties)
            self._drafting = self._pipeline(target, {**properties, "draft_model": draft})

    @classmethod
    def load(cls, spec: PeerSpec) -> OpenVinoPeer:
        """Convert and compile the models.

        Raises:
            ConfigError: A package is missing, or the model is not a plain Llama.
            VocabularyMismatchError: Draft model and target do not share token ids.
            ModelError: The runtime refuses the model.
        """
        try:
            ov = importlib.import_module("openvino")
            genai = importlib.import_module("openvino_genai")
        except ImportError as error:
            raise missing_package(cls.name, _PACKAGES) from error
        return cls(ov, genai, spec)

    def _pipeline(self, folder: Path, properties: dict[str, Any]) -> Any:
        scheduler = self._genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = _MAX_BATCHED_TOKENS
        try:
            return self._genai.LLMPipeline(
                str(folder), "CPU", scheduler_config=scheduler, **properties
            )
        except RuntimeError as error:
            raise ModelError(
                f"OpenVINO cannot load {folder.name}: {_last_line(error)}",
                hint="compare with another engine; the model works here",
            ) from error

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        speculative: bool,
    ) -> PeerOutput:
        """Continue one prompt; see the contract.

        Raises:
            RequestError: The engine failed at this request, or is known to answer it wrongly.
        """
        if speculative and self._drafting is None:
            raise ConfigError(
                "speculation was asked of OpenVINO without a draft model",
                hint="name a draft model, or compare plain decoding",
            )
        if speculative and temperature > 0 and self._corrupts:
            release = self.version.partition(",")[0]
            reason = f"{release} keeps wrong tokens after a rejection; its speed would mean nothing"
            raise _failed(speculative, temperature, reason)
        pipeline = self._drafting if speculative else self._plain
        config = self._config(max_new_tokens, temperature, seed, speculative)
        ids = self._ov.Tensor(np.asarray([prompt_ids], dtype=np.int64))
        start = time.perf_counter()
        try:
            result = pipeline.generate(ids, config)
        except RuntimeError as error:
            raise _failed(speculative, temperature, _last_line(error)) from error
        seconds = time.perf_counter() - start
        token_ids = [int(token) for token in result.tokens[0]]
        if len(token_ids) != max_new_tokens:
            what = f"it made {len(token_ids)} tokens of {max_new_tokens}"
            raise _failed(speculative, temperature, what)
        return _output(token_ids, seconds, result, speculative)

    def _config(self, max_new_tokens: int, temperature: float, seed: int, speculative: bool) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = max_new_tokens
        config.ignore_eos = True
        config.set_eos_token_id(_UNUSED_EOS)
        config.apply_chat_template = False
        if temperature > 0:
            config.do_sample = True
            config.temperature = temperature
            config.rng_seed = seed
        if speculative:
            config.num_assistant_tokens = self._num_draft_tokens
        return config

    def close(self) -> None:
        """Free the models."""
        self._plain = self._drafting = None


def _output(token_ids: list[int], seconds: float, result: Any, speculative: bool) -> PeerOutput:
    num_steps, num_accepted = len(token_ids), None
    if speculative:
        # Its own counts of draft tokens leave the last step out; each pass gives one token and
        # those it accepts, so that accepted ones are counted without them.
        metrics = result.extended_perf_metrics.main_model_metrics
        num_steps = len(metrics.raw_metrics.m_durations)
        num_accepted = len(token_ids) - num_steps
    return PeerOutput(
        token_ids=token_ids,
        seconds=seconds,
        prefill_s=result.perf_metrics.get_ttft().mean / 1e3,
        num_steps=num_steps,
        num_accepted=num_accepted,
    )


def _failed(speculative: bool, temperature: float, reason: str) -> ForetokenError:
    mode = "with a draft model" if speculative else "without a draft model"
    return RequestError(
        f"OpenVINO {mode} at temperature {temperature:g}: {reason}",
        hint="the other numbers of this engine stand; this one is missing",
    )


def _last_line(error: RuntimeError) -> str:
    """Return what a message says after its trail of source lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
