"""Everything that is registered, by the axes of the survey.

The axes are those of "Beyond the Speculative Game" (arXiv:2404.14897): where drafts come from,
whether that is trained, what ends a draft, how drafts are managed; and of verification the
acceptance criterion and whether the output is the target's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from foretoken.core.draft import SiblingDraw
from foretoken.core.registry import Registry
from foretoken.drafters import DRAFTERS
from foretoken.drafters.base import Drafter, Taxonomy
from foretoken.engine.fit import agree_on_draws
from foretoken.errors import ConfigError
from foretoken.verifiers import VERIFIERS
from foretoken.verifiers.base import Verifier

UNSAID = "not said"  # by a class of another package, which may leave out what nothing depends on
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterRow:
    """A drafter's place in the survey's table.

    Args:
        name: As registered.
        source: Where drafts come from.
        is_trained: Whether it needs weights made for it; None if its class does not say.
        termination: What ends a draft.
        structure: Shape and management of its drafts.
        draws: Ways in which it can draw siblings.
        verifiers: Rules that take one of these ways.
        reference: The paper or work it follows.
        package: Where its class comes from.
    """

    name: str
    source: str
    is_trained: bool | None
    termination: str
    structure: str
    draws: tuple[str, ...]
    verifiers: tuple[str, ...]
    reference: str
    package: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierRow:
    """A verifier's place in the survey's table.

    Args:
        name: As registered.
        exactness: How closely its output follows plain decoding, given equal logits.
        criterion: What it accepts a draft token by.
        draws: Ways in which siblings may have been drawn, the preferred one first.
        structure: "tree", or "chain" if a node may have one child only.
        max_drafters: Most drafters whose sampled drafts may be merged; None for any number.
        reference: The paper or work it follows.
        package: Where its class comes from.
    """

    name: str
    exactness: str
    criterion: str
    draws: tuple[str, ...]
    structure: str
    max_drafters: int | None
    reference: str
    package: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Methods:
    """What is registered here, entry points of other packages included.

    Args:
        drafters: Those of one source stand together.
        verifiers: In the registry's order.
        broken: Kind and name, such as "drafter x", to why it cannot be imported.
    """

    drafters: tuple[DrafterRow, ...]
    verifiers: tuple[VerifierRow, ...]
    broken: Mapping[str, str]


def list_methods() -> Methods:
    """Return the place of everything that is registered.

    What another package registers and does not import is told of, and in nobody's way.
    """
    broken: dict[str, str] = {}
    rules = _load_all(VERIFIERS, broken)
    drafters = _load_all(DRAFTERS, broken)
    rows = [_drafter_row(name, kind, rules) for name, kind in drafters.items()]
    families = list(dict.fromkeys(_family(row) for row in rows))
    return Methods(
        drafters=tuple(sorted(rows, key=lambda row: families.index(_family(row)))),
        verifiers=tuple(_verifier_row(name, rule) for name, rule in rules.items()),
        broken=broken,
    )


def _load_all(registry: Registry[type[T]], broken: dict[str, str]) -> dict[str, type[T]]:
    loaded = {}
    for name in registry:
        try:
            loaded[name] = registry.load(name)
        except ConfigError as error:
            broken[f"{registry.kind} {name}"] = str(error)
    return loaded


def _family(row: DrafterRow) -> str:
    """Return the source without its particulars: "retrieval" of "retrieval (datastore)"."""
    return row.source.partition(" (")[0]


def _drafter_row(name: str, kind: type[Drafter], rules: Mapping[str, type[Verifier]]) -> DrafterRow:
    place: Taxonomy | None = getattr(kind, "taxonomy", None)
    return DrafterRow(
        name=name,
        source=place.source if place else UNSAID,
        is_trained=place.is_trained if place else None,
        termination=place.termination if place else UNSAID,
        structure=place.structure if place else UNSAID,
        draws=tuple(draw.value for draw in SiblingDraw if draw in kind.draws),
        verifiers=tuple(rule for rule in rules if _fits(name, kind, rule, rules[rule])),
        reference=place.reference if place else UNSAID,
        package=_package(kind),
    )


def _verifier_row(name: str, rule: type[Verifier]) -> VerifierRow:
    return VerifierRow(
        name=name,
        exactness=rule.exactness.value,
        criterion=getattr(rule, "criterion", UNSAID),
        draws=tuple(draw.value for draw in rule.draws),
        structure="chain" if rule.max_width == 1 else "tree",
        max_drafters=rule.max_drafters,
        reference=getattr(rule, "reference", UNSAID),
        package=_package(rule),
    )


def _fits(name: str, kind: type[Drafter], rule_name: str, rule: type[Verifier]) -> bool:
    try:
        agree_on_draws(rule_name, rule, {name: kind})
    except ConfigError:
        return False
    return True


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


__all__ = ["UNSAID", "DrafterRow", "Methods", "VerifierRow", "list_methods"]
