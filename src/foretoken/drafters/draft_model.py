"""A small language model of the target's family drafts a tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from foretoken.drafters.base import DrafterHost, Taxonomy
from foretoken.drafters.model_drafter import GrowthOptions, ModelDrafter
from foretoken.models.loading import load_model
from foretoken.models.tokenizer import Tokenizer, check_same_vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftModelOptions(GrowthOptions):
    """Options of `draft-model`, besides how trees grow.

    Args:
        path: Directory or hub id of the draft model; it shares the target's tokens.
        dtype: Of its weights; without it, as for the target. What is drafted may differ by it,
            what is said does not.
    """

    name: ClassVar[str] = "draft-model"
    path: str
    dtype: str | None = None


class DraftModelDrafter(ModelDrafter):
    """Grows trees with a model of its own that speaks the target's tokens."""

    Options: ClassVar[type[Any]] = DraftModelOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="independent model",
        is_trained=True,
        termination="adaptive (static with expansion)",
        structure="tree",
        reference="SpecInfer, arXiv:2305.09781; SpecExec, arXiv:2406.02532",
    )

    @classmethod
    def create(cls, options: DraftModelOptions, host: DrafterHost) -> Self:
        """Load the draft model and check that it speaks the target's tokens.

        Raises:
            ModelError: It cannot be loaded, or its tokens are others.
        """
        model = load_model(options.path, dtype=options.dtype or host.dtype, device=host.device)
        check_same_vocabulary(host.target, host.tokenizer, model, Tokenizer.load(options.path))
        return cls(model, options, host)
