"""The tables of the SpecInfer paper: what is counted, and what is said of it."""

import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from foretoken.bench.plots import check_plots
from foretoken.bench.specinfer import paper
from foretoken.bench.specinfer.estimates import Bootstrap
from foretoken.bench.specinfer.plots import write_plots
from foretoken.bench.specinfer.record import make_record
from foretoken.bench.specinfer.report import print_report
from foretoken.bench.specinfer.run import run_specinfer
from foretoken.bench.specinfer.settings import SpecInferSettings, System, Tree, systems
from foretoken.bench.specinfer.success_rate import (
    DISTINCT,
    IID,
    MAX_GUESSES,
    MSS_RULE,
    RACE,
    TOP_K,
    Continuation,
    Replay,
    iid_success,
    mss_success,
    sampled_success,
)
from foretoken.bench.specinfer.summary import summarize
from foretoken.bench.workloads import Workload, WorkloadPrompt
from foretoken.errors import ConfigError, UnknownNameError, VocabularyMismatchError
from foretoken.models.loading import load_model
from tests.engines import plain_ids, sampled

PROMPTS = [f"prompt number {number}" for number in range(3)]


def specinfer_settings(pair, **changes):
    prompts = [WorkloadPrompt(prompt=text, place="test") for text in PROMPTS]
    values = {
        "model": pair.target,
        "model_name": "target",
        "draft": pair.draft,
        "draft_name": "draft",
        "workload": Workload("test", tuple(prompts)),
        "max_new_tokens": 12,
        "num_seeds": 2,
        "seed": 5,
        "max_width": 2,
        "verifiers": ("rrs",),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
    }
    return SpecInferSettings(**{**values, **changes})


@pytest.fixture(scope="module")
def result(pair):
    return run_specinfer(specinfer_settings(pair))


@pytest.fixture(scope="module")
def record(result):
    return make_record(result, ["foretoken", "bench", "specinfer", "--model", "/a/b/target"])


def cells_of(record, **wanted):
    return [
        cell
        for cell in record["tokens_per_step"]
        if all(cell[name] == value for name, value in wanted.items())
    ]


# -- success rates -------------------------------------------------------------------------------


def random_distributions(num_rows, vocab_size, seed):
    logits = np.random.default_rng(seed).normal(size=(2, num_rows, vocab_size)) * 1.5
    weights = np.exp(logits)
    return weights / weights.sum(axis=2, keepdims=True)


def enumerated_mss(target, draft, num_guesses):
    """Return the probability that MSS accepts, over all draws: Algorithm 2 to the letter."""
    total = 0.0
    for guesses in itertools.product(range(len(target)), repeat=num_guesses):
        rest, missed = target, 1.0
        for guess in guesses:
            missed *= 1 - min(1, rest[guess] / draft[guess])
            left = np.maximum(rest - draft, 0)
            rest = left / left.sum()
        total += np.prod(draft[list(guesses)]) * (1 - missed)
    return total


def test_iid_and_mss_success_equal_their_enumeration():
    target, draft = random_distributions(4, 4, seed=0)
    iid, mss = iid_success(target, draft), mss_success(target, draft)
    for row, num_guesses in itertools.product(range(4), range(1, MAX_GUESSES + 1)):
        missed = (1 - draft[row]) ** num_guesses
        assert iid[row, num_guesses - 1] == pytest.approx((target[row] * (1 - missed)).sum())
        expected = enumerated_mss(target[row], draft[row], num_guesses)
        assert mss[row, num_guesses - 1] == pytest.approx(expected)


def test_mss_accepts_at_once_where_both_agree():
    probs = np.array([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]])
    assert mss_success(probs, probs.copy()) == pytest.approx(np.ones((2, MAX_GUESSES)))
    apart = mss_success(probs, probs[::-1].copy())
    assert apart == pytest.approx(np.zeros((2, MAX_GUESSES)))


