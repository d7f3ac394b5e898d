"""Print one of the newcomer's commands, exactly as README.md shows it.

Usage: readme_commands.py NAME [README]

The command is the only line of the fenced block that follows the comment
`<!-- newcomer:NAME -->`. Anything else (no marker, two markers, no block, not
exactly one line) is an error: what is tested must be what a reader copies.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def command_after_marker(text: str, name: str) -> str:
    """Return the single line of the fenced block after the marker `name`.

    Raises:
        ValueError: The marker is missing or repeated, or no block of exactly
            one line follows it.
    """
    marker = f"<!-- newcomer:{name} -->"
    if (num_markers := text.count(marker)) != 1:
        raise ValueError(f"expected the marker {marker} once, found it {num_markers} times")
    block = re.match(r"\s*\n```\w*\n(.*?)^```\s*$", text.partition(marker)[2], re.DOTALL | re.M)
    if block is None:
        raise ValueError(f"no fenced block follows the marker {marker}")
    lines = block[1].splitlines()
    if len(lines) != 1 or not lines[0].strip():
        raise ValueError(f"expected one line in the block after {marker}, got {len(lines)}")
    return lines[0]


def main(arguments: list[str]) -> int:
    """Print the command that is asked for; 2 and a message when there is none."""
    if len(arguments) not in (1, 2):
        print("usage: readme_commands.py NAME [README]", file=sys.stderr)
        return 2
    readme = Path(arguments[1]) if len(arguments) == 2 else README
    try:
        print(command_after_marker(readme.read_text(encoding="utf-8"), arguments[0]))
    except (OSError, ValueError) as error:
        print(f"error: {readme}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
