"""What a call of transformers' `generate` asks for, in Foretoken's terms.

`generate` turns its configuration into lists of processors and stopping criteria, each with its
own numbers. They are read rather than the configuration, so that what is applied is what
transformers would apply, in its order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as theirs
from transformers.generation import stopping_criteria as endings
from transformers.generation.utils import GenerateDecoderOnlyOutput

from foretoken.core.params import SamplingParams
from foretoken.errors import RequestError

Criterion = Callable[[Tensor, None], Any]
Reader = Callable[[Any], dict[str, Any] | None]
"""Maps a processor to sampling parameters; None if they cannot say what it does."""

# What looks at more than its arguments, or at all rows of a batch at once.
_REFUSED: Mapping[type, str] = {
    theirs.UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    theirs.EncoderRepetitionPenaltyLogitsProcessor: "encoder_repetition_penalty",
    theirs.EncoderNoRepeatNGramLogitsProcessor: "encoder_no_repeat_ngram_size",
    theirs.WatermarkLogitsProcessor: "watermarking_config",
    theirs.SynthIDTextWatermarkLogitsProcessor: "watermarking_config",
    theirs.PrefixConstrainedLogitsProcessor: "prefix_allowed_tokens_fn",
}
# In the order in which transformers and `SamplingParams` apply them.
_WARPERS: Mapping[type, Reader] = {
    theirs.TemperatureLogitsWarper: lambda it: {"temperature": it.temperature},
    theirs.TopHLogitsWarper: lambda it: {"top_h": it.top_h},
    theirs.TopKLogitsWarper: lambda it: {"top_k": it.top_k},
    theirs.TopPLogitsWarper: lambda it: {"top_p": it.top_p},
    theirs.MinPLogitsWarper: lambda it: {"min_p": it.min_p},
    theirs.TypicalLogitsWarper: lambda it: {"typical_p": it.mass},
    theirs.EpsilonLogitsWarper: lambda it: {"epsilon_cutoff": it.epsilon},
    theirs.EtaLogitsWarper: lambda it: {"eta_cutoff": float(it.epsilon)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What all rows of a call have in common.

    Args:
        params: Sampling parameters by name, the seed and the length left out.
        processors: Applied after those that `params` stand for, to the row with its padding.
        eos_ids: Tokens that end a row.
        criteria: Asked after each token whether the row ends with it.
        max_length: Of padding, prompt and output together.
    """

    params: Mapping[str, Any]
    processors: tuple[Callable[[Tensor, Tensor], Tensor], ...]
    eos_ids: tuple[int, ...]
    criteria: tuple[Criterion, ...]
    max_length: int

    def params_for(self, padding: Tensor, seed: int, max_new_tokens: int) -> SamplingParams:
        """Return the sampling parameters of one row.

        Args:
            padding: Token ids that stand before its prompt, [P].
            seed: Key of its noise.
            max_new_tokens: Most tokens that it takes.

        Raises:
            ConfigError: A parameter is out of Foretoken's range.
        """
        values = dict(self.params)
        values["min_new_tokens"] = min(values.get("min_new_tokens", 0), max_new_tokens)
        return SamplingParams(
            **values,
            max_new_tokens=max_new_tokens,
            seed=seed,
            ignore_eos=True,  # the call says what ends a sequence, not the model
            stop_token_ids=self.eos_ids,
            logits_processors=[_padded(it, padding) for it in self.processors],
        )


def read_wishes(
    processors: Sequence[Any],
    criteria: Sequence[Any],
    *,
    is_sampled: bool,
    prompt_length: int,
    vocab_size: int,
) -> Wishes:
    """Translate what `generate` has prepared.

    Processors that sampling parameters cannot express run as they are, from the first such one
    on.

    Args:
        processors: transformers' and the user's, in the order of their application.
        criteria: Likewise.
        is_sampled: Whether tokens are sampled; else the likeliest is taken.
        prompt_length: Of a row, padding included.
        vocab_size: Token ids outside are left out where they say nothing.

    Raises:
        RequestError: A processor cannot be applied under speculation.
    """
    for processor in processors:
        if type(processor) in _REFUSED:
            raise refusal(_REFUSED[type(processor)], "it looks at more than one row's own tokens")
    eos_ids = _eos_ids(criteria, vocab_size)
    edits, warpers = _split(processors, is_sampled=is_sampled)
    params: dict[str, Any] = {"temperature": 1.0 if is_sampled else 0.0}
    readers = _edit_readers(eos_ids, prompt_length, vocab_size)
    num_read = _read_edits(edits, readers, params)
    for warper in warpers:
        params.update(_read_warper(warper))
    lengths = [it.max_length for it in criteria if isinstance(it, endings.MaxLengthCriteria)]
    native = (endings.MaxLengthCriteria, endings.EosTokenCriteria)
    return Wishes(
        params=params,
        processors=tuple(edits[num_read:]),
        eos_ids=eos_ids,
        criteria=tuple(it for it in criteria if not isinstance(it, native)),
        max_length=min(lengths),
    )


