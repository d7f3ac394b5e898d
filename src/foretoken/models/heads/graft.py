"""Layers of a target that draft over the target's own states: as a module to train, and served.

A draft model that is cut from its target makes keys and values of the whole text by itself, and
whatever it gets wrong stays there. The same layers grafted onto the target need that only for the
tokens of a draft: of every token that the target has run, their keys and values are made from the
target's states before these very layers. So each of them reads what it read in the target.

Before training, `fc` hands every layer the states that it read in the target, and all else is the
draft model that is cut from these layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from foretoken.errors import ModelError, UnsupportedModelError
from foretoken.models.decoder_config import is_plain_decoder
from foretoken.models.decoder_loading import TensorFiles
from foretoken.models.heads.eagle_layer import rotate
from foretoken.models.heads.files import HeadFiles
from foretoken.models.loading import load_config
from foretoken.models.loops import LoopShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DRAFT_FOLDER = "draft"  # of the layers as a model, beside the head's own files


@dataclass(frozen=True, slots=True, kw_only=True)
class GraftDesign:
    """How a graft is built; kept as the options of its files.

    Args:
        layers: The target's that it began as, counted from 0, ascending; it reads the states
            before each of them.
        num_steps: How far drafts went in its training; it may draft further.
    """

    layers: tuple[int, ...]
    num_steps: int

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> GraftDesign:
        """Read the options of a graft's files.

        Raises:
            ModelError: They are not those of a graft.
        """
        try:
            return cls(layers=tuple(options["layers"]), num_steps=int(options["num_steps"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"the options of the head are not those of a graft: {error}",
                hint="check its config.json, or train it again",
            ) from error

    def as_options(self) -> dict[str, Any]:
        """Return what `from_options` reads."""
        return asdict(self)


def spread_layers(num_layers: int, num_kept: int) -> tuple[int, ...]:
    """Return so many layers of a target, evenly spread, the last one among them.

    With the target's states before it, a late layer needs none of the early ones.

    Args:
        num_layers: Of the target.
        num_kept: From 1 to as many.
    """
    return tuple(-(-num_layers * place // num_kept) - 1 for place in range(1, num_kept + 1))


def cut_layers(directory: Path, layers: Sequence[int]) -> PreTrainedModel:
    """Return a model of some of a target's layers, with its embedding, final norm and head.

    Args:
        directory: Of the target, with safetensors weights.
        layers: Which, counted from 0, ascending.

    Raises:
        UnsupportedModelError: The target is no plain decoder, or some of its layers see only the
            last tokens.
    """
    from transformers import AutoModelForCausalLM  # which serving does without

    config: Any = copy.deepcopy(load_config(str(directory)))
    check_graftable(config, directory.name)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    dtype = config.dtype
    with torch.random.fork_rng(devices=[]):  # its random weights are overwritten
        module: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    source_of = {name: _name_in_target(name, layers) for name in module.state_dict()}
    files = TensorFiles(directory)
    found = dict(files.read({name for name in source_of.values() if name in files}))
    if config.tie_word_embeddings:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    module.load_state_dict({name: found[source].float() for name, source in source_of.items()})
    module.config.dtype = dtype  # of the target's files, in which it will be saved too
    return module


def check_graftable(config: Any, name: str) -> None:
    """Check that a target's layers can be grafted.

    Args:
        config: The target's.
        name: Of the target, for messages.

    Raises:
        UnsupportedModelError: They cannot.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_window = kinds != {"full_attention"} or (
        config.model_type == "mistral" and config.sliding_window
    )
    if not is_plain_decoder(config) or has_window or LoopShape.of(config):
        raise UnsupportedModelError(
            f"{name}: layers of this architecture cannot be grafted; those of Llama, Mistral, "
            "Qwen 2 and Qwen 3 with full attention can",
            hint="train another kind of head, or a draft model",
        )


def _name_in_target(name: str, layers: Sequence[int]) -> str:
    """Return what a tensor of the cut model is called in its target."""
    prefix = "model.layers."
    if not name.startswith(prefix):
        return name
    place, _, part = name.removeprefix(prefix).partition(".")
    return f"{prefix}{layers[int(place)]}.{part}"


