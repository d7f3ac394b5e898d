"""One prompt, shown while it grows; a terminal shows accepted draft tokens in a colour."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from foretoken.cli.terminal import ACCEPTED, OWN, PROMPT, harmless, has_colour, is_terminal, paint
from foretoken.engine.text import TextStream

if TYPE_CHECKING:
    from foretoken.cli.output import StdoutSink
    from foretoken.engine.llm import LLM, RequestOutput, StreamChunk


class Painter:
    """Finds out which part of streamed text each token gave, and colours it by its source.

    Args:
        decode: Token ids to text.
        prompt_ids: The prompt.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int]) -> None:
        # A second text of the same tokens, advanced one token at a time to see where each ends.
        self._text = TextStream(decode, prompt_ids, ())
        self._ends: list[tuple[int, str]] = []  # (end of a token's text, its style), ascending
        self._num_shown = 0

    def pieces(self, chunk: StreamChunk) -> Iterator[tuple[str, str]]:
        """Yield the chunk's text in parts with their styles."""
        for token_id, source in zip(chunk.token_ids, chunk.sources, strict=True):
            self._text.push([token_id])
            self._ends.append((len(self._text.text), ACCEPTED if source else OWN))
        rest = chunk.text
        while rest:
            end, style = self._ends[0] if self._ends else (self._num_shown + len(rest), OWN)
            length = end - self._num_shown
            if length > 0:
                yield rest[:length], style
                self._num_shown += len(rest[:length])
                rest = rest[length:]
            if self._ends and self._num_shown >= end:
                self._ends.pop(0)


def show_stream(
    llm: LLM, prompt: str | list[int], chunks: Iterator[StreamChunk], sink: StdoutSink
) -> RequestOutput:
    """Show a prompt and its continuation on standard output; return the whole.

    Args:
        llm: For its tokenizer.
        prompt: Text or token ids.
        chunks: Of `llm.stream`.
        sink: Standard output.
    """
    safe = harmless if is_terminal(sys.stdout) else str
    prompt_ids = llm.encode(prompt)
    decode = llm.tokenizer.decode if llm.tokenizer else None
    painter = Painter(decode, prompt_ids) if decode and has_colour(sys.stdout) else None
    text = prompt if isinstance(prompt, str) else decode(prompt_ids) if decode else ""
    output = None
    sink.write(paint(safe(text), PROMPT, sys.stdout))
    try:
        for chunk in chunks:
            parts = painter.pieces(chunk) if painter else [(chunk.text, OWN)]
            sink.write("".join(paint(safe(part), style, sys.stdout) for part, style in parts))
            output = chunk.output
    except KeyboardInterrupt:
        sink.write("\n")
        raise
    sink.write("\n")
    if output is None:
        raise RuntimeError("the stream ended without its output")
    return output


__all__ = ["Painter", "show_stream"]
