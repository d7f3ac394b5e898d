"""Token ids to text while they arrive, with stop texts found across token borders."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

# Tokens of the prompt that are decoded along, because some tokenizers write a token differently
# at the beginning of a text than inside it.
NUM_CONTEXT_IDS = 6
INCOMPLETE = "\ufffd"


class TextStream:
    """The text of one request's output; without stop texts, tokens are decoded when it is read.

    Args:
        decode: Maps token ids to text; None for a model without tokenizer: no text then.
        prompt_ids: The prompt, for the context of the first tokens.
        stop: Texts that end the output.
    """

    def __init__(
        self, decode: Decode | None, prompt_ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._text = ""
        self._decode = decode
        self._stop = stop
        self._longest_stop = max(map(len, stop), default=0)
        self._ids = list(prompt_ids[-NUM_CONTEXT_IDS:])
        self._start, self._end = 0, len(self._ids)  # decoded already: ids[start:end]
        self._num_taken = 0

    def push(self, token_ids: Sequence[int]) -> int | None:
        """Add tokens; return after how many of them a stop text is complete, None if none is."""
        if not self._stop:
            self._ids += token_ids
            return None
        for count, token_id in enumerate(token_ids, start=1):
            self._ids.append(token_id)
            num_before = len(self._text)
            self._advance()
            if self._cut_at_stop(max(0, num_before - self._longest_stop + 1)):
                return count
        return None

    @property
    def text(self) -> str:
        """All text so far that is certain, without anything from a stop text on."""
        self._advance()
        return self._text

    def take(self) -> str:
        """Return the text that is new since the last call and can no longer be taken back."""
        text = self.text
        taken = text[self._num_taken : len(text) - self._num_held_back()]
        self._num_taken += len(taken)
        return taken

    def finish(self) -> str:
        """Return the rest, with whatever an incomplete last character decodes to."""
        self._advance(is_last=True)
        self._cut_at_stop(0)
        rest = self._text[self._num_taken :]
        self._num_taken = len(self._text)
        return rest

    def _advance(self, *, is_last: bool = False) -> None:
        """Decode the tokens that are new."""
        if self._decode is None or self._end == len(self._ids):
            return
        known = self._decode(self._ids[self._start : self._end])
        whole = self._decode(self._ids[self._start :])
        if len(whole) > len(known) and (is_last or not whole.endswith(INCOMPLETE)):
            self._text += whole[len(known) :]
            self._start, self._end = self._end, len(self._ids)

    def _cut_at_stop(self, search_from: int) -> bool:
        found = [self._text.find(stop, search_from) for stop in self._stop]
        found = [position for position in found if position >= 0]
        if found:
            self._text = self._text[: min(found)]
            self._ids, self._start, self._end = [], 0, 0
        return bool(found)

    def _num_held_back(self) -> int:
        """Return the length of the longest tail that may become a stop text."""
        for length in range(min(self._longest_stop - 1, len(self._text)), 0, -1):
            tail = self._text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
