"""Metrics: what is counted, in which names, and in a text that Prometheus can read."""

import math
import re
from collections import Counter
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from foretoken.core.draft import Draft, merge_drafts
from foretoken.core.tree import TokenTree
from foretoken.planner.cost import CostCurve
from foretoken.server.app import create_app
from foretoken.server.families import Distribution
from foretoken.server.metrics import ServerMetrics
from foretoken.server.settings import ServerSettings
from tests.engines import (
    OracleDrafter,
    ScriptedDrafter,
    counting_drafter,
    counting_model,
    finish,
    greedy,
    make_engine,
    plain_ids,
    random_table,
)
from tests.server.conftest import MODEL_NAME

CURVE = CostCurve(rows=(1, 64), base_ms=(1.0, 2.0))
DOCS = Path(__file__).resolve().parents[2] / "docs"
# Names that operators know, which do not end in their unit.
WITHOUT_UNIT = {
    "foretoken:server",
    "foretoken:prefix_cache_queries",
    "foretoken:prefix_cache_hits",
    "foretoken:num_requests_running",
    "foretoken:num_requests_waiting",
    "foretoken:kv_cache_usage_perc",
    "foretoken:spec_decode_num_accepted_tokens_per_pos",
    "foretoken:spec_decode_num_judged_per_pos",
}


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


class Idle:
    num_running, num_waiting, kv_used_share = 3, 2, 0.25


def watched(engine, **options):
    """Return metrics that watch an engine, with a curve that nobody measured."""
    metrics = ServerMetrics("m", measure=lambda _: CURVE, **options)
    metrics.watch(engine)
    metrics.follow(Idle())
    return metrics


def samples(metrics):
    """Return every value by name and labels."""
    return samples_of(metrics.encode()[0].decode())


