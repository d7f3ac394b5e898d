"""The target without some of its layers drafts; which ones, it finds out while it runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, ClassVar

from foretoken.core.draft import Draft
from foretoken.core.sampling import Frontier, best_guesses
from foretoken.drafters.base import DraftContext, DrafterHost, Outcome, RequestView, Taxonomy
from foretoken.drafters.levels import RACE_TEMPERATURE
from foretoken.drafters.model_drafter import (
    DraftState,
    GrowthOptions,
    ModelDrafter,
)
from foretoken.drafters.skip_search import SkipSearch, SkipSet
from foretoken.errors import ConfigError, UnsupportedModelError
from foretoken.models.adapter import LanguageModel, LayerView
from foretoken.models.batch import Segment
from foretoken.models.partial import LayerSet, copy_past

AUTO = "auto"
MIN_WINDOW = 8  # emitted tokens before which a text says nothing about a set
_PART = re.compile(r"([am]?)(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSkipOptions(GrowthOptions):
    """Options of `layer-skip`, besides how trees grow.

    Args:
        skip: Layers that are left out, such as `3-5-6`; with `a5` or `m5` only the attention or
            the feed-forward part of layer 5. `auto` searches while requests run.
        share: With `auto`, the share of the layers between the first and the last that is left
            out.
        window: With `auto`, the last tokens on which sets are compared.
        enough: With `auto`, the agreement with the target at which the search ends.
        max_trials: With `auto`, sets after which it ends.
        search_share: With `auto`, the most time that the search may take, as a share of the time
            that steps take.
        max_depth: As there; a pass costs a good part of the target's, so trees are small.
        width: Likewise.
        min_gain: Likewise.
    """

    name: ClassVar[str] = "layer-skip"
    skip: str = AUTO
    share: float = 0.45
    window: int = 32
    enough: float = 0.95
    max_trials: int = 200
    search_share: float = 0.1
    max_depth: int = 4
    width: int = 2
    min_gain: float = 0.5

    def __post_init__(self) -> None:
        GrowthOptions.__post_init__(self)
        self.fixed_set()
        for option in ("share", "enough", "search_share"):
            value = getattr(self, option)
            if not 0 < value <= 1:
                raise ConfigError(
                    f"layer-skip:{option} is above 0 and at most 1; got {value}",
                    hint=f"change {option}",
                )
        if self.window < MIN_WINDOW or self.max_trials < 0:
            raise ConfigError(
                f"layer-skip:window is at least {MIN_WINDOW} and max_trials not negative; "
                f"got {self.window} and {self.max_trials}",
                hint="change window or max_trials",
            )

    def fixed_set(self) -> SkipSet | None:
        """Return what is left out; None if that is to be found.

        Raises:
            ConfigError: It cannot be read.
        """
        if self.skip == AUTO:
            return None
        parts = [_PART.fullmatch(part) for part in self.skip.split("-")]
        found = [(match[1], int(match[2])) for match in parts if match]
        if len(found) < len(parts):
            raise ConfigError(
                f"layer-skip:skip is auto or layers joined by '-'; got {self.skip!r}",
                hint="for example skip=3-5-6, or skip=a3-m5-6 for parts of layers",
            )
        return SkipSet(
            tuple(sorted({layer for kind, layer in found if kind != "m"})),
            tuple(sorted({layer for kind, layer in found if kind != "a"})),
        )


class LayerSkipDrafter(ModelDrafter):
    """Drafts with the target without some attention and feed-forward parts of its layers.

    Drafts look back on the target's own keys and values of the text (as in Draft & Verify and
    SWIFT), which are copied, never computed twice. With `skip=auto` two sets of parts, the one in
    use and another, are compared now and then: each runs over the last tokens of a request in one
    pass and is scored by how many of them it would have chosen. The better one drafts from then
    on; requests that run go over to it. The set in use depends on what has run so far: drafts do
    too, tokens never.

    Args:
        options: What to leave out, and how trees grow.
        host: Its target drafts.

    Raises:
        ConfigError: The target has no such layers.
        UnsupportedModelError: Its architecture's layers cannot be left out.
    """

    Options: ClassVar[type[Any]] = LayerSkipOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="target itself",
        is_trained=False,
        termination="adaptive (static with expansion)",
        structure="tree",
        reference="Draft & Verify, arXiv:2309.08168; SWIFT, arXiv:2410.06916",
    )

    def __init__(self, options: LayerSkipOptions, host: DrafterHost) -> None:
        self._target = host.target
        self._options = options
        self._num_prompt_ids: dict[str, int] = {}
        self._following: set[str] = set()  # requests whose past is the target's
        self._step_s = self._search_s = self._trial_s = 0.0
        self._started_s: float | None = None
        fixed = options.fixed_set()
        self._search = _new_search(host.target, options) if fixed is None else None
        self.skipped = fixed or (self._search.best if self._search else SkipSet())
        self._view = _view_without(host.target, self.skipped)
        super().__init__(self._view, options, host)
        self.needs = replace(self.needs, target_past=True)

    @classmethod
    def create(cls, options: LayerSkipOptions, host: DrafterHost) -> LayerSkipDrafter:
        """Build it on the host's target; nothing is loaded."""
        return cls(options, host)

    def start(self, request: RequestView) -> None:
        """Open the request's place in the cache; the prompt is taken over with the first draft."""
        super().start(request)
        self._num_prompt_ids[request.request_id] = len(request.prompt_ids)

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return one tree per context; before, compare two sets of parts if it is time to."""
        self._started_s = perf_counter()
        if self._search is not None and not self._search.is_over and self._has_time():
            texts = [context for context in contexts if self._window(context)]
            if texts:
                self._try_another(self._search, texts[self._search.num_trials % len(texts)])
                self._trial_s = perf_counter() - self._started_s
                self._search_s += self._trial_s
        return super().propose(contexts)

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Drop what was staged where the target will have better keys and values of it."""
        for outcome in outcomes:
            if outcome.request_id in self._following:
                state = self._states[outcome.request_id]
                self._cache.rollback(state.sequence)
                state.reset()
        super().commit(outcomes)
        if self._started_s is not None:
            self._step_s += perf_counter() - self._started_s
            self._started_s = None

    def stop(self, request_id: str) -> None:
        """Free the request's place in the cache."""
        super().stop(request_id)
        self._num_prompt_ids.pop(request_id, None)
        self._following.discard(request_id)

    def _catch_up(self, state: DraftState, context: DraftContext) -> None:
        """Take the keys and values of the text from the target."""
        if context.past is None:
            super()._catch_up(state, context)
            return
        self._following.add(context.request_id)
        num_cached = context.past.sequence.num_cached
        copy_past(
            context.past, self._view.layers.attention, self._cache, state.sequence, num_cached
        )

    # -- the search --------------------------------------------------------------------------

    def _has_time(self) -> bool:
        """Whether another trial keeps the search within its share of the steps' time."""
        return self._search_s + self._trial_s <= self._options.search_share * self._step_s

    def _window(self, context: DraftContext) -> range:
        """Return the positions whose tokens sets are compared on; none if there are too few."""
        if context.past is None:
            return range(0)
        stop = context.past.sequence.num_cached + 1
        num_prompt_ids = self._num_prompt_ids[context.request_id]
        window = range(max(num_prompt_ids, stop - self._options.window), stop)
        return window if len(window) >= MIN_WINDOW else range(0)

    def _try_another(self, search: SkipSearch, context: DraftContext) -> None:
        """Compare the set in use with another on the last tokens of a text; take the better."""
        other = search.propose()
        view = _view_without(self._target, other)
        score, score_in_use = (self._agreement(it, context) for it in (view, self._view))
        if search.observe(score, score_in_use):
            self.skipped, self._view = other, view
            self._take_model(view)

    def _agreement(self, view: LayerView, context: DraftContext) -> float:
        """Return the share of the window's tokens that a view would have drafted, in one pass."""
        window, token_ids, past = self._window(context), context.token_ids, context.past
        if past is None:
            return 0.0
        first = window.start - 1  # whose row predicts the first token of the window
        cache = view.new_cache(window.stop)
        sequence = cache.open()
        copy_past(past, view.layers.attention, cache, sequence, first)
        fed = token_ids[first : window.stop - 1]
        batch = view.batch(cache, [Segment(sequence, fed, range(-1, len(fed) - 1))])
        logits = view.forward(batch, range(len(fed))).logits
        rows = [Frontier(context.sampler, token_ids[:position], [()]) for position in window]
        guesses, _ = best_guesses(logits, rows, 1, RACE_TEMPERATURE)
        agreed = [guess[:1] == [token_ids[at]] for guess, at in zip(guesses, window, strict=True)]
        return sum(agreed) / len(agreed)


