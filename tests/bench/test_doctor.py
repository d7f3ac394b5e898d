"""`foretoken doctor`: each defect is made, found, and told what to do about."""

import json
import os

import pytest
import torch
from transformers import AutoTokenizer

from foretoken.bench import doctor
from foretoken.bench.doctor import Finding, Level
from foretoken.bench.limits import Limits
from foretoken.core.options import ComponentSpec
from foretoken.core.params import SamplingParams
from foretoken.engine.llm import LLM
from foretoken.errors import ConfigError
from foretoken.models.tokenizer import Tokenizer
from tests.cli.conftest import ALPHABET, cli, save_model  # noqa: F401 - a fixture

PROMPTS = ["hello, who is there", "once upon a time", "so it goes"]
PLENTY = Limits(num_cores=64, memory_bytes=2**40, has_bfloat16=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "target": save_model(folder / "target", seed=0),
        "itself": save_model(folder / "itself", seed=0),
        "dead": save_model(folder / "dead", seed=5),
        "stranger": save_model(folder / "stranger", seed=2, alphabet=ALPHABET[::-1]),
    }


@pytest.fixture
def run(cli, folders):  # noqa: F811
    """Run `foretoken doctor` with the tiny target; return exit code, lines and errors."""

    def run_here(*arguments):
        prompts = [word for text in PROMPTS for word in (text,)]
        return cli("doctor", "--model", folders["target"], *prompts, *arguments)

    return run_here


def findings_of(result):
    return {item["what"].partition(":")[0]: item for item in json.loads(result.out)["findings"]}


def probed(folders, drafter, **options):
    llm = LLM(folders["target"], drafters=drafter, dtype="float64", **options)
    params = [SamplingParams(max_new_tokens=24)] * len(PROMPTS)
    label = next(iter(llm.engine.drafters))
    before = llm.engine.parts
    counts = doctor.probe_drafter(llm, label, PROMPTS, params)
    assert llm.engine.parts is before
    return counts


# -- drafters ------------------------------------------------------------------------------------


def test_a_dead_drafter(folders, run):
    counts = probed(folders, f"draft-model:path={folders['dead']}")
    assert counts.num_draft_tokens >= doctor.MIN_DRAFTED
    finding = doctor.check_drafter("draft-model", counts, is_trained=True)
    assert finding.level is Level.BAD
    assert "dead: " in finding.what
    assert "foretoken train" in finding.do
    result = run("--drafter", f"draft-model:path={folders['dead']}", "--max-new-tokens", "24")
    assert result.code == 1
    assert "bad: draft-model: dead" in result.out


def test_a_drafter_that_knows_the_target_is_well(folders, run):
    counts = probed(folders, f"draft-model:path={folders['itself']}")
    finding = doctor.check_drafter("draft-model", counts, is_trained=True)
    assert finding.level is Level.OK
    result = run("--drafter", f"draft-model:path={folders['itself']}", "--max-new-tokens", "24")
    assert result.code == 0
    assert "draft tokens accepted (" in result.out


def test_few_draft_tokens_do_not_condemn(folders):
    counts = doctor.DrafterCounts(num_steps=40, num_draft_tokens=63, num_accepted=0)
    assert doctor.check_drafter("suffix", counts, is_trained=False).level is Level.OK
    enough = doctor.DrafterCounts(num_steps=40, num_draft_tokens=64, num_accepted=0)
    finding = doctor.check_drafter("suffix", enough, is_trained=False)
    assert finding.level is Level.WARN  # what copies has nothing to copy here
    assert "where outputs are like these" in finding.do


def test_a_drafter_that_is_never_used(folders, run):
    spec = "prompt-lookup:min_ngram=9,max_ngram=9"
    counts = probed(folders, spec)
    assert counts.num_draft_tokens == 0
    result = run("--drafter", spec, "--max-new-tokens", "8", "--format", "json")
    finding = findings_of(result)["prompt-lookup"]
    assert finding["level"] == "warn"
    assert "proposed nothing in " in finding["what"]
    assert result.code == 0


def test_the_planner_does_not_hide_a_drafter_from_the_doctor(folders):
    """A plan that adapts stops asking a drafter that is no good, which is what is to be found."""
    spec = f"draft-model:path={folders['dead']}"
    counts = probed(folders, spec, adaptive=True, max_nodes=8)
    fixed = probed(folders, spec, adaptive=False, max_nodes=8)
    assert counts.num_draft_tokens == fixed.num_draft_tokens > 0


