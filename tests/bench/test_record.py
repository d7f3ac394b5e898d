"""Records and what is drawn from them."""

import io
import json

import pytest
from rich.console import Console

from foretoken.bench.plots import check_plots, write_plots
from foretoken.bench.record import (
    different_tokens,
    make_record,
    portable,
    portable_command,
    write_record,
)
from foretoken.bench.report import print_report
from foretoken.bench.runner import PLAIN, run_bench
from foretoken.errors import ConfigError

DRAFT = "foretoken draft-model"


@pytest.fixture(scope="module")
def result(settings, registered_peer, tmp_path_factory):
    registered_peer.changes_text = True
    result = run_bench(
        settings(
            peers=("fake",),
            dtype="float32",
            draft=tmp_path_factory.mktemp("models") / "draft",
            temperatures=(0.0, 1.0),
            batch_sizes=(1, 2),
        )
    )
    registered_peer.reset()
    return result


@pytest.fixture(scope="module")
def record(result):
    return make_record(result, ["/somewhere/bin/foretoken", "bench", "--model", "/a/b/target"])


def test_a_record_is_json_without_folders(record, tmp_path):
    path = write_record(record, tmp_path)
    text = path.read_text()
    assert json.loads(text) == json.loads(json.dumps(record))
    assert str(tmp_path) not in text
    assert record["command"] == "foretoken bench --model target"
    assert record["settings"]["drafters"] == ["draft-model:path=draft"]
    assert record["settings"]["draft_of_peers"] == "draft"


def test_it_holds_every_round(record):
    cell = record["cells"][0]
    for system in cell["systems"].values():
        rounds = system["tokens_per_s"]["rounds"]
        assert len(rounds) == len(system["unit_s"]) == 2
        for rate, seconds in zip(rounds, system["unit_s"], strict=True):
            assert rate == pytest.approx(cell["num_tokens"] / sum(seconds), rel=1e-3)
    assert cell["num_tokens"] == 18
    assert len(cell["read_bandwidth_bytes_per_s"]["rounds"]) == 2


def test_ratios_are_formed_within_rounds(record):
    systems = record["cells"][0]["systems"]
    ratio = systems[DRAFT]["speed_up"]
    pairs = zip(
        systems[DRAFT]["tokens_per_s"]["rounds"],
        systems[PLAIN]["tokens_per_s"]["rounds"],
        strict=True,
    )
    assert ratio["rounds"] == pytest.approx([ours / plain for ours, plain in pairs], rel=1e-3)
    low, high = ratio["interval_95"]
    assert low <= ratio["median"] <= high
    assert "speed_up" not in systems[PLAIN]
    assert systems["fake draft"]["speed_up_over_own_plain"]["median"] == pytest.approx(2.0)


def test_it_tells_counts_phases_and_memory(record):
    systems = record["cells"][0]["systems"]
    plain, fast = systems[PLAIN], systems[DRAFT]
    assert plain["tokens_per_step"] == 1
    assert fast["tokens_per_step"] > 1  # the draft has the target's own weights
    assert 0 < fast["acceptance_rate"] <= 1
    assert "tokens_per_step" not in systems["fake plain"]  # it does not tell
    phases = plain["phases_s"]
    parts = [sum(phases[name][n] for name in phases if name != "total") for n in range(2)]
    assert parts == pytest.approx(phases["total"], rel=1e-3)
    assert list(plain["target_pass_ms"]) == ["1"]
    assert plain["bandwidth_share"].keys() == {"of_tokens", "of_passes"}
    assert systems["fake plain"]["bandwidth_share"].keys() == {"of_tokens"}


def test_weights_that_a_pass_reads(result, record):
    # tiny llama: its embedding is not its output matrix, so one row of it is read
    count = result.systems[0].host.info.num_parameters
    assert record["settings"]["weight_bytes_per_pass"] == 4 * (count - 257 * 32)


def test_categories_have_their_own_numbers(record):
    entries = record["cells"][0]["systems"][DRAFT]["categories"]
    assert {name: entry["num_prompts"] for name, entry in entries.items()} == {"a": 2, "b": 1}
    assert "categories" not in record["cells"][1]["systems"][DRAFT]  # batches mix them


def test_changed_tokens_of_peers_are_counted_where_they_mean_something(record):
    greedy, _, sampled, _ = record["cells"]
    assert greedy["systems"]["fake draft"]["prompts_with_other_tokens"] == {
        "than_foretoken_plain": 3,
        "than_own_plain": 3,
    }
    assert "prompts_with_other_tokens" not in sampled["systems"]["fake draft"]
    for cell in record["cells"]:
        assert cell["systems"][DRAFT]["prompts_with_other_tokens"] == {"than_foretoken_plain": 0}


def test_changed_tokens_of_foretoken_are_listed(result):
    assert different_tokens(make_record(result, [])) == []
    token_ids = result.cells[0].rounds[1][DRAFT].outputs[1].token_ids
    token_ids[2] += 1
    [difference] = different_tokens(make_record(result, []))
    token_ids[2] -= 1
    assert difference == {
        "temperature": 0.0,
        "batch_size": 1,
        "system": DRAFT,
        "round": 1,
        "prompt": 1,
        "place": "test, line 2",
        "text": "once upon",
        "token": 2,
    }


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("--output", "--output"),
        ("/data/models/big", "big"),
        ("~/models/big/", "big"),
        ("draft-model:path=/data/small,max_depth=4", "draft-model:path=small,max_depth=4"),
        ("owner/model", "owner/model"),
        ("./big", "./big"),
        ("hidden=1536,layers=20", "hidden=1536,layers=20"),
    ],
)
def test_paths_of_this_machine_are_shortened(word, shown):
    assert portable(word) == shown


def test_a_command_can_be_typed_again():
    assert portable_command(["/x/__main__.py", "bench", "a b"]) == "foretoken bench 'a b'"
    assert portable_command([]) == "foretoken"


def test_the_report_shows_every_system(record):
    stream = io.StringIO()
    print_report(record, Console(file=stream, width=130))
    text = stream.getvalue()
    assert "greedy, 2 prompts at once" in text
    for name in (PLAIN, DRAFT, "fake plain", "fake draft"):
        assert name in text
    assert "fake draft: other tokens than own plain for 3 prompts" in text
    assert "speed-up [95 %]" in text


def test_the_pictures_are_pictures(record, tmp_path):
    pytest.importorskip("matplotlib")
    paths = write_plots(record, tmp_path)
    assert [path.name for path in paths] == [
        "tokens_per_s.png",
        "phases.png",
        "tokens_per_step.png",
    ]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_pictures_need_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="matplotlib is not installed"):
        check_plots()
