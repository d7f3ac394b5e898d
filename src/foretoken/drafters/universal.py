"""A draft model with a tokenizer of its own: any small model drafts for any target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.drafters.base import DraftContext, DrafterHost, Outcome, RequestView, Taxonomy
from foretoken.drafters.model_drafter import NOTHING, GrowthOptions, ModelDrafter
from foretoken.drafters.retokenize import Retokenizer, Vocabulary, pair_special, shared_tokens
from foretoken.drafters.translate import (
    MAX_GROWN_NODES,
    NAME,
    TextTranslation,
    TokenTranslation,
    Translation,
)
from foretoken.errors import ConfigError, ModelError
from foretoken.models.adapter import LanguageModel
from foretoken.models.loading import load_model
from foretoken.models.tokenizer import Tokenizer

MODES = ("auto", "text", "tokens")
# `auto` is `tokens` if so large a share of the larger vocabulary is shared. Of a small share the
# text consists too seldom: a draft model that knows whole words for a target of syllables would
# have to spell them.
MANY_SHARED = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class UniversalOptions(GrowthOptions):
    """Options of `universal`, besides how trees grow.

    What is said there of paths and gains is counted in the target's tokens. A draft model with
    shorter ones makes more passes.

    Args:
        path: Directory or hub id of the draft model, with a tokenizer of its own.
        mode: How its tokens become the target's: `text` by encoding what they spell, `tokens` by
            drafting only tokens that both have, `auto` by how many these are.
    """

    name: ClassVar[str] = NAME
    path: str
    mode: str = "auto"

    def __post_init__(self) -> None:
        GrowthOptions.__post_init__(self)  # super() does not work in a class with slots
        if self.mode not in MODES:
            raise ConfigError(
                f"{NAME}:mode is one of {', '.join(MODES)}; got {self.mode!r}",
                hint="leave it out for auto",
            )


class UniversalDrafter(ModelDrafter):
    """Grows trees in the draft model's own tokens and translates them into the target's.

    The context is encoded in the draft's tokens as it grows. Its draft is empty where that is not
    possible: after a part of a character, or where the draft's tokenizer changes the text.

    Args:
        model: Speaks the draft's tokens.
        options: How trees grow and how they are translated.
        host: What there is.
        target: The target's vocabulary.
        draft: The draft model's.

    Raises:
        ConfigError: Only shared tokens are to be drafted, and there are none.
    """

    Options: ClassVar[type[Any]] = UniversalOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="independent model",
        is_trained=True,
        termination="adaptive (static with expansion)",
        structure="tree",
        reference="SLEM and TLI, arXiv:2502.05202",
    )
    # Samples would be of a distribution over the draft's tokens.
    draws: ClassVar[frozenset[SiblingDraw]] = frozenset(
        {SiblingDraw.DETERMINISTIC, SiblingDraw.COUPLED}
    )

    def __init__(
        self,
        model: LanguageModel,
        options: UniversalOptions,
        host: DrafterHost,
        target: Vocabulary,
        draft: Vocabulary,
    ) -> None:
        special = pair_special(target, draft, host.target.info.eos_ids, model.info.eos_ids)
        shared = {**shared_tokens(target, draft), **special}
        mode = _choose_mode(options, len(shared), target, draft)
        ratio = 1.0 if mode == "tokens" else target.tokens_per_token(draft)
        translation: Translation
        if mode == "tokens":
            sizes = host.target.info.vocab_size, model.info.vocab_size
            translation = TokenTranslation(shared, *sizes, model.info.device)
        else:
            target_special = {own_id: target_id for target_id, own_id in special.items()}
            translation = TextTranslation(
                target, draft, target_special, max_ratio=ratio, min_gain=options.min_gain
            )
        own_options = _own_options(options, ratio)
        num_scratch = own_options.depth_limit * max(MAX_GROWN_NODES, options.width)
        super().__init__(model, own_options, _own_host(host, model, ratio, num_scratch))
        self._translation = translation
        self._vocabularies = target, draft
        self._special = tuple(special.items())
        self._bounds = options.max_nodes, options.max_depth
        self._texts: dict[str, Retokenizer] = {}

    @classmethod
    def create(cls, options: UniversalOptions, host: DrafterHost) -> UniversalDrafter:
        """Load the draft model and compare the two vocabularies.

        Raises:
            ConfigError: The draft model has the target's tokens, or none in common where only
                such are to be drafted.
            ModelError: It cannot be loaded, or one of the models has no tokenizer.
        """
        tokenizer = Tokenizer.load(options.path)
        target_name = host.target.info.name
        target_tokenizer = _required(host.tokenizer, "target", target_name)
        tokenizer = _required(tokenizer, "draft", options.path)
        if tokenizer.vocabulary == target_tokenizer.vocabulary:
            raise ConfigError(
                f"{NAME} is for draft models with tokens of their own; {options.path!r} has those "
                f"of the target {target_name!r}",
                hint=f"use draft-model:path={options.path}, which drafts better for the same cost",
            )
        model = load_model(options.path, dtype=host.dtype, device=host.device)
        target = Vocabulary(target_tokenizer, target_name, host.target.info.vocab_size)
        draft = Vocabulary(tokenizer, options.path, model.info.vocab_size)
        return cls(model, options, host, target, draft)

    def start(self, request: RequestView) -> None:
        """Open the request's place in the cache; the prompt is encoded with the first draft."""
        super().start(request)
        self._texts[request.request_id] = Retokenizer(*self._vocabularies, dict(self._special))

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return one tree per context, grown together in the draft's tokens."""
        contexts = [self._bounded(context) for context in contexts]
        drafts = super().propose(self._own_contexts(contexts))
        return [
            self._translation.translate(draft, context)
            for draft, context in zip(drafts, contexts, strict=True)
        ]

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Keep the keys and values of tokens that stand whatever follows.

        Those at the end of the context may become others when it goes on, and so may what was
        drafted: it is fed anew, as a few rows of the next pass.
        """
        kept = []
        for outcome in outcomes:
            state = self._states[outcome.request_id]
            if state.num_known:
                num_new = self._texts[outcome.request_id].num_closed - state.sequence.num_cached
                kept.append((state.sequence, range(max(0, min(state.num_known, num_new)))))
                state.reset()
        if kept:
            self._cache.commit(kept)

    def stop(self, request_id: str) -> None:
        """Free the request's place in the cache."""
        super().stop(request_id)
        self._texts.pop(request_id, None)

    def _bounded(self, context: DraftContext) -> DraftContext:
        """Return the context with the options' bounds, which are in the target's tokens."""
        budget, (max_nodes, max_depth) = context.budget, self._bounds
        max_nodes = budget.max_nodes if max_nodes is None else min(budget.max_nodes, max_nodes)
        max_depth = min(budget.max_depth, max_depth)
        return replace(context, budget=replace(budget, max_nodes=max_nodes, max_depth=max_depth))

    def _own_contexts(self, contexts: Sequence[DraftContext]) -> list[DraftContext]:
        """Return the contexts in the draft's tokens; with an empty budget where that cannot be."""
        own_contexts = []
        for context in contexts:
            own_ids = self._encode(context)
            if own_ids and not context.budget.is_empty:
                own_contexts.append(self._translation.own_context(context, own_ids))
            else:
                own_contexts.append(replace(context, token_ids=[0], budget=NOTHING))
        return own_contexts

    def _encode(self, context: DraftContext) -> list[int]:
        text = self._texts[context.request_id]
        text.take(context.token_ids)
        return text.encode()


