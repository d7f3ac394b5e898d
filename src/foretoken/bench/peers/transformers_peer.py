"""transformers' own generation: plain, and assisted by a draft model (`assistant_model`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers

from foretoken.bench.peers.base import PeerOutput, PeerSpec
from foretoken.models.quiet import silence_libraries

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TransformersPeer:
    """`model.generate` with SDPA attention; a constant number of draft tokens per step.

    Args:
        model: The target.
        draft: The assistant; None for plain decoding only.
        version: For the record.
    """

    name: ClassVar[str] = "transformers"

    def __init__(self, model: Any, draft: Any, version: str) -> None:
        self.version = version
        self._model = model
        self._draft = draft
        self._num_passes = 0
        model.register_forward_hook(self._count_pass)

    @classmethod
    def load(cls, spec: PeerSpec) -> TransformersPeer:
        """Load both models in this process."""
        silence_libraries()
        torch.set_num_threads(spec.threads)
        model = _load(str(spec.model), spec.dtype)
        draft = _load(str(spec.draft), spec.dtype) if spec.draft is not None else None
        if draft is not None:
            config = draft.generation_config
            config.num_assistant_tokens = spec.num_draft_tokens
            config.num_assistant_tokens_schedule = "constant"
            config.assistant_confidence_threshold = 0.0  # else drafts end where it is unsure
        return cls(model, draft, f"transformers {transformers.__version__}")

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        speculative: bool,
    ) -> PeerOutput:
        """Continue one prompt; sampling takes its numbers from torch's generator."""
        torch.manual_seed(seed)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        inputs = torch.tensor([list(prompt_ids)])
        self._num_passes = 0
        start_s = time.perf_counter()
        output = self._model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            assistant_model=self._draft if speculative else None,
            **sampling,
        )
        seconds = time.perf_counter() - start_s
        return PeerOutput(
            token_ids=output[0, len(prompt_ids) :].tolist(),
            seconds=seconds,
            num_steps=self._num_passes,
        )

    def close(self) -> None:
        """Forget both models."""
        del self._model, self._draft

    def _count_pass(self, *_: Any) -> None:
        self._num_passes += 1


def _load(path: str, dtype: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=DTYPES[dtype], attn_implementation="sdpa", use_safetensors=True
    )
    config = model.generation_config
    config.eos_token_id = None  # goes on after the end of a sequence, as every system here
    config.pad_token_id = 0  # never used with one prompt; stops a warning
    return model.eval()
