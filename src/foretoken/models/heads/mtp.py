"""Multi-token-prediction layers that a model was trained with, run on its states.

The layers are transformers' own: it leaves them in the checkpoint when it loads a model, and builds
them beside it on demand. Here the first of them runs over token trees, with this package's
attention and a cache of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpModel

from foretoken.errors import ModelError, UnsupportedModelError
from foretoken.models.adapter import ForwardOutput, LanguageModel
from foretoken.models.attention import BATCH_KEYWORD, AttentionBackend, attention_for
from foretoken.models.batch import RaggedBatch
from foretoken.models.heads.state_reader import StateReader
from foretoken.models.module_pass import ModulePass, ShapeProbe
from foretoken.models.packing import check_finite, is_packable, pack_module

HINT = "use early-exit or layer-skip, which need no training, or a head made by `foretoken train`"


class ServedMtp(StateReader):
    """A target's first multi-token-prediction layer over ragged batches of token trees.

    Embedding, rotary table and head are the target's own. The row of position i reads the
    target's state there and the token at i + 1, and says what comes at i + 2; a deeper row
    reads the layer's output in place of a state. Models with several layers were trained to use
    each for one depth; the first one is used for all.

    Args:
        target: A model that carries such layers, as `find_layers` makes sure of.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.2.
    """

    def __init__(self, target: LanguageModel) -> None:
        self._module = find_layers(target)
        self._mtp, num_parameters = _load(self._module, target)
        self._embedding = self._module.get_input_embeddings()
        self._head: Any = self._module.get_output_embeddings()
        self.target_layers = (target.info.num_layers,)
        probe = ShapeProbe()
        self._outputs(torch.zeros(2, dtype=torch.int64), torch.arange(2), None, probe)
        self.info = replace(
            target.info,
            num_layers=1,
            kv_layers=tuple(probe.shapes),
            num_parameters=num_parameters,
        )

    def fuse(self, hidden: Mapping[int, Tensor]) -> Tensor:
        """Return what rows read of the target's states: the last ones, [n, D]."""
        return hidden[self.target_layers[0]].to(self.info.device, self.info.dtype)

    @torch.inference_mode()
    def score(self, batch: RaggedBatch, rows: Sequence[int], states: Tensor) -> ForwardOutput:
        """Run the rows of a batch; arguments and result as for `StateReader`."""
        positions = batch.positions + 1  # that of the token that a row reads
        outputs = self._outputs(batch.token_ids, positions, states, attention_for(batch))
        wanted = outputs if len(rows) == batch.num_rows else outputs[list(rows)]
        logits = self._head(wanted) if len(rows) else wanted
        return ForwardOutput(logits=logits, hidden={1: outputs})

    @torch.inference_mode()
    def _outputs(
        self,
        token_ids: Tensor,
        positions: Tensor,
        states: Tensor | None,
        attention: AttentionBackend,
    ) -> Tensor:
        """Run the layer; return what its norm gives, [R, D]."""
        embedded = self._embedding(token_ids.to(self._module.device)[None])
        output: Tensor = self._mtp.forward_layer(
            0,
            torch.zeros_like(embedded) if states is None else states[None],
            positions.to(embedded.device)[None],
            None,
            inputs_embeds=embedded,
            **{BATCH_KEYWORD: attention},
        )
        return output[0]


def find_layers(target: LanguageModel) -> PreTrainedModel:
    """Return a target's module, which carries multi-token-prediction layers.

    Raises:
        UnsupportedModelError: It has none, or transformers does not build them for its kind.
    """
    forward_pass = target.forward_pass
    if isinstance(forward_pass, ModulePass):
        config: Any = forward_pass.module.config.get_text_config(decoder=True)
        if getattr(config, "num_mtp_layers", None):
            return forward_pass.module
    raise UnsupportedModelError(
        f"{target.info.name}: has no multi-token-prediction layers that transformers can build; "
        "those of DeepSeek-V3, GLM-4.5 and Mellum it can",
        hint=HINT,
    )


def _load(module: PreTrainedModel, target: LanguageModel) -> tuple[MtpModel, int]:
    """Read the first layer from the target's own files, in its dtype and on its device.

    Returns:
        The layer, and its number of parameters.
    """
    config: Any = module.config.get_text_config(decoder=True)
    first, name, info = config.num_hidden_layers, target.info.name, target.info
    # transformers finds the layers by patterns that hold the depth of one published model.
    main = copy.copy(module)
    main._keys_to_ignore_on_load_unexpected = [
        r"^(model\.)?mtp\.",
        *(rf"(^|\.)layers\.{first + index}\." for index in range(config.num_mtp_layers)),
    ]
    try:
        mtp = MtpModel.from_pretrained(main, device_map={"": module.device})
    except Exception as error:  # what transformers and the hub raise has no common base
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{name}: its multi-token-prediction layers cannot be read: {reason}",
            hint=f"the checkpoint may have been saved without them; {HINT}",
        ) from error
    # What is the target's must not be converted or packed a second time.
    rotary, mtp.rotary_emb = mtp.rotary_emb, None
    mtp.embed_tokens = mtp.shared_head = None
    mtp.layers = mtp.layers[:1]
    num_parameters = sum(parameter.numel() for parameter in mtp.parameters())
    check_finite(mtp, f"{name}, its multi-token-prediction layers")
    if is_packable(info.device, info.dtype):
        pack_module(mtp, info.dtype)
    mtp = mtp.to(dtype=info.dtype, device=info.device).eval().requires_grad_(False)
    mtp.rotary_emb = rotary
    return mtp, num_parameters


__all__ = ["ServedMtp", "find_layers"]
