"""Options of the command line, each declared once; commands name the ones they take."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from foretoken.core.params import SamplingParams

DEFAULTS = SamplingParams()

MODEL_PANEL = "Model and drafters"
SAMPLING_PANEL = "Sampling"
FILES_PANEL = "Input and output"
MACHINE_PANEL = "Machine"
LENGTH_PANEL = "Length and end"
BANS_PANEL = "Penalties and bans"


class OutputFormat(enum.StrEnum):
    """How results are written."""

    TEXT = "text"
    JSON = "json"


def _option(name: str, metavar: str, help_text: str, panel: str, **more: Any) -> Any:
    return typer.Option(
        name,
        metavar=metavar,
        help=help_text,
        show_default=False,  # the help text says it, in a few words and on the same line
        rich_help_panel=panel,
        **more,
    )


def _model(name: str, metavar: str, help_text: str, **more: Any) -> Any:
    return _option(name, metavar, help_text, MODEL_PANEL, **more)


def _sampling(name: str, metavar: str, help_text: str, **more: Any) -> Any:
    return _option(name, metavar, help_text, SAMPLING_PANEL, **more)


def _length(name: str, metavar: str, help_text: str, **more: Any) -> Any:
    return _option(name, metavar, help_text, LENGTH_PANEL, **more)


def _bans(name: str, metavar: str, help_text: str, **more: Any) -> Any:
    return _option(name, metavar, help_text, BANS_PANEL, **more)


def _files(name: str, metavar: str, help_text: str, **more: Any) -> Any:
    return _option(name, metavar, help_text, FILES_PANEL, **more)


def _machine(name: str, metavar: str, help_text: str, **more: Any) -> Any:
    return _option(name, metavar, help_text, MACHINE_PANEL, **more)


def _integer(text: str | int) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not an integer") from None


def _number(text: str | float) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number") from None


def _format(text: str) -> OutputFormat:
    try:
        return OutputFormat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither text nor json") from None


def _set_debug(context: typer.Context, value: bool) -> bool:
    if context.obj is not None:
        context.obj.debug = context.obj.debug or value
    return value


# -- model and drafters --------------------------------------------------------------------------

Model = Annotated[
    str, _model("--model", "MODEL", "Directory, hub id, or stories (default, included).")
]
Drafters = Annotated[
    list[str] | None,
    _model(
        "--drafter",
        "SPEC",
        "auto (default), none, or name:key=value,key=value; may be repeated.",
    ),
]
# The defaults of these two are those of a plan, which is not imported for a help text.
Verifier = Annotated[
    str | None,
    _model("--verifier", "NAME", "Rule that keeps draft tokens (default coupled)."),
]
MaxNodes = Annotated[
    int | None,
    _model(
        "--max-nodes",
        "N",
        "Most draft tokens per step; 0: none (default 8, adaptive 32).",
        parser=_integer,
    ),
]
Adaptive = Annotated[
    bool | None,
    _model(
        "--adaptive/--fixed",
        "",
        "Choose drafters and sizes anew as costs and acceptance change, down to plain "
        "decoding; or not (default: only for the drafters auto).",
    ),
]
PlanFile = Annotated[
    Path | None,
    _model(
        "--plan",
        "FILE",
        "JSON with drafters, verifier, max_nodes and adaptive; options given here win over it.",
    ),
]

# -- sampling ------------------------------------------------------------------------------------

MaxNewTokens = Annotated[
    int,
    _length(
        "--max-new-tokens",
        "N",
        f"Most new tokens per prompt (default {DEFAULTS.max_new_tokens}).",
        parser=_integer,
    ),
]
Temperature = Annotated[
    float,
    _sampling(
        "--temperature",
        "T",
        f"0: greedy; 1: as the model (default {DEFAULTS.temperature:g}).",
        parser=_number,
    ),
]
TopK = Annotated[
    int,
    _sampling(
        "--top-k", "K", f"Keep the K likeliest; 0: all (default {DEFAULTS.top_k}).", parser=_integer
    ),
]
TopP = Annotated[
    float,
    _sampling(
        "--top-p",
        "P",
        f"Keep the likeliest that together have probability P (default {DEFAULTS.top_p:g}).",
        parser=_number,
    ),
]
MinP = Annotated[
    float,
    _sampling(
        "--min-p",
        "P",
        f"Drop tokens less likely than P times the likeliest (default {DEFAULTS.min_p:g}).",
        parser=_number,
    ),
]
RepetitionPenalty = Annotated[
    float,
    _bans(
        "--repetition-penalty",
        "X",
        "Above 1: fewer tokens that prompt or output contain "
        f"(default {DEFAULTS.repetition_penalty:g}).",
        parser=_number,
    ),
]
PresencePenalty = Annotated[
    float,
    _bans(
        "--presence-penalty",
        "X",
        f"Subtracted from logits of tokens in the output (default {DEFAULTS.presence_penalty:g}).",
        parser=_number,
    ),
]
FrequencyPenalty = Annotated[
    float,
    _bans(
        "--frequency-penalty",
        "X",
        f"The same, once per occurrence (default {DEFAULTS.frequency_penalty:g}).",
        parser=_number,
    ),
]
LogitBias = Annotated[
    str | None,
    _bans("--logit-bias", "JSON", """Added to logits by token id, as '{"42": -1.5}'."""),
]
Stop = Annotated[
    list[str] | None,
    _length("--stop", "TEXT", "End before this text; may be repeated."),
]
Seed = Annotated[
    int | None,
    _sampling(
        "--seed", "N", "The same seed gives the same tokens (default: a new one).", parser=_integer
    ),
]

# -- input and output ----------------------------------------------------------------------------

Prompts = Annotated[
    list[str] | None,
    typer.Argument(metavar="PROMPT", help="Texts to continue.", show_default=False),
]
InputFile = Annotated[
    str | None,
    _files(
        "--input",
        "FILE",
        ".txt with a prompt a line, .jsonl with an object a line, or - for standard input.",
    ),
]
ReferenceFile = Annotated[
    Path | None,
    _files("--reference", "FILE", "Text that outputs may copy from, such as one to be edited."),
]
OutputFile = Annotated[
    Path | None,
    _files("--output", "FILE", "Write here, not to standard output; must not exist."),
]
Force = Annotated[bool, _files("--force", "", "Let --output overwrite a file.")]
Format = Annotated[
    OutputFormat,
    _files("--format", "FORMAT", "text (default), or json: an object a line.", parser=_format),
]
Compare = Annotated[
    bool,
    _files("--compare", "", "Also decode without drafts and compare."),
]

# -- machine -------------------------------------------------------------------------------------

DType = Annotated[
    str,
    _machine("--dtype", "NAME", "auto (default), float32, bfloat16, float16 or float64."),
]
Device = Annotated[
    str, _machine("--device", "NAME", "auto (default), cpu, cuda or another torch device.")
]
Threads = Annotated[
    int | None,
    _machine("--threads", "N", "CPU threads (default: torch's own).", parser=_integer),
]
Debug = Annotated[
    bool,
    _machine(
        "--debug",
        "",
        "Show warnings, and tracebacks of errors.",
        is_eager=True,
        callback=_set_debug,
    ),
]