def refusal(option: str, reason: str) -> RequestError:
    """Return the error for an option of `generate` that cannot be served."""
    return RequestError(
        f"foretoken.hf.generate does not take {option}: {reason}",
        hint=f"leave {option} out, or leave custom_generate out for transformers' own decoding",
    )


def as_output(sequences: Tensor, stats: Sequence[Any]) -> GenerateDecoderOnlyOutput:
    """Return what `generate` returns as a dictionary, with the statistics of each row."""
    return SpeculativeOutput(sequences=sequences, stats=tuple(stats))


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc] # untyped there
    """transformers' output with what speculation did.

    Args:
        stats: One `RequestStats` per row.
    """

    stats: tuple[Any, ...] | None = None


def _padded(
    processor: Callable[[Tensor, Tensor], Tensor], padding: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a processor that sees a row as `generate` holds it, padding first."""

    def processed(input_ids: Tensor, scores: Tensor) -> Tensor:
        row = torch.cat((padding.to(input_ids.device)[None], input_ids), dim=1)
        return processor(row, scores)

    processed.__name__ = type(processor).__name__
    return processed


def _eos_ids(criteria: Sequence[Any], vocab_size: int) -> tuple[int, ...]:
    found = [it.eos_token_id for it in criteria if isinstance(it, endings.EosTokenCriteria)]
    return _known([token_id for ids in found for token_id in ids.tolist()], vocab_size)


def _known(token_ids: Collection[int], vocab_size: int) -> tuple[int, ...]:
    return tuple(token_id for token_id in token_ids if 0 <= token_id < vocab_size)


def _split(processors: Sequence[Any], *, is_sampled: bool) -> tuple[list[Any], list[Any]]:
    """Return the processors before the warpers, and the warpers: the longest end in their order."""
    edits, warpers = list(processors), list[Any]()
    while edits and type(edits[-1]) is theirs.LogitNormalization:
        edits.pop()  # changes neither the order of scores nor the distribution
    places = {kind: place for place, kind in enumerate(_WARPERS)}
    limit = len(places) if is_sampled else 0
    while edits and places.get(type(edits[-1]), limit) < limit:
        limit = places[type(edits[-1])]
        warpers.insert(0, edits.pop())
    return edits, warpers


def _read_warper(warper: Any) -> dict[str, Any]:
    if getattr(warper, "min_tokens_to_keep", 1) != 1 or _fill_of(warper) != -torch.inf:
        raise refusal(
            type(warper).__name__, "min_tokens_to_keep and filter_value have to be the usual ones"
        )
    return _WARPERS[type(warper)](warper) or {}


def _fill_of(warper: Any) -> float:
    """Return the score that a warper gives to what it drops."""
    return float(getattr(warper, "filter_value", -torch.inf))


def _read_edits(
    edits: Sequence[Any], readers: Mapping[type, Reader], params: dict[str, Any]
) -> int:
    """Add what processors ask for to the parameters; return how many of them could be read."""
    places = {kind: place for place, kind in enumerate(readers)}
    last = -1
    for number, processor in enumerate(edits):
        place = places.get(type(processor), -1)
        values = readers[type(processor)](processor) if place > last else None
        if values is None:
            return number
        least = max(params.get("min_new_tokens", 0), values.pop("min_new_tokens", 0))
        params.update(values, min_new_tokens=least)
        last = place
    return len(edits)


def _edit_readers(
    eos_ids: Collection[int], prompt_length: int, vocab_size: int
) -> Mapping[type, Reader]:
    """Return how to read processors, in the order in which transformers and we apply them."""

    def until(count: int, processor: Any) -> dict[str, Any] | None:
        theirs_ids = set(_known(processor.eos_token_id.tolist(), vocab_size))
        return {"min_new_tokens": max(0, count)} if theirs_ids == set(eos_ids) else None

    def biases(processor: Any) -> dict[str, Any] | None:
        pairs = tuple(processor.sequence_bias.items())
        return {"sequence_bias": pairs} if all(math.isfinite(bias) for _, bias in pairs) else None

    def bad_words(processor: Any) -> dict[str, Any]:
        return {"bad_words_ids": tuple(processor.sequence_bias)}

    def suppressed(processor: Any) -> dict[str, Any]:
        return {"suppress_tokens": _known(processor.suppress_tokens.tolist(), vocab_size)}

    return {
        theirs.SequenceBiasLogitsProcessor: biases,
        theirs.RepetitionPenaltyLogitsProcessor: lambda it: {"repetition_penalty": it.penalty},
        theirs.NoRepeatNGramLogitsProcessor: lambda it: {"no_repeat_ngram_size": it.ngram_size},
        theirs.NoBadWordsLogitsProcessor: bad_words,
        theirs.MinLengthLogitsProcessor: lambda it: until(it.min_length - prompt_length, it),
        theirs.MinNewTokensLengthLogitsProcessor: lambda it: until(it.min_new_tokens, it),
        theirs.SuppressTokensLogitsProcessor: suppressed,
    }


__all__ = ["Criterion", "SpeculativeOutput", "Wishes", "as_output", "read_wishes", "refusal"]
