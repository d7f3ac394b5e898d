"""The target's own multi-token-prediction layer drafts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from foretoken.drafters.base import DrafterHost, Taxonomy
from foretoken.drafters.eagle import EagleDrafter
from foretoken.drafters.model_drafter import GrowthOptions
from foretoken.models.heads.mtp import ServedMtp


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpOptions(GrowthOptions):
    """Options of `mtp`: how trees grow.

    Args:
        max_depth: As there. Beyond the first level the layer reads its own outputs, which it was
            not trained on, so deep drafts are seldom right.
    """

    name: ClassVar[str] = "mtp"
    max_depth: int = 4


class MtpDrafter(EagleDrafter):
    """Grows trees with the layer that the target was trained with to see further ahead.

    As an EAGLE head it reads the target's last state and the next token. Its weights come from
    the target's own checkpoint; nothing has to be trained.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.2.
    """

    Options: ClassVar[type[Any]] = MtpOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="layer of the target's checkpoint",
        is_trained=True,
        termination="adaptive (static with expansion)",
        structure="tree",
        reference="DeepSeek-V3, arXiv:2412.19437",
    )

    @classmethod
    def create(cls, options: MtpOptions, host: DrafterHost) -> Self:  # type: ignore[override]
        """Read the layer.

        Raises:
            UnsupportedModelError: The target has none.
            ModelError: It cannot be read from the target's files.
        """
        return cls(ServedMtp(host.target), options, host)
