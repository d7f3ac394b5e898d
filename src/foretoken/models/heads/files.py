"""The directory that a trained head is kept in: `config.json`, `model.safetensors`, `README.md`.

Directories of other projects are read too; each of their layouts is one file and one line in
`LAYOUTS`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foretoken.errors import ModelError
from foretoken.models.adapter import ModelInfo
from foretoken.models.heads.target import TargetShape, TargetTensors, target_tensors

FORMAT = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"


@dataclass(frozen=True, slots=True)
class HeadFiles:
    """A head as it was read.

    Args:
        kind: What it is: "medusa", "eagle", ...
        target: What it was made for.
        options: The kind's own, as they were saved.
        tensors: By the names of our modules.
        path: Where it was read from.
    """

    kind: str
    target: TargetShape
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    path: str

    def fill(self, module: nn.Module) -> None:
        """Give a module these tensors, in its own dtype.

        Raises:
            ModelError: Tensors are missing, unknown, of another shape or not finite.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ModelError(
                    f"the tensor {name!r} of the head {self.path!r} has the shape "
                    f"{found.get(name, 'none, it is missing')}; its configuration asks for "
                    f"{expected.get(name, 'no such tensor')}",
                    hint="check that config.json and the weights are of one head, and complete",
                )
        for name, tensor in self.tensors.items():
            if not tensor.isfinite().all():
                raise ModelError(
                    f"the tensor {name!r} of the head {self.path!r} holds NaN or infinite numbers",
                    hint="the head is broken; fetch or train it again",
                )
        module.load_state_dict(self.tensors)


# Returns None for a directory that is not of its layout. Arguments: the directory, what its
# config.json says, and the target that the head is wanted for.
Layout = Callable[[Path, Mapping[str, Any], TargetShape], HeadFiles | None]

# Layouts of other projects: name to "module:function", asked in this order.
LAYOUTS = {
    "medusa": "foretoken.models.heads.layout_medusa:read_medusa",
    "speculators": "foretoken.models.heads.layout_speculators:read_speculators",
    "eagle3": "foretoken.models.heads.layout_eagle3:read_eagle3",
}


def read_head(path: str | Path, kind: str, target: ModelInfo | TargetShape) -> HeadFiles:
    """Read a head, of our own layout or a published one.

    Args:
        path: Its directory.
        kind: What it must be.
        target: What it must have been made for.

    Raises:
        ModelError: It cannot be read, is of another kind, or was made for another target.
    """
    shape = TargetShape.of(target) if isinstance(target, ModelInfo) else target
    folder = Path(path).expanduser()
    config = _read_config(folder)
    head = _read_own(folder, config) if "foretoken_head" in config else None
    for place in LAYOUTS.values():
        if head is None:
            module, _, function = place.partition(":")
            layout: Layout = getattr(importlib.import_module(module), function)
            head = layout(folder, config, shape)
    if head is None:
        raise ModelError(
            f"{str(folder)!r} is no head that is known here: its config.json has no "
            f"'foretoken_head', nor is it one of the layouts {', '.join(LAYOUTS)}",
            hint="give the directory of a head, not of a model; a whole model is for draft-model",
        )
    check_head(head, kind, shape)
    return head


def check_head(head: HeadFiles, kind: str, target: TargetShape) -> None:
    """Check that a head is of a kind and made for a target.

    Raises:
        ModelError: It is not.
    """
    if head.kind != kind:
        raise ModelError(
            f"{head.path!r} is a head of the kind {head.kind!r}; {kind!r} is needed here",
            hint=f"use it as the drafter {head.kind}:path={head.path}, or give a head of the "
            f"kind {kind!r}",
        )
    for name in ("vocab_size", "hidden_size", "num_layers"):
        made_for, wanted = getattr(head.target, name), getattr(target, name)
        if made_for and made_for != wanted:
            raise ModelError(
                f"the head {head.path!r} was made for a target with {name} {made_for}"
                f"{_named(head.target)}; this target has {wanted}{_named(target)}",
                hint="serve the target that the head was made for, or train a head for this one",
            )


def save_head(
    tensors: Mapping[str, Tensor],
    kind: str,
    target: TargetShape,
    options: Mapping[str, Any],
    folder: Path,
    card: str,
) -> None:
    """Write a head's directory, made if it is missing; what is there is written over.

    Args:
        tensors: The module's, by name, in the type they are to be kept in.
        kind: What it is.
        target: What it was made for.
        options: The kind's own: all that is needed to build the module again.
        folder: Where to.
        card: Text of its README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(copies, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {
        "foretoken_head": kind,
        "format": FORMAT,
        "target": asdict(target),
        "options": dict(options),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or of a torch file without running its code.

    Raises:
        ModelError: It is missing or broken.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}
    except FileNotFoundError as error:
        raise ModelError(
            f"the head {str(file.parent)!r} has no {file.name}",
            hint="fetch or train the head again; its directory is not complete",
        ) from error
    except Exception as error:  # what safetensors and pickle raise has no common base
        raise _broken(file, error) from error


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        found = "is a file, not a directory" if folder.exists() else "does not exist"
        raise ModelError(
            f"the head's directory {str(folder)!r} {found}", hint="check the drafter's path"
        )
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ModelError(
            f"{str(folder)!r} has no {CONFIG_FILE}, so it is not the directory of a head",
            hint="give a directory that `foretoken train` wrote, or a published head",
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken(file, error) from error
    if not isinstance(config, dict):
        raise _broken(file, ValueError("it is no JSON object"))
    return config


def _read_own(folder: Path, config: Mapping[str, Any]) -> HeadFiles:
    file = folder / CONFIG_FILE
    if config.get("format") != FORMAT:
        raise ModelError(
            f"{str(file)!r} is of format {config.get('format')!r}; this version reads {FORMAT}",
            hint="train the head again with this version, or use the one that made it",
        )
    try:
        target = TargetShape(**config["target"])
        kind, options = str(config["foretoken_head"]), dict(config["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(file, error) from error
    return HeadFiles(kind, target, options, read_tensors(folder / WEIGHTS_FILE), str(folder))


def _broken(file: Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ModelError(
        f"{str(file)!r} cannot be read: {reason}", hint="fetch or train the head again"
    )


def _named(target: TargetShape) -> str:
    return f" ({target.name})" if target.name else ""


__all__ = [
    "LAYOUTS",
    "HeadFiles",
    "Layout",
    "TargetShape",
    "TargetTensors",
    "check_head",
    "read_head",
    "read_tensors",
    "save_head",
    "target_tensors",
]
