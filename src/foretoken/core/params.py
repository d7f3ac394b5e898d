"""What a request asks of the sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from foretoken.core import checks
from foretoken.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor

MAX_SEED = 2**64
LOGPROBS_MODES = ("raw", "processed")
MIN_TEMPERATURE = 1e-6  # below, logits overflow when divided; 0 means greedy
MAX_TEMPERATURE = 1e6  # every token is as likely as the others; far above, it overflows itself

LogitsProcessor = Callable[["Tensor", "Tensor"], "Tensor"]
"""A user's own control: maps (input_ids [1, T] int64, scores [1, V]) to scores [1, V]."""

_GRAMMARS = ("json_schema", "regex", "lark")
_SHARE = "in [0, 1]", lambda value: 0 <= value <= 1
_POSITIVE_SHARE = "in (0, 1]", lambda value: 0 < value <= 1
_CUTOFF = "in [0, 1)", lambda value: 0 <= value < 1
_PENALTY = "in [-2, 2]", lambda value: -2 <= value <= 2
_REALS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": (
        f"0 or in [{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}]",
        lambda value: value == 0 or MIN_TEMPERATURE <= value <= MAX_TEMPERATURE,
    ),
    "top_p": _POSITIVE_SHARE,
    "min_p": _SHARE,
    "typical_p": _POSITIVE_SHARE,
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "repetition_penalty": ("> 0", lambda value: value > 0),
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
}
_COUNTS = {"max_new_tokens": 1, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "top_k": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request chooses its tokens, and when it ends.

    Controls apply in transformers' order, which is the order of the fields from `logit_bias` to
    `eta_cutoff`. Each does what transformers' processor or option of the same name does, except
    where it says otherwise. Greedy decoding takes no notice of those from `temperature` on.

    Args:
        max_new_tokens: Upper bound on generated tokens; >= 1.
        stop: Texts that end the request; the output ends before the first one found.
        stop_token_ids: Tokens that end the request, as an end-of-sequence token does; also with
            `ignore_eos`.
        seed: Key of the request's noise, 0 <= seed < 2**64. None draws a fresh one, which the
            output reports.
        ignore_eos: Go on after an end-of-sequence token.
        logit_bias: Added to the logits of token ids; OpenAI's.
        sequence_bias: Pairs of token ids and a number, which is added to the logit of the last
            one where the others come just before.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that occur
            in prompt or output; > 0, 1 is off (CTRL, arXiv:1909.05858).
        frequency_penalty: Subtracted once for each time a token occurs in the output; OpenAI's.
        presence_penalty: Subtracted once if a token occurs in the output; OpenAI's.
        no_repeat_ngram_size: No run of so many tokens, of prompt and output together, comes
            twice; 0 is off.
        bad_words_ids: Sequences of token ids that are never completed. An end-of-sequence token
            alone does not count.
        min_new_tokens: No token that ends the request is chosen before so many others.
        allowed_token_ids: Only these are ever chosen; None allows all.
        json_schema: A JSON schema, as text or parsed, that the output must follow; `{}` for any
            JSON.
        regex: A regular expression that the whole output must match.
        lark: A grammar in llguidance's Lark dialect that the output must follow. At most one of
            these three is given.
        suppress_tokens: Token ids that are never chosen.
        logits_processors: Functions of (input_ids [1, T], scores [1, V]) that return new scores,
            as transformers' LogitsProcessor; they depend on their arguments alone. Applied in
            turn, to copies.
        temperature: 0 or in [1e-6, 1e6]; 0 is greedy, ties to the lowest token id.
        top_h: Keep the likeliest tokens, of a hundred, up to this share of their entropy;
            0 < h <= 1, None is off (arXiv:2509.02510).
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the fewest most likely tokens whose probabilities reach this; 0 < p <= 1.
        min_p: Drop tokens below this share of the likeliest token's probability; 0 <= p <= 1.
        typical_p: Keep the tokens whose surprise is nearest to the expected one, until their
            probabilities reach this; 0 < p <= 1, 1 is off (arXiv:2202.00666).
        epsilon_cutoff: Drop tokens less likely than this, the likeliest excepted; 0 <= p < 1, 0
            is off (arXiv:2210.15191).
        eta_cutoff: The same, with a bound that falls where the entropy is high.
        logprobs: For each output token, report its log-probability and those of this many
            likeliest tokens; None reports nothing.
        prompt_logprobs: The same for the tokens of the prompt, the first one excepted.
        logprobs_mode: "raw", as the model says it, or "processed", after every control. Those of
            the prompt are always raw.

    Raises:
        ConfigError: A value is out of range or of the wrong type, or two contradict each other.
    """

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    sequence_bias: checks.SequenceBias = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: checks.TokenSequences = ()
    min_new_tokens: int = 0
    allowed_token_ids: tuple[int, ...] | None = None
    json_schema: str | None = None
    regex: str | None = None
    lark: str | None = None
    suppress_tokens: tuple[int, ...] = ()
    logits_processors: Sequence[LogitsProcessor] = ()
    temperature: float = 0.0
    top_h: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: str = "raw"

    def __post_init__(self) -> None:
        for name, low in _COUNTS.items():
            checks.check_int(name, getattr(self, name), low)
        for name, (allowed, is_allowed) in _REALS.items():
            checks.check_real(name, getattr(self, name), allowed, is_allowed)
        if self.top_h is not None:
            checks.check_real("top_h", self.top_h, *_POSITIVE_SHARE)
        if self.seed is not None:
            checks.check_int("seed", self.seed, 0, MAX_SEED - 1)
        checks.check_bool("ignore_eos", self.ignore_eos)
        self._check_logprobs()
        for name, value in self._normalized().items():
            object.__setattr__(self, name, value)
        for name in ("regex", "lark"):
            if getattr(self, name) is not None:
                checks.check_text(name, getattr(self, name))
        self._check_together()

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from a mapping such as a JSON object.

        Raises:
            UnknownNameError: A key is not a sampling parameter.
            ConfigError: A value is out of range or of the wrong type.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise UnknownNameError("sampling parameter", key, names)
        return cls(**values)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without noise."""
        return self.temperature == 0

    @property
    def has_grammar(self) -> bool:
        """Whether the output must follow a grammar."""
        return any(getattr(self, name) is not None for name in _GRAMMARS)

    def named_token_ids(self) -> Iterator[tuple[str, int]]:
        """Yield each token id that a parameter names, with the parameter's name.

        Whether a model has such tokens is for who knows the model to check.
        """
        for name in ("logit_bias", "stop_token_ids", "allowed_token_ids", "suppress_tokens"):
            for token_id in getattr(self, name) or ():
                yield name, token_id
        for name, sequences in (
            ("bad_words_ids", self.bad_words_ids),
            ("sequence_bias", [token_ids for token_ids, _ in self.sequence_bias]),
        ):
            for sequence in sequences:
                for token_id in sequence:
                    yield name, token_id

    def _normalized(self) -> dict[str, Any]:
        """Return the parameters that are stored in another form than they may be given in."""
        allowed = self.allowed_token_ids
        if allowed is not None:
            allowed = checks.checked_ids("allowed_token_ids", allowed)
        if allowed == ():
            raise ConfigError(
                f"allowed_token_ids is None or at least one token id; got {self.allowed_token_ids}",
                hint="leave it out to allow every token",
            )
        return {
            "stop": checks.checked_stop(self.stop),
            "logit_bias": checks.checked_bias(self.logit_bias),
            "sequence_bias": checks.checked_sequence_bias(self.sequence_bias),
            "bad_words_ids": checks.checked_sequences("bad_words_ids", self.bad_words_ids),
            "stop_token_ids": checks.checked_ids("stop_token_ids", self.stop_token_ids),
            "suppress_tokens": checks.checked_ids("suppress_tokens", self.suppress_tokens),
            "allowed_token_ids": allowed,
            "json_schema": checks.checked_schema(self.json_schema),
            "logits_processors": checks.checked_callables(
                "logits_processors", self.logits_processors
            ),
        }

    def _check_logprobs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                checks.check_int(name, getattr(self, name), 0)
        if self.logprobs_mode not in LOGPROBS_MODES:
            raise ConfigError(
                f"logprobs_mode is one of {', '.join(LOGPROBS_MODES)}; got {self.logprobs_mode!r}",
                hint="raw is the model's own, processed is after every control",
            )

    def _check_together(self) -> None:
        """Refuse parameters that contradict each other whatever the model says."""
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens is at most max_new_tokens; got {self.min_new_tokens} and "
                f"{self.max_new_tokens}",
                hint="raise max_new_tokens or lower min_new_tokens",
            )
        grammars = [name for name in _GRAMMARS if getattr(self, name) is not None]
        if len(grammars) > 1:
            raise ConfigError(
                f"at most one of {', '.join(_GRAMMARS)} is given; got {' and '.join(grammars)}",
                hint="put all that the output must follow into one of them",
            )
        if self.allowed_token_ids is not None:
            self._check_allowed(set(self.allowed_token_ids))

    def _check_allowed(self, left: set[int]) -> None:
        """Refuse parameters that rule out every allowed token, from the first choice on."""
        bans = {
            "bad_words_ids": {ids[0] for ids in self.bad_words_ids if len(ids) == 1},
            "suppress_tokens": set(self.suppress_tokens),
            "stop_token_ids": set(self.stop_token_ids) if self.min_new_tokens else set(),
        }
        guilty = [name for name, banned in bans.items() if left & banned]
        if left - set().union(*bans.values()):
            return
        names = [f"{name} with min_new_tokens" if "stop" in name else name for name in guilty]
        raise ConfigError(
            f"every token of allowed_token_ids is ruled out by {' and '.join(names)}; "
            f"allowed_token_ids is {sorted(left)[:10]}",
            hint="allow a token that nothing else rules out",
        )
