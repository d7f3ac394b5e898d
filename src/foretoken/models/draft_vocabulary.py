"""Draft models that can say only some of the target's tokens, and are faster for it.

Most of a small model is its embedding and its head, and most tokens are rare. Such a draft has
token ids of its own, 0 to V' - 1, for the kept tokens in ascending order. A file beside its weights
maps the target's ids on them, so that towards everybody else it speaks the target's tokens: what is
fed to it may be any token, and those that it does not know stand for the nearest one that it does;
its logits have a column for every token, minus infinity where it has nothing to say.

Sources: FR-Spec, arXiv:2502.14856; VocabTrim, arXiv:2506.22694.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from foretoken.errors import ConfigError, ModelError, UnsupportedModelError
from foretoken.models.adapter import ForwardOutput, LanguageModel, LayerView
from foretoken.models.batch import RaggedBatch, Segment
from foretoken.models.cache import KVCache
from foretoken.models.draft_shape import DraftShape
from foretoken.models.partial import LayerSet

FILE_NAME = "draft_vocabulary.safetensors"
# Of configurations: ids that mean something beside the text.
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NUM_COMPARED = 1 << 24  # similarities at a time


@dataclass(frozen=True, slots=True, eq=False)
class DraftVocabulary:
    """Which of the target's V tokens a draft model has, and what stands for the others.

    Args:
        d2t: For each of the draft's ids the target's, ascending, [V'] int64.
        t2d: For each of the target's ids the draft's: its own or that of a kept token, [V] int64.

    Raises:
        ModelError: They are no such maps.
    """

    d2t: Tensor
    t2d: Tensor

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ModelError(
                f"the draft vocabulary of {len(self.d2t)} of {len(self.t2d)} tokens is broken: "
                f"{problem}",
                hint="make the draft model again",
            )

    def _problem(self) -> str | None:
        d2t, t2d = self.d2t, self.t2d
        if any(ids.dtype != torch.int64 or ids.dim() != 1 or not len(ids) for ids in (d2t, t2d)):
            return "d2t and t2d are int64 vectors of at least one id"
        if (d2t.diff() <= 0).any() or d2t[0] < 0 or d2t[-1] >= len(t2d):
            return f"d2t does not ascend within 0 to {len(t2d) - 1}"
        if t2d.min() < 0 or t2d.max() >= len(d2t):
            return f"t2d leaves 0 to {len(d2t) - 1}"
        if (t2d[d2t] != torch.arange(len(d2t))).any():
            return "t2d does not lead kept tokens back to themselves"
        return None

    @classmethod
    def choose(
        cls,
        texts: Iterable[Sequence[int]],
        size: int,
        embedding: Tensor,  # [V, D]
        required: Collection[int] = (),
    ) -> DraftVocabulary:
        """Keep the tokens that are most frequent in texts; among equals, those of lower ids.

        Args:
            texts: Token ids that the target wrote.
            size: V', how many tokens to keep.
            embedding: The target's; a token that is not kept is read as the kept one whose
                embedding points most nearly where its own does.
            required: Tokens that are kept however rare they are, such as the end of a text.

        Raises:
            ConfigError: More tokens are wanted than there are, or fewer than are required.
        """
        vocab_size = len(embedding)
        required = {token_id for token_id in required if 0 <= token_id < vocab_size}
        if not max(1, len(required)) <= size <= vocab_size:
            raise ConfigError(
                f"a draft vocabulary keeps from {max(1, len(required))} to {vocab_size} of the "
                f"target's tokens; got {size}",
                hint="change vocab in the draft's shape",
            )
        counts = Counter(token_id for text in texts for token_id in text)
        by_rank = sorted(range(vocab_size), key=lambda it: (it not in required, -counts[it], it))
        d2t = torch.tensor(sorted(by_rank[:size]))
        t2d = _nearest(embedding.detach().float(), d2t.to(embedding.device)).cpu()
        t2d[d2t] = torch.arange(size)
        return cls(d2t, t2d)

    @property
    def size(self) -> int:
        """V', tokens of the draft."""
        return len(self.d2t)

    def save(self, folder: Path) -> None:
        """Write the file beside a model's weights."""
        save_file({"d2t": self.d2t.contiguous(), "t2d": self.t2d.contiguous()}, folder / FILE_NAME)

    @classmethod
    def load(cls, path: str | Path) -> DraftVocabulary | None:
        """Read the file beside a model's weights; None if there is none.

        Args:
            path: The model's directory, or its hub id.

        Raises:
            ModelError: There is one, but it is broken.
        """
        file = _find_file(str(path))
        if file is None:
            return None
        try:
            tensors = load_file(file)
            d2t, t2d = tensors["d2t"], tensors["t2d"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelError(
                f"the draft vocabulary of {str(path)!r} cannot be read: {error}",
                hint="make the draft model again",
            ) from error
        return cls(d2t, t2d)

    def write_into(self, config: Any) -> None:
        """Let a model's configuration say the draft's ids and their number; without, no id."""
        config.vocab_size = self.size
        for name in SPECIAL_IDS:
            target_ids = getattr(config, name, None)
            if isinstance(target_ids, int):
                setattr(config, name, self._own_id(target_ids))
            elif target_ids is not None:
                own = [self._own_id(token_id) for token_id in target_ids]
                setattr(config, name, [it for it in own if it is not None] or None)

    def _own_id(self, token_id: int) -> int | None:
        own = int(self.t2d[token_id])
        return own if self.d2t[own] == token_id else None


def check_vocabulary(
    shape: DraftShape, vocabulary: DraftVocabulary | None, vocab_size: int
) -> None:
    """Check that a draft's shape and its vocabulary say the same.

    Raises:
        ConfigError: They do not, or the vocabulary is of another target.
    """
    given = None if vocabulary is None else (vocabulary.size, len(vocabulary.t2d))
    wanted = None if shape.vocab is None else (shape.vocab, vocab_size)
    if given != wanted:
        says = {
            it: "all tokens" if it is None else "{} of {} tokens".format(*it)
            for it in (given, wanted)
        }
        raise ConfigError(
            f"the draft's shape says {says[wanted]}, its vocabulary {says[given]}",
            hint="give a vocabulary if and only if the shape has a size of one",
        )


class ReducedModel(LanguageModel):
    """A draft model with fewer tokens that is fed, and answers in, the target's tokens.

    Args:
        model: Knows its own ids only.
        vocabulary: What they mean.

    Raises:
        ModelError: The vocabulary is of another model.
    """

    def __init__(self, model: LanguageModel, vocabulary: DraftVocabulary) -> None:
        info, vocab_size = model.info, len(vocabulary.t2d)
        if info.vocab_size != vocabulary.size:
            raise ModelError(
                f"{info.name}: {FILE_NAME} is of {vocabulary.size} tokens, the weights of "
                f"{info.vocab_size}",
                hint="make the draft model again",
            )
        eos_ids = frozenset(int(vocabulary.d2t[own]) for own in info.eos_ids)
        super().__init__(replace(info, vocab_size=vocab_size, eos_ids=eos_ids), model._forward_pass)
        self._t2d = vocabulary.t2d.numpy()
        self._d2t = vocabulary.d2t.to(info.device)

    def with_layers(self, layers: LayerSet) -> LayerView:
        """Refuse: it drafts for others, and nobody drafts for it.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError(
            f"{self.info.name} has a reduced vocabulary, so it is a draft model and cannot draft "
            "for itself with some of its layers",
            hint="use the drafters suffix or token-recycling, or another model",
        )

    def batch(self, cache: KVCache, segments: Sequence[Segment]) -> RaggedBatch:
        """Stage new nodes, given in the target's ids, and lay them out in its own."""
        batch = super().batch(cache, segments)
        token_ids = batch.layout.token_ids  # shares the memory that a pass reads
        token_ids[:] = self._t2d[token_ids]
        return batch

    def forward(
        self, batch: RaggedBatch, rows: Sequence[int], *, hidden_layers: Sequence[int] = ()
    ) -> ForwardOutput:
        """Run one pass; logits have a column for each of the target's tokens."""
        output = super().forward(batch, rows, hidden_layers=hidden_layers)
        logits = output.logits.new_full((len(rows), self.info.vocab_size), -math.inf)
        logits.index_copy_(1, self._d2t, output.logits)
        return ForwardOutput(logits=logits, hidden=output.hidden)


def _nearest(embedding: Tensor, kept: Tensor) -> Tensor:
    """Return for every row the place among the kept ones of that of highest cosine, [V]."""
    directions = functional.normalize(embedding, dim=1)
    candidates = directions[kept].T.contiguous()
    num_rows = max(1, _NUM_COMPARED // len(kept))
    return torch.cat([(part @ candidates).argmax(dim=1) for part in directions.split(num_rows)])


def _find_file(path: str) -> Path | None:
    directory = Path(path).expanduser()
    if directory.exists():
        file = directory / FILE_NAME
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(path, FILE_NAME))
    except EntryNotFoundError:  # there is none, or the hub cannot be asked and none is cached
        return None


__all__ = ["FILE_NAME", "SPECIAL_IDS", "DraftVocabulary", "ReducedModel", "check_vocabulary"]
