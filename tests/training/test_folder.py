"""Folders of runs: resumed with the same settings, refused with others."""

import json

import pytest

from foretoken.errors import ConfigError
from foretoken.training.folder import RunFolder, fingerprint

SETTINGS = {"seed": 1, "start": "small", "window": 4}


def test_the_same_settings_resume(tmp_path):
    assert not RunFolder(tmp_path / "new" / "run", SETTINGS).is_resumed
    assert RunFolder(tmp_path / "new" / "run", dict(SETTINGS)).is_resumed


def test_other_settings_are_refused(tmp_path):
    RunFolder(tmp_path, SETTINGS)
    with pytest.raises(ConfigError) as caught:
        RunFolder(tmp_path, {**SETTINGS, "seed": 2, "start": "other", "more": 1})
    assert str(caught.value).endswith(
        'other settings: seed 1, now 2, start "small", now "other", more null, now 1'
    )
    assert "name another folder" in caught.value.hint


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        RunFolder(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        RunFolder(tmp_path / "file", SETTINGS)


@pytest.mark.parametrize("text", ["{", "3"])
def test_broken_settings_are_refused(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ConfigError, match="cannot be read"):
        RunFolder(tmp_path, SETTINGS)


def test_a_build_that_fails_leaves_nothing_under_the_name(tmp_path):
    folder = RunFolder(tmp_path, SETTINGS)

    def fails(path):
        (path / "half").write_text("")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        folder.build("a/model", fails)
    assert not (tmp_path / "a" / "model").exists()
    folder.build("a/model", lambda path: (path / "whole").write_text(""))
    assert [path.name for path in (tmp_path / "a" / "model").iterdir()] == ["whole"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]


def test_a_fingerprint_follows_the_files(models, tmp_path):
    before = fingerprint(str(models.start))
    assert before == fingerprint(str(models.start)) != fingerprint(str(models.target))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((models.start / name).read_bytes())
    one = fingerprint(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert fingerprint(str(tmp_path)) != one
    assert fingerprint("owner/name") == "owner/name"
