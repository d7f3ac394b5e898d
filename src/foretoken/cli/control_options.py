"""Options of `foretoken generate` that steer what is written: ends, bans, structure, logprobs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from foretoken.cli.errors import FileError
from foretoken.cli.options import (
    DEFAULTS,
    _bans,
    _files,
    _integer,
    _length,
    _number,
    _option,
    _sampling,
)
from foretoken.core.params import LOGPROBS_MODES
from foretoken.errors import ConfigError

STRUCTURE_PANEL = "Structure"

# What each JSON option is called in `SamplingParams`, and how its value is written.
_JSON_EXAMPLES = {
    "logit_bias": '{"42": -1.5}',
    "sequence_bias": "[[[7, 8], -1.5]]",
    "bad_words_ids": "[[42], [7, 8]]",
    "allowed_token_ids": "[42, 43]",
    "suppress_tokens": "[42, 43]",
}


def _structure(name: str, metavar: str, help_text: str, **more: Any) -> Any:
    return _option(name, metavar, help_text, STRUCTURE_PANEL, **more)


# -- length and end ------------------------------------------------------------------------------

MinNewTokens = Annotated[
    int,
    _length(
        "--min-new-tokens", "N", "Do not end before N new tokens (default 0).", parser=_integer
    ),
]
StopTokenIds = Annotated[
    list[int] | None,
    _length("--stop-token-id", "ID", "End after this token; may be repeated.", parser=_integer),
]
IgnoreEos = Annotated[
    bool, _length("--ignore-eos", "", "Go on after the model's end-of-sequence token.")
]

# -- sampling ------------------------------------------------------------------------------------

TypicalP = Annotated[
    float,
    _sampling(
        "--typical-p",
        "P",
        f"Keep the most typical that together have probability P (default {DEFAULTS.typical_p:g}).",
        parser=_number,
    ),
]
TopH = Annotated[
    float | None,
    _sampling(
        "--top-h",
        "H",
        "Keep the likeliest up to the share H of their entropy (default: all).",
        parser=_number,
    ),
]
EpsilonCutoff = Annotated[
    float,
    _sampling(
        "--epsilon-cutoff",
        "P",
        f"Drop tokens less likely than P (default {DEFAULTS.epsilon_cutoff:g}).",
        parser=_number,
    ),
]
EtaCutoff = Annotated[
    float,
    _sampling(
        "--eta-cutoff",
        "P",
        "The same, with a bound that falls where much is possible "
        f"(default {DEFAULTS.eta_cutoff:g}).",
        parser=_number,
    ),
]

# -- penalties and bans --------------------------------------------------------------------------

NoRepeatNgramSize = Annotated[
    int,
    _bans(
        "--no-repeat-ngram-size", "N", "No N tokens in a row come twice; 0: off.", parser=_integer
    ),
]
SequenceBias = Annotated[
    str | None,
    _bans(
        "--sequence-bias",
        "JSON",
        f"Added to a sequence's last logit, as '{_JSON_EXAMPLES['sequence_bias']}'.",
    ),
]
BadWordsIds = Annotated[
    str | None,
    _bans(
        "--bad-words-ids",
        "JSON",
        f"Token sequences never written, as '{_JSON_EXAMPLES['bad_words_ids']}'.",
    ),
]
AllowedTokenIds = Annotated[
    str | None,
    _bans(
        "--allowed-token-ids",
        "JSON",
        f"The only tokens written, as '{_JSON_EXAMPLES['allowed_token_ids']}'.",
    ),
]
SuppressTokens = Annotated[
    str | None,
    _bans(
        "--suppress-tokens",
        "JSON",
        f"Tokens never written, as '{_JSON_EXAMPLES['suppress_tokens']}'.",
    ),
]

# -- structure -----------------------------------------------------------------------------------

JsonSchema = Annotated[
    str | None,
    _structure(
        "--json-schema", "FILE|JSON", "Write JSON that follows this schema; '{}': any JSON."
    ),
]
Regex = Annotated[
    str | None, _structure("--regex", "REGEX", "Write what this regular expression matches.")
]
Grammar = Annotated[
    Path | None, _structure("--grammar", "FILE", "Write what this Lark grammar produces.")
]

# -- output --------------------------------------------------------------------------------------

Logprobs = Annotated[
    int | None,
    _files(
        "--logprobs",
        "N",
        "With --format json: log-probabilities of tokens and of the N likeliest.",
        parser=_integer,
    ),
]
PromptLogprobs = Annotated[
    int | None,
    _files("--prompt-logprobs", "N", "The same for the prompt's tokens.", parser=_integer),
]
LogprobsMode = Annotated[
    str,
    _files(
        "--logprobs-mode",
        "MODE",
        f"{LOGPROBS_MODES[0]} (default): as the model says; {LOGPROBS_MODES[1]}: after the "
        "options above.",
    ),
]


def parse_json_options(texts: Mapping[str, str | None]) -> dict[str, Any]:
    """Return what the JSON texts of options say, without those that were not given.

    `SamplingParams` checks the values.

    Args:
        texts: Name of the sampling parameter to text.

    Raises:
        ConfigError: A text is not JSON.
    """
    values = {}
    for name, text in texts.items():
        if text is None:
            continue
        try:
            values[name] = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"--{name.replace('_', '-')} is not JSON: {error}",
                hint=f"write it as '{_JSON_EXAMPLES[name]}'",
            ) from error
    return values


def read_schema(text: str | None) -> str | None:
    """Return a JSON schema, given as text or as the name of a file.

    Raises:
        FileError: The file cannot be read.
    """
    if text is None or text.lstrip().startswith("{") or text.strip() in ("true", "false"):
        return text
    return read_text("schema", Path(text))


def read_grammar(path: Path | None) -> str | None:
    """Return the text of a grammar's file.

    Raises:
        FileError: The file cannot be read.
    """
    return read_text("grammar", path) if path is not None else None


def read_text(what: str, path: Path) -> str:
    """Return the text of a file.

    Args:
        what: What it holds, for messages.
        path: The file, in UTF-8.

    Raises:
        FileError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FileError(
            f"{what} file {str(path)!r} cannot be read: {error.strerror}", hint="check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise FileError(
            f"{what} file {str(path)!r} is not UTF-8 text", hint="save the file as UTF-8"
        ) from error
