"""Every sampling control beside transformers' processor of the same name, for many tests."""

import numpy as np
import torch
import transformers
from hypothesis import strategies as st

from foretoken.core.controls import build_controls, new_history
from foretoken.core.edits import Edits, edit_array, edit_tensor
from foretoken.core.warpers import warp_array, warp_tensor

# -- ours, one row at a time -----------------------------------------------------------------


def edited_by_numpy(params, row, token_ids, num_prompt_ids, *, eos_ids=(), grammar=None, path=()):
    """Return a row after every control that looks at the history."""
    array = row.numpy().copy()
    edit_array(array, edits_of(params, token_ids, num_prompt_ids, eos_ids, grammar, path))
    return torch.from_numpy(array)


def edited_by_torch(params, row, token_ids, num_prompt_ids, *, eos_ids=(), grammar=None, path=()):
    """Return what `edited_by_numpy` does, the way other devices take."""
    return edit_tensor(row, edits_of(params, token_ids, num_prompt_ids, eos_ids, grammar, path))


def edits_of(params, token_ids, num_prompt_ids, eos_ids, grammar, path):
    edits, history = Edits(), new_history(params, num_prompt_ids)
    history.move_to(token_ids, path)
    for control in build_controls(params, frozenset(eos_ids), grammar).values():
        control(edits, history)
    return edits


def warped_by_numpy(params, row):
    """Return a row after every warper."""
    array = row.numpy().copy()
    warp_array(array, params)
    return torch.from_numpy(array)


def warped_by_torch(params, row):
    """Return what `warped_by_numpy` does, the way other devices take."""
    return warp_tensor(row, params)


# -- theirs ----------------------------------------------------------------------------------


class OpenAIPenalties(transformers.LogitsProcessor):
    """The formula of OpenAI's API reference; transformers has no such processor."""

    def __init__(self, frequency, presence, num_prompt_ids):
        self._penalties, self._num_prompt_ids = (frequency, presence), num_prompt_ids

    def __call__(self, input_ids, scores):
        frequency, presence = self._penalties
        scores = scores.clone()
        output_ids = input_ids[0, self._num_prompt_ids :].tolist()
        for token_id in set(output_ids):
            penalty = output_ids.count(token_id) * frequency + presence
            scores[0, token_id] -= torch.tensor(penalty, dtype=scores.dtype)
        return scores


