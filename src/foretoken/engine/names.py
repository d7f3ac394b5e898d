"""What the names mean that users give to models and drafters."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from foretoken.assets import EMBEDDED, EMBEDDED_MODELS
from foretoken.core.options import ComponentSpec
from foretoken.drafters import DRAFTERS
from foretoken.errors import ConfigError, ModelError, UnknownNameError

_AUTO = ("suffix", "token-recycling")
_AUTO_BESIDE = ("suffix",)  # beside a draft model


def resolve_model(model: str) -> str:
    """Return the path or hub id that a model name means.

    Raises:
        ModelError: It looks like a mistyped name of an embedded model.
    """
    if model in EMBEDDED_MODELS:
        return str(EMBEDDED_MODELS[model])
    # Hub ids have an owner, or are older than that; do not ask the network about a typing error.
    nearest = difflib.get_close_matches(model, EMBEDDED_MODELS, n=1, cutoff=0.75)
    if nearest and "/" not in model and not Path(model).exists():
        raise ModelError(
            f"there is no model {model!r}: no such directory, no such embedded model",
            hint=f"did you mean {nearest[0]!r}?",
        )
    return model


def resolve_drafters(names: Sequence[str], model: str) -> list[ComponentSpec]:
    """Return the drafter specs that names mean for a model; "none" means no drafter.

    "auto" is a draft model and past texts for the embedded target; for other models past texts
    and the target's own rows, which need no training. The first of them serves alone where there
    is no planner to choose.

    Raises:
        UnknownNameError: There is no such drafter.
        ConfigError: auto or none stands beside other drafters, or an option cannot be read.
    """
    if len(names) > 1 and {"auto", "none"} & set(names):
        raise ConfigError(
            f"auto and none stand alone; got drafters {', '.join(names)}",
            hint="leave auto and none out when naming drafters",
        )
    if tuple(names) == ("none",):
        return []
    if tuple(names) == ("auto",):
        if model in EMBEDDED:
            pair = EMBEDDED[model]
            options = {"path": str(pair.draft), **pair.draft_options}
            return [ComponentSpec("draft-model", options), *map(ComponentSpec, _AUTO_BESIDE)]
        return list(map(ComponentSpec, _AUTO))
    specs = [ComponentSpec.parse(name) for name in names]
    for spec in specs:
        if spec.name not in DRAFTERS:
            raise UnknownNameError("drafter", spec.name, ("auto", *DRAFTERS))
    return specs
