"""Rules of the house that no linter checks."""

import ast
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src" / "foretoken").rglob("*.py"))
MAX_MODULE_LINES = 400

SKIPPED_FOLDERS = {"__pycache__", "build", "dist", "node_modules"}
KEPT_DOT_FOLDERS = {".ci", ".github"}


def is_project_folder(folder):
    if folder.name in SKIPPED_FOLDERS or (folder / "pyvenv.cfg").exists():
        return False
    return not folder.name.startswith(".") or folder.name in KEPT_DOT_FOLDERS


def project_texts():
    """Yield (path, text) of each text file of the project; binary files are passed over."""
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [name for name in subfolders if is_project_folder(Path(folder, name))]
        for name in names:
            path = Path(folder, name)
            content = path.read_bytes()
            if b"\0" not in content[:4096]:
                yield path.relative_to(ROOT), content.decode("utf-8", errors="replace")


def lines_that_match(pattern):
    return [
        f"{path}:{number}: {line.strip()[:120]}"
        for path, text in project_texts()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


def source_ids(path):
    return str(path.relative_to(ROOT / "src"))


def test_sources_are_found():
    assert SOURCES


@pytest.mark.parametrize("path", SOURCES, ids=source_ids)
def test_module_keeps_house_style(path):
    text = path.read_text(encoding="utf-8")
    module = ast.parse(text)
    public = [
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
    ]
    undocumented = [node.name for node in public if not ast.get_docstring(node)]
    asserts = [node.lineno for node in ast.walk(module) if isinstance(node, ast.Assert)]
    assert undocumented == [], "public functions and classes have docstrings"
    assert asserts == [], "raise an error of foretoken.errors: `python -O` removes asserts"
    assert text.count("\n") < MAX_MODULE_LINES, "split the module"


def test_sources_read_nothing_beside_the_checkout():
    pattern = re.compile(r"\.\./|shared/data")
    found = [path.name for path in SOURCES if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_no_file_names_a_machine_path():
    # A folder at the root of somebody's machine; not a part of an address or of a longer path.
    pattern = re.compile(r"(?<![\w.~}-])/(?:work|home|root|Users|mnt|opt)/\w")
    assert lines_that_match(pattern) == []


def test_no_file_names_a_package_registry():
    # Users choose where packages come from; an address in a file would choose for them.
    pattern = re.compile(
        r"pypi\.org|pythonhosted\.|download\.pytorch|npmjs\.|conda\.anaconda|--(?:extra-)?index-url"
    )
    assert lines_that_match(pattern) == []