def their_processors(params, num_prompt_ids, eos_ids=()):
    """Return processors in the order, and on the conditions, of `_get_logits_processor`."""
    eos, found = list(eos_ids), []
    bias = {(token_id,): value for token_id, value in params.logit_bias.items()}
    bias.update(dict(params.sequence_bias))
    if bias:
        found.append(transformers.SequenceBiasLogitsProcessor(bias))
    if params.repetition_penalty != 1:
        found.append(transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.frequency_penalty or params.presence_penalty:
        found.append(
            OpenAIPenalties(params.frequency_penalty, params.presence_penalty, num_prompt_ids)
        )
    if params.no_repeat_ngram_size:
        found.append(transformers.NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
    words = [list(ids) for ids in params.bad_words_ids]
    if any(ids not in [[token_id] for token_id in eos] for ids in words):
        found.append(transformers.NoBadWordsLogitsProcessor(words, eos or None))
    final_ids = [*eos, *params.stop_token_ids]
    if params.min_new_tokens and final_ids:
        found.append(
            transformers.MinNewTokensLengthLogitsProcessor(
                num_prompt_ids, params.min_new_tokens, final_ids
            )
        )
    if params.allowed_token_ids is not None:
        allowed = list(params.allowed_token_ids)
        found.append(transformers.PrefixConstrainedLogitsProcessor(lambda *_: allowed, 1))
    if params.suppress_tokens:
        suppressed = list(params.suppress_tokens)
        found.append(transformers.generation.SuppressTokensLogitsProcessor(suppressed))
    return transformers.LogitsProcessorList([*found, *params.logits_processors])


def their_warpers(params):
    """Return the warpers after temperature, in their order."""
    found = []
    if params.top_h is not None:
        found.append(transformers.TopHLogitsWarper(params.top_h))
    if params.top_k:
        found.append(transformers.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        found.append(transformers.TopPLogitsWarper(params.top_p))
    if params.min_p:
        found.append(transformers.MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        found.append(transformers.TypicalLogitsWarper(params.typical_p))
    if params.epsilon_cutoff:
        found.append(transformers.EpsilonLogitsWarper(params.epsilon_cutoff))
    if params.eta_cutoff:
        found.append(transformers.EtaLogitsWarper(params.eta_cutoff))
    return transformers.LogitsProcessorList(found)


def edited_by_them(params, row, token_ids, num_prompt_ids, eos_ids=()):
    """Return a row after their processors."""
    processors = their_processors(params, num_prompt_ids, eos_ids)
    return processors(torch.tensor([token_ids]), row.unsqueeze(0).clone())[0]


def warped_by_them(params, row):
    """Return a row after their warpers.

    They compute probabilities in the type of the row, we in float64: where float32 would round
    across a bound, float64 says what is right. So they get the row in float64, after temperature.
    """
    no_ids = torch.tensor([[0]])
    if params.temperature != 1:
        warper = transformers.TemperatureLogitsWarper(float(params.temperature))
        row = warper(no_ids, row.unsqueeze(0))[0]
    return their_warpers(params)(no_ids, row.double().unsqueeze(0))[0].to(row.dtype)


# -- what to ask for -------------------------------------------------------------------------


def shares(low=0, high=999):
    """Return numbers in (0, 1) that no sum of equal probabilities meets, rounding or not."""
    return st.integers(low, high).map(lambda count: (count + 0.137) / 1000)


def sequences(vocab_size, max_length=3):
    """Return short lists of short sequences; small token ids, so that they occur."""
    token_id = st.integers(0, min(5, vocab_size - 1)) | st.integers(0, vocab_size - 1)
    return st.lists(token_id, min_size=1, max_size=max_length)


def eighths(limit=8):
    """Return numbers that float32 adds without rounding."""
    return st.integers(-8 * limit, 8 * limit).map(lambda count: count / 8)


def history_controls(vocab_size):
    """Return strategies for every parameter that looks at the history, by name."""
    token_ids = st.lists(st.integers(0, vocab_size - 1), max_size=4)
    words = sequences(vocab_size)
    return {
        "logit_bias": st.dictionaries(st.integers(0, vocab_size - 1), eighths(), max_size=4),
        "sequence_bias": st.lists(
            st.tuples(words.filter(lambda ids: len(ids) > 1), eighths()), max_size=4
        ),
        "repetition_penalty": st.sampled_from([0.5, 0.8, 1.3, 2.0]),
        "frequency_penalty": eighths(2),
        "presence_penalty": eighths(2),
        "no_repeat_ngram_size": st.integers(1, 4),
        "bad_words_ids": st.lists(words, max_size=5),
        "min_new_tokens": st.integers(0, 8),
        "stop_token_ids": token_ids,
        "suppress_tokens": token_ids,
        "allowed_token_ids": st.lists(
            st.integers(0, vocab_size - 1), min_size=vocab_size // 2, max_size=vocab_size
        ),
    }


def warper_controls():
    """Return strategies for every parameter that only reshapes a distribution, by name."""
    return {
        "top_h": shares(),
        "top_k": st.integers(1, 70),
        "top_p": shares(),
        "min_p": shares(0, 400),
        "typical_p": shares(),
        "epsilon_cutoff": shares(0, 300),
        # transformers keeps its root in float32; these have one.
        "eta_cutoff": st.integers(1, 6).map(lambda power: 0.25**power),
    }


class CyclicGrammar:
    """A grammar over token ids: a token's remainder is one more than the last one's.

    It is narrower than the vocabulary, and allows nothing where `dead_ends` say so, and the next
    token id alone where `forcing` does.
    """

    def __init__(self, vocab_size, modulus=3, narrower=1, dead_ends=(), forcing=()):
        self._remainders = np.arange(vocab_size - narrower) % modulus
        self._modulus, self._dead_ends, self._forcing = modulus, dead_ends, forcing

    def allowed(self, token_ids, path=()):
        last = [*token_ids, *path][-1]
        if last in self._dead_ends:
            return np.zeros(len(self._remainders), dtype=bool)
        if last in self._forcing:
            return np.arange(len(self._remainders)) == last + 1
        return self._remainders == (last + 1) % self._modulus

    def forced(self, token_ids):
        found, last = [], token_ids[-1]
        while last in self._forcing:
            last += 1
            found.append(last)
        return found

    def is_complete(self, token_ids, path=()):
        return False
