"""Compiled functions: cached where that is possible, announced when it takes time."""

import os
import subprocess
import sys

import pytest

MODULE = """
from foretoken.core.jit import jit

@jit
def total(values):
    result = 0.0
    for value in values:
        result += value
    return result
"""
SCRIPT = """
import numpy as np
from foretoken.core.jit import announce_compilation

announce_compilation(lambda: print("compiling"))
import kernel

print(kernel.total(np.ones(3)), kernel.total(np.ones(3, dtype=np.float32)))
"""


@pytest.fixture
def run_script(tmp_path):
    """Run the script in a process of its own; return the lines that it printed."""
    (tmp_path / "kernel.py").write_text(MODULE)
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(**environment):
        done = subprocess.run(
            [sys.executable, tmp_path / "script.py"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **environment},
        )
        assert done.stderr == ""
        return done.stdout.splitlines()

    return run


def test_compilation_is_announced_once_and_only_when_the_cache_has_nothing(run_script, tmp_path):
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert run_script(**environment) == ["compiling", "3.0 3.0"]
    assert run_script(**environment) == ["3.0 3.0"]
    (tmp_path / "kernel.py").write_text(MODULE.replace("result = 0.0", "result = 1.0"))
    assert run_script(**environment) == ["compiling", "4.0 4.0"]


def test_without_a_folder_to_write_to_every_process_compiles(run_script, tmp_path):
    """A file where the cache folder should be stops even a superuser from writing."""
    (tmp_path / "file").write_text("")
    environment = {
        "NUMBA_CACHE_DIR": str(tmp_path / "file" / "cache"),
        "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator",
    }
    for _ in range(2):
        assert run_script(**environment) == ["compiling", "3.0 3.0"]