def samples_of(text):
    families = parse_text(text)
    return {
        (sample.name.removeprefix("foretoken:"), *sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def serve(engine, metrics, prompts, params):
    """Run requests as the server would, without its clocks."""
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    for request in requests:
        metrics.submitted(request)
    finish(engine)
    for request in requests:
        metrics.finished(request, request.finish_reason.value, 0.0)
    return requests


@pytest.fixture
def served():
    """Metrics of an engine that has decoded with a drafter that is always right."""
    engine = make_engine(counting_model(), {"count": counting_drafter()}, max_nodes=4)
    metrics = watched(engine)
    serve(engine, metrics, [[0], [5, 6]], greedy(11))
    metrics.rejected("queue_full")
    return metrics


# -- counts of steps -----------------------------------------------------------------------------


def test_counts_agree_with_those_of_the_requests():
    """Whatever random trees are drafted, sums are those of the requests' own statistics."""
    target = random_table(seed=3)
    prompts = [[1, 2, 3], [4], [7, 7]]
    truths = [prompt + plain_ids(target, prompt, greedy(40)) for prompt in prompts]
    engine = make_engine(target, {"oracle": OracleDrafter(truths, 20)})
    metrics, num_passes = watched(engine), len(target.rows_per_pass)
    requests = serve(engine, metrics, prompts, greedy(40))
    stats, totals = [request.stats for request in requests], metrics.meter.totals()
    assert totals.num_tokens == sum(item.num_tokens for item in stats) == 120
    assert totals.tokens_per_step.total() == sum(item.num_steps for item in stats)
    assert totals.draft_tokens.total() == sum(item.num_draft_tokens for item in stats)
    assert totals.accepted.total() == sum(item.num_accepted for item in stats) > 0
    assert totals.accepted_by == sum((item.accepted_by for item in stats), Counter())
    assert totals.rows["accepted"] + totals.rows["wasted"] == totals.draft_tokens.total()
    assert totals.rows["prompt"] + totals.rows["root"] == sum(
        request.num_prompt_ids + request.stats.num_steps - 1 for request in requests
    )
    assert totals.rows.total() == sum(target.rows_per_pass[num_passes:])
    assert totals.steps.total() == len(target.rows_per_pass[num_passes:])


def test_tokens_behind_a_stop_are_wasted_not_accepted():
    """The verifier takes 0 1 2 3 4; the output ends with the stop token 2."""
    engine = make_engine(counting_model(), {"count": counting_drafter()}, max_nodes=6)
    metrics = watched(engine)
    [request] = serve(engine, metrics, [[25]], greedy(20, stop_token_ids=(2,)))
    totals = metrics.meter.totals()
    assert request.output_ids == [0, 1, 2]
    assert totals.num_tokens == totals.accepted.total() == request.stats.num_accepted == 3
    assert totals.rows["wasted"] == 3
    assert totals.acceptance_by_depth == [1.0, 1.0, 1.0], "what stands behind was not judged"


def test_acceptance_by_depth_counts_levels_that_were_judged():
    """Drafts are right for two tokens and wrong from the third on, which hides the fourth."""

    def draft(context):
        last, room = context.token_ids[-1], context.budget.max_depth
        return [(last + 1) % 26, (last + 2) % 26, last, last][:room]

    engine = make_engine(counting_model(), {"scripted": ScriptedDrafter(draft)}, max_nodes=4)
    metrics = watched(engine)
    serve(engine, metrics, [[0]], greedy(12))
    totals = metrics.meter.totals()
    assert totals.tokens_per_step == {3: 4}
    assert totals.accepted == {(0, "scripted"): 4, (1, "scripted"): 4}
    # The last step has room for the two right ones only.
    assert totals.judged == {1: 4, 2: 4, 3: 3}
    assert totals.acceptance_by_depth == [1.0, 1.0, 0.0]


def test_a_token_of_several_drafters_is_counted_once_in_sums():
    """Both propose 1 2; one goes on with 3, which is right, the other with 9."""

    def chain(name, *token_ids):
        return Draft.from_drafter(name, TokenTree.chain([0, *token_ids]))

    merged = merge_drafts([chain("a", 1, 2, 3), chain("b", 1, 2, 9)])
    assert Counter(merged.source[1:]) == {"a+b": 2, "a": 1, "b": 1}
    engine = make_engine(
        counting_model(),
        {
            "a": ScriptedDrafter(lambda context: right(context, 3), "a"),
            "b": ScriptedDrafter(lambda context: [*right(context, 2), 25], "b"),
        },
        max_nodes=4,
    )
    metrics = watched(engine)
    serve(engine, metrics, [[0]], greedy(4))
    values = samples(metrics)
    assert values["spec_decode_num_drafts_total", "a+b"] == 1
    assert values["spec_decode_num_accepted_tokens_total", "a+b"] == 2
    assert values["spec_decode_num_accepted_tokens_total", "a"] == 1
    assert values["spec_decode_num_accepted_tokens_total", "b"] == 0
    assert metrics.meter.totals().accepted_by == {"a": 3, "b": 2}


def right(context, count):
    last = context.token_ids[-1]
    return [(last + step) % 26 for step in range(1, count + 1)]


def test_plain_requests_and_engines_without_drafters():
    engine = make_engine(counting_model())
    metrics = watched(engine)
    assert metrics.meter.pace is None, "nothing to compare, so nothing is measured"
    serve(engine, metrics, [[0]], greedy(5))
    values = samples(metrics)
    assert values["generation_tokens_total",] == 5
    assert values["num_rows_total", "root"] == 5
    assert ("speedup_ratio",) not in values
    assert not any(name.startswith("plain_step_seconds") for name, *_ in values)


def test_tokens_are_those_of_an_engine_that_nobody_watches():
    target = random_table(seed=1)
    drafters = {"oracle": OracleDrafter([[1, *plain_ids(target, [1], greedy(30))]], 20)}
    engine = make_engine(target, drafters)
    metrics = watched(engine)
    [request] = serve(engine, metrics, [[1]], greedy(30))
    assert request.output_ids == plain_ids(target, [1], greedy(30))


def test_speedup_is_plain_time_by_time(served):
    totals = served.meter.totals()
    assert totals.speedup == sum(totals.plain_s.values()) / sum(totals.step_s.values()) > 0
    values = samples(served)
    assert values["speedup_ratio",] > 0
    by_phase = [value for (name, *_), value in values.items() if name == "step_phase_seconds_total"]
    by_kind = [value for (name, *_), value in values.items() if name == "step_seconds_total"]
    assert sum(by_phase) == pytest.approx(sum(by_kind), rel=1e-9)


# -- latencies -----------------------------------------------------------------------------------


def test_a_steps_time_is_shared_by_its_tokens():
    """One token after 2 s; 4 in a step of 0.8 s are 4 times 0.2 s; then 1 after 0.05 s."""
    clock = Clock()
    metrics = ServerMetrics(clock=clock)
    request = make_engine(counting_model()).new_request([0, 1, 2], greedy(5))
    metrics.submitted(request)
    metrics.emitted(request.request_id, 1, 102.0)
    metrics.emitted(request.request_id, 4, 102.8)
    metrics.emitted(request.request_id, 1, 102.85)
    metrics.emitted(request.request_id, 0, 109.0)  # an error gives nothing
    metrics.emitted("unknown", 7, 110.0)
    values = samples(metrics)
    assert values["time_to_first_token_seconds_sum",] == pytest.approx(2.0)
    assert values["time_to_first_token_seconds_count",] == 1
    assert values["inter_token_latency_seconds_count",] == 5
    assert values["inter_token_latency_seconds_sum",] == pytest.approx(0.85)
    assert values["inter_token_latency_seconds_bucket", "0.1"] == 1
    assert values["inter_token_latency_seconds_bucket", "0.25"] == 5
    assert values["prompt_tokens_total",] == values["prefix_cache_queries_total",] == 3


def test_only_whole_outputs_have_a_latency():
    clock = Clock()
    metrics = ServerMetrics(clock=clock)
    engine = make_engine(counting_model())
    whole, cut = (engine.add_request([0], greedy(3)) for _ in range(2))
    for request in (whole, cut):
        metrics.submitted(request)
    cut.stats.num_preemptions = 2
    engine.abort(cut.request_id)
    finish(engine)
    clock.now_s += 4.0
    metrics.finished(whole, "length", 0.5)
    metrics.finished(cut, "cancelled", 1.5)
    values = samples(metrics)
    assert values["e2e_request_latency_seconds_sum",] == pytest.approx(4.0)
    assert values["e2e_request_latency_seconds_count",] == 1
    assert values["request_queue_time_seconds_sum",] == pytest.approx(2.0)
    assert values["finished_requests_total", "cancelled"] == 1
    assert values["num_preemptions_total",] == 2


@pytest.mark.parametrize("value", [0.0, 1.0, 1.5, 2.0, 9.0])
def test_a_distributions_bounds_are_included(value):
    distribution = Distribution((1.0, 2.0))
    distribution.add(value, 3)
    buckets = {
        sample.labels["le"]: sample.value
        for sample in distribution.family("x", "help").samples
        if "le" in sample.labels
    }
    assert buckets == {le: 3 * (value <= float(le)) for le in ("1.0", "2.0", "+Inf")}


# -- the text ------------------------------------------------------------------------------------


def test_the_text_is_what_prometheus_reads(served):
    """Names, one declaration each, help and type, counters in _total, whole histograms."""
    content, content_type = served.encode()
    assert content_type.startswith("text/plain; version=0.0.4")
    text = content.decode()
    families = list(parse_text(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    declared = re.findall(r"^# (HELP|TYPE) (\S+)", text, re.MULTILINE)
    assert len(declared) == len(set(declared)) == 2 * len(families)
    for family in families:
        assert re.fullmatch(r"foretoken:[a-z][a-z0-9_]*", family.name)
        assert family.documentation
        assert family.type in {"counter", "gauge", "histogram"}
        keys = [(sample.name, *sorted(sample.labels.items())) for sample in family.samples]
        assert len(keys) == len(set(keys))
        for sample in family.samples:
            assert math.isfinite(sample.value)
            assert (family.type == "counter") == sample.name.endswith("_total")


def test_openmetrics_if_asked(served):
    content, content_type = served.encode("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    families = list(parse_openmetrics(content.decode()))
    assert len(families) > 20
    for family in families:
        assert family.documentation
        assert bool(family.unit) == (family.name not in WITHOUT_UNIT), family.name
        assert not family.unit or family.name.endswith(f"_{family.unit}")


def test_every_metric_is_documented_and_every_documented_one_exists(served):
    families = {family.name for family in parse_text(served.encode()[0].decode())}
    text = (DOCS / "metrics.md").read_text("utf-8")
    kinds = "counter|gauge|histogram|info"
    documented = re.findall(rf"^\| `(foretoken:\w+)` \| (?:{kinds}) \|", text, re.MULTILINE)
    assert sorted(documented) == sorted(families)


@pytest.mark.parametrize("name", ["metrics.md", "grafana.json"])
def test_queries_name_what_there_is(served, name):
    """Every rate in the documents and on the dashboard is one of a sample that exists."""
    there = {name for name, *_ in samples(served)}
    text = (DOCS / name).read_text("utf-8")
    queries = re.findall(r"foretoken:(\w+)(?:\{[^}]*\})?\[", text)
    assert len(queries) > 10
    assert set(queries) <= there


def test_counters_of_all_drafters_are_there_before_the_first_draft():
    engine = make_engine(counting_model(), {"count": counting_drafter()})
    values = samples(watched(engine))
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        assert values[f"spec_decode_num_{name}_total", "count"] == 0


def test_what_is_going_on_now(served):
    values = samples(served)
    assert values["num_requests_running",] == 3
    assert values["num_requests_waiting",] == 2
    assert values["kv_cache_usage_perc",] == 0.25
    assert values["rejected_requests_total", "queue_full"] == 1


def test_several_in_one_process_do_not_meet(served):
    other = ServerMetrics("other")
    assert samples(other)["generation_tokens_total",] == 0
    assert samples(served)["generation_tokens_total",] == 22


def test_the_whole_server(llm):
    """What a request through HTTP leaves behind in metrics and statistics."""
    app = create_app(llm, ServerSettings(model_name=MODEL_NAME, drain_s=5.0))
    body = {"model": MODEL_NAME, "prompt": "Once upon a time", "max_tokens": 24, "n": 2}
    with TestClient(app, "http://localhost") as client:
        answer = client.post("/v1/completions", json=body | {"seed": 1, "ignore_eos": True})
        assert answer.status_code == 200, answer.text
        refused = client.post("/v1/completions", json=body | {"n": 0})
        assert refused.status_code == 400
        text = client.get("/metrics").text
        stats = client.get("/stats").json()
    values = samples_of(text)
    assert values["finished_requests_total", "length"] == 2
    assert values["generation_tokens_total",] == stats["num_tokens"] == 48
    assert values["time_to_first_token_seconds_count",] == 2
    assert values["e2e_request_latency_seconds_count",] == 2
    assert 0 < values["inter_token_latency_seconds_count",] <= 46
    assert values["prompt_tokens_total",] == 2 * answer.json()["usage"]["prompt_tokens"]
    assert values["num_requests_running",] == values["num_requests_waiting",] == 0
    assert values["speedup_ratio",] > 0
    assert stats["tokens_per_step"] >= 1
