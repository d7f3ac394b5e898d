"""Writing: whole or not at all, and clear about a full disk."""

import pytest
import torch
from safetensors.torch import save_file

from foretoken.errors import ConfigError
from foretoken.training.folder import RunFolder, write_json
from foretoken.training.storage import write_atomically, writing
from tests.training.disks import small_disk

LIMIT_BYTES = 100_000
LARGE = {"weights": torch.zeros(LIMIT_BYTES)}


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(2 * LIMIT_BYTES)),
        lambda path: save_file(LARGE, path),  # raises an error of its own, not the system's
    ],
)
def test_what_does_not_fit_is_an_error_that_leaves_the_old_file(tmp_path, write):
    path = tmp_path / "file"
    path.write_text("old")
    with (
        small_disk(LIMIT_BYTES),
        pytest.raises(ConfigError, match=r"^file cannot be written: File too large"),
    ):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_torch_may_raise_another_error_while_it_handles_the_systems(tmp_path):
    """torch.save into a file that is full says something of positions in the archive."""
    path = tmp_path / "file"

    def write(partial):
        with partial.open("wb") as file:
            torch.save(LARGE, file)

    with small_disk(LIMIT_BYTES), pytest.raises(ConfigError, match="File too large"):
        write_atomically(path, write)


def test_a_model_that_does_not_fit_leaves_nothing_under_its_name(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    with small_disk(LIMIT_BYTES), pytest.raises(ConfigError, match=r"^model cannot be written"):
        folder.build("model", lambda path: save_file(LARGE, path / "model.safetensors"))
    assert sorted(path.name for path in folder.path.iterdir()) == ["settings.json"]


def test_a_full_disk_under_json(tmp_path):
    (tmp_path / "report.json.partial").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"^report.json cannot be written: No space left"):
        write_json(tmp_path / "report.json", {"a": 1})


def test_other_errors_pass():
    with pytest.raises(KeyError), writing("file"):
        raise KeyError("no name")
