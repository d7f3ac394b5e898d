"""How a draft model begins: cut from its target, or from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from foretoken.errors import ConfigError
from foretoken.models.blank import blank_model
from foretoken.models.draft_shape import DraftShape
from foretoken.models.draft_vocabulary import DraftVocabulary
from foretoken.models.pruning import prune
from foretoken.models.trainable import TrainableModel

Method = Literal["prune", "scratch"]


def initialise(
    target: TrainableModel,
    shape: DraftShape,
    examples: Sequence[Sequence[int]],
    method: Method,
    seed: int,
) -> TrainableModel:
    """Return a draft model to train; the same arguments give the same weights.

    Args:
        target: It is left as it is.
        shape: The draft's.
        examples: Token ids of texts that the target wrote: what is important is judged by them,
            and which tokens a draft of fewer tokens keeps.
        method: "prune" takes the target's own weights, those that its outputs depend on most;
            "scratch" draws new ones.
        seed: Of new weights; pruning draws none.

    Raises:
        ConfigError: There is no such method, there are no examples where they are needed, or a
            size of the shape is more than the target's where it is pruned.
        UnsupportedModelError: The target is of a family that cannot be pruned.
    """
    vocabulary = None
    if shape.vocab is not None:
        vocabulary = choose_vocabulary(target, shape.vocab, examples)
    if method == "prune":
        return prune(target, shape, examples, vocabulary=vocabulary)
    if method == "scratch":
        return blank_model(target, shape, vocabulary=vocabulary, seed=seed)
    raise ConfigError(
        f"a draft is initialised by {' or '.join(get_args(Method))}; got {method!r}",
        hint="change the method",
    )


def choose_vocabulary(
    target: TrainableModel, size: int, examples: Sequence[Sequence[int]]
) -> DraftVocabulary:
    """Return the tokens that a draft of fewer tokens keeps: the most frequent, and ends of texts.

    Args:
        target: Whose tokens they are.
        size: How many to keep.
        examples: Token ids of texts that the target wrote.

    Raises:
        ConfigError: There are no examples, or the size is out of range.
    """
    if not examples:
        raise ConfigError(
            "which tokens a draft keeps is judged by texts of the target; got none",
            hint="collect outputs of the target first",
        )
    return DraftVocabulary.choose(examples, size, target.embedding, target.eos_ids)


__all__ = ["Method", "choose_vocabulary", "initialise"]
