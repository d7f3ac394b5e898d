"""Models as modules to train: loaded from a directory, called on token ids, saved."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foretoken.errors import ModelError
from foretoken.models.draft_vocabulary import DraftVocabulary
from foretoken.models.files import context_limit, eos_ids, unreadable
from foretoken.models.loading import load_config, resolve_device
from foretoken.models.packing import check_finite
from foretoken.models.tokenizer import TOKENIZER_FILES

_OTHER_TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json", "chat_template*")


class TrainableModel:
    """A causal language model with weights in float32 that can be trained.

    Args:
        module: As transformers loads it.
        directory: Where it was loaded from; its tokenizer goes wherever the model is saved.
        dtype: Type of the weights there, and wherever the model is saved.
        vocabulary: Of a draft model with fewer tokens than its target: what they are.
    """

    def __init__(
        self,
        module: nn.Module,
        directory: Path,
        dtype: torch.dtype,
        vocabulary: DraftVocabulary | None = None,
    ) -> None:
        self.module = module
        self.directory = directory
        self.dtype = dtype
        self.vocabulary = vocabulary
        self.config = module.config
        self.vocab_size = int(self.config.vocab_size)  # type: ignore[arg-type, union-attr]
        self.context_limit = context_limit(self.config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def embedding(self) -> Tensor:
        """One row per token, [V, D]."""
        weight: Tensor = self.module.get_input_embeddings().weight  # type: ignore[operator]
        return weight

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a sequence."""
        return eos_ids(getattr(self.module, "generation_config", None), self.config)

    @property
    def num_parameters(self) -> int:
        """Distinct parameters."""
        return sum(weight.numel() for weight in self.module.parameters())

    def logits(self, token_ids: Tensor) -> Tensor:
        """Return the logits behind every token, [B, T, V], of rows that may be filled at the right.

        With a vocabulary of its own, there is a column for each of its V' tokens.

        Args:
            token_ids: [B, T], the target's; what stands at the right of a row changes nothing at
                its left.
        """
        if self.vocabulary is not None:
            token_ids = self.vocabulary.t2d.to(token_ids.device)[token_ids]
        output: Tensor = self.module(input_ids=token_ids, use_cache=False).logits
        return output


def last_states(model: TrainableModel, token_ids: Tensor) -> Tensor:
    """Return what the head turns into logits, [B, T, D].

    Args:
        model: Of any family.
        token_ids: [B, T], as for `TrainableModel.logits`.
    """
    states: Tensor = model.module.base_model(  # type: ignore[operator]
        input_ids=token_ids, use_cache=False
    ).last_hidden_state
    return states


def head_logits(model: TrainableModel, states: Tensor) -> Tensor:
    """Return the head's product with states, [..., V]; in some families logits are more than that.

    Args:
        model: Whose head it is.
        states: [..., D].
    """
    logits: Tensor = model.module.get_output_embeddings()(states)  # type: ignore[operator]
    return logits


def compile_layers(model: TrainableModel) -> None:
    """Let torch compile the decoder layers, each when it first runs; weights and names stay.

    Args:
        model: Of a family whose layers are in a list called layers.
    """
    stack: Any = model.module.base_model
    for layer in stack.layers:
        layer.compile()


def load_trainable(path: str | Path, *, device: str = "auto") -> TrainableModel:
    """Load a causal language model to be trained.

    Args:
        path: A directory written by `save_pretrained`.
        device: A torch device, or "auto": CUDA where there is one, else CPU.

    Raises:
        ConfigError: There is no such device here.
        ModelError: The directory is missing, or its files are broken or no causal language model.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        found = "is a file, not a directory" if directory.exists() else "does not exist"
        raise ModelError(f"model directory {str(path)!r} {found}", hint="check the path")
    torch_device = resolve_device(device)
    config = load_config(str(directory))
    from transformers import AutoModelForCausalLM

    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # what transformers and safetensors raise has no common base
        raise unreadable(str(path), error) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"the weights of {str(path)!r} lack {len(missing)} tensors, "
            f"the first is {missing[0]!r}",
            hint="check that config.json and the weights are of one model, and complete",
        )
    check_finite(module, str(path))
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    vocabulary = DraftVocabulary.load(directory)
    return TrainableModel(module.to(torch_device), directory, dtype, vocabulary)


def save_trainable(model: TrainableModel, folder: Path, card: str) -> None:
    """Write a model directory that `load_model` and transformers read.

    Args:
        model: Saved in the type of weights that it was loaded from.
        folder: An empty folder.
        card: Text of its README.md.
    """
    saved = copy.deepcopy(model.module).to(dtype=model.dtype)
    saved.save_pretrained(folder)  # type: ignore[operator]
    if model.vocabulary is not None:
        model.vocabulary.save(folder)
    for pattern in (*TOKENIZER_FILES, *_OTHER_TOKENIZER_FILES):
        for path in model.directory.glob(pattern):
            target = folder / path.name
            if path.is_file() and not target.exists():
                shutil.copyfile(path, target)
    (folder / "README.md").write_text(card, encoding="utf-8")


__all__ = [
    "TrainableModel",
    "compile_layers",
    "head_logits",
    "last_states",
    "load_trainable",
    "save_trainable",
]
