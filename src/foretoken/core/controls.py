"""Controls that look at the history: biases, penalties and bans.

The order is that of transformers' `GenerationMixin._get_logits_processor`. OpenAI's two
penalties, which transformers does not have, come after the repetition penalty; a grammar comes
with the bans.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from foretoken.core.edits import Edits
from foretoken.core.grammar import GrammarState
from foretoken.core.history import History
from foretoken.core.params import SamplingParams

Control = Callable[[Edits, History], None]
"""Adds one control's part to the edits of the row that follows a history."""


# -- what is added or subtracted -----------------------------------------------------------------


def sequence_bias(pairs: Iterable[tuple[Sequence[int], float]]) -> Control:
    """Add to the logit of a sequence's last token where the tokens before it have just come.

    A sequence of one token is always biased, which is OpenAI's `logit_bias`.

    Source: transformers' SequenceBiasLogitsProcessor.
    """
    table = _SequenceTable(pairs)

    def add(edits: Edits, history: History) -> None:
        for token_id, value in table.completed_by(history.token_ids):
            edits.bias[token_id] = edits.bias.get(token_id, 0.0) + value

    return add


def repetition_penalty(penalty: float) -> Control:
    """Make tokens of prompt and output less likely (> 1) or likelier (< 1).

    Source: Keskar et al. 2019, arXiv:1909.05858; transformers' RepetitionPenaltyLogitsProcessor.
    """

    def add(edits: Edits, history: History) -> None:
        if history.seen is not None:
            edits.penalized_ids = history.seen.ids
            edits.repetition_penalty = penalty

    return add


def occurrence_penalties(frequency: float, presence: float) -> Control:
    """Subtract `count * frequency + presence` from the logits of tokens of the output.

    Source: OpenAI's API reference, frequency and presence penalties.
    """

    def add(edits: Edits, history: History) -> None:
        if history.output is not None:
            edits.counted_ids = history.output.ids
            edits.penalties = history.output.numbers * frequency + presence

    return add


# -- what cannot be chosen -----------------------------------------------------------------------


def no_repeat_ngram() -> Control:
    """Ban tokens that would complete an n-gram which prompt and output contain already.

    Source: transformers' NoRepeatNGramLogitsProcessor.
    """

    def add(edits: Edits, history: History) -> None:
        if history.ngrams is not None:
            edits.banned_ids += history.ngrams.followers(history.token_ids)
        elif history.seen is not None:  # n-grams of one token are the tokens
            edits.banned_ids += history.seen.ids.tolist()

    return add


def bad_words(sequences: Iterable[Sequence[int]], eos_ids: frozenset[int]) -> Control:
    """Ban the last token of a sequence where the tokens before it have just come.

    An end-of-sequence token alone is not banned.

    Source: transformers' NoBadWordsLogitsProcessor.
    """
    table = _SequenceTable(
        (ids, 0.0) for ids in sequences if not (len(ids) == 1 and ids[0] in eos_ids)
    )

    def add(edits: Edits, history: History) -> None:
        edits.banned_ids += [token_id for token_id, _ in table.completed_by(history.token_ids)]

    return add


def min_new_tokens(count: int, final_ids: Iterable[int]) -> Control:
    """Ban tokens that end the request until it has `count` others.

    Source: transformers' MinNewTokensLengthLogitsProcessor.
    """
    banned = list(final_ids)

    def add(edits: Edits, history: History) -> None:
        if history.num_output_ids < count:
            edits.banned_ids += banned

    return add


def allowed_tokens(token_ids: Sequence[int]) -> Control:
    """Ban all tokens but these.

    Source: transformers' PrefixConstrainedLogitsProcessor, whose function returns these always;
    where other controls leave none of them, that one forces them and this one does not.
    """
    allowed = np.zeros(max(token_ids) + 1, dtype=np.bool_)
    allowed[list(token_ids)] = True

    def add(edits: Edits, _history: History) -> None:
        edits.masks.append(allowed)

    return add