class GraftModule(nn.Module):
    """A graft, to be trained.

    Args:
        design: How it is built.
        model: Its layers, embedding, norm and head, as of `cut_layers`.
        state_size: Columns of the target's states; if as many as the layers', `fc` begins as the
            identity, else with zeros.
    """

    def __init__(self, design: GraftDesign, model: PreTrainedModel, state_size: int) -> None:
        super().__init__()
        self.design = design
        self.model = model
        num_layers, size = len(design.layers), int(model.config.hidden_size)
        self.fc = nn.Linear(num_layers * state_size, num_layers * size, bias=False)
        with torch.no_grad():
            blocks = self.fc.weight.view(num_layers, size, num_layers, state_size)
            blocks.zero_()
            for layer in range(num_layers):
                blocks[layer, :, layer].fill_diagonal_(1.0)

    def forward(self, token_ids: Tensor, hidden: Mapping[int, Tensor], roots: Tensor) -> Tensor:
        """Draft every token of some texts; the tokens read are the texts' own.

        Args:
            token_ids: [B, T].
            hidden: The target's states before each of the layers, [B, T, D of the target].
            roots: For each position the one where its draft begins, [B, T]: from there on it sees
                what the layers make of the tokens, and before only the target's states.

        Returns:
            Normalized outputs, [B, T, D]; `logits` of them says the next tokens.
        """
        base: Any = self.model.model
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        is_own = positions >= roots[..., None]
        mask = torch.cat((~is_own, is_own & (positions <= positions[:, None])), dim=-1)
        x = base.embed_tokens(token_ids)
        turns = [turn[0].chunk(2, dim=-1)[0] for turn in base.rotary_emb(x, positions[None])]
        read = torch.cat([hidden[layer] for layer in self.design.layers], dim=-1)
        for layer, states in zip(
            base.layers, self.fc(read).chunk(len(base.layers), dim=-1), strict=True
        ):
            mixed = _attend(layer, x, states, turns, mask)
            x = x + layer.self_attn.o_proj(mixed)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        outputs: Tensor = base.norm(x)
        return outputs

    def logits(self, outputs: Tensor) -> Tensor:
        """Return logits over the target's tokens, [..., V]."""
        logits: Tensor = self.model.lm_head(outputs)
        return logits

    def save_model(self, folder: Path) -> None:
        """Write the layers as a model, in the type of the target's files."""
        module: Any = copy.deepcopy(self.model)
        module.to(module.config.dtype or torch.float32).save_pretrained(folder)


def _attend(layer: Any, x: Tensor, states: Tensor, turns: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Attend to keys and values of states, then to those of the rows themselves.

    Args:
        layer: Of transformers.
        x: The rows, [B, T, D].
        states: The target's at the same tokens, likewise.
        turns: Cosines and sines of the positions, [T, head_dim / 2] each.
        mask: Which of both each row sees, [B, T, 2 T].
    """
    attention = layer.self_attn
    rows, told = layer.input_layernorm(x), layer.input_layernorm(states)

    def heads(part: str, read: Tensor) -> Tensor:
        made = getattr(attention, f"{part}_proj")(read).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{part}_norm", None)
        made = made if norm is None else norm(made)
        made = made if part == "v" else rotate(made, *(turn.to(made.dtype) for turn in turns))
        return made.transpose(1, 2)

    keys, values = (torch.cat((heads(part, told), heads(part, rows)), dim=2) for part in "kv")
    mixed = functional.scaled_dot_product_attention(
        heads("q", rows), keys, values, attn_mask=mask.unsqueeze(1), enable_gqa=True
    )
    return mixed.transpose(1, 2).flatten(2)


def load_fc(files: HeadFiles, hidden_size: int) -> Tensor:
    """Return the matrix from joined states to those that the layers read.

    Args:
        files: Of the head.
        hidden_size: Columns of its layers.

    Raises:
        ModelError: It is missing, of another shape, or not finite.
    """
    num_layers = len(GraftDesign.from_options(files.options).layers)
    holder = nn.Module()
    holder.fc = nn.Linear(num_layers * files.target.hidden_size, num_layers * hidden_size, False)
    files.fill(holder)
    return holder.fc.weight.detach()


__all__ = [
    "DRAFT_FOLDER",
    "GraftDesign",
    "GraftModule",
    "check_graftable",
    "cut_layers",
    "load_fc",
    "spread_layers",
]
