"""Which shapes a study compares: deep and narrow against shallow and wide, at equal parameters.

A family begins with a draft of few layers and the target's full width; its other members have
more layers, each as much narrower that the number of parameters stays. Of the shallowest there are
also versions with fewer heads and with fewer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from foretoken.errors import ConfigError
from foretoken.models.draft_shape import DraftShape
from foretoken.models.pruning import check_prunable

WIDTH_STEP = 16  # of hidden and intermediate sizes: what kernels' blocks divide
DEPTH_FACTORS = (1, 2, 4, 8)
TOLERANCE = 0.02  # share by which members of a family may miss its number of parameters


def candidate_shapes(
    config: Any,
    depths: Sequence[int],
    vocab_shares: Sequence[float],
    *,
    is_pruned: bool,
) -> list[DraftShape]:
    """Return the shapes to compare for a target, each once, family by family.

    Args:
        config: The target's, of transformers.
        depths: Layers of the full-width draft that begins each family.
        vocab_shares: Shares of the target's tokens, for the versions with fewer.
        is_pruned: Whether drafts are cut from the target, so that none may be larger in anything.

    Raises:
        ConfigError: No depth is less than the target's.
        UnsupportedModelError: The target is of a family that cannot be pruned.
    """
    whole = DraftShape.of(config)
    shallow = [depth for depth in depths if depth < whole.layers]
    if not shallow:
        raise ConfigError(
            f"a draft has fewer layers than its target, which has {whole.layers}; got "
            f"{', '.join(map(str, depths))}",
            hint="change depths",
        )
    shapes = [it for depth in shallow for it in family(config, whole, depth)]
    wide = replace(whole, layers=min(shallow))
    shapes += _variants(wide, config.vocab_size, vocab_shares)
    if is_pruned:
        for shape in shapes:
            check_prunable(config, shape)
    return list(dict.fromkeys(shapes))


def family(config: Any, whole: DraftShape, depth: int) -> list[DraftShape]:
    """Return a full-width shape and deeper ones of as many parameters.

    Args:
        config: The target's.
        whole: Its shape.
        depth: Of the full-width one.
    """
    wide = replace(whole, layers=depth)
    budget = wide.num_parameters(config)
    deeper = (
        _with_parameters(config, whole, depth * factor, budget)
        for factor in DEPTH_FACTORS[1:]
        if depth * factor <= whole.layers
    )
    return [wide, *(shape for shape in deeper if shape is not None)]


def _with_parameters(config: Any, whole: DraftShape, layers: int, budget: int) -> DraftShape | None:
    """Return the shape of some layers that is nearest to a budget; None if none is near."""
    fitting = [_fitted(config, it, budget) for it in _narrower(whole, layers)]
    nearest = min(fitting, key=lambda shape: _distance(config, whole, shape, budget))
    is_near = abs(nearest.num_parameters(config) - budget) <= TOLERANCE * budget
    return nearest if is_near else None


def _narrower(whole: DraftShape, layers: int) -> Iterator[DraftShape]:
    """Yield shapes of the target's proportions, of every width up to its own."""
    group = whole.heads // whole.kv_heads
    for hidden in range(WIDTH_STEP, whole.hidden + 1, WIDTH_STEP):
        share = hidden / whole.hidden
        kv_heads = max(1, round(whole.kv_heads * share))
        if hidden % (kv_heads * group) == 0:
            yield replace(
                whole,
                layers=layers,
                hidden=hidden,
                heads=kv_heads * group,
                kv_heads=kv_heads,
                intermediate=_rounded(whole.intermediate * share, whole.intermediate),
            )


def _fitted(config: Any, shape: DraftShape, budget: int) -> DraftShape:
    """Return the shape with as much wider or narrower a feed-forward part as the budget wants."""
    per_channel = 3 * shape.hidden * shape.layers
    num_missing = (budget - shape.num_parameters(config)) / per_channel
    widest = DraftShape.of(config).intermediate
    return replace(shape, intermediate=_rounded(shape.intermediate + num_missing, widest))


def _distance(config: Any, whole: DraftShape, shape: DraftShape, budget: int) -> float:
    """Return how far a shape is from the budget, and a little from the target's proportions."""
    off_budget = abs(shape.num_parameters(config) / budget - 1)
    ratio = (shape.intermediate / shape.hidden) / (whole.intermediate / whole.hidden)
    return off_budget + 0.05 * abs(ratio - 1)


def _variants(
    wide: DraftShape, vocab_size: int, vocab_shares: Sequence[float]
) -> Iterator[DraftShape]:
    if wide.kv_heads % 2 == 0:
        yield replace(wide, heads=wide.heads // 2, kv_heads=wide.kv_heads // 2)
    for share in vocab_shares:
        yield replace(wide, vocab=_rounded(vocab_size * share, vocab_size))


def _rounded(value: float, most: int) -> int:
    """Return the nearest multiple of `WIDTH_STEP`, at least one, unless that is too much."""
    return min(most, max(1, round(value / WIDTH_STEP)) * WIDTH_STEP)


__all__ = ["candidate_shapes", "family"]