def suppress_tokens(token_ids: Sequence[int]) -> Control:
    """Ban these tokens.

    Source: transformers' SuppressTokensLogitsProcessor.
    """

    def add(edits: Edits, _history: History) -> None:
        edits.banned_ids += token_ids

    return add


def follow_grammar(grammar: GrammarState) -> Control:
    """Ban what a grammar does not allow next."""

    def add(edits: Edits, history: History) -> None:
        edits.masks.append(grammar.allowed(*history.source))

    return add


# -- all of a request ----------------------------------------------------------------------------


def build_controls(
    params: SamplingParams, eos_ids: frozenset[int], grammar: GrammarState | None
) -> dict[str, Control]:
    """Return the controls that are on, in order, under the names of their parameters.

    Args:
        params: The request's parameters.
        eos_ids: End-of-sequence tokens that end the request.
        grammar: What the output must follow, if anything.
    """
    return {**_biases(params), **_bans(params, eos_ids, grammar)}


def _biases(params: SamplingParams) -> dict[str, Control]:
    controls: dict[str, Control] = {}
    if params.logit_bias:
        pairs = [((token_id,), value) for token_id, value in params.logit_bias.items()]
        controls["logit_bias"] = sequence_bias(pairs)
    if params.sequence_bias:
        controls["sequence_bias"] = sequence_bias(params.sequence_bias)
    if params.repetition_penalty != 1:
        controls["repetition_penalty"] = repetition_penalty(params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        controls["frequency_penalty and presence_penalty"] = occurrence_penalties(
            params.frequency_penalty, params.presence_penalty
        )
    return controls


def _bans(
    params: SamplingParams, eos_ids: frozenset[int], grammar: GrammarState | None
) -> dict[str, Control]:
    controls: dict[str, Control] = {}
    if params.no_repeat_ngram_size:
        controls["no_repeat_ngram_size"] = no_repeat_ngram()
    if params.bad_words_ids:
        controls["bad_words_ids"] = bad_words(params.bad_words_ids, eos_ids)
    if params.min_new_tokens:
        final_ids = eos_ids.union(params.stop_token_ids)
        controls["min_new_tokens"] = min_new_tokens(params.min_new_tokens, final_ids)
    if params.allowed_token_ids is not None:
        controls["allowed_token_ids"] = allowed_tokens(params.allowed_token_ids)
    if params.suppress_tokens:
        controls["suppress_tokens"] = suppress_tokens(params.suppress_tokens)
    if grammar is not None:
        controls["grammar"] = follow_grammar(grammar)
    return controls


def new_history(params: SamplingParams, num_prompt_ids: int) -> History:
    """Return a history that keeps what the controls of `params` look at, and nothing else."""
    size = params.no_repeat_ngram_size
    return History(
        num_prompt_ids,
        has_counts=params.repetition_penalty != 1 or size == 1,
        has_output_counts=bool(params.frequency_penalty or params.presence_penalty),
        ngram_size=size if size > 1 else 0,
    )


class _SequenceTable:
    """Finds the sequences that one more token would complete."""

    def __init__(self, pairs: Iterable[tuple[Sequence[int], float]]) -> None:
        # By length of what comes before the last token, then by that itself.
        self._by_length: dict[int, dict[tuple[int, ...], list[tuple[int, float]]]] = {}
        for ids, value in pairs:
            table = self._by_length.setdefault(len(ids) - 1, defaultdict(list))
            table[tuple(ids[:-1])].append((ids[-1], value))

    def completed_by(self, token_ids: Sequence[int]) -> Iterable[tuple[int, float]]:
        """Yield the last token and the value of each sequence that may be completed next."""
        for length, table in self._by_length.items():
            before = tuple(token_ids[len(token_ids) - length :]) if length else ()
            if length <= len(token_ids):
                yield from table.get(before, ())