def _required(tokenizer: Tokenizer | None, role: str, name: str) -> Tokenizer:
    if tokenizer is None:
        raise ModelError(
            f"{NAME} compares texts and needs the tokenizers of target and draft model; the {role} "
            f"{name!r} has no tokenizer files",
            hint="put tokenizer.json beside the model's weights, or use draft-model if both "
            "models share their tokens",
        )
    return tokenizer


def _choose_mode(
    options: UniversalOptions, num_shared: int, target: Vocabulary, draft: Vocabulary
) -> str:
    if options.mode == "auto":
        share = num_shared / max(len(target.spellings), len(draft.spellings))
        return "tokens" if share >= MANY_SHARED else "text"
    if options.mode == "tokens" and not num_shared:
        raise ConfigError(
            f"{NAME}:mode=tokens drafts tokens that both models have; "
            f"{target.name!r} and {draft.name!r} share none",
            hint="use mode=text",
        )
    return options.mode


def _own_options(options: UniversalOptions, ratio: float) -> UniversalOptions:
    """Return how trees of the draft's tokens grow; nodes are bounded request by request."""
    max_depth = options.depth_limit
    if options.expansion is None:
        max_depth = math.ceil(max_depth * ratio)
    return replace(options, max_depth=max_depth, max_nodes=None)


def _own_host(
    host: DrafterHost, model: LanguageModel, ratio: float, num_scratch: int
) -> DrafterHost:
    """Return what there is for a drafter whose target speaks the draft's tokens.

    Args:
        host: What there is.
        model: The draft model.
        ratio: Its tokens for one of the target's.
        num_scratch: Positions for a request's tree in the making.
    """
    num_tokens = min(
        math.ceil(host.kv_cache_tokens * ratio), host.max_requests * model.info.context_limit
    )
    num_tokens += host.max_requests * num_scratch
    return replace(host, target=model, kv_cache_tokens=num_tokens)