def test_samples_without_replacement_hold_the_mass_that_they_should():
    """Over 40,000 draws the mean of each column stays within five standard errors.

    A column fails by chance with probability 6e-7, one of the four with 2.4e-6.
    """
    [[target], [draft]] = random_distributions(1, 5, seed=3)
    expected = np.zeros(4)
    squares = np.zeros(4)
    for order in itertools.permutations(range(5)):
        probability, left = 1.0, 1.0
        for token in order:
            probability *= draft[token] / left
            left -= draft[token]
            if left <= 0:
                break
        mass = target[list(order)].cumsum()[:4]
        expected += probability * mass
        squares += probability * mass**2
    num_draws = 40_000
    rows = np.tile(target, (num_draws, 1)), np.tile(draft, (num_draws, 1))
    ways = sampled_success(*rows, race=np.zeros((num_draws, 5)), generator=np.random.default_rng(1))
    errors = np.sqrt(np.maximum(squares - expected**2, 0) / num_draws)
    assert (abs(ways[DISTINCT].mean(axis=0)[:4] - expected) < 5 * errors + 1e-9).all()
    assert ways[DISTINCT][:, 4] == pytest.approx(np.ones(num_draws))
    likeliest = target[np.argsort(-draft)].cumsum()
    assert ways[TOP_K][0] == pytest.approx(likeliest)


def test_a_draft_equal_to_the_target_is_always_right(pair):
    """The race shares the target's noise and MSS the distribution; chance spoils the others."""
    model = load_model(pair.target, dtype="float64", device="cpu")
    prompt_ids = [5, 9, 2]
    output_ids = plain_ids(model, prompt_ids, sampled(70, seed=3, ignore_eos=True))
    continuation = Continuation(
        prompt_ids=prompt_ids, output_ids=output_ids, temperature=1.0, seed=3
    )
    ways = Replay(model, model, 128).success(continuation)
    assert ways[RACE] == pytest.approx(np.full(MAX_GUESSES, 70))
    assert ways[MSS_RULE] == pytest.approx(np.full(MAX_GUESSES, 70))
    assert ways[IID][0] < 69


def test_greedy_success_is_that_of_ranks(pair):
    target = load_model(pair.target, dtype="float64", device="cpu")
    other = load_model(pair.stranger, dtype="float64", device="cpu")
    prompt_ids = [5, 9, 2]
    output_ids = plain_ids(target, prompt_ids, sampled(20, temperature=0.0, ignore_eos=True))
    replay = Replay(target, other, 64)
    continuation = Continuation(
        prompt_ids=prompt_ids, output_ids=output_ids, temperature=0.0, seed=0
    )
    ours = replay.success(continuation)[TOP_K]
    expected = np.zeros(MAX_GUESSES)
    for place, token_id in enumerate(output_ids):
        prefix = [*prompt_ids, *output_ids[:place]]
        one = Continuation(prompt_ids=prefix, output_ids=[token_id], temperature=0.0, seed=0)
        expected += replay.success(one)[TOP_K]
    assert ours == pytest.approx(expected)
    assert (np.diff(ours) >= 0).all()
    itself = Replay(target, target, 64).success(continuation)[TOP_K]
    assert itself == pytest.approx(np.full(MAX_GUESSES, 20))


# -- what runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_trees_of_a_width_fit_one_budget(width):
    def shape(tree):
        return System(tree=tree, verifier="coupled", width=width, temperature=0.0).shape

    max_nodes = System(tree=Tree.STATIC, verifier="mss", width=width, temperature=1.0).max_nodes
    assert max_nodes == 2 + 6 * width
    sizes = {
        tree: sum(itertools.accumulate(shape(tree)["expansion"], lambda size, wide: size * wide))
        for tree in (Tree.STATIC, Tree.FULL)
    }
    assert shape(Tree.STATIC)["expansion"] == (1, 1, width, 1, 1, 1, 1, 1)
    assert sizes[Tree.STATIC] == max_nodes
    assert (
        sizes[Tree.FULL]
        <= max_nodes
        < sizes[Tree.FULL] + width ** (len(shape(Tree.FULL)["expansion"]) + 1)
    )
    assert shape(Tree.BEST_FIRST)["max_depth"] == 8
    assert shape(Tree.BEST_FIRST_DEEP)["max_depth"] == max_nodes


