"""The shape study: equal parameters, acceptance off texts, judgement, and a run that resumes."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from foretoken import LLM, SamplingParams
from foretoken.errors import ConfigError
from foretoken.models.draft_shape import DraftShape
from foretoken.models.pruning import check_prunable
from foretoken.models.trainable import load_trainable
from foretoken.planner.analysis import expected_tokens
from foretoken.training.corpus import Example
from foretoken.training.draft import study as study_module
from foretoken.training.draft.study import StudyReport, StudySettings, judge, run_study
from foretoken.training.draft.study_acceptance import (
    Hits,
    Point,
    fit_acceptance,
    hits,
    spread_out,
)
from foretoken.training.draft.study_findings import families, findings, latency_exponents
from foretoken.training.draft.study_latency import StepMs
from foretoken.training.draft.study_record import Candidate, Spread
from foretoken.training.draft.study_report import table, told_findings, write_plots
from foretoken.training.draft.study_shapes import TOLERANCE, candidate_shapes, family
from tests.fakes import tiny_config
from tests.training.conftest import save_tiny

BIG = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}


# -- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_family_has_equal_parameters_and_doubles_its_depth(depth):
    config = tiny_config("llama", **BIG)
    shapes = family(config, DraftShape.of(config), depth)
    assert [shape.layers for shape in shapes] == [depth, 2 * depth, 4 * depth, 8 * depth][
        : len(shapes)
    ]
    assert len(shapes) >= 3
    budget = shapes[0].num_parameters(config)
    assert shapes[0].hidden == 512
    for wider, narrower in itertools.pairwise(shapes):
        assert abs(narrower.num_parameters(config) / budget - 1) <= TOLERANCE
        assert narrower.hidden < wider.hidden


def test_candidates_fit_the_target_and_are_there_once():
    config = tiny_config("llama", **BIG)
    shapes = candidate_shapes(config, (1, 2, 16), (0.5, 0.25), is_pruned=True)
    assert len(set(shapes)) == len(shapes)
    for shape in shapes:
        check_prunable(config, shape)
        assert shape.layers <= 16
    assert [shape.vocab for shape in shapes if shape.vocab] == [2048, 1024]
    assert {shape.heads for shape in shapes if shape.hidden == 512} == {16, 8}


def test_a_target_without_room_for_a_draft_is_refused():
    with pytest.raises(ConfigError, match="fewer layers than its target"):
        candidate_shapes(tiny_config("llama", num_hidden_layers=1), (1, 2), (), is_pruned=False)


# -- acceptance ----------------------------------------------------------------------------------


def conditional_rates(texts, max_depth):
    """Count chains from every token, the slow way."""
    rates = []
    for depth in range(1, max_depth + 1):
        starts = [text[s : s + depth] for text in texts for s in range(len(text) - depth + 1)]
        judged = sum(math.prod(chain[:-1]) for chain in starts)
        rates.append(sum(map(math.prod, starts)) / judged if judged else 0.0)
    return rates


def test_acceptance_by_depth_is_that_of_chains_from_every_token():
    generator = torch.Generator().manual_seed(3)
    texts = [torch.rand(n, generator=generator) for n in (9, 1, 4)]
    expected = conditional_rates([text.tolist() for text in texts], 6)
    assert Hits(texts, 0.0).by_depth(6) == pytest.approx(expected, abs=1e-6)
    marks = [torch.tensor([1.0, 1.0, 0.0, 1.0])]
    assert Hits(marks, 0.0).by_depth(3) == pytest.approx([3 / 4, 1 / 2, 0.0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48}
    return SimpleNamespace(
        target=save_tiny(folder / "target", seed=0, **sizes),
        other=save_tiny(folder / "other", seed=0, noise=0.05, **sizes),
    )


@pytest.fixture(scope="module")
def texts(folders):
    prompts = [[first, 2 * first % 61, 7] for first in range(1, 17)]
    outputs = LLM(str(folders.target), drafters="none").generate(
        prompts, SamplingParams(max_new_tokens=24)
    )
    return [
        Example(tuple(prompt), tuple(output.token_ids))
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def test_hits_are_what_a_served_chain_accepts(folders, texts):
    """The same texts, served with a chain of one token: its acceptance is the share of hits."""
    target, other = load_trainable(folders.target), load_trainable(folders.other)
    found = hits(other, target, texts, 0.0)
    llm = LLM(str(folders.target), drafters=f"draft-model:path={folders.other},expansion=1")
    start_to_end = [accepted.tolist() for accepted in found.accepted]
    num_steps = 0
    for accepted in start_to_end:
        place = 0
        while place < len(accepted):
            is_drafted = place < len(accepted) - 1  # the last token is always the target's own
            place += 2 if is_drafted and accepted[place] else 1
            num_steps += 1
    prompts = [list(text.prompt_ids) for text in texts]
    outputs = llm.generate(prompts, SamplingParams(max_new_tokens=24))
    assert num_steps == sum(output.stats.num_steps for output in outputs)
    assert 0.1 < found.by_depth(1)[0] < 1


def test_the_target_hits_itself(folders, texts):
    target = load_trainable(folders.target)
    for temperature in (0.0, 0.7):
        found = hits(target, target, texts, temperature)
        assert found.by_depth(4) == pytest.approx([1.0] * 4, abs=1e-4)
    text = texts[0]
    logits = target.logits(torch.tensor([text.token_ids[:-1]]))[0, len(text.prompt_ids) - 1 :]
    chosen = torch.tensor(text.output_ids)
    loss = torch.nn.functional.cross_entropy(logits, chosen).item()
    assert hits(target, target, [text], 0.0).cross_entropy == pytest.approx(loss, rel=1e-5)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_the_fit_finds_the_slopes_that_made_the_points():
    def rate(num_parameters, layers):
        return sigmoid(-6 + 0.5 * math.log(num_parameters) + 0.2 * math.log(layers))

    sizes = [(n, layers) for n in (1e5, 4e5, 2e6) for layers in (1, 2, 8)]
    trained = [Point(n, layers, 1.0, (rate(n, layers),) * 2) for n, layers in sizes]
    fit = fit_acceptance(trained)
    assert fit.coefficients[1] == pytest.approx(0.5, rel=0.02)
    assert fit.coefficients[2] == pytest.approx(0.2, rel=0.05)
    assert fit.residual < 0.01
    between = Point(8e5, 4)
    assert fit.acceptances(between) == pytest.approx([rate(8e5, 4)] * 2, abs=0.01)
    half = fit.acceptances(Point(8e5, 4, coverage=0.5))
    assert half == pytest.approx([0.5 * rate(8e5, 4)] * 2, abs=0.01)


def test_one_trained_shape_stands_for_all():
    fit = fit_acceptance([Point(1000, 2, 1.0, (0.6, 0.8))])
    assert fit.acceptances(Point(9000, 8)) == pytest.approx([0.6, 0.8])


def test_shapes_to_train_are_the_corners():
    points = [Point(n, layers) for n in (100, 200, 400) for layers in (1, 2, 4)]
    chosen = {(points[it].num_parameters, points[it].layers) for it in spread_out(points, 4)}
    assert chosen == {(100, 1), (400, 1), (100, 4), (400, 4)}
    with_fewer = [*points, Point(400, 1, coverage=0.9)]
    assert len(spread_out(with_fewer, 99)) == 9


# -- judgement -----------------------------------------------------------------------------------


def test_a_shape_is_judged_at_its_best_lookahead():
    config = tiny_config("llama")
    rounds = [StepMs(draft=ms, target=9.0, other=1.5) for ms in (3.0, 1.0, 2.0)]
    verify_ms = [10.0, 10.2, 10.4]
    found = judge(
        DraftShape.of(config), rounds, [0.8, 0.5], None, verify_ms, StepMs(0.0, 9.0, 1.0), config
    )
    assert found.draft_ms == Spread(low=1.0, median=2.0, high=3.0)
    assert found.overhead_ms == 0.5
    tokens = expected_tokens([0.8, 0.5])
    assert found.num_draft_tokens == 2
    assert found.tokens_per_step == pytest.approx(tokens)
    assert found.speed_up == pytest.approx(tokens * 10.0 / (2.0 + 10.4 + 0.5))
    assert found.slowest < found.speed_up < found.fastest
    assert not found.is_trained


def candidate(layers, num_parameters, ms, *, loss=None, gain=1.0, vocab=61):
    return Candidate(
        shape=f"layers={layers},hidden=16,heads=2,kv_heads=1,head_dim=8,intermediate=16"
        + (f",vocab={vocab}" if vocab != 61 else ""),
        layers=layers,
        hidden=64 // layers,
        vocab=vocab,
        num_parameters=num_parameters,
        draft_ms=Spread(low=0.9 * ms, median=ms, high=1.2 * ms),
        overhead_ms=0.1,
        acceptances=[0.7, 0.6, 0.5],
        cross_entropy=loss,
        num_draft_tokens=2,
        tokens_per_step=2.1,
        speed_up=gain,
        slowest=0.9 * gain,
        fastest=1.1 * gain,
    )


def some_candidates():
    """Time grows as L^0.75 P^0.25; the better perplexity belongs to the slower shape."""
    sizes = [(1, 1000), (2, 1010), (4, 995), (2, 4000), (4, 4020)]
    made = [
        candidate(
            layers,
            count,
            layers**0.75 * count**0.25,
            loss=3.0 - 0.2 * layers if count < 2000 else None,
            gain=2.0 - 0.25 * layers,
        )
        for layers, count in sizes
    ]
    return [*made, candidate(1, 600, 1.0, vocab=32)]


def test_findings_say_what_the_numbers_say():
    found = findings(some_candidates())
    assert found["latency"]["depth"] == pytest.approx(0.75)
    assert found["latency"]["parameters"] == pytest.approx(0.25)
    assert found["latency"]["explained"] == pytest.approx(1.0)
    first = found["equal_parameters"][0]
    assert first["times_the_depth"] == 4
    assert first["times_the_latency"] == pytest.approx(4**0.75, rel=0.01)
    pairs = found["better_but_slower"]
    assert (pairs["num_pairs"], pairs["num_slower"]) == (3, 3)
    assert pairs["better_speed_up"] < pairs["faster_speed_up"]
    assert pairs["better_cross_entropy"] < pairs["faster_cross_entropy"]


def test_families_are_of_like_sizes():
    groups = families([it for it in some_candidates() if it.vocab == 61])
    assert [[it.layers for it in group] for group in groups] == [[1, 2, 4], [2, 4]]
    assert latency_exponents(groups[0]) is None


def make_report(candidates):
    return StudyReport(
        target="tiny",
        target_parameters=10_000,
        lookahead=3,
        plain_ms=4.0,
        verify_ms=[4.0, 4.2, 4.4, 4.6],
        candidates=candidates,
        fit={},
        findings=findings(candidates),
        settings={},
    )


def test_a_report_survives_json_and_names_its_choice():
    report = make_report(some_candidates())
    again = StudyReport.from_dict(json.loads(json.dumps(report.as_dict())))
    assert again == report
    assert again.chosen == DraftShape.parse(report.candidates[0].shape)
    text = table(report)
    assert "| 1 × 64 ← | 61 |" in text
    assert all(sentence in text for sentence in told_findings(report))
    assert text.index("1 × 64 ←") < text.index("4 × 16")  # the best first


@pytest.mark.parametrize("count", [1, 6])
def test_plots_are_drawn_of_few_and_many(count, tmp_path):
    pytest.importorskip("matplotlib")
    paths = write_plots(make_report(some_candidates()[:count]), tmp_path)
    assert {path.name for path in paths} == {"latency.png", "throughput.png", "break_even.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


# -- a whole run ---------------------------------------------------------------------------------

SETTINGS = StudySettings(
    depths=(1,),
    vocab_shares=(0.5,),
    lookahead=3,
    rounds=2,
    timed_steps=3,
    num_trained=2,
    num_steps=3,
    batch_size=4,
    num_held_out=4,
)


class Killed(BaseException):
    """Ends a run from outside."""


def test_a_study_that_was_killed_goes_on_and_chooses(folders, texts, tmp_path, monkeypatch):
    num_timed = [0]
    time_one = study_module.StepTimer.time

    def counted(self, draft):
        num_timed[0] += 1
        return time_one(self, draft)

    monkeypatch.setattr(study_module.StepTimer, "time", counted)
    seen = []

    def kill_in_training(progress):
        seen.append(progress)
        if "training" in progress.stage and progress.done == 2:
            raise Killed

    with pytest.raises(Killed):
        run_study(folders.target, texts, SETTINGS, tmp_path / "study", kill_in_training)
    num_before = num_timed[0]
    report = run_study(folders.target, texts, SETTINGS, tmp_path / "study", seen.append)
    assert num_timed[0] == num_before == 2 * (1 + len(report.candidates))
    assert not list((tmp_path / "study").glob("*.checkpoint"))
    assert not (tmp_path / "study" / "blank").exists()
    assert json.loads((tmp_path / "study" / "study.json").read_text())["chosen"] == str(
        report.chosen
    )
    assert (tmp_path / "study" / "study.md").exists()
    assert {it.stage for it in seen} >= {"timing shapes", "training shapes, 1 of 2"}

    assert sum(it.is_trained for it in report.candidates) == 2
    assert any(it.vocab < 61 for it in report.candidates)
    for it in report.candidates:
        assert len(it.acceptances) == 3
        assert all(0 <= rate <= 1 for rate in it.acceptances)
        assert 0 < it.draft_ms.low <= it.draft_ms.median <= it.draft_ms.high
    whole = run_study(folders.target, texts, SETTINGS, tmp_path / "again")
    trained = [it.acceptances for it in report.candidates if it.is_trained]
    assert trained == [it.acceptances for it in whole.candidates if it.is_trained]


def test_a_study_of_given_shapes_from_scratch(folders, texts, tmp_path):
    settings = StudySettings(
        shapes=("layers=1", "layers=2,hidden=16,heads=4,kv_heads=2,head_dim=4,intermediate=16"),
        method="scratch",
        lookahead=2,
        rounds=1,
        timed_steps=2,
        num_trained=1,
        num_steps=1,
        batch_size=2,
    )
    report = run_study(str(folders.target), texts, settings, tmp_path / "study")
    assert [it.layers for it in report.candidates] == [1, 2]
    assert report.candidates[1].hidden == 16
    with pytest.raises(ConfigError, match="other settings"):
        run_study(str(folders.target), texts, SETTINGS, tmp_path / "study")


def test_too_few_texts_are_refused(folders, texts, tmp_path):
    with pytest.raises(ConfigError, match="at least 4 texts"):
        run_study(str(folders.target), texts[:3], SETTINGS, tmp_path / "study")
    with pytest.raises(ConfigError, match="vocab_shares"):
        StudySettings(vocab_shares=(1.5,))
