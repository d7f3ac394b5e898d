"""What a terminal shows beside the results: colours, notes, a spinner, a progress bar."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

# Select Graphic Rendition codes.
PROMPT = "1"
ACCEPTED = "32"
OWN = ""
ERROR = "1;31"
HINT = "36"
FAINT = "2"

# Control characters would let a model's output steer the terminal: show their pictures instead.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at the stream."""
    return stream.isatty()


def has_colour(stream: TextIO) -> bool:
    """Whether the stream is a terminal that shows colours; NO_COLOR turns them off."""
    is_dumb = os.environ.get("TERM", "") in ("", "dumb")
    return is_terminal(stream) and not is_dumb and not os.environ.get("NO_COLOR")


def paint(text: str, style: str, stream: TextIO) -> str:
    """Return the text in a style, plain if the stream shows none."""
    return f"\x1b[{style}m{text}\x1b[0m" if style and text and has_colour(stream) else text


def harmless(text: str) -> str:
    """Return the text with control characters replaced by their pictures."""
    return text.translate(_PICTURES)


def note(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def loading(what: str) -> AbstractContextManager[object]:
    """Show on a terminal that something takes a while."""
    if not is_terminal(sys.stderr):
        return nullcontext()
    from rich.console import Console
    from rich.markup import escape

    return Console(stderr=True).status(f"loading {escape(what)}")


def explain_compilation() -> None:
    """Say so on a terminal when code has to be compiled, which takes a while the first time."""
    from foretoken.core.jit import announce_compilation

    def explain() -> None:
        if is_terminal(sys.stderr):
            note("compiling for this machine; later runs start at once")

    announce_compilation(explain)


class PromptProgress:
    """A bar of finished prompts on standard error; nothing if that is no terminal.

    Args:
        progress: The bar; None shows nothing.
        num_prompts: How many there are.
    """

    def __init__(self, progress: Progress | None, num_prompts: int) -> None:
        self._progress = progress
        self._task = progress.add_task("prompts", total=num_prompts) if progress else None

    def advance(self) -> None:
        """Count one prompt as finished."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Make room for a result on the same terminal."""
        if self._progress is None or not is_terminal(sys.stdout):
            yield
            return
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()


@contextmanager
def prompt_progress(num_prompts: int) -> Iterator[PromptProgress]:
    """Show a bar while prompts are generated; one prompt needs none."""
    if num_prompts < 2 or not is_terminal(sys.stderr):
        yield PromptProgress(None, num_prompts)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        refresh_per_second=4,
    )
    with progress:
        yield PromptProgress(progress, num_prompts)