# -- two models ----------------------------------------------------------------------------------


def test_another_vocabulary(folders, run):
    result = run("--drafter", f"draft-model:path={folders['stranger']}")
    assert result.code == 1
    [line] = result.out.splitlines()
    assert line.startswith("bad: draft and target vocabularies differ: ")
    assert "; do: use a draft model of the same family" in line


@pytest.mark.parametrize(
    ("ours", "theirs", "level", "message"),
    [
        (None, None, Level.OK, "no chat template, as the target"),
        ("{{ a }}", "{{ a }}", Level.OK, "the target's chat template"),
        ("{{ a }}", "{{ b }}", Level.WARN, "another chat template than the target"),
        ("{{ a }}", None, Level.WARN, "in one of the two only: the draft has none"),
        (None, "{{ a }}", Level.WARN, "in one of the two only: the target has none"),
    ],
)
def test_chat_templates(folders, tmp_path, ours, theirs, level, message):
    tokenizers = []
    for name, template in (("ours", ours), ("theirs", theirs)):
        tokenizer = AutoTokenizer.from_pretrained(folders["target"])
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
        tokenizers.append(Tokenizer.load(str(tmp_path / name)))
    finding = doctor.check_template(*tokenizers, "draft-model")
    assert (finding.level, bool(finding.do)) == (level, level is Level.WARN)
    assert message in finding.what


def test_the_draft_models_template_is_looked_at(folders, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folders["target"])
    folder = save_model(tmp_path / "draft", seed=0)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    llm = LLM(folders["target"], drafters=f"draft-model:path={folder}", dtype="float64")
    specs = [ComponentSpec("draft-model", {"path": folder}), ComponentSpec("suffix", {"path": "x"})]
    whats = [finding.what for finding in doctor.examine(llm, specs, PLENTY, {})]
    assert [what for what in whats if "template" in what] == [
        "draft-model: a chat template in one of the two only: the target has none; conversations "
        "look foreign to it, and few guesses are taken"
    ]


# -- exactness and arithmetic --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "level", "message"),
    [
        ({"dtype": "float32"}, Level.OK, "bitwise"),
        ({"dtype": "float64"}, Level.WARN, "numerical only"),
        ({"dtype": "float32", "verifier": "rejection"}, Level.OK, "distribution"),
        ({"dtype": "float32", "verifier": "typical"}, Level.WARN, "lossy"),
    ],
)
def test_exactness(folders, options, level, message):
    llm = LLM(folders["target"], drafters="none", **options)
    finding = doctor.check_exactness(llm)
    assert finding.level is level
    assert message in finding.what


def test_why_it_is_only_numerical(folders, monkeypatch):
    llm = LLM(folders["target"], drafters="none", dtype="float64")
    assert "float64" in doctor.check_exactness(llm).what
    object.__setattr__(llm.info, "inexact_because", "the router sums in another order")
    assert "because the router sums in another order" in doctor.check_exactness(llm).what


def test_bfloat16_without_units_for_it(folders):
    info = LLM(folders["target"], drafters="none", dtype="bfloat16").info
    finding = doctor.check_dtype(info, Limits(num_cores=1, has_bfloat16=False))
    assert finding.level is Level.WARN
    assert "--dtype float32" in finding.do
    for known in (True, None):
        limits = Limits(num_cores=1, has_bfloat16=known)
        assert doctor.check_dtype(info, limits).level is Level.OK
    plain = LLM(folders["target"], drafters="none", dtype="float32").info
    assert doctor.check_dtype(plain, Limits(num_cores=1, has_bfloat16=False)).level is Level.OK


# -- the machine ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_threads", "limits", "level", "message", "do"),
    [
        (2, Limits(num_cores=2), Level.OK, "2 on 2 cores", ""),
        (4, Limits(num_cores=2), Level.BAD, "4 take turns on 2 cores", "use --threads 2"),
        (4, Limits(num_cores=8, cpu_quota=1.5), Level.BAD, "grants 1.5 cores", "use --threads 1"),
        (1, Limits(num_cores=8, cpu_quota=0.5), Level.OK, "1 on 1 cores", ""),
        (
            8,
            Limits(num_cores=8, num_physical_cores=4),
            Level.WARN,
            "8 share 4 physical cores",
            "use --threads 4",
        ),
        (1, Limits(num_cores=8), Level.WARN, "1 of 8 cores are used", "use --threads 8"),
        (5, Limits(num_cores=8), Level.OK, "5 on 8 cores", ""),
    ],
)
def test_threads_and_cores(num_threads, limits, level, message, do):
    finding = doctor.check_threads(num_threads, limits, {})
    assert finding.level is level
    assert message in finding.what
    assert finding.do.startswith(do)


