"""What heads know of their target: its sizes, and the tensors that they share with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from foretoken.errors import ForetokenError, ModelError
from foretoken.models.adapter import ModelInfo
from foretoken.models.decoder_loading import TensorFiles, has_safetensors
from foretoken.models.files import unreadable
from foretoken.models.loading import local_directory

# What the families call them; a model inside another one has more in front.
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_HEADS = ("lm_head.weight", "embed_out.weight")
_FINAL_NORMS = (
    "model.norm.weight",
    "language_model.norm.weight",
    "ln_f.weight",
    "decoder.final_layer_norm.weight",
    "gpt_neox.final_layer_norm.weight",
    "norm_f.weight",
)


@dataclass(frozen=True, slots=True)
class TargetShape:
    """What a target must have in common with the one that a head was made for.

    Args:
        vocab_size: V, columns of its logits.
        hidden_size: D, columns of its states.
        num_layers: Its layers. Of a head's own target, 0 where the files do not say.
        name: Path or hub id, for readers; any will do.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    name: str = field(default="", compare=False)

    @classmethod
    def of(cls, info: ModelInfo) -> TargetShape:
        """Return the shape of a loaded target."""
        return cls(info.vocab_size, info.hidden_size, info.num_layers, info.name)


@dataclass(frozen=True, slots=True)
class TargetTensors:
    """Tensors of a target that heads share or begin with, in the type of its files.

    Args:
        embedding: Of its tokens, [V, D].
        head: From its last states to logits, [V, D]; the embedding itself where they are tied.
        norm: Weight of its final norm, [D]; None if it has none.
        directory: Where its files are; None of tensors that are of no files.
    """

    embedding: Tensor
    head: Tensor
    norm: Tensor | None
    directory: Path | None = None


def target_tensors(name_or_path: str) -> TargetTensors:
    """Read from a target's own files what heads share with it.

    Args:
        name_or_path: A directory with safetensors weights, in one file or several, or a hub id.

    Raises:
        ModelError: It has no such files, or they hold no embedding.
    """
    try:
        directory = local_directory(name_or_path)
        if not has_safetensors(directory):
            raise ModelError(
                f"the target {name_or_path!r} has no safetensors weights, from which the head "
                "takes its embedding",
                hint="save the target with save_pretrained",
            )
        return _read(directory)
    except ForetokenError:
        raise
    except Exception as error:  # what safetensors and the hub raise has no common base
        raise unreadable(name_or_path, error) from error


def _read(directory: Path) -> TargetTensors:
    files = TensorFiles(directory)
    embedding = _find(files.names, _EMBEDDINGS)
    if embedding is None:
        raise ModelError(
            f"the weights of {files.name!r} have no tensor named {' or '.join(_EMBEDDINGS)}",
            hint="heads are for decoders that transformers knows; use another drafter",
        )
    head, norm = _find(files.names, _HEADS), _find(files.names, _FINAL_NORMS)
    wanted = {embedding, head or embedding, norm or embedding}
    found = {name: tensor.clone() for name, tensor in files.read(wanted)}
    return TargetTensors(
        embedding=found[embedding],
        head=found[head or embedding],
        norm=None if norm is None else found[norm],
        directory=directory,
    )


def _find(names: Iterable[str], endings: tuple[str, ...]) -> str | None:
    """Return the shortest name with one of these endings: of the text model, not of a part."""
    found = [name for name in names if f".{name}".endswith(tuple(f".{end}" for end in endings))]
    return min(found, key=len, default=None)
