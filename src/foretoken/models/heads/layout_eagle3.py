"""EAGLE-3 heads as the method's authors publish them (SafeAILab/EAGLE), and as SpecForge does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretoken.errors import ModelError
from foretoken.models.heads.eagle import EAGLE_3, EagleDesign, fused_layers
from foretoken.models.heads.eagle_layer import LayerSizes
from foretoken.models.heads.files import HeadFiles, TargetShape, read_tensors

_ARCHITECTURE = "Eagle3"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_COMPLETE = "check that config.json and the weights are of one head, and complete"


def read_eagle3(folder: Path, config: Mapping[str, Any], target: TargetShape) -> HeadFiles | None:
    """Read a directory of this layout; None if it is of another.

    The layer is `midlayer`; `d2t` tells how far a draft token's id is from the target's, `t2d`
    which of the target's tokens there are. The embedding may be left out: then it is the target's.

    Args:
        folder: The directory.
        config: What its config.json says.
        target: Tells which layers are the low, middle and high ones, if the files do not.

    Raises:
        ModelError: Files are missing or broken, or hold no such head.
    """
    architectures = config.get("architectures") or []
    if "speculators_model_type" in config or not any(_ARCHITECTURE in it for it in architectures):
        return None
    tensors = {}
    for name, tensor in read_tensors(weights_file(folder)).items():
        tensors[name.replace("midlayer.", "layer.", 1)] = tensor
    asked = config.get("eagle_config") or {}
    layers = asked.get("eagle_aux_hidden_state_layer_ids")
    return eagle3_files(folder, config, config, tensors, layers, target)


def eagle3_files(
    folder: Path,
    config: Mapping[str, Any],
    layer_config: Mapping[str, Any],
    tensors: dict[str, Tensor],
    target_layers: Iterable[int] | None,
    target: TargetShape,
    **norms: bool,
) -> HeadFiles:
    """Return an EAGLE-3 head whose layer has our name.

    Args:
        folder: Where it is from.
        config: What the files say of the head.
        layer_config: What they say of its layer, as transformers does.
        tensors: By name; what serves training only among them.
        target_layers: Those whose states it reads; None for the paper's choice.
        target: What it is wanted for.
        norms: Fields of `EagleDesign` that differ from the paper's.

    Raises:
        ModelError: The layer is of another kind, or the tokens that it knows are not told.
    """
    sizes, vocab_size = layer_sizes(folder, layer_config)
    num_said = config.get("draft_vocab_size") or vocab_size
    offsets = tensors.pop("d2t", None)
    for name in ("t2d", "verifier_norm.weight", "verifier_lm_head.weight"):
        tensors.pop(name, None)
    if num_said < vocab_size:
        if offsets is None or offsets.shape != (num_said,):
            found = "none" if offsets is None else f"one of shape {tuple(offsets.shape)}"
            raise ModelError(
                f"the head {str(folder)!r} says {num_said} of {vocab_size} tokens and needs a "
                f"table 'd2t' of them; it has {found}",
                hint=_COMPLETE,
            )
        tensors["draft_ids"] = torch.arange(num_said) + offsets
        _check_ids(folder, tensors["draft_ids"], vocab_size)
    has_embedding = "embed_tokens.weight" in tensors
    hidden_size = config.get("target_hidden_size") or sizes.hidden
    if not has_embedding and hidden_size != sizes.hidden:
        raise ModelError(
            f"the head {str(folder)!r} of width {sizes.hidden} has no 'embed_tokens.weight', and "
            f"its target's is {hidden_size} wide",
            hint=_COMPLETE,
        )
    design = EagleDesign(
        variant=EAGLE_3,
        sizes=sizes,
        target_layers=tuple(target_layers or fused_layers(target.num_layers)),
        draft_vocab_size=num_said if num_said < vocab_size else None,
        has_embedding=has_embedding,
        has_head=True,
        has_output_norm=True,
        **norms,
    )
    shape = TargetShape(vocab_size, hidden_size, num_layers=0, name=verifier_name(config))
    return HeadFiles("eagle", shape, design.as_options(), tensors, str(folder))


def weights_file(folder: Path) -> Path:
    """Return the file of a published head's tensors, or the one that should be there."""
    found = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    return found[0] if found else folder / _WEIGHTS[0]


def layer_sizes(folder: Path, config: Mapping[str, Any]) -> tuple[LayerSizes, int]:
    """Return the sizes of a head's layer, and of its vocabulary; what is not said has defaults.

    Raises:
        ModelError: The layer is none that is known here, or there are several.
    """
    from transformers import LlamaConfig, Qwen3Config

    kinds = {"llama": LlamaConfig, "qwen3": Qwen3Config}
    model_type = config.get("model_type", "llama")
    num_layers = config.get("num_hidden_layers", 1)
    if model_type not in kinds or num_layers != 1:
        raise ModelError(
            f"the head {str(folder)!r} has {num_layers} layers of the kind {model_type!r}; heads "
            f"have one layer of {' or '.join(kinds)}",
            hint="use another head",
        )
    full: Any = kinds[model_type](**config)
    return LayerSizes(
        hidden=full.hidden_size,
        heads=full.num_attention_heads,
        kv_heads=full.num_key_value_heads,
        head_dim=getattr(full, "head_dim", None) or full.hidden_size // full.num_attention_heads,
        intermediate=full.intermediate_size,
        epsilon=full.rms_norm_eps,
        qkv_bias=bool(full.attention_bias),
        qk_norm=model_type == "qwen3",
        rope=dict(full.rope_parameters),
    ), full.vocab_size


def verifier_name(config: Mapping[str, Any]) -> str:
    """Return what the files call the target, if anything."""
    verifier = (config.get("speculators_config") or {}).get("verifier") or {}
    return str(verifier.get("name_or_path") or "")


def _check_ids(folder: Path, draft_ids: Tensor, vocab_size: int) -> None:
    if int(draft_ids.min()) < 0 or int(draft_ids.max()) >= vocab_size:
        raise ModelError(
            f"the table 'd2t' of the head {str(folder)!r} names tokens from {int(draft_ids.min())} "
            f"to {int(draft_ids.max())}; its target has {vocab_size}",
            hint=_COMPLETE,
        )


__all__ = ["read_eagle3"]
