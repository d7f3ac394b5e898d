"""A model of byte tokens to take these from, and texts that are easy to learn."""

import pytest

from foretoken.training.looped.documents import Split
from foretoken.training.looped.settings import LoopedSettings
from tests.cli.conftest import save_model

NAMES = ("cat", "dog", "cow", "hen", "ant", "fox", "bee", "pig", "owl", "ewe")


@pytest.fixture(scope="session")
def like(tmp_path_factory):
    """Folder of a tiny model with a tokenizer."""
    return save_model(tmp_path_factory.mktemp("like"), seed=0)


@pytest.fixture(scope="session")
def split():
    texts = [
        f"The {name} sat on the mat and ate {count} figs." for count in range(9) for name in NAMES
    ]
    return Split(texts[:80], texts[80:])


@pytest.fixture
def settings(like):
    def make(**changes):
        values = {
            "model": like,
            "steps": 6,
            "context": 24,
            "batch_size": 4,
            "loops": 3,
            "group": 1,
            "measure_steps": 2,
        }
        return LoopedSettings(**{**values, **changes})

    return make
