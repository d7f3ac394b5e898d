"""README and docs do what they show: Python blocks run, links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def python_blocks():
    """Yield each block that is fenced as Python; its test is named after page and line."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, block.start()) + 1
            yield pytest.param(block[1], id=f"{page.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize("code", list(python_blocks()))
def test_python_block_runs_as_it_stands(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    relative = [target for target in targets if "://" not in target]
    assert [target for target in relative if not (page.parent / target).exists()] == []


def newcomer_command(*arguments):
    script = ROOT / ".ci" / "readme_commands.py"
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("run", 'pip install . && foretoken generate "Once upon a time"'),
        ("test", 'pip install ".[dev]" && pytest'),
    ],
)
def test_newcomer_command_is_in_the_readme(name, command):
    assert newcomer_command(name).stdout == command + "\n"


@pytest.mark.parametrize(
    "readme",
    [
        "```sh\ntrue\n```\n",
        "<!-- newcomer:run -->\nno block\n",
        "<!-- newcomer:run -->\nprose first\n```sh\ntrue\n```\n",
        "<!-- newcomer:run -->\n```sh\n```\n",
        "<!-- newcomer:run -->\n```sh\none\ntwo\n```\n",
        "<!-- newcomer:run -->\n```sh\none\n```\n<!-- newcomer:run -->\n```sh\ntwo\n```\n",
    ],
    ids=["no marker", "no block", "prose before", "no line", "two lines", "two markers"],
)
def test_newcomer_command_fails_loudly(readme, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(readme, encoding="utf-8")
    done = newcomer_command("run", str(page))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
