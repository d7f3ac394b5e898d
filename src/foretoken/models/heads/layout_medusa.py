"""Medusa heads as the method's authors publish them (FasterDecoding/Medusa)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foretoken.errors import ModelError
from foretoken.models.heads.files import HeadFiles, TargetShape, read_tensors

_WEIGHTS = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
# Some files hold the heads under their name in the whole model.
_BLOCK = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.linear\.(weight|bias)")
_LM_HEAD = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.weight")


def read_medusa(folder: Path, config: Mapping[str, Any], target: TargetShape) -> HeadFiles | None:
    """Read a directory of this layout; None if it is of another.

    Of head i, `i.j.linear.weight` and `i.j.linear.bias` are its residual block j, and `i.L.weight`
    its LM head, behind `medusa_num_layers` L blocks. How many heads there are, the weights say:
    the configurations of the best known ones name fewer in `medusa_num_heads`.

    Args:
        folder: The directory.
        config: What its config.json says.
        target: Not needed: all sizes are in the files.

    Raises:
        ModelError: Files are missing or broken, or hold no such heads.
    """
    if "medusa_num_heads" not in config:
        return None
    num_layers = config.get("medusa_num_layers", 1)
    tensors = {}
    for name, tensor in read_tensors(_weights_file(folder)).items():
        tensors[_own_name(folder, name, num_layers)] = tensor
    lm_head = tensors.get("lm_heads.0.weight")
    if lm_head is None or lm_head.dim() != 2:
        raise ModelError(
            f"the Medusa heads {str(folder)!r} have no LM head '0.{num_layers}.weight'",
            hint="check that config.json and the weights are of one head, and complete",
        )
    vocab_size, hidden_size = lm_head.shape
    made_for = str(config.get("base_model_name_or_path") or "")
    shape = TargetShape(vocab_size, hidden_size, num_layers=0, name=made_for)
    num_heads = sum(name.startswith("lm_heads.") for name in tensors)
    options = {"heads": num_heads, "layers": num_layers, "own_lm_heads": True}
    return HeadFiles("medusa", shape, options, tensors, str(folder))


def _weights_file(folder: Path) -> Path:
    found = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    return found[0] if found else folder / _WEIGHTS[0]


def _own_name(folder: Path, name: str, num_layers: int) -> str:
    """Return what we call a tensor."""
    if match := _BLOCK.fullmatch(name):
        return f"blocks.{match[1]}.{match[2]}.linear.{match[3]}"
    match = _LM_HEAD.fullmatch(name)
    if match and int(match[2]) == num_layers:
        return f"lm_heads.{match[1]}.weight"
    raise ModelError(
        f"the Medusa heads {str(folder)!r} hold the tensor {name!r}; known are "
        f"'i.j.linear.weight', 'i.j.linear.bias' and 'i.{num_layers}.weight', behind the "
        f"{num_layers} layers of medusa_num_layers",
        hint="check that config.json and the weights are of one head",
    )


__all__ = ["read_medusa"]