def test_more_threads_than_this_process_has_cores(run):
    before = torch.get_num_threads()
    try:
        result = run("--threads", len(os.sched_getaffinity(0)) + 1, "--drafter", "none")
    finally:
        torch.set_num_threads(before)
    assert result.code == 1
    assert "bad: threads: " in result.out
    assert "take turns on" in result.out


def test_the_variable_that_set_the_threads_is_named():
    variables = {"OMP_NUM_THREADS": "16", "HOME": "somewhere"}
    finding = doctor.check_threads(16, Limits(num_cores=4), variables)
    assert "16 (OMP_NUM_THREADS=16) take turns on 4 cores" in finding.what
    assert "somewhere" not in finding.what


def test_a_variable_that_asks_for_more_threads_than_there_are_cores():
    """Torch takes no more than there are, other libraries do."""
    finding = doctor.check_threads(4, Limits(num_cores=4), {"MKL_NUM_THREADS": "16"})
    assert finding.level is Level.WARN
    assert "MKL_NUM_THREADS ask for more than the 4 cores (MKL_NUM_THREADS=16)" in finding.what
    assert finding.do == "unset MKL_NUM_THREADS"
    for value in ("4", "", "many"):
        fine = doctor.check_threads(4, Limits(num_cores=4), {"OMP_NUM_THREADS": value})
        assert fine.level is Level.OK


def test_memory_too_small_for_the_cache(folders):
    llm = LLM(folders["target"], drafters="none", dtype="float32")
    num_bytes = llm.engine.cache.num_blocks * 16 * llm.info.kv_bytes_per_token
    for free, level in ((num_bytes - 1, Level.BAD), (num_bytes, Level.OK), (None, Level.OK)):
        finding = doctor.check_memory(llm, Limits(num_cores=1, memory_bytes=free))
        assert finding.level is level
    assert doctor.check_memory(llm, Limits(num_cores=1, memory_bytes=0)).do


def test_a_cache_for_one_request(folders):
    llm = LLM(folders["target"], drafters="none", dtype="float32", kv_cache_tokens=160)
    finding = doctor.check_memory(llm, PLENTY)
    assert finding.level is Level.WARN
    assert "holds 1.2 requests of full length; others wait" in finding.what


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_memory_too_small_to_load(error):
    finding = doctor.load_failure(error)
    assert finding.level is Level.BAD
    assert finding.what.startswith("memory: it does not suffice")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ConfigError("typo", hint="mend it")])
def test_other_errors_are_no_findings(error):
    with pytest.raises(type(error)):
        doctor.load_failure(error)


# -- the command ---------------------------------------------------------------------------------


def test_a_finding_is_one_line():
    assert str(Finding(Level.OK, "threads: 2 on 2 cores")) == "ok: threads: 2 on 2 cores"
    assert str(Finding(Level.BAD, "what", "this")) == "bad: what; do: this"


def test_the_embedded_pair_is_well(cli):  # noqa: F811
    result = cli("doctor", "--max-new-tokens", "16")
    assert result.code == 0
    lines = result.out.splitlines()
    assert all(line.startswith(("ok: ", "warn: threads")) for line in lines)
    assert any(line.startswith("ok: draft-model: ") and "accepted (" in line for line in lines)


def test_a_model_that_is_not_there(cli, tmp_path):  # noqa: F811
    result = cli("doctor", "--model", tmp_path / "nothing", "--format", "json")
    assert result.code == 1
    [finding] = json.loads(result.out)["findings"]
    assert finding["level"] == "bad"
    assert "does not exist" in finding["what"]
    assert finding["do"] == "check the path"


def test_a_mistyped_option_is_an_error_not_a_finding(run):
    result = run("--drafter", "promt-lookup")
    assert (result.code, result.out) == (2, "")
    assert "unknown drafter 'promt-lookup'" in result.err


def test_plain_decoding_has_no_drafters_to_look_at(run):
    result = run("--drafter", "none", "--format", "json")
    assert sorted(findings_of(result)) == ["dtype", "exactness", "memory", "threads"]
