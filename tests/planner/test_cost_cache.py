"""Curves on disk: found again, and measured anew when anything that matters has changed."""

import json
import logging
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foretoken.assets import EMBEDDED
from foretoken.models.loading import load_model
from foretoken.planner import cost_cache
from foretoken.planner.cost import CostCurve
from foretoken.planner.cost_cache import cache_folder, identity, load_or_measure
from tests.fakes import tiny_language_model

DRAFT = EMBEDDED["stories"].draft


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FORETOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cost"


@pytest.fixture
def measurements(monkeypatch):
    """Replace measuring; each measurement gives another curve, and is listed here."""
    made = []

    def measure(model, *, budget_s, on_progress):
        made.append(CostCurve(rows=(1, 2), base_ms=(1.0 + len(made), 2.5 + len(made))))
        return made[-1]

    monkeypatch.setattr(cost_cache, "measure_cost", measure)
    return made


@pytest.fixture(scope="module")
def model():
    return load_model(str(DRAFT))


def test_a_curve_is_measured_once(folder, measurements, model):
    first = load_or_measure(model)
    assert load_or_measure(model) == load_or_measure(load_model(str(DRAFT))) == first
    assert measurements == [first]
    (file,) = folder.iterdir()
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["curve"]["base_ms"] == {"1": 1.0, "2": 2.5}
    assert content["identity"] == identity(model)


def test_a_real_measurement_is_found_again_exactly(folder, model):
    first = load_or_measure(model, budget_s=0.1)
    assert load_or_measure(model, budget_s=0.1) == first


def test_nothing_in_a_file_names_a_folder(folder, measurements, model):
    load_or_measure(model)
    (file,) = folder.iterdir()
    assert str(Path.home()) not in file.read_text(encoding="utf-8")
    assert str(DRAFT.parent) not in file.read_text(encoding="utf-8")


def test_a_copy_of_the_model_elsewhere_is_the_same_model(tmp_path, model):
    copy = shutil.copytree(DRAFT, tmp_path / "elsewhere")
    assert identity(load_model(str(copy))) == identity(model)


def test_a_configuration_that_says_something_else_is_another_model(tmp_path, model):
    """Experts per token change what a pass costs, and nothing else that is known of a model."""
    copy = shutil.copytree(DRAFT, tmp_path / "other")
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(
        json.dumps({**config, "num_experts_per_tok": 3}), encoding="utf-8"
    )
    changed = replace(model.info, name=str(copy))
    other = load_model(str(DRAFT))
    other.info = changed
    assert identity(other) != identity(model)


def test_another_dtype_is_another_model(model):
    assert identity(load_model(str(DRAFT), dtype="bfloat16")) != identity(model)


def test_another_way_of_computing_is_another_model(model):
    """Float64 goes through modules: even where all else were equal, its passes cost more."""
    assert (
        identity(load_model(str(DRAFT), dtype="float64"))["model"]["path"]
        != (identity(model)["model"]["path"])
    )


def test_models_without_files_are_told_apart_by_their_sizes():
    one, same, other = (
        tiny_language_model("llama"),
        tiny_language_model("llama", 1),
        tiny_language_model("llama", intermediate_size=80),
    )
    assert identity(one) == identity(same) != identity(other)


def test_every_number_of_threads_has_its_curve(folder, measurements, model):
    load_or_measure(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        load_or_measure(model)
    finally:
        torch.set_num_threads(threads)
    load_or_measure(model)
    assert len(measurements) == 2


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("_processor", {"processor": "another"}),
        ("_software", {"torch": "another"}),
        ("_sources_digest", "another"),
    ],
)
def test_a_changed_machine_or_software_is_measured_anew(
    folder, measurements, model, monkeypatch, part, changed
):
    load_or_measure(model)
    cost_cache._software.cache_clear()
    monkeypatch.setattr(cost_cache, part, lambda: changed)
    load_or_measure(model)
    if part == "_sources_digest":
        cost_cache._software.cache_clear()
    assert len(measurements) == 2
    assert len(list(folder.iterdir())) == 2


def test_sources_of_the_kernels_are_part_of_the_identity(monkeypatch):
    before = cost_cache._sources_digest()
    read_bytes = Path.read_bytes
    monkeypatch.setattr(
        Path,
        "read_bytes",
        lambda path: read_bytes(path) + (b"#" if path.name == "products.py" else b""),
    )
    assert cost_cache._sources_digest() != before


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"identity": {}, "curve": {}}',
        b"\xff\xfe\x00",
    ],
)
def test_a_broken_file_is_told_and_replaced(folder, measurements, model, caplog, content):
    load_or_measure(model)
    (file,) = folder.iterdir()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING):
        second = load_or_measure(model)
    assert "is not used and will be replaced" in caplog.text
    assert second == measurements[1]
    assert load_or_measure(model) == second


@pytest.mark.parametrize("key", ["identity", "curve"])
def test_a_file_with_foreign_content_is_replaced(folder, measurements, model, caplog, key):
    load_or_measure(model)
    (file,) = folder.iterdir()
    content = json.loads(file.read_text(encoding="utf-8"))
    content[key] = {"base_ms": {"1": -1}, "context_ms": {"1": 0}, "request_ms": 0}
    file.write_text(json.dumps(content), encoding="utf-8")
    load_or_measure(model)
    assert len(measurements) == 2
    assert json.loads(file.read_text(encoding="utf-8"))["identity"] == identity(model)


def test_a_folder_that_cannot_be_is_no_error(tmp_path, monkeypatch, measurements, model, caplog):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    monkeypatch.setenv("FORETOKEN_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO):
        assert load_or_measure(model) == measurements[0]
    assert "cannot be written" in caplog.text
    assert (tmp_path / "file").read_text(encoding="utf-8") == "no folder"


def test_a_write_that_fails_leaves_no_trace(folder, measurements, model, monkeypatch):
    load_or_measure(model)
    (file,) = folder.iterdir()
    before = file.read_text(encoding="utf-8")

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    cost_cache._save(file, identity(model), CostCurve(rows=(1,), base_ms=(9.0,)))
    assert [path.name for path in folder.iterdir()] == [file.name]
    assert file.read_text(encoding="utf-8") == before


def test_readers_see_whole_files_while_others_write(folder, measurements, model, caplog):
    wanted = identity(model)
    load_or_measure(model)
    (file,) = folder.iterdir()
    curve = CostCurve(rows=tuple(range(1, 400)), base_ms=tuple(float(i) for i in range(1, 400)))
    writers = [
        threading.Thread(target=lambda: [cost_cache._save(file, wanted, curve) for _ in range(50)])
        for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    seen = [cost_cache._load(file, wanted) for _ in range(200)]
    for writer in writers:
        writer.join()
    assert None not in seen
    assert caplog.text == ""
    assert [path.name for path in folder.iterdir()] == [file.name]


def test_the_folder_is_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("FORETOKEN_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("FORETOKEN_CACHE_DIR")
    assert cache_folder() == tmp_path / "xdg" / "foretoken"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_folder() == tmp_path / "home" / ".cache" / "foretoken"