def test_rules_for_chains_run_at_width_1_only(pair):
    cells = list(systems(specinfer_settings(pair), frozenset({"rejection"})))
    assert len(set(cells)) == len(cells)
    assert [cell.width for cell in cells if cell.verifier == "rejection"] == [1]
    assert [cell.width for cell in cells if cell.verifier == "rrs"] == [1, 2]


def test_mss_and_naive_get_the_same_kind_of_draws(record):
    assert {cell["siblings"] for cell in cells_of(record, verifier="mss")} == {"iid"}
    naive = cells_of(record, verifier="naive")
    assert [(cell["siblings"], cell["width"]) for cell in naive] == [
        ("iid", 1),
        ("iid", 2),
        ("deterministic", 2),
    ]
    [rrs] = {cell["siblings"] for cell in cells_of(record, verifier="rrs")}
    assert rrs == "without_replacement"


def test_every_cell_makes_all_tokens(record):
    for cell in record["tokens_per_step"]:
        num_outputs = 2 if cell["temperature"] else 1
        assert cell["tokens_by_prompt"] == [12 * num_outputs] * 3
        assert cell["num_tokens"] == 36 * num_outputs
        assert cell["num_steps"] == sum(cell["steps_by_prompt"])
        rate = cell["tokens_per_step"]
        assert rate["value"] == pytest.approx(cell["num_tokens"] / cell["num_steps"], rel=1e-4)
        low, high = rate["interval_95"]
        assert low <= rate["value"] <= high
        assert 0 < cell["nodes_per_step"] <= cell["max_nodes"]


def test_a_perfect_draft_is_kept_whole(record):
    """Target and draft of the pair are one model: paths of 8 and a bonus give 12 tokens in 2."""
    for cell in cells_of(record, verifier="coupled", tree="static"):
        assert cell["steps_by_prompt"] == [4 if cell["temperature"] else 2] * 3
    [chain] = cells_of(record, verifier="rejection")
    assert chain["tokens_per_step"]["value"] == 6


def test_coupled_output_is_that_of_plain_decoding(record):
    changed = {
        name: sum(
            cell["outputs_with_other_tokens_than_plain"] for cell in cells_of(record, verifier=name)
        )
        for name in ("coupled", "naive")
    }
    assert changed["coupled"] == 0
    assert changed["naive"] > 0
    assert record["summary"][0]["holds"]


def test_a_run_is_a_function_of_its_seed(pair, record):
    def without_the_machine(one):
        return {key: one[key] for key in one if key not in ("at", "environment", "command")}

    again = make_record(run_specinfer(specinfer_settings(pair)), ["foretoken"])
    assert without_the_machine(again) == without_the_machine(record)
    other = make_record(run_specinfer(specinfer_settings(pair, seed=6)), ["foretoken"])
    rates = [one["success_rate"][1]["ways"][IID] for one in (record, other)]
    assert rates[0] != rates[1]


def test_progress_reaches_its_total(pair):
    seen = []
    small = specinfer_settings(pair, num_seeds=1, verifiers=(), max_new_tokens=4)
    run_specinfer(small, seen.append)
    counted = [progress for progress in seen if progress.total > 1]
    assert [progress.done for progress in counted] == sorted(progress.done for progress in counted)
    assert counted[-1].done == counted[-1].total == counted[-2].done


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"verifiers": ("fair",)}, UnknownNameError, "unknown verifier 'fair'"),
        ({"max_new_tokens": 120}, ConfigError, "leaves room for 120 tokens in a context of 128"),
    ],
)
def test_what_cannot_be_measured_is_said(pair, changes, error, message):
    with pytest.raises(error, match=message):
        run_specinfer(specinfer_settings(pair, **changes))


