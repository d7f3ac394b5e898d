"""The certificate as text: the verdict, tables, explanations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from foretoken.certify.certificate import FAIL, INCOMPLETE, PASS

Entry = Mapping[str, Any]
MISSING = "–"
MAX_SHOWN = 5  # differences that are explained on a screen
_STYLES = {PASS: "bold green", FAIL: "bold red", INCOMPLETE: "bold yellow"}
_CLAIMS = {
    "bitwise": "the tokens of plain decoding, from the same bits",
    "numerical": "the rule of plain decoding, on logits that agree up to rounding",
    "distribution": "the target's distribution, and plain decoding's tokens where it is greedy",
    "lossy": "lossy, as allowed; the logits are plain decoding's",
}


def print_report(record: Entry, console: Console) -> None:
    """Print what a person wants of a record.

    Args:
        record: As `Certification.record` returns it; its `subject` is shown if there is one.
        console: Where to.
    """
    for line in _lines(record):
        console.print(line, highlight=False, soft_wrap=isinstance(line, Text))


def _lines(record: Entry) -> Iterator[Text | Table | str]:
    yield _headline(record)
    for reason in record["reasons"]:
        yield Text(f"  {reason}", style="red")
    for note in record["notes"]:
        yield Text(f"  {note}", style="yellow")
    if record.get("subject"):
        yield Text(_subject(record["subject"], record), style="dim")
    if record["identity"]["comparisons"]:
        yield ""
        yield _identity_table(record["identity"]["comparisons"])
        yield from _rounding(record)
        yield from _differences(record["identity"]["comparisons"])
    for entry in record["distribution"]:
        if entry["num_tokens"]:
            yield ""
            yield from _distribution(entry)
    if record["distribution"]:
        yield ""
        yield from _meaning(record)


def _headline(record: Entry) -> Text:
    verdict = record["verdict"]
    said = {
        PASS: _CLAIMS[record["exactness"]],
        FAIL: f"exactness {record['exactness']} does not hold"
        if record["exactness"] != "lossy"
        else "the rule is lossy",
        INCOMPLETE: "interrupted; this was finished",
    }[verdict]
    return Text.assemble((verdict.upper(), _STYLES[verdict]), f"  {said}")


def _subject(subject: Entry, record: Entry) -> str:
    work = record["work"]
    prompts = "1 prompt" if work["num_prompts"] == 1 else f"{work['num_prompts']} prompts"
    return (
        f"  {subject['model']}, {subject['dtype']}, drafters {', '.join(subject['drafters'])}, "
        f"verifier {subject['verifier']}, up to {subject['max_nodes']} draft tokens a step; "
        f"{prompts}, up to {subject['max_new_tokens']} tokens each, seed {work['seed']}"
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _identity_table(comparisons: list[Entry]) -> Table:
    table = _table(
        "against plain decoding alone", "same texts", "same rows", "logits differ by", "accepted"
    )
    for item in comparisons:
        how = "speculative" if item["is_speculative"] else "plain"
        batch = "alone" if item["batch_size"] == 1 else f"{item['batch_size']} at once"
        table.add_row(
            f"{_mode(item['temperature'])}: {how}, {batch}",
            f"{item['num_same_texts']} of {item['num_texts']}"
            + ("" if item["is_promised"] else " *"),
            f"{item['num_same_rows']} of {item['num_rows']}",
            _size(item["row_difference"]),
            f"{item['num_accepted']} of {item['num_draft_tokens']}"
            if item["is_speculative"]
            else MISSING,
        )
    return table


def _rounding(record: Entry) -> Iterator[Text]:
    identity = record["identity"]
    if any(not item["is_promised"] for item in identity["comparisons"]):
        yield Text("* the rule does not promise the same tokens", style="dim")
    if record["exactness_of_target"] == "bitwise":
        return
    noise = identity["noise"]
    because = f" ({record['inexact_because']})" if record["inexact_because"] else ""
    yield Text(
        f"the target is {record['exactness_of_target']}{because}: passes over whole texts move "
        f"logits by up to {_size(noise['row_difference'])}, so differences up to "
        f"{_size(identity['tolerance'])} count as rounding",
        style="dim",
    )


def _differences(comparisons: list[Entry]) -> Iterator[Text]:
    found = [(item, entry) for item in comparisons for entry in item["divergences"]]
    total = sum(item["num_divergences"] for item in comparisons)
    if not found:
        return
    yield Text("")
    found.sort(key=lambda pair: not pair[1]["is_failure"])
    for item, entry in found[:MAX_SHOWN]:
        style = "red" if entry["is_failure"] else ""
        how = "speculative" if item["is_speculative"] else "plain"
        where = (
            f"{_mode(item['temperature'])}, {how}, batch {item['batch_size']}: {entry['place']}, "
            f"output token {entry['position'] + 1}, seed {entry['seed']}"
        )
        yield Text(where, style=style)
        for line in _why(entry):
            yield Text(f"  {line}")
    if total > MAX_SHOWN:
        yield Text(f"and {total - MAX_SHOWN} more; --format json tells of each", style="dim")


def _why(entry: Entry) -> Iterator[str]:
    if entry["cause"] == "end":
        yield f"the same tokens, but plain decoding {entry['detail']}"
        return
    plain, found = entry["plain"], entry["found"]
    for label, token in (("plain", plain), ("here", found)):
        yield (
            f"{label}: {token['text']!r} ({token['token_id']}), logit "
            f"{_logit(token['plain_logit'])} there and {_logit(token['found_logit'])} here, "
            f"ranked by {_logit(token['plain_score'])} and {_logit(token['found_score'])}"
        )
    if entry["cause"] == "rule":
        yield "the row here ranks another token first: the rule did not take it"
        return
    yield (
        f"plain decoding preferred its token by {_size(entry['margin'])} "
        f"({_size(entry['margin_ulp'])} ULP); the rows differ by up to "
        f"{_size(entry['row_difference'])}"
        + ("" if entry["is_failure"] else ": a near tie, decided by rounding")
    )


def _distribution(entry: Entry) -> Iterator[Text | Table]:
    places = ", ".join(f"{name} {count}" for name, count in entry["places"].items() if count)
    yield Text(
        f"temperature {entry['temperature']:g}: {entry['num_tokens']} tokens of "
        f"{entry['num_texts']} texts against the target's distribution ({places})"
    )
    yield Text(
        f"rows with the same bits as passes over the finished texts: {entry['num_same_rows']} of "
        f"{entry['num_rows']}"
    )
    table = _table("drawn tokens", "counted", "statistic", "p", "p adjusted", "would see TV")
    for test in entry["tests"]:
        kind = f"χ²({test['degrees']})" if test["degrees"] else "z"
        table.add_row(
            test["name"],
            str(test["num_observations"]),
            f"{kind} {test['statistic']:.4g}",
            f"{test['p_value']:.3g}",
            f"{test['adjusted_p_value']:.3g}",
            f"{test['detectable_distance']:.3f}",
        )
    yield table
    for item in entry["distances"]:
        yield Text(
            f"total variation distance, {item['order']}: at least {item['distance']:.4f} measured; "
            f"chance alone stays below {item['resolution']:.4f}",
            style="dim",
        )


def _meaning(record: Entry) -> Iterator[Text]:
    yield Text(
        f"A correct rule fails this certificate with probability {record['false_alarm']:g} at "
        'most (Holm over all tests). "would see TV": a total variation distance, averaged over '
        "what the test counts, that it finds with probability 0.9.",
        style="dim",
    )


def _mode(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def _size(value: float | None) -> str:
    return "infinity" if value is None else f"{value:.3g}"


def _logit(value: float | None) -> str:
    return "-infinity" if value is None else f"{value:.6g}"


__all__ = ["print_report"]
