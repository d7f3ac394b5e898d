"""Read the story files, normalise and deduplicate the stories, split them by hash."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

SOURCES = ("tinystories_cased_train.txt", "tinystories_recased_extra.txt")
SEPARATOR = "<|endoftext|>"
MIN_CHARACTERS = 60
HELD_OUT_PER_MILLE = 30

_CURLY = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "\u02dc": "'", "…": "..."})
# What is left of UTF-8 quotes read as Windows-1252: longer patterns first.
_MOJIBAKE = (
    ("â€œ", '"'),
    ("â€™", "'"),
    ("â€˜", "'"),
    ("â€“", "-"),
    ("â€”", "-"),
    ("â€¦", "..."),
    ("â€\x9d", '"'),
    ("â€", '"'),
    ("ã©", "é"),
)


@dataclass(frozen=True)
class Story:
    """One normalised story and the file it came from."""

    text: str
    source: str


def normalise(text: str) -> str:
    """Straighten quotes, undo the mojibake and keep one newline between paragraphs."""
    for wrong, right in _MOJIBAKE:
        text = text.replace(wrong, right)
    text = text.translate(_CURLY).replace("\r\n", "\n")
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n[ \n]*", "\n", text)
    return text.strip()


def identity(text: str) -> str:
    """A story's letters and digits only: what two copies of one story have in common."""
    return re.sub(r"[^a-z0-9]+", "", text.lower())


def is_held_out(text: str) -> bool:
    """Whether the hash of the story's first 80 letters puts it in the held-out split.

    Two versions of one story share their opening, so they fall on the same side.
    """
    digest = hashlib.sha256(identity(text)[:80].encode()).digest()
    return int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_MILLE


def read_stories(data: Path) -> list[Story]:
    """All distinct stories of the source files below `data`, in file order."""
    stories: list[Story] = []
    seen: set[str] = set()
    for source in SOURCES:
        path = next(iter(sorted(data.rglob(source))), None)
        if path is None:
            raise FileNotFoundError(f"{source} not found below {data}")
        for raw in path.read_text(encoding="utf-8").split(SEPARATOR):
            text = normalise(raw)
            key = identity(text)
            if len(text) < MIN_CHARACTERS or key in seen:
                continue
            seen.add(key)
            stories.append(Story(text, source))
    return stories


def without_overlap(held_out: list[Story], train: list[Story]) -> list[Story]:
    """Drop held-out stories that end in the same 100 letters as a training story.

    Stories that start in the same 80 letters are on one side already.
    """
    tails = {identity(story.text)[-100:] for story in train}
    return [story for story in held_out if identity(story.text)[-100:] not in tails]


def split(stories: list[Story]) -> dict[str, list[Story]]:
    """Training and held-out stories, the latter free of near copies of the former."""
    train = [story for story in stories if not is_held_out(story.text)]
    held_out = [story for story in stories if is_held_out(story.text)]
    return {"train": train, "held_out": without_overlap(held_out, train)}


def save(stories: list[Story], path: Path) -> None:
    """Write stories as JSON lines."""
    lines = (json.dumps(asdict(story), ensure_ascii=False) for story in stories)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load(path: Path) -> list[Story]:
    """Read what `save` wrote."""
    with path.open(encoding="utf-8") as lines:
        return [Story(**json.loads(line)) for line in lines]
