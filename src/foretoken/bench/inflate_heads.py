"""Heads of a small target, made heads of the widened one that draft the same.

A widened target's states are the small one's, followed by columns that nothing reads. So whatever
a head multiplies states with gets columns of zeros behind its own, and all else stays as it is.
Like the target, the head then has a real model's cost: that of reading wide states.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional

from foretoken.core.options import ComponentSpec
from foretoken.errors import ModelError
from foretoken.models.heads.eagle import EagleDesign
from foretoken.models.heads.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    HeadFiles,
    read_head,
    save_head,
)
from foretoken.models.heads.graft import DRAFT_FOLDER
from foretoken.models.heads.target import TargetShape, target_tensors
from foretoken.models.loading import load_config

RECIPE = 1  # part of the folder's name: a change of the recipe makes new files
OWN_FORMAT = "foretoken_head"  # key in the configuration of heads in our own layout

Widened = tuple[dict[str, Any], dict[str, Tensor]]
"""Options and tensors of a head."""


def inflate_drafter(spec: ComponentSpec, small: Path, wide: Path, folder: Path) -> ComponentSpec:
    """Return a drafter for the widened target: with its head widened too, if it has one.

    Args:
        spec: Of any drafter for the small target.
        small: Directory of the small target.
        wide: Directory of the widened one.
        folder: For the widened head; created if missing.

    Raises:
        ModelError: The head cannot be widened, or is not of the small target.
    """
    path = Path(spec.options.get("path", "")).expanduser()
    if not is_head(path):
        return spec
    made = inflate_head(path, small, wide, folder)
    return ComponentSpec(spec.name, {**spec.options, "path": str(made)})


def is_head(path: Path) -> bool:
    """Whether a directory holds a head in our own layout."""
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and OWN_FORMAT in config


def inflate_head(source: Path, small: Path, wide: Path, folder: Path) -> Path:
    """Write the widened head into a subfolder and return it; one made earlier is returned.

    Args:
        source: Directory of a head of the small target, in our own layout.
        small: Directory of the small target.
        wide: Directory of the widened one.
        folder: Created if missing.

    Raises:
        ModelError: The head cannot be read or widened, or is not of the small target.
    """
    kind = str(json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))[OWN_FORMAT])
    before, after = _shape(small), _shape(wide)
    head = read_head(source, kind, before)
    if kind not in _WIDEN:
        raise _refusal(source, f"is of the kind {kind!r}, not {', '.join(_WIDEN)}")
    target = folder / f"{source.resolve().parent.name}-{kind}-{_digest(source, small, after)}"
    if (target / CONFIG_FILE).is_file():
        return target
    options, tensors = _WIDEN[kind](head, after, str(small))
    folder.mkdir(parents=True, exist_ok=True)
    card = f"# {kind} head\n\nOf a small target, widened with it; for measurements.\n"
    # Made aside and moved when whole: an interrupted run leaves nothing that looks finished.
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        made = Path(draft) / "head"
        save_head(tensors, kind, after, options, made, card)
        if (source / DRAFT_FOLDER).is_dir():  # which reads tokens and states as wide as before
            shutil.copytree(source / DRAFT_FOLDER, made / DRAFT_FOLDER)
        try:
            made.rename(target)
        except OSError:  # another run was faster; what it made is the same
            if not (target / CONFIG_FILE).is_file():
                raise
    return target


def _widen_eagle(head: HeadFiles, wide: TargetShape, small_target: str) -> Widened:
    """Widen what reads the target's states; the layer keeps its width."""
    design, tensors = EagleDesign.from_options(head.options), dict(head.tensors)
    if not design.is_eagle3:
        raise _refusal(head.path, "is of EAGLE-1, whose layer is as wide as its target")
    if design.has_fc_norm:
        raise _refusal(head.path, "normalizes states, by an epsilon that would have to be another")
    before = head.target
    tensors["fc.weight"] = _spread(tensors["fc.weight"], 1, before, wide)
    if not design.has_embedding:  # it shares the target's, which is now wider than its layer
        tensors["embed_tokens.weight"] = target_tensors(small_target).embedding.float()
    layers = tuple(
        wide.num_layers if layer == before.num_layers else layer for layer in design.target_layers
    )
    widened = replace(design, target_layers=layers, has_embedding=True)
    return widened.as_options(), tensors


def _widen_graft(head: HeadFiles, wide: TargetShape, _: str) -> Widened:
    """Widen what reads the target's states; the layers keep their width.

    Layers that a widened target has more come last, so the states before each are where they were.
    """
    return dict(head.options), {
        "fc.weight": _spread(head.tensors["fc.weight"], 1, head.target, wide)
    }


def _widen_linear(head: HeadFiles, wide: TargetShape, _: str) -> Widened:
    """Widen heads without attention: all of their vectors are as wide as states."""
    tensors = {}
    for name, tensor in head.tensors.items():
        widened = _spread(tensor, -1, head.target, wide)
        is_lm_head = name.startswith("lm_heads.")  # which writes one number per token
        if tensor.ndim == 2 and not is_lm_head:
            widened = _spread(widened, 0, head.target, wide)
        tensors[name] = widened
    return dict(head.options), tensors


_WIDEN: dict[str, Callable[[HeadFiles, TargetShape, str], Widened]] = {
    "eagle": _widen_eagle,
    "parallel": _widen_eagle,
    "graft": _widen_graft,
    "medusa": _widen_linear,
    "hydra": _widen_linear,
}


def _spread(tensor: Tensor, axis: int, small: TargetShape, wide: TargetShape) -> Tensor:
    """Return a tensor with zeros behind each vector of the small target's along an axis."""
    vectors = tensor.movedim(axis, -1).unflatten(-1, (-1, small.hidden_size))
    padded = functional.pad(vectors, (0, wide.hidden_size - small.hidden_size))
    return padded.flatten(-2).movedim(-1, axis).contiguous()


def _shape(directory: Path) -> TargetShape:
    config = load_config(str(directory))
    return TargetShape(
        config.vocab_size, config.hidden_size, config.num_hidden_layers, directory.name
    )


def _refusal(path: str | Path, problem: str) -> ModelError:
    return ModelError(
        f"the head {str(path)!r} {problem}, so it cannot be widened",
        hint="leave it out, or train it for the wide target itself",
    )


def _digest(source: Path, small: Path, wide: TargetShape) -> str:
    """Return a text that is another one when anything about the result could be."""
    weights = (source / WEIGHTS_FILE).stat()
    config = (source / CONFIG_FILE).read_text(encoding="utf-8")
    what = [
        RECIPE,
        [str(source.resolve()), weights.st_size, weights.st_mtime_ns, config],
        str(small.resolve()),
        [wide.hidden_size, wide.num_layers],
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:10]


__all__ = ["inflate_drafter", "inflate_head", "is_head"]