def test_a_draft_of_another_vocabulary_is_refused(pair, models_of_two_vocabularies):
    with pytest.raises(VocabularyMismatchError):
        run_specinfer(specinfer_settings(pair, draft=models_of_two_vocabularies))


@pytest.fixture(scope="module")
def models_of_two_vocabularies(tmp_path_factory):
    from tests.cli.conftest import ALPHABET, save_model

    folder = tmp_path_factory.mktemp("other") / "reversed"
    return save_model(folder, seed=2, alphabet=ALPHABET[::-1])


def test_long_prompts_are_left_out_and_counted(pair):
    first, *others = specinfer_settings(pair).workload.prompts
    long = WorkloadPrompt(prompt="x" * 125, place="test")
    short = WorkloadPrompt(prompt=first.prompt, place="test", max_new_tokens=2)
    workload = Workload("test", (short, *others, long))
    found = run_specinfer(
        specinfer_settings(pair, num_seeds=1, verifiers=(), max_new_tokens=4, workload=workload)
    )
    assert (found.num_prompts, found.num_skipped) == (3, 1)
    assert {tuple(count.num_tokens for count in cell.counts) for cell in found.cells} == {(2, 4, 4)}
    console = Console(file=io.StringIO(), width=120)
    print_report(make_record(found, ["foretoken"]), console)
    assert "1 prompts were left out" in console.file.getvalue()


# -- what is said of it --------------------------------------------------------------------------


def test_intervals_know_paired_prompts():
    bootstrap = Bootstrap(40, seed=0)
    rng = np.random.default_rng(0)
    tokens = np.full(40, 100.0)
    steps = rng.integers(20, 60, size=40).astype(float)
    one = bootstrap.ratio(tokens, steps)
    assert one.low < one.value < one.high
    assert one.value == pytest.approx(tokens.sum() / steps.sum())
    same = bootstrap.gain((tokens, steps), (tokens, steps * 2))
    assert (same.value, same.low, same.high) == pytest.approx((2, 2, 2))
    assert same.standard_error < 1e-9


def cell_with(rates, *, tree="static", verifier="coupled", temperature=1.0, siblings="coupled"):
    """Return one cell per width, 100 tokens for each of two prompts."""
    return [
        {
            "tree": tree,
            "verifier": verifier,
            "siblings": siblings,
            "temperature": temperature,
            "width": width,
            "tokens_per_step": {"value": rate},
            "tokens_by_prompt": [100, 100],
            "steps_by_prompt": [100 / rate, 100 / rate],
            "outputs_with_other_tokens_than_plain": 0,
        }
        for width, rate in enumerate(rates, start=1)
    ]


def made_up_cells(**changes):
    lines = {
        "greedy": cell_with([2, 3], temperature=0.0),
        "greedy best": cell_with([3, 4], tree="best-first", temperature=0.0),
        "greedy deep": cell_with([3, 4], tree="best-first, any depth", temperature=0.0),
        "naive": cell_with([1, 1.5], verifier="naive", siblings="iid"),
        "naive, likeliest": cell_with([9, 9], verifier="naive", siblings="deterministic"),
        "mss": cell_with([1.5, 2], verifier="mss", siblings="iid"),
        "coupled": cell_with([1.5, 2.5]),
        "full mss": cell_with([1.5, 2], tree="full", verifier="mss", siblings="iid"),
        "full": cell_with([1.5, 2.5], tree="full"),
        "best": cell_with([2, 3], tree="best-first"),
        "deep": cell_with([2, 3], tree="best-first, any depth"),
        **changes,
    }
    return [cell for line in lines.values() for cell in line]


