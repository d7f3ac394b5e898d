"""Engines for modules of the user's, kept as long as their weights stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from foretoken.engine.build import EngineBuilder
from foretoken.engine.engine import Engine, EngineConfig
from foretoken.models.adapter import LanguageModel
from foretoken.models.loaded import Fingerprint, adapt_loaded, fingerprint
from foretoken.models.tokenizer import Tokenizer
from foretoken.planner.plan import Plan


@dataclass(slots=True)
class _Adapted:
    """What was made of a module."""

    weights: Fingerprint
    target: LanguageModel
    engines: dict[Any, Engine] = field(default_factory=dict)


_ADAPTED: WeakKeyDictionary[Any, _Adapted] = WeakKeyDictionary()


def engine_for(
    module: Any, plan: Plan, *, kv_cache_tokens: int | None = None, tokenizer: Any = None
) -> Engine:
    """Return an engine that says what a module says; the module stays as it is.

    The first call adapts the module and builds the engine. Later ones with the same options take
    what is there, unless the weights have been written to since.

    Args:
        module: A causal language model of transformers.
        plan: Drafters, verifier and how much to draft at most.
        kv_cache_tokens: Positions that the KV cache holds; None sizes it by the free memory.
        tokenizer: transformers' tokenizer, for drafters that need one; None looks for it in the
            directory that the module was loaded from.

    Raises:
        ConfigError: An option is not allowed.
        ModelError: The module, or a drafter's model, cannot be served.
    """
    key = (plan, kv_cache_tokens, tokenizer)
    kept = _ADAPTED.get(module)
    if kept is not None and kept.weights != fingerprint(module):
        forget(module)
        kept = None
    if kept is not None and key in kept.engines:
        return kept.engines[key]
    # Options are checked before anything is done with the module.
    builder = EngineBuilder(module.name_or_path, plan, EngineConfig(), kv_cache_tokens)
    if kept is None:
        kept = _ADAPTED[module] = _Adapted(fingerprint(module), adapt_loaded(module))
    kept.engines[key] = builder.build(
        kept.target, _tokenizer(module, tokenizer), device=str(module.device), dtype="auto"
    )
    return kept.engines[key]


def forget(module: Any) -> None:
    """Free what was made of a module: packed weights, KV caches, drafters.

    The next call makes it anew, which is also how to make weights known that were written through
    `parameter.data`.
    """
    kept = _ADAPTED.pop(module, None)
    if kept is not None:
        for engine in kept.engines.values():
            engine.close()


def _tokenizer(module: Any, given: Any) -> Tokenizer | None:
    if given is not None:
        return Tokenizer(given)
    is_local = module.name_or_path and Path(module.name_or_path).is_dir()
    return Tokenizer.load(module.name_or_path) if is_local else None
