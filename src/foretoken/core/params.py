"""What a request asks of the sampler."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from operator import index
from typing import Any

from foretoken.errors import ConfigError, UnknownNameError

MAX_SEED = 2**64
MIN_TEMPERATURE = 1e-6  # below, logits overflow when divided; 0 means greedy


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request chooses its tokens, and when it ends.

    Controls apply in the order of the fields: bias and penalties, then temperature, top-k, top-p
    and min-p, each as transformers' processors of the same name do.

    Args:
        max_new_tokens: Upper bound on generated tokens; >= 1.
        stop: Texts that end the request; the output ends before the first one found.
        seed: Key of the request's noise, 0 <= seed < 2**64. None draws a fresh one, which the
            output reports.
        ignore_eos: Go on after an end-of-sequence token.
        logit_bias: Added to the logits of token ids.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that occur
            in prompt or output; > 0, 1 is off (CTRL, arXiv:1909.05858).
        frequency_penalty: Subtracted once for each time a token occurs in the output.
        presence_penalty: Subtracted once if a token occurs in the output.
        temperature: 0 or >= 1e-6; 0 is greedy, ties to the lowest token id.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the fewest most likely tokens whose probabilities reach this; 0 < p <= 1.
        min_p: Drop tokens below this share of the likeliest token's probability; 0 <= p <= 1.

    Raises:
        ConfigError: A value is out of range or of the wrong type.
    """

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        _check_int("max_new_tokens", self.max_new_tokens, 1, None)
        _check_int("top_k", self.top_k, 0, None)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED - 1)
        _check_bool("ignore_eos", self.ignore_eos)
        _check_real(
            "temperature",
            self.temperature,
            f"0 or >= {MIN_TEMPERATURE:g}",
            lambda value: value == 0 or value >= MIN_TEMPERATURE,
        )
        _check_real("top_p", self.top_p, "in (0, 1]", lambda value: 0 < value <= 1)
        _check_real("min_p", self.min_p, "in [0, 1]", lambda value: 0 <= value <= 1)
        _check_real("repetition_penalty", self.repetition_penalty, "> 0", lambda value: value > 0)
        for name in ("frequency_penalty", "presence_penalty"):
            _check_real(name, getattr(self, name), "in [-2, 2]", lambda value: -2 <= value <= 2)

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


def _checked_stop(stop: object) -> tuple[str, ...]:
    """Return the stop texts as a tuple; one text stands for itself."""
    texts = (stop,) if isinstance(stop, str) else stop
    if isinstance(texts, (list, tuple)) and all(isinstance(text, str) and text for text in texts):
        return tuple(texts)
    raise ConfigError(
        f"stop holds texts of at least one character; got {stop!r}",
        hint="leave empty stop texts out",
    )


def _checked_bias(bias: Mapping[int, float]) -> Mapping[int, float]:
    """Return a copy of the bias with integer keys; JSON objects bring their keys as text."""
    try:
        checked = {
            int(token_id) if isinstance(token_id, str) else index(token_id): float(value)
            for token_id, value in bias.items()
        }
        if any(token_id < 0 for token_id in checked) or not all(
            math.isfinite(value) for value in checked.values()
        ):
            raise ValueError
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"logit_bias maps token ids >= 0 to finite numbers; got {bias!r}",
            hint='write it as {"42": -1.5}',
        ) from None
    return checked


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is true or false; got {value!r}", hint=f"change {name}")


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if is_int and low <= value and (high is None or value <= high):  # type: ignore[operator]
        return
    allowed = f">= {low}" if high is None else f"in [{low}, {high}]"
    raise ConfigError(f"{name} is an integer {allowed}; got {value!r}", hint=f"change {name}")


def _check_real(
    name: str, value: object, allowed: str, is_allowed: Callable[[float], bool]
) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer beyond every float
            if math.isfinite(value) and is_allowed(value):
                return
    raise ConfigError(f"{name} is a number {allowed}; got {value!r}", hint=f"change {name}")
