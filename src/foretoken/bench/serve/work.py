"""Requests with prompts of real text: each is a piece that no other one has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from foretoken.bench.serve.client import Ask
from foretoken.bench.serve.settings import ServeSettings
from foretoken.bench.serve.trace import Arrival
from foretoken.bench.sweep.work import MAX_TEXT_TOKENS, Stories
from foretoken.errors import ConfigError
from foretoken.models.tokenizer import Tokenizer

NUM_STORIES = 64
MAX_TEXT_CHARACTERS = 8 * 2**20  # of a file; more would take long to split into tokens


@dataclass(frozen=True, slots=True)
class Text:
    """A long text in a model's tokens.

    Args:
        token_ids: At least one.
        beginning: What prompts of this model begin with; may be empty.
    """

    token_ids: Sequence[int]
    beginning: tuple[int, ...]


def load_text(settings: ServeSettings, tokenizer: Tokenizer | None) -> Text:
    """Return the text of the settings' file, or stories by the embedded target without one.

    Args:
        settings: Of the bench.
        tokenizer: Of the target; None if it has none.

    Raises:
        ConfigError: There is no tokenizer, or the file holds no text.
    """
    if tokenizer is None:
        raise ConfigError(
            "prompts are texts, but the model has no tokenizer",
            hint="name a model that has one beside its weights",
        )
    beginning = tuple(tokenizer.encode("")[:1])
    if settings.text is None:
        stories = Stories(tokenizer, MAX_TEXT_TOKENS, MAX_TEXT_TOKENS, settings.threads)
        seeds = range(settings.seed, settings.seed + NUM_STORIES)
        token_ids = [token_id for prompt_ids, _ in stories.begin(seeds) for token_id in prompt_ids]
        return Text(token_ids, beginning)
    try:
        with settings.text.open(encoding="utf-8") as file:
            content = file.read(MAX_TEXT_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise _no_text(settings.text.name, str(error)) from error
    token_ids = tokenizer.encode(content, adds_special=False)
    if not token_ids:
        raise _no_text(settings.text.name, "it is empty")
    return Text(token_ids, beginning)


def _no_text(name: str, reason: str) -> ConfigError:
    return ConfigError(f"{name} cannot be used as text: {reason}", hint="change --text")


class Prompter:
    """Gives arrivals their prompts.

    Prompts are successive pieces of one text: none begins as another does, and what two share is
    what pieces of a text share. A text that is used up comes again, cut at other places.

    Args:
        text: Where the pieces are from.
        seed: Of the first request; each has the next one.
        place: Where in the text the first piece begins.
    """

    def __init__(self, text: Text, seed: int, place: int = 0) -> None:
        self._text = text
        self._seed = seed
        self._place = place

    def asks(self, arrivals: Iterable[Arrival]) -> Iterator[Ask]:
        """Yield requests that come when the arrivals do and are as long."""
        for arrival in arrivals:
            yield Ask(
                at_s=arrival.at_s,
                prompt_ids=self._take(arrival.num_prompt_ids),
                num_new_tokens=arrival.num_new_tokens,
                seed=self._seed,
            )
            self._seed += 1

    def _take(self, num_tokens: int) -> list[int]:
        token_ids, beginning = self._text.token_ids, self._text.beginning
        num_wanted = max(0, num_tokens - len(beginning))
        piece: list[int] = []
        while len(piece) < num_wanted:
            start = self._place % len(token_ids)
            part = token_ids[start : start + num_wanted - len(piece)]
            piece += part
            self._place += len(part)
        return [*beginning, *piece]


__all__ = ["Prompter", "Text", "load_text"]
