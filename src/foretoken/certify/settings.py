"""What is certified, on how much work, and how strictly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from foretoken.core.params import SamplingParams

FALSE_ALARM = 1e-6  # of a whole certificate, if the rule and the target are right


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifyPrompt:
    """One prompt with the controls it is continued under.

    Args:
        prompt_ids: At least one token.
        params: Everything but temperature and seed counts as it is; a seed given here is that of
            the first text.
        temperatures: With which it is continued.
        place: Where it comes from, for the report.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    temperatures: tuple[float, ...]
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifySettings:
    """How much is compared and drawn.

    Args:
        prompts: At least one.
        num_seeds: Texts per prompt and temperature above 0 whose tokens are compared.
        batch_sizes: Requests at once, each a comparison of its own.
        num_samples: Texts drawn per temperature above 0 for the distribution, over all prompts.
        sample_tokens: Tokens of each of them.
        sample_prompts: Most prompts that are drawn from, the first ones.
        seed: Everything random follows from it.
        allow_lossy: Whether a rule that declares itself lossy may pass.
    """

    prompts: tuple[CertifyPrompt, ...]
    num_seeds: int = 2
    batch_sizes: tuple[int, ...] = (1, 3, 8)
    num_samples: int = 1024
    sample_tokens: int = 10
    sample_prompts: int = 8
    seed: int = 0
    allow_lossy: bool = False

    @property
    def temperatures(self) -> list[float]:
        """All temperatures of all prompts, in order of appearance."""
        return list(dict.fromkeys(t for prompt in self.prompts for t in prompt.temperatures))


Report = Callable[[str], None]
"""Told after each finished text what it was for."""


__all__ = ["FALSE_ALARM", "CertifyPrompt", "CertifySettings", "Report"]
