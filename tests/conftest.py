"""Fixtures and settings that every test shares."""

import os
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Tests keep cost curves and the like to themselves; processes that they start inherit this.
_CACHE = tempfile.TemporaryDirectory(prefix="foretoken-tests-")
os.environ["FORETOKEN_CACHE_DIR"] = _CACHE.name

# CI draws the same examples each time; elsewhere each run explores. Timing is not tested.
hypothesis.settings.register_profile(
    "foretoken",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
)
hypothesis.settings.load_profile("foretoken")

# Tiny matrices gain nothing from threads, and parallel test runs would fight over the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with third-party models and text that the project does not ship."""
    folder = Path(os.environ.get("FORETOKEN_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; FORETOKEN_SHARED_DATA names another")
    return folder
