"""Registries: names resolve late, to our own table first and then to other packages."""

import importlib
import sys
from importlib.metadata import entry_points

import pytest

from foretoken.core.registry import Registry
from foretoken.errors import ConfigError, UnknownNameError

GROUP = "foretoken.test_plugins"


@pytest.fixture
def registry():
    return Registry(
        "drafter", {"fractions": "fractions:Fraction", "ours": "decimal:Decimal"}, group=GROUP
    )


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a distribution with the given entry points."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "broken_plugin", None)
    monkeypatch.delitem(sys.modules, "broken_plugin")

    def install(**targets):
        folder = tmp_path / "some_plugin-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1.0\n")
        lines = [f"{name.replace('_', '-')} = {target}" for name, target in targets.items()]
        (folder / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
        assert len(entry_points(group=GROUP)) == len(targets)

    return install


def test_name_of_the_table_is_imported(registry):
    assert registry.load("fractions").__name__ == "Fraction"


def test_nothing_is_imported_before_it_is_asked_for():
    sys.modules.pop("this", None)
    registry = Registry("drafter", {"zen": "this:d"}, group=GROUP)
    assert list(registry) == ["zen"]
    assert "this" not in sys.modules


def test_unknown_name_suggests_the_nearest(registry):
    with pytest.raises(UnknownNameError, match="unknown drafter 'fraction'; known: frac") as caught:
        registry.load("fraction")
    assert caught.value.hint == "did you mean 'fractions'?"


def test_entry_point_of_another_package_is_found(registry, install):
    install(counter_like="collections:Counter")
    assert list(registry) == ["fractions", "ours", "counter-like"]
    assert registry.load("counter-like").__name__ == "Counter"
    with pytest.raises(UnknownNameError) as caught:
        registry.load("counterlike")
    assert caught.value.hint == "did you mean 'counter-like'?"


def test_our_own_name_wins(registry, install):
    install(ours="collections:Counter")
    assert registry.load("ours").__name__ == "Decimal"
    assert list(registry) == ["fractions", "ours"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "No module named 'broken_plugin'"),
        ("Drafters = 1", "has no attribute 'Drafter'"),
        ("import no_such_dependency", "No module named 'no_such_dependency'"),
        ("raise RuntimeError('needs a licence')", "needs a licence"),
        ("def Drafter(:", "invalid syntax"),
    ],
    ids=["no module", "no attribute", "no dependency", "raises", "no Python"],
)
def test_plugin_that_does_not_import_says_whose_it_is(registry, install, tmp_path, source, reason):
    if source is not None:
        (tmp_path / "broken_plugin.py").write_text(source)
        importlib.invalidate_caches()
    install(broken="broken_plugin:Drafter")
    with pytest.raises(ConfigError, match=f"'broken' is registered as.*{reason}") as caught:
        registry.load("broken")
    assert "package" in caught.value.hint
    assert registry.load("ours").__name__ == "Decimal", "the others still load"
