"""`foretoken methods`: the taxonomy of what is registered, and docs/methods.md made from it."""

import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from foretoken.cli.methods import REGENERATE, page
from foretoken.core import registry
from foretoken.core.draft import SiblingDraw
from foretoken.core.verdict import Exactness
from foretoken.drafters import DRAFTERS
from foretoken.engine.methods import UNSAID, list_methods
from foretoken.verifiers import VERIFIERS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
PLUGIN = """
from foretoken.core.draft import SiblingDraw
from foretoken.core.verdict import Exactness
from foretoken.drafters.base import Taxonomy

class Parrot:
    taxonomy = Taxonomy(
        source="retrieval (a parrot)", is_trained=True, termination="adaptive",
        structure="chain", reference="Flaubert | 1877",
    )
    draws = frozenset({SiblingDraw.IID})

class Terse:
    draws = frozenset({SiblingDraw.DETERMINISTIC})

class Lenient:
    exactness = Exactness.LOSSY
    draws = (SiblingDraw.IID,)
    max_width = 1
    max_drafters = 2
"""


@pytest.fixture
def plugins(monkeypatch, tmp_path):
    """Set the entry points of other packages; none at first."""
    found = {}

    def entry_points(*, group, name=None):
        entries = (EntryPoint(key, value, group) for key, value in found.get(group, {}).items())
        return [entry for entry in entries if name in (None, entry.name)]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    (tmp_path / "menagerie.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield found
    sys.modules.pop("menagerie", None)


def drafters_of(output):
    return {row["name"]: row for row in json.loads(output)["drafters"]}


@pytest.mark.usefixtures("plugins")
def test_the_page_is_what_the_command_prints(cli):
    printed = cli("methods", "--format", "markdown")
    assert printed.code == 0
    shown = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    assert shown == printed.out, f"docs/methods.md is stale; run: {REGENERATE}"
    assert printed.out == page(list_methods())


@pytest.mark.usefixtures("plugins")
def test_all_that_is_registered_has_a_place_on_every_axis():
    found = list_methods()
    assert sorted(row.name for row in found.drafters) == sorted(DRAFTERS)
    assert [row.name for row in found.verifiers] == list(VERIFIERS)
    for row in (*found.drafters, *found.verifiers):
        said = {row.reference, getattr(row, "source", "x"), getattr(row, "criterion", "x")}
        assert not said & {UNSAID, ""}, row.name
    for row in found.drafters:
        assert isinstance(row.is_trained, bool)
        assert row.verifiers, f"no rule takes what {row.name} drafts"
    assert {row.exactness for row in found.verifiers} <= {level.value for level in Exactness}


@pytest.mark.usefixtures("plugins")
def test_json_tells_which_rules_take_which_drafts(cli):
    drafters = drafters_of(cli("methods", "--format", "json").out)
    copies = drafters["prompt-lookup"]
    assert (copies["is_trained"], copies["draws"]) == (False, ["deterministic"])
    assert "coupled" in copies["verifiers"]
    assert not {"mss", "rrs", "k-seq"} & set(copies["verifiers"])
    assert drafters["draft-model"]["is_trained"] is True
    assert set(drafters["draft-model"]["verifiers"]) == set(VERIFIERS)


@pytest.mark.usefixtures("plugins")
def test_drafters_of_one_source_stand_together():
    families = [row.source.partition(" (")[0] for row in list_methods().drafters]
    changes = [
        family
        for before, family in zip(["", *families], families, strict=False)
        if family != before
    ]
    assert len(changes) == len(set(families))


def test_what_other_packages_register_appears(cli, plugins):
    plugins["foretoken.drafters"] = {"parrot": "menagerie:Parrot", "terse": "menagerie:Terse"}
    plugins["foretoken.verifiers"] = {"lenient": "menagerie:Lenient"}
    record = json.loads(cli("methods", "--format", "json").out)
    drafters = {row["name"]: row for row in record["drafters"]}
    assert drafters["parrot"]["package"] == "menagerie"
    assert drafters["parrot"]["verifiers"][-1] == "lenient"
    assert "rrs" not in drafters["parrot"]["verifiers"]
    assert (drafters["terse"]["source"], drafters["terse"]["is_trained"]) == (UNSAID, None)
    rule = record["verifiers"][-1]
    assert (rule["name"], rule["structure"], rule["max_drafters"]) == ("lenient", "chain", 2)
    assert (rule["exactness"], rule["criterion"]) == ("lossy", UNSAID)
    markdown = cli("methods", "--format", "markdown").out
    assert r"| `parrot (of menagerie)` | retrieval (a parrot) | yes |" in markdown
    assert r"Flaubert \| 1877" in markdown
    text = cli("methods").out
    assert "lenient (of menagerie)" in text
    assert "Flaubert | 1877" in text


def test_a_package_that_does_not_import_is_told_of_and_in_nobodys_way(cli, plugins):
    plugins["foretoken.drafters"] = {"ghost": "no_such_package:Ghost"}
    result = cli("methods", "--format", "json")
    assert result.code == 0
    assert "prompt-lookup" in drafters_of(result.out)
    assert "ghost" not in drafters_of(result.out)
    assert "drafter ghost" in json.loads(result.out)["broken"]
    assert result.err.startswith("left out: drafter ghost: ")
    assert "no_such_package" in result.err


@pytest.mark.usefixtures("plugins")
def test_the_table_for_people(cli):
    result = cli("methods")
    assert (result.code, result.err) == (0, "")
    for name in (*DRAFTERS, *VERIFIERS):
        assert any(line.startswith(f"{name} ") for line in result.out.splitlines()), name
    coupled = next(line for line in result.out.splitlines() if line.startswith("coupled "))
    assert "bitwise" in coupled
    assert " any " in coupled  # of all ways of drawing siblings, in one word
    assert SiblingDraw.WITHOUT_REPLACEMENT.value not in result.out


def test_an_unknown_format(cli):
    result = cli("methods", "--format", "xml")
    assert result.code == 2
    assert "'xml' is not text, json or markdown" in result.err