def _view_without(target: LanguageModel, skipped: SkipSet) -> LayerView:
    """Return the target without some parts.

    Raises:
        ConfigError: It has no such layers, or nothing is left of it.
        UnsupportedModelError: Its layers cannot be left out.
    """
    num_layers = target.info.num_layers
    layers = LayerSet.without(num_layers, skipped.attention, skipped.mlp)
    if max((*skipped.attention, *skipped.mlp), default=0) >= num_layers or not layers.attention:
        raise ConfigError(
            f"layer-skip:skip leaves out some of the layers 0 to {num_layers - 1}, and keeps one "
            f"with attention; got {skipped}",
            hint="change skip",
        )
    return target.with_layers(layers)


def _new_search(target: LanguageModel, options: LayerSkipOptions) -> SkipSearch:
    """Return a search over the layers between the first and the last."""
    num_layers = target.info.num_layers
    if num_layers < 2:
        raise ConfigError(
            "layer-skip leaves out layers of a target that has several; this one has 1",
            hint="use another drafter",
        )
    middle = range(1, max(2, num_layers - 1))
    has_parts = True
    try:
        _view_without(target, SkipSet(attention=(1,)))
    except UnsupportedModelError:
        has_parts = False
    return SkipSearch(
        middle,
        share=options.share,
        has_parts=has_parts,
        enough=options.enough,
        max_trials=options.max_trials,
    )