def verdicts(**changes):
    return [entry["holds"] for entry in summarize(made_up_cells(**changes), Bootstrap(2, seed=0))]


def test_all_expectations_can_hold():
    assert verdicts() == [True] * 12
    [*_, last] = summarize(made_up_cells(), Bootstrap(2, seed=0))
    assert last["shown"].startswith("MSS / naive at width 2 1.33 [1.33, 1.33]")
    assert last["by_width"]["2"]["value"] == pytest.approx(1.3333)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"coupled": cell_with([1.5, 1.9])}, {1}),
        ({"full": cell_with([1.5, 1.9], tree="full")}, {2}),
        ({"best": cell_with([2, 2.7], tree="best-first")}, {6}),
        ({"greedy deep": cell_with([3, 3.2], tree="best-first, any depth", temperature=0.0)}, {5}),
        ({"greedy": cell_with([2, 1.9], temperature=0.0)}, {8}),
        ({"naive": cell_with([1, 2.1], verifier="naive", siblings="iid")}, {11}),
    ],
)
def test_each_expectation_can_be_missed(changes, missed):
    holds = verdicts(**changes)
    assert {place for place, held in enumerate(holds) if not held} == missed


def test_other_tokens_than_plain_decoding_are_not_hidden():
    cells = made_up_cells()
    cells[0]["outputs_with_other_tokens_than_plain"] = 3
    [first, *_] = summarize(cells, Bootstrap(2, seed=0))
    assert not first["holds"]
    assert first["shown"].startswith("3 outputs with other tokens")


def test_the_report_shows_every_line(record):
    console = Console(file=io.StringIO(), width=120)
    print_report(record, console)
    text = console.file.getvalue()
    assert "w=1 (8)" in text
    assert "w=2 (14)" in text
    assert "static; rrs, draws without replacement" in text
    assert "paper, Alpaca" in text
    assert text.count("\nyes  ") + text.count("\nno   ") == len(record["summary"])
    for way in record["success_rate"][1]["ways"]:
        assert way in text


def test_the_record_is_json_without_folders(record, pair, tmp_path):
    text = json.dumps(record)
    assert str(pair.target) not in text
    assert record["command"] == "foretoken bench specinfer --model target"
    assert json.loads(text)["paper"]["datasets"] == list(paper.DATASETS)


def test_a_picture_is_drawn(record, tmp_path):
    pytest.importorskip("matplotlib")
    check_plots()
    [path] = write_plots(record, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_papers_numbers_agree_with_each_other():
    """Its last table divides numbers of the one before."""
    for mss, naive in zip(paper.MSS_TOKENS, paper.NAIVE_TOKENS, strict=True):
        low, high = paper.MSS_GAIN
        assert low - 0.01 < mss[-1] / naive < high + 0.01
    for rows in (paper.GREEDY_SUCCESS, paper.STOCHASTIC_SUCCESS, paper.GREEDY_TOKENS):
        assert len(rows) == len(paper.DATASETS)
        assert all(list(row) == sorted(row) and len(row) == 5 for row in rows)


@pytest.mark.parametrize("pair_name", ["stories", "babyllama"])
def test_the_page_shows_what_is_recorded(pair_name):
    root = Path(__file__).resolve().parents[2]
    name = f"specinfer_{pair_name}.json"
    path = root / "benchmarks" / "results" / name
    if not path.exists():
        pytest.skip("the records are not part of the source distribution")
    console = Console(file=io.StringIO(), width=120)
    print_report(json.loads(path.read_text(encoding="utf-8")), console)
    page = (root / "docs" / "specinfer.md").read_text(encoding="utf-8")
    shown = re.search(rf"<!-- report: {name} -->\n```text\n(.*?)```", page, re.DOTALL)[1]
    assert shown.splitlines() == [line.rstrip() for line in console.file.getvalue().splitlines()]
