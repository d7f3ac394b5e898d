"""EAGLE heads in the format of the speculators library (vllm-project/speculators)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foretoken.errors import ModelError
from foretoken.models.heads.eagle import EAGLE_1, EagleDesign
from foretoken.models.heads.files import HeadFiles, TargetShape, read_tensors
from foretoken.models.heads.layout_eagle3 import (
    eagle3_files,
    layer_sizes,
    verifier_name,
    weights_file,
)

# The beginnings of their names, in the library's earlier and later versions, and ours.
_PREFIXES = {
    "layers.0.": "layer.",
    "transformer.": "layer.",
    "fusion_fc.": "fc.",
    "input_norm.": "fc_norm.",
    "embedding_layernorm.": "embedding_norm.",
    "pre_lm_head_layernorm.": "norm.",
}


def read_speculators(
    folder: Path, config: Mapping[str, Any], target: TargetShape
) -> HeadFiles | None:
    """Read a directory of this layout; None if it is of another.

    Args:
        folder: The directory.
        config: What its config.json says.
        target: Tells which layers an EAGLE-3 head reads, if the files do not.

    Raises:
        ModelError: Files are missing or broken, or hold a head of another kind.
    """
    kind = config.get("speculators_model_type")
    if kind is None:
        return None
    if kind not in ("eagle", "eagle3"):
        raise ModelError(
            f"the speculators checkpoint {str(folder)!r} is of the kind {kind!r}; those of the "
            "kinds 'eagle' and 'eagle3' are read here",
            hint="use another head",
        )
    tensors = {
        _own_name(name): tensor for name, tensor in read_tensors(weights_file(folder)).items()
    }
    layer_config = {"num_hidden_layers": 1, **config.get("transformer_layer_config", {})}
    if kind == "eagle3":
        return eagle3_files(
            folder,
            config,
            layer_config,
            tensors,
            config.get("eagle_aux_hidden_state_layer_ids"),
            target,
            norm_before_residual=bool(config.get("norm_before_residual")),
            has_fc_norm=bool(config.get("norm_before_fc")),
        )
    sizes, vocab_size = layer_sizes(folder, layer_config)
    has_norms = bool(config.get("layernorms"))
    design = EagleDesign(
        variant=EAGLE_1,
        sizes=sizes,
        target_layers=(target.num_layers,),
        has_embedding="embed_tokens.weight" in tensors,
        has_head="lm_head.weight" in tensors,
        has_input_norm=has_norms,
        has_output_norm=has_norms,
        has_embedding_norm=has_norms,
        fc_bias=bool(config.get("fusion_bias")),
    )
    shape = TargetShape(vocab_size, sizes.hidden, num_layers=0, name=verifier_name(config))
    return HeadFiles("eagle", shape, design.as_options(), tensors, str(folder))


def _own_name(name: str) -> str:
    """Return what we call a tensor."""
    for prefix, own in _PREFIXES.items():
        if name.startswith(prefix):
            return own + name[len(prefix) :]
    return name


__all__ = ["read_speculators"]
