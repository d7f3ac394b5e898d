"""Rounds: who runs what, in which order, and what is refused."""

import pytest

from foretoken.bench.runner import PLAIN, run_bench
from foretoken.bench.workloads import Workload, WorkloadPrompt
from foretoken.errors import ConfigError, ForetokenError, UnknownNameError


def names(result):
    return [system.name for system in result.systems]


def test_every_system_does_the_same_work(settings):
    result = run_bench(settings(temperatures=(0.0, 1.0), batch_sizes=(1, 2)))
    assert names(result) == [PLAIN, "foretoken draft-model"]
    assert [(cell.temperature, cell.batch_size) for cell in result.cells] == [
        (0.0, 1),
        (0.0, 2),
        (1.0, 1),
        (1.0, 2),
    ]
    for cell in result.cells:
        assert len(cell.rounds) == len(cell.bandwidth) == 2
        for turns in cell.rounds:
            plain, fast = turns[PLAIN], turns["foretoken draft-model"]
            assert [o.token_ids for o in plain.outputs] == [o.token_ids for o in fast.outputs]
            assert all(len(output.token_ids) == 6 for output in plain.outputs)
            assert len(plain.unit_s) == (3 if cell.batch_size == 1 else 2)


def test_the_order_rotates_from_round_to_round(settings, pair):
    drafters = (f"draft-model:path={pair.draft}", "prompt-lookup")
    seen = []
    run_bench(settings(drafters=drafters, rounds=3), lambda progress: seen.append(progress.detail))
    order = [doing.rpartition(": ")[2] for doing in seen if ", round " in doing]
    plain, model, lookup = PLAIN, "foretoken draft-model", "foretoken prompt-lookup"
    assert order == [plain, model, lookup, model, lookup, plain, lookup, plain, model]


def test_each_setting_is_a_system(settings, pair):
    drafters = (f"draft-model:path={pair.draft}", f"draft-model:path={pair.stranger}")
    result = run_bench(settings(drafters=drafters, max_nodes=(2, 4), rounds=1))
    assert names(result) == [
        PLAIN,
        "foretoken draft-model ≤2",
        "foretoken draft-model ≤4",
        "foretoken draft-model#2 ≤2",
        "foretoken draft-model#2 ≤4",
    ]


def test_without_drafters_there_is_plain_decoding_alone(settings):
    assert names(run_bench(settings(drafters=(), rounds=1))) == [PLAIN]


def test_a_peer_does_the_work_of_foretoken(settings, pair, fake_peer, tmp_path):
    done = settings(peers=("fake",), dtype="float32", draft=tmp_path, batch_sizes=(1, 2), rounds=1)
    result = run_bench(done)
    assert names(result)[2:] == ["fake plain", "fake draft"]
    assert [len(cell.systems) for cell in result.cells] == [4, 2]  # one prompt at a time
    work = [call for call in fake_peer.calls if not call[4]]
    prompts = [call[0] for call in work[1:]]  # the first is the warm-up
    assert [len(prompt) for prompt in prompts] == [5, 9, 2]
    assert {call[1] for call in work[1:]} == {6}
    assert [call[3] for call in work[1:]] == [0, 1, 2]
    assert fake_peer.loaded is None  # it was closed


def test_a_peer_learns_what_to_load(settings, fake_peer, monkeypatch, pair, tmp_path):
    specs = []
    load = fake_peer.load
    monkeypatch.setattr(fake_peer, "load", lambda spec: specs.append(spec) or load(spec))
    run_bench(settings(peers=("fake",), draft=None, dtype="float32", rounds=1))
    [spec] = specs
    assert (str(spec.model), spec.draft, spec.dtype) == (pair.target, None, "float32")
    assert (spec.threads, spec.num_draft_tokens) == (1, 3)
    assert spec.work_dir.is_dir()


def test_what_does_not_fit_the_context_is_left_out(settings):
    prompts = (
        WorkloadPrompt(prompt="x" * 126, place="test, line 1"),
        WorkloadPrompt(prompt="y" * 500, place="test, line 2"),
        WorkloadPrompt(prompt=(1, 2), place="test, line 3", max_new_tokens=3),
    )
    result = run_bench(settings(workload=Workload("test", prompts), rounds=1))
    assert result.num_skipped == 1
    assert [item.place for item in result.prompts] == ["test, line 1", "test, line 3"]
    outputs = result.cells[0].rounds[0][PLAIN].outputs
    assert [len(output.token_ids) for output in outputs] == [2, 3]


def test_a_workload_of_long_prompts_only_is_refused(settings):
    prompts = (WorkloadPrompt(prompt="y" * 500, place="test, line 1"),)
    with pytest.raises(ConfigError, match="fits the model's context of 128 tokens"):
        run_bench(settings(workload=Workload("test", prompts)))


def test_unknown_peers_are_found_before_anything_is_loaded(settings):
    with pytest.raises(UnknownNameError, match=r"unknown peer 'lama.cpp'"):
        run_bench(settings(model="nowhere", peers=("lama.cpp",)))


def test_peers_refuse_other_dtypes(settings, fake_peer):
    with pytest.raises(ConfigError, match=r"peers run float32 or bfloat16; .* float64"):
        run_bench(settings(peers=("fake",), dtype="float64", draft=None))


@pytest.mark.parametrize("cannot", ["fake plain", "fake draft"])
def test_a_peer_that_cannot_do_the_work_is_left_out(settings, fake_peer, cannot, tmp_path):
    fake_peer.refuses = ((1.0, cannot == "fake draft"),)
    result = run_bench(
        settings(
            peers=("fake",), dtype="float32", draft=tmp_path, temperatures=(0.0, 1.0), rounds=1
        )
    )
    greedy, sampled = result.cells
    assert greedy.left_out == {}
    assert sampled.left_out[cannot] == "fake cannot do this"
    kept = [system.name for system in sampled.systems if system.is_peer]
    assert kept == (["fake plain"] if cannot == "fake draft" else [])
    assert "fake draft" in sampled.left_out


def test_a_peer_that_ends_early_is_an_error(settings, fake_peer):
    fake_peer.num_missing = 1
    with pytest.raises(ForetokenError, match="fake made 5 tokens where 6 were asked for"):
        run_bench(settings(peers=("fake",), dtype="float32"))
