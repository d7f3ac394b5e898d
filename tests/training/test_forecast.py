"""The forecast: the counts that serving gives, and times put together from their parts."""

import pytest

from foretoken import LLM, SamplingParams
from foretoken.errors import ConfigError, ForetokenError
from foretoken.planner.cost import CostCurve
from foretoken.training import forecast as forecasting
from foretoken.training.corpus import Example
from foretoken.training.forecast import PLAIN, ForecastSettings, forecast
from tests.heads import write_head
from tests.training.conftest import save_tiny

NUM_TEXTS = 4
PROMPTS = [[3, 9, 3, 9, 4], [17, 5, 5], list(range(20, 45)), [7]]
# A pass of any rows takes a second, which no pass of such a target does.
SLOW = CostCurve(rows=(1, 64), base_ms=(1000.0, 1000.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast")
    sizes = {"num_hidden_layers": 2}
    return {
        "target": save_tiny(folder / "target", seed=0, **sizes),
        "draft": save_tiny(folder / "draft", seed=0, noise=0.05, **sizes),
    }


@pytest.fixture(scope="module")
def specs(folders):
    draft = f"draft-model:path={folders['draft']}"
    return {
        "tree": f"{draft},min_gain=0",
        "chain": f"{draft},expansion=1-1-1",
        "exit": "early-exit:layers=1",
        "medusa": f"medusa:path={write_head(folders['target'], 'medusa')}",
        "lookup": "prompt-lookup",
        "recycling": "token-recycling",
    }


@pytest.fixture(scope="module", params=["greedy", "sampled"])
def recorded(request, folders):
    temperature = 0.0 if request.param == "greedy" else 0.8
    params = [
        SamplingParams(max_new_tokens=30, temperature=temperature, seed=seed)
        for seed in range(NUM_TEXTS)
    ]
    llm = LLM(str(folders["target"]), drafters="none")
    outputs = llm.generate(PROMPTS, params)
    texts = [
        Example(tuple(prompt), tuple(output.token_ids))
        for prompt, output in zip(PROMPTS, outputs, strict=True)
    ]
    return texts, params


def test_a_forecast_counts_what_serving_counts(folders, specs, recorded):
    texts, params = recorded
    settings = ForecastSettings(max_nodes=6, num_live=1)
    forecasts = forecast(str(folders["target"]), specs, texts, params, settings)
    assert list(forecasts) == [PLAIN, *specs]
    llm = LLM(
        str(folders["target"]), drafters=list(specs.values()), max_nodes=6, prefix_caching=False
    )
    for name, label in zip(specs, llm.engine.drafters, strict=False):
        served = [
            llm.generate([prompt], its, drafters=label)[0]
            for prompt, its in zip(PROMPTS, params, strict=True)
        ]
        found = forecasts[name]
        assert found.num_steps == sum(output.stats.num_steps for output in served)
        assert found.num_tokens == sum(output.stats.num_tokens for output in served)
        assert found.tokens_per_step.value == found.num_tokens / found.num_steps
        assert found.is_replayed == (name != "recycling")
    assert forecasts[PLAIN].tokens_per_step.value == 1
    assert forecasts["tree"].tokens_per_step.value > 1.2
    assert forecasts["exit"].tokens_per_step.value > 1


def test_intervals_hold_their_values(folders, specs, recorded):
    texts, params = recorded
    settings = ForecastSettings(num_live=3)
    forecasts = forecast(str(folders["target"]), {"tree": specs["tree"]}, texts, params, settings)
    for found in forecasts.values():
        for estimate in (found.tokens_per_step, found.tokens_per_s):
            assert estimate.low <= estimate.value <= estimate.high
    tree = forecasts["tree"]
    assert tree.tokens_per_step.low < tree.tokens_per_step.high
    per_token_ms = sum(tree.step_ms.values()) / tree.tokens_per_step.value
    assert tree.tokens_per_s.value == pytest.approx(1000 / per_token_ms)
    assert all(0 <= rate <= 1 for rate in tree.acceptances)


def test_times_are_the_curves_unless_texts_are_served(folders, specs, recorded, monkeypatch):
    monkeypatch.setattr(forecasting, "measure_cost", lambda _target, **_options: SLOW)
    texts, params = recorded
    named = {"chain": specs["chain"]}

    def step_ms(num_live):
        settings = ForecastSettings(num_live=num_live)
        return forecast(str(folders["target"]), named, texts, params, settings)["chain"].step_ms

    alone, with_live = step_ms(0), step_ms(2)
    assert alone["target"] + alone["prompt"] == pytest.approx(1000.0)
    assert with_live["target"] < 500
    assert alone["draft"] > 0
    assert with_live["draft"] > 0


def test_other_outputs_than_recorded_are_an_error(folders, recorded):
    texts, params = recorded
    wrong = [Example(text.prompt_ids, (*text.output_ids[:-1], 1)) for text in texts]
    if any(text.output_ids[-1] == 1 for text in texts):
        wrong = [Example(text.prompt_ids, (*text.output_ids[:-1], 2)) for text in texts]
    with pytest.raises(ForetokenError, match="other tokens than were recorded"):
        forecast(str(folders["target"]), {}, wrong, params)


def test_what_cannot_be_forecast_is_refused(folders, recorded):
    texts, params = recorded
    with pytest.raises(ConfigError, match="at least one text"):
        forecast(str(folders["target"]), {}, [], [])
    with pytest.raises(ConfigError, match="plain"):
        forecast(str(folders["target"]), {PLAIN: "prompt-lookup"}, texts, params)
