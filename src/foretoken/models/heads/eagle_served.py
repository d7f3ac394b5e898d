"""EAGLE heads as they are served: compiled on CPU, through the module elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from foretoken.models.adapter import ForwardOutput, ModelInfo
from foretoken.models.attention import AttentionBackend, AttentionCall, attention_for
from foretoken.models.batch import RaggedBatch
from foretoken.models.decoder_loading import DTYPES as COMPILED_DTYPES
from foretoken.models.files import SMALL_ON_CPU
from foretoken.models.heads.eagle import EagleModule
from foretoken.models.heads.eagle_compiled import CompiledHead
from foretoken.models.heads.fusion import serve_fusion
from foretoken.models.heads.state_reader import StateReader
from foretoken.models.loading import DTYPES
from foretoken.models.pools import LayerShape
from foretoken.models.state_rows import join_columns


class HeadPass(Protocol):
    """Computes a pass: through the module, or compiled."""

    def run(self, batch: RaggedBatch, rows: Sequence[int], states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits wanted, over the tokens that the head can say, and all outputs."""
        ...


class ServedEagle(StateReader):
    """An EAGLE head over ragged batches of token trees.

    Args:
        module: Its tensors, on CPU; it is not to be used afterwards.
        target: What it drafts for.
        dtype: Type to run in, a name in `DTYPES`, or "auto": the target's, except that small heads
            run in float32 on CPU.
        extra_embeddings: Of tokens that the target does not have, [n, D]; their ids come after
            its own.

    Attributes:
        target_layers: Layers of the target whose states it reads.
    """

    def __init__(
        self,
        module: EagleModule,
        target: ModelInfo,
        dtype: str = "auto",
        extra_embeddings: Tensor | None = None,
    ) -> None:
        design = module.design
        num_parameters = sum(parameter.numel() for parameter in module.parameters())
        self.info = replace(
            target,
            hidden_size=design.sizes.hidden,
            num_layers=1,
            num_parameters=num_parameters,
            dtype=_dtype(dtype, num_parameters, target),
            kv_layers=(
                LayerShape(design.sizes.kv_heads, design.sizes.head_dim, design.sizes.head_dim),
            ),
        )
        self.target_layers = design.target_layers
        device, kind = self.info.device, self.info.dtype
        is_compiled = device.type == "cpu" and kind in COMPILED_DTYPES
        # What a compiled pass takes over from another is float32, whatever its matrices are.
        self._state_dtype = torch.float32 if is_compiled else kind
        self._columns: Tensor | None = None
        if design.draft_vocab_size:
            self._columns = module.draft_ids.to(device)
        self._fuse = _fusion(module, device, kind)
        embedding = module.embedding.detach()
        if extra_embeddings is not None:
            embedding = torch.cat((embedding, extra_embeddings.detach()))
        self._pass: HeadPass = (
            CompiledHead(module, kind, module.read_embedding(embedding))
            if is_compiled
            else _ModulePass(module.to(device, kind), embedding.to(device, kind))
        )

    @torch.inference_mode()
    def fuse(self, hidden: Mapping[int, Tensor]) -> Tensor:
        """Return what rows read of the target's states, as `EagleModule.fuse` does."""
        states = self._fuse(join_columns([hidden[layer] for layer in self.target_layers]))
        return states.to(self.info.device, self._state_dtype)

    @torch.inference_mode()
    def score(
        self,
        batch: RaggedBatch,
        rows: Sequence[int],
        states: Tensor,  # [R, D]
    ) -> ForwardOutput:
        """Run the rows of a batch.

        Args:
            batch: Row by row the token after the state that the row reads.
            rows: Those whose logits are wanted.
            states: What each row reads: fused states of the target, or the head's own output.

        Returns:
            Logits of all the target's tokens, minus infinity where the head cannot say them, and
            its output at every row as the hidden states of layer 1.
        """
        logits, outputs = self._pass.run(batch, rows, states)
        if self._columns is not None:
            shape = (len(logits), self.info.vocab_size)
            known = logits
            logits = known.new_full(shape, -math.inf).index_copy_(1, self._columns, known)
        return ForwardOutput(logits=logits, hidden={1: outputs})


class _ModulePass:
    """Runs the module itself, with attention over a cache.

    Args:
        module: The head, where and as it is to run.
        embedding: Of all tokens, those included that are not the target's, [V, D].
    """

    def __init__(self, module: EagleModule, embedding: Tensor) -> None:
        self._module = module
        self._embedding = embedding

    def run(self, batch: RaggedBatch, rows: Sequence[int], states: Tensor) -> tuple[Tensor, Tensor]:
        backend = attention_for(batch)
        outputs = self._module.run(
            functional.embedding(batch.token_ids, self._embedding),
            states,
            batch.positions,
            lambda q, k, v: _attend(backend, q, k, v),
        )
        return self._module.logits(outputs[list(rows)]), outputs


def _attend(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    call = AttentionCall(
        layer=0,
        query=q,
        key=k,
        value=v,
        scaling=q.shape[-1] ** -0.5,
        window=None,
        softcap=None,
        sinks=None,
    )
    return backend.attend(call)


def _fusion(
    module: EagleModule, device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Return what makes of the target's joined states those that rows read."""
    if not module.design.is_eagle3:
        return lambda states: states
    weight, bias, norm = module.fc.weight, module.fc.bias, None
    if module.design.has_fc_norm:
        norm = module.fc_norm.weight.detach()
    return serve_fusion(
        weight.detach().to(device, dtype),
        None if bias is None else bias.detach(),
        norm,
        module.design.sizes.epsilon,
    )


def _dtype(wanted: str, num_parameters: int, target: ModelInfo) -> torch.dtype:
    if wanted != "auto":
        return DTYPES[wanted]
    is_small = target.device.type == "cpu" and num_parameters < SMALL_ON_CPU
    return torch.float32 if is_small else target.dtype
