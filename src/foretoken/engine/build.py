"""From options to an engine: everything that can be wrong is found before a model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

from foretoken.core.options import ComponentSpec
from foretoken.core.verdict import Exactness
from foretoken.drafters import DRAFTERS, prepare_drafter
from foretoken.drafters.base import Drafter, DrafterHost, Retracer
from foretoken.drafters.in_flight import InFlightDrafter
from foretoken.engine.engine import Engine, EngineConfig
from foretoken.engine.fit import agree_on_draws, takes_copies_in_trees
from foretoken.engine.loops import in_flight_label
from foretoken.engine.names import resolve_drafters
from foretoken.engine.sizing import default_kv_cache_tokens
from foretoken.errors import ConfigError
from foretoken.models.adapter import LanguageModel, ModelInfo
from foretoken.models.grammar import GrammarCompiler
from foretoken.models.tokenizer import Tokenizer
from foretoken.planner.adaptive import AdaptivePlanner
from foretoken.planner.base import FixedPlanner, Planner
from foretoken.planner.cost import CostModel
from foretoken.planner.cost_cache import load_or_measure
from foretoken.planner.cost_ticks import load_or_measure_ticks
from foretoken.planner.flight_adaptive import AdaptiveFlightPlanner
from foretoken.planner.in_flight import FlightPlanner
from foretoken.planner.plan import AUTO, Plan
from foretoken.verifiers import VERIFIERS

T = TypeVar("T")
BuildDrafter = Callable[[DrafterHost], Drafter]

# Drafters that every request has whose verifier takes them, and that cost nothing otherwise:
# what its grammar forces is certain, and a text that comes with it is meant to be copied from.
_FREE = ("forced",)
_ASKED_FOR = ("reference",)

# What "auto" is where the target shares its layers: it needs no training and no second model.
_AUTO_WITH_LOOPS = "speed"

# How often a drafter's first guess is taken before anything is known, by whether it was trained.
_FIRST_GUESS = {True: 0.6, False: 0.25}


class EngineBuilder:
    """An engine whose options are checked, and whose target is still to come.

    Args:
        model: The target's name, which decides what the drafters "auto" are.
        plan: Drafters, verifier and how much to draft at most.
        config: Sizes.
        kv_cache_tokens: Positions that the KV cache holds over all requests; None sizes it by
            the free memory.

    Raises:
        UnknownNameError: There is no such drafter, option or verifier.
        ConfigError: An option is not allowed, or verifier and drafters do not go together.
    """

    def __init__(
        self, model: str, plan: Plan, config: EngineConfig, kv_cache_tokens: int | None = None
    ) -> None:
        check_count("kv_cache_tokens", kv_cache_tokens)
        specs = resolve_drafters(plan.drafters, model)
        self._verifier_class = VERIFIERS.load(plan.verifier)
        # Under rules that throw dice a draft decides what is said, and must not follow the clock.
        is_free = self._verifier_class.exactness is Exactness.BITWISE
        self._is_adaptive = plan.is_adaptive and is_free and plan.node_limit > 0
        if plan.drafters == AUTO and not self._is_adaptive:
            specs = specs[:1]
        self._always: tuple[str, ...] = ()
        if plan.adaptive and not is_free:
            raise ConfigError(
                f"verifier {plan.verifier!r} says other tokens for other drafts, so that an "
                f"adaptive plan would make output depend on the clock",
                hint="use the verifier coupled, or leave adaptive out",
            )
        if specs and takes_copies_in_trees(self._verifier_class):
            named = {spec.name for spec in specs}
            specs += [ComponentSpec(name) for name in (*_FREE, *_ASKED_FOR) if name not in named]
            self._always = tuple(name for name in _FREE if name not in named)
        self._builders = _numbered([(spec.name, prepare_drafter(spec)) for spec in specs])
        agree_on_draws(
            plan.verifier,
            self._verifier_class,
            {spec.name: DRAFTERS.load(spec.name) for spec in specs},
        )
        self._plan = plan
        self._config = config
        self._kv_cache_tokens = kv_cache_tokens

    def build(
        self, target: LanguageModel, tokenizer: Tokenizer | None, *, device: str, dtype: str
    ) -> Engine:
        """Return the engine; drafters load their own models now.

        Args:
            target: The model whose output is wanted.
            tokenizer: Its tokenizer, None if it has none.
            device: Where drafters put their own models.
            dtype: For their own models, as the user gave it.

        Raises:
            ModelError: A drafter's own model cannot be loaded or does not fit.
        """
        num_tokens = self._kv_cache_tokens or default_kv_cache_tokens(
            target.info,
            max_requests=self._config.max_requests,
            max_nodes=self._plan.node_limit,
        )
        host = DrafterHost(
            target=target,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            max_requests=self._config.max_requests,
            kv_cache_tokens=num_tokens,
        )
        info = target.info
        drafters = {label: build(host) for label, build in self._builders_for(info)}
        in_flight = in_flight_label(drafters)
        return Engine(
            target,
            target.new_cache(num_tokens),
            drafters,
            self._verifier_class(),
            self._plan,
            planner=self._planner(target, drafters) if in_flight is None else None,
            flight_planner=(
                self._flight_planner(target, cast(InFlightDrafter, drafters[in_flight]))
                if in_flight is not None
                else None
            ),
            decode=tokenizer.decode if tokenizer else None,
            compile_grammar=GrammarCompiler(tokenizer, info.vocab_size, info.eos_ids).compile,
            config=self._config,
        )

    def _builders_for(self, info: ModelInfo) -> Sequence[tuple[str, BuildDrafter]]:
        """Return what builds the drafters, now that it is known whether the target has loops."""
        has_loops = info.loops is not None and info.loops.loops > 1
        if not (has_loops and self._is_adaptive and self._plan.drafters == AUTO):
            return self._builders
        free = [it for it in self._builders if it[0] in (*_FREE, *_ASKED_FOR)]
        return [(_AUTO_WITH_LOOPS, prepare_drafter(ComponentSpec(_AUTO_WITH_LOOPS))), *free]

    def _flight_planner(
        self, target: LanguageModel, drafter: InFlightDrafter
    ) -> FlightPlanner | None:
        """Return who says how many rows are in flight; None if there is nothing to choose."""
        loops, is_open = target.info.loops, None in (drafter.exit_loop, drafter.max_in_flight)
        if loops is None or not (self._is_adaptive and is_open):
            return None
        return AdaptiveFlightPlanner(
            load_or_measure_ticks(target),
            load_or_measure(target),
            loops=loops.loops,
            check="eager" if drafter.is_eager else "lazy",
            exit_loop=drafter.exit_loop,
            max_in_flight=drafter.max_in_flight,
        )

    def _planner(self, target: LanguageModel, drafters: Mapping[str, Drafter]) -> Planner:
        plan, labels = self._plan, [label for label in drafters if label not in self._always]
        if not (self._is_adaptive and labels):
            return FixedPlanner()
        return AdaptivePlanner(
            CostModel(load_or_measure(target)),
            labels,
            always=self._always,
            max_nodes=plan.node_limit,
            first_guess={
                label: _FIRST_GUESS[drafters[label].taxonomy.is_trained] for label in labels
            },
            retraces={
                label: drafter.retrace
                for label, drafter in drafters.items()
                if label in labels and isinstance(drafter, Retracer)
            },
        )


def check_count(name: str, value: int | None) -> None:
    """Check an option that is a positive number or None.

    Raises:
        ConfigError: It is something else.
    """
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ConfigError(f"{name} is an integer >= 1; got {value!r}", hint=f"change {name}")


def _numbered(items: Sequence[tuple[str, T]]) -> list[tuple[str, T]]:
    """Number names that come again, `name#2`, so that both can be told apart."""
    seen: Counter[str] = Counter()
    numbered = []
    for name, item in items:
        seen[name] += 1
        numbered.append((f"{name}#{seen[name]}" if seen[name] > 1 else name, item))
    return numbered


__all__ = ["EngineBuilder", "check_count"]
