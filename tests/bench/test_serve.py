"""The load bench of the server: traces, prompts, a client that keeps its pace, and conclusions."""

import io
import json
from contextlib import ExitStack

import numpy as np
import pytest
from rich.console import Console

from foretoken.bench.resume import new_record
from foretoken.bench.serve import run
from foretoken.bench.serve.client import Ask, LoadClient, Reply
from foretoken.bench.serve.level import Level, Turn, as_entry
from foretoken.bench.serve.plots import write_plots
from foretoken.bench.serve.report import print_report
from foretoken.bench.serve.run import run_serve
from foretoken.bench.serve.settings import ServeSettings
from foretoken.bench.serve.summary import goals, num_unexpected_texts
from foretoken.bench.serve.trace import Arrival, Trace, load_trace
from foretoken.bench.serve.work import Prompter, Text, load_text
from foretoken.errors import ConfigError, ForetokenError
from foretoken.models.tokenizer import Tokenizer
from tests.bench.serve_fakes import CONTEXT_LIMIT, FakeServer, listening

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def make_trace(num_arrivals=40, length_s=60.0):
    """Return a trace of uneven arrivals and lengths."""
    random = np.random.default_rng(0)
    times = np.sort(random.uniform(0, length_s, num_arrivals))
    times[0] = 0.0
    prompts = random.integers(10, 400, num_arrivals).tolist()
    outputs = random.integers(5, 90, num_arrivals).tolist()
    arrivals = map(Arrival, times.tolist(), prompts, outputs)
    return Trace("trace.csv", tuple(arrivals), length_s)


@pytest.fixture
def serve_settings(pair, tmp_path):
    """Return settings of a tiny load bench; keywords replace some."""
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little text. " * 400, encoding="utf-8")

    def make(**changes):
        values = {
            "model": pair.target,
            "model_name": "target",
            "weights": ("1",),
            "drafters": ("suffix",),
            "max_nodes": None,
            "adaptive": None,
            "trace": make_trace(),
            "text": text,
            "max_prompt_tokens": None,
            "max_new_tokens": None,
            "loads": (0.4, 1.2),
            "rounds": 2,
            "duration_s": 0.25,
            "temperature": 0.0,
            "seed": 7,
            "slo_first_token_ms": None,
            "slo_inter_token_ms": None,
            "max_requests": 4,
            "max_queue": 128,
            "kv_cache_tokens": None,
            "dtype": "float32",
            "device": "cpu",
            "threads": 1,
        }
        return ServeSettings(**{**values, **changes})

    return make


# -- traces --------------------------------------------------------------------------------------


def write_trace(folder, *rows):
    path = folder / "trace.csv"
    path.write_text(HEADER + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_the_first_minutes_of_a_trace(tmp_path):
    path = write_trace(
        tmp_path,
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:16:46.6805900,10,5",  # files are not always in order
        "2023-11-16 18:15:50.9951690,396,109",
        "2023-11-16 18:17:46.6805900,1,1",  # two minutes later: the first that is not of them
    )
    trace = load_trace(path, 2.0)
    assert (trace.name, trace.length_s) == ("trace.csv", 120)
    assert [item.num_prompt_ids for item in trace.arrivals] == [374, 396, 10]
    assert [item.num_new_tokens for item in trace.arrivals] == [44, 109, 5]
    times = [item.at_s for item in trace.arrivals]
    assert times == pytest.approx([0, 4.314579, 60], abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (["yesterday,1,1"], "ValueError"),
        (["2023-11-16 18:15:46,1"], "TypeError"),
        (["2023-11-16 18:15:46,1,0"], "without tokens"),
        ([], "no request at all"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, rows, reason):
    path = write_trace(tmp_path, *rows)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_trace(path, 10)
    assert "GeneratedTokens" in caught.value.hint


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.csv is no trace"):
        load_trace(tmp_path / "gone.csv", 10)


def lengths(trace):
    prompts = np.array([item.num_prompt_ids for item in trace.arrivals])
    return prompts, np.array([item.num_new_tokens for item in trace.arrivals])


def test_lengths_keep_their_proportions_and_fit_the_context():
    trace = make_trace(400)
    prompts, outputs = lengths(trace.scaled(256, None, None))
    whole_prompts, whole_outputs = lengths(trace)
    assert (prompts + outputs).max() <= 256
    assert prompts.min() >= 1
    ratio = 256 / np.quantile(whole_prompts + whole_outputs, 0.99)
    assert np.abs(outputs - whole_outputs * ratio).max() <= 0.5  # rounding
    assert np.mean(np.abs(prompts - whole_prompts * ratio) <= 0.5) >= 0.98  # 1 % are cut


def test_a_bound_scales_one_kind_of_length():
    trace = make_trace(400)
    prompts, outputs = lengths(trace.scaled(256, 64, 128))
    assert (prompts.max(), outputs.max()) == (64, 128)
    assert np.median(prompts) == pytest.approx(64 * 200 / 396, rel=0.15)
    assert np.median(outputs) == pytest.approx(128 * 47 / 89, rel=0.15)
    _, unbound = lengths(trace.scaled(256, 64, None))
    assert unbound.tolist() == lengths(trace.scaled(256, None, None))[1].tolist()


def test_a_context_of_two_tokens_is_enough():
    prompts, outputs = lengths(make_trace().scaled(2, None, 50))
    assert set(prompts.tolist()) == set(outputs.tolist()) == {1}


def test_a_part_has_the_rate_that_is_wanted_and_keeps_its_bursts():
    trace = make_trace(40)
    part = trace.part(5, 4.0, 2.5)
    assert len(part) == 10
    assert [it.num_new_tokens for it in part] == [it.num_new_tokens for it in trace.arrivals[5:15]]
    times = np.array([it.at_s for it in part])
    original = np.array([it.at_s for it in trace.arrivals[5:16]])
    scale = 2.5 / (original[-1] - original[0])  # the next one would come when it is over
    assert times == pytest.approx((original[:-1] - original[0]) * scale)


def test_after_the_last_arrival_comes_the_first_and_none_twice():
    trace = make_trace(40)
    part = trace.part(35, 40.0, 99.0)
    assert [it.num_prompt_ids for it in part] == [
        it.num_prompt_ids for it in (*trace.arrivals[35:], *trace.arrivals[:35])
    ]
    times = [it.at_s for it in part]
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] < 1.0  # 40 at a rate of 40
    assert len(trace.part(0, 0.001, 1.0)) == 1


# -- prompts -------------------------------------------------------------------------------------


def test_prompts_are_successive_pieces():
    text = Text(list(range(10, 30)), beginning=(0,))
    prompter = Prompter(text, seed=5, place=18)
    asks = list(prompter.asks([Arrival(0.1, 4, 2), Arrival(0.2, 1, 3), Arrival(0.3, 25, 4)]))
    assert asks[0] == Ask(at_s=0.1, prompt_ids=[0, 28, 29, 10], num_new_tokens=2, seed=5)
    assert asks[1].prompt_ids == [0]
    assert asks[2].prompt_ids == [0, *range(11, 30), *range(10, 15)]
    assert [ask.seed for ask in asks] == [5, 6, 7]


def test_a_text_is_a_file_or_stories(serve_settings, pair, monkeypatch):
    tokenizer = Tokenizer.load(pair.target)
    text = load_text(serve_settings(), tokenizer)
    assert tokenizer.decode(text.token_ids[:42]) == "Once upon a time there was a little text. "
    monkeypatch.setattr("foretoken.bench.serve.work.NUM_STORIES", 2)
    monkeypatch.setattr("foretoken.bench.serve.work.MAX_TEXT_TOKENS", 20)
    stories = load_text(serve_settings(text=None), tokenizer)
    assert len(stories.token_ids) == 40
    assert stories.beginning == ()


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "it is empty"), (b"\xff\xfe\xff", "cannot be used as text")]
)
def test_what_is_no_text_is_refused(serve_settings, pair, content, message):
    settings = serve_settings()
    settings.text.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_text(settings, Tokenizer.load(pair.target))
    with pytest.raises(ConfigError, match="the model has no tokenizer"):
        load_text(settings, None)


# -- the client ----------------------------------------------------------------------------------


def make_asks(*times, num_new_tokens=5):
    return [Ask(at_s, [1, 2, 3], num_new_tokens, seed) for seed, at_s in enumerate(times)]


def client_of(server, temperature=0.0):
    return LoadClient(server.base_url, "target", temperature)


def test_a_reply_has_its_times_and_counts():
    with listening(FakeServer(step_s=0.02, tokens_per_step=2)) as server:
        [reply] = client_of(server, 0.5).replay(make_asks(0.05))
    assert server.bodies == [
        {
            "model": "target",
            "prompt": [1, 2, 3],
            "max_tokens": 5,
            "seed": 0,
            "temperature": 0.5,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert reply.is_complete
    assert reply.num_tokens == 5
    assert reply.stats["num_steps"] == 3
    assert reply.exactness == "bitwise"
    # Three steps: the first token after one, the last after three.
    assert 0.02 <= reply.first_s < reply.last_s - 0.03
    assert reply.inter_token_s == pytest.approx((reply.last_s - reply.first_s) / 4)
    assert 0 <= reply.late_s < reply.first_s


def test_equal_texts_have_equal_digests():
    with listening(FakeServer()) as server:
        client = client_of(server)
        first, other = client.replay(make_asks(0.0, 0.0))
        server.tokens_per_step = 3  # other chunks, the same text
        again, _ = client.replay(make_asks(0.0, 0.0))
    assert first.digest == again.digest != other.digest


def test_requests_are_sent_when_they_are_due_whatever_answers_take():
    """An open loop: a slow server gets the same requests at the same times."""
    with listening(FakeServer(step_s=0.1)) as server:
        replies = client_of(server).replay(make_asks(*np.arange(0, 0.3, 0.03)))
    assert server.most_running == 10  # the last one comes before the first one ends
    assert all(reply.is_complete for reply in replies)
    assert max(reply.late_s for reply in replies) < 0.2


def test_waiting_to_be_sent_counts():
    """Times are from when a request was due, even if the client itself was late."""
    reply = Reply(make_asks(0.0)[0], late_s=0.5, first_s=0.6, last_s=1.0, num_tokens=5)
    assert reply.inter_token_s == pytest.approx(0.1)
    with listening(FakeServer()) as server:
        [reply] = client_of(server).replay(make_asks(-0.5))  # it was due before the beginning
    assert 0.5 <= reply.late_s < reply.first_s < reply.last_s


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("status", "status 500"),
        ("event", "it broke"),
        ("cut", "the answer is not whole"),
    ],
)
def test_what_goes_wrong_is_an_error_of_its_request_alone(how, error):
    with listening(FakeServer()) as server:
        server.breaks = lambda body: how if body["seed"] == 1 else ""
        replies = client_of(server).replay(make_asks(0.0, 0.0, 0.0))
    assert [reply.is_complete for reply in replies] == [True, False, True]
    assert error in replies[1].error
    assert not replies[1].is_rejected


def test_a_server_that_is_gone_is_an_error():
    with listening(FakeServer()) as server:
        pass
    [reply] = client_of(server).replay(make_asks(0.0))
    assert reply.error.startswith("ConnectError")


def test_being_sent_away_is_no_error():
    with listening(FakeServer(step_s=0.05)) as server:
        server.has_room = lambda num_running: num_running < 1
        first, second = client_of(server).replay(make_asks(0.0, 0.1))
    assert first.is_complete
    assert (second.is_rejected, second.error, second.is_complete) == (True, "", False)


def test_a_server_is_kept_busy_and_what_has_not_ended_is_given_up():
    with listening(FakeServer(step_s=0.01)) as server:
        asks = iter(make_asks(*[0.0] * 500))
        replies = client_of(server).keep_busy(asks, 3, 0.5)
        assert server.most_running == 3
    assert 3 < len(replies) <= 3 * 0.5 / 0.05
    assert all(reply.is_complete and 0.05 <= reply.ended_s < 0.6 for reply in replies)


# -- what is concluded ---------------------------------------------------------------------------


def turn_of(latencies, seconds=2.0, **changes):
    """Return a turn whose requests have five tokens and took so long; None was sent away."""
    replies = []
    for ask, latency_s in zip(make_asks(*[0.0] * len(latencies)), latencies, strict=True):
        reply = Reply(ask, first_s=0.1, last_s=latency_s or 0.0, num_tokens=5, digest="a")
        reply.stats = {"num_steps": 2, "num_draft_tokens": 6, "num_accepted": 3}
        reply.exactness, reply.is_rejected = "bitwise", latency_s is None
        replies.append(reply)
    for name, value in changes.items():
        setattr(replies[0], name, value)
    return Turn(replies, seconds, server_cpu_s=1.0, client_cpu_s=0.1, speed_up=None)


def entry_of(settings, plain, drafts, load=0.5):
    rounds = [[reply.ask for reply in turn.replies] for turn in plain]
    turns = [{"plain": a, "drafts": b} for a, b in zip(plain, drafts, strict=True)]
    return as_entry(Level(load, 3.0, 2.0, rounds), turns, settings)


def test_ratios_are_of_rounds(serve_settings):
    plain = [turn_of([1.0, 3.0]), turn_of([2.0, 4.0])]
    drafts = [turn_of([0.5, 1.5]), turn_of([1.5, 3.0], seconds=2.5)]
    entry = entry_of(serve_settings(), plain, drafts)
    assert entry["latency_ratio"]["rounds"] == [0.5, 0.75]
    assert entry["goodput_ratio"]["rounds"] == [1.0, 0.8]
    assert entry["latency_ratio"]["median"] == 0.625
    assert entry["goals"]["latency"] == {"bound": 0.7, "holds": True, "is_clear": False}
    assert entry["goals"]["goodput"] == {"bound": 1.0, "holds": False, "is_clear": False}
    assert entry["wanted_tokens_per_s"] == 5
    system = entry["systems"]["plain"]
    assert system["latency_ms"] == {
        "mean": 2500,
        "p50": 2500,
        "p95": 3850,
        "rounds": [2000, 3000],
    }
    assert (system["tokens_per_step"], system["acceptance_rate"]) == (2.5, 0.5)
    assert (system["server_cores"], system["client_cores"]) == (0.5, 0.05)
    assert "good_share" not in system


def test_beyond_saturation_latency_has_no_goal(serve_settings):
    entry = entry_of(serve_settings(), [turn_of([1.0])], [turn_of([1.0])], load=1.0)
    assert set(entry["goals"]) == {"goodput"}


def test_who_is_sent_away_or_fails_counts_neither_as_good_nor_as_slow(serve_settings):
    failed = turn_of([9.0, 1.0, None], error="broken")
    system = entry_of(serve_settings(), [failed], [turn_of([1.0] * 3)])["systems"]["plain"]
    counts = (system["num_complete"], system["num_rejected"], system["num_errors"])
    assert counts == (1, 1, 1)
    assert system["errors"] == ["broken"]
    assert system["latency_ms"]["mean"] == 1000
    assert system["goodput_tokens_per_s"]["median"] == 2.5


def test_answers_that_are_fast_enough(serve_settings):
    """The first token came after 0.1 s; four more within (latency - 0.1) s."""
    turns = [turn_of([0.5, 0.9, None])]
    both = serve_settings(slo_first_token_ms=150.0, slo_inter_token_ms=120.0)
    system = entry_of(both, turns, turns)["systems"]["drafts"]
    assert system["good_share"] == pytest.approx(1 / 3, rel=1e-4)
    assert system["good_requests_per_s"] == 0.5
    first = serve_settings(slo_first_token_ms=90.0)
    assert entry_of(first, turns, turns)["systems"]["drafts"]["good_share"] == 0


def test_other_texts_are_found(serve_settings):
    entry = entry_of(serve_settings(), [turn_of([1.0, 1.0])], [turn_of([1.0, 1.0], digest="b")])
    assert entry["num_different_texts"] == 1
    record = {"cells": [entry]}
    assert num_unexpected_texts(record) == 1
    assert [goal.holds for goal in goals(record)] == [True, False, True, False]
    entry["exactness"] = ["numerical"]  # which promises less
    assert num_unexpected_texts(record) == 0


# -- whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def fakes(monkeypatch):
    """Let fake servers stand for the processes; drafts make three tokens a step."""
    with ExitStack() as stack:
        plain = stack.enter_context(listening(FakeServer(step_s=0.02)))
        drafts = stack.enter_context(listening(FakeServer(step_s=0.02, tokens_per_step=3)))
        servers, options = {"plain": plain, "drafts": drafts}, {}

        def start(name, words):
            options[name] = words
            return servers[name]

        monkeypatch.setattr(run, "ServerProcess", start)
        yield servers, options


def test_a_whole_run(fakes, serve_settings, tmp_path):
    servers, options = fakes
    stages = []
    record = run_serve(
        serve_settings(adaptive=True, max_nodes=5), ["foretoken"], tmp_path, stages.append
    )
    assert all(server.is_closed for server in servers.values())
    assert options["plain"][-2:] == ["--drafter", "none"]
    assert "--adaptive" not in options["plain"]
    assert options["drafts"][-3:] == ["--adaptive", "--drafter", "suffix"]
    assert options["drafts"][options["drafts"].index("--max-nodes") + 1] == "5"
    assert record["lengths"]["context_limit"] == CONTEXT_LIMIT
    rate = record["capacity"]["plain"]["requests_per_s"]
    assert record["capacity"]["drafts"]["requests_per_s"] > 1.3 * rate
    assert [cell["load"] for cell in record["cells"]] == [0.4, 1.2]
    for cell in record["cells"]:
        expected = min(40, round(cell["load"] * rate * 0.25))
        assert cell["num_requests"] == [expected, expected]
        assert cell["latency_ratio"]["median"] < 0.7
        assert cell["num_different_texts"] == 0
        assert cell["systems"]["plain"]["num_errors"] == 0
        assert cell["systems"]["plain"]["tokens_per_step"] == 1
        assert cell["systems"]["drafts"]["tokens_per_step"] > 2
        assert cell["systems"]["drafts"]["own_speed_up"] == [3.0, 3.0]
    assert json.loads((tmp_path / "record.json").read_text()) == record
    assert (stages[-1].done, stages[-1].total, stages[-1].detail) == (2, 2, "done")
    assert "load 0.4: round 1 of 2: plain" in {stage.detail for stage in stages}


def test_both_servers_get_the_same_requests_and_no_prompt_comes_twice(fakes, serve_settings):
    servers, _ = fakes
    settings = serve_settings(text=None, loads=(0.5,), max_new_tokens=4)
    numbers = Text(list(range(100_000)), beginning=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_text", lambda *_: numbers)
        record = run_serve(settings, ["foretoken"])
    num_replayed = sum(record["cells"][0]["num_requests"])
    key = json.dumps
    plain, drafts = (
        [key(body, sort_keys=True) for body in servers[name].bodies[-num_replayed:]]
        for name in ("plain", "drafts")
    )
    assert sorted(plain) == sorted(drafts)
    prompts = [tuple(body["prompt"]) for body in servers["plain"].bodies]
    assert len(set(prompts)) == len(prompts)
    assert all(len(it["prompt"]) + it["max_tokens"] <= 64 for it in servers["plain"].bodies)


def test_a_run_that_was_cut_off_goes_on(fakes, serve_settings, tmp_path, monkeypatch):
    measured = []

    def measure(systems, level, say):
        measured.append(level.load)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure_level(systems, level, say)

    measure_level = run.measure_level
    monkeypatch.setattr(run, "measure_level", measure)
    settings = serve_settings(rounds=1, duration_s=0.2)
    with pytest.raises(KeyboardInterrupt):
        run_serve(settings, ["foretoken"], tmp_path)
    begun = json.loads((tmp_path / "record.json").read_text())
    assert len(begun["cells"]) == 1
    stages = []
    record = run_serve(settings, ["foretoken"], tmp_path, stages.append)
    assert stages[0].is_resumed
    assert measured == [0.4, 1.2, 1.2]
    assert record["capacity"] == begun["capacity"]
    assert record["cells"][0] == begun["cells"][0]
    assert run_serve(settings, ["foretoken"], tmp_path) == record
    assert len(measured) == 3
    with pytest.raises(ConfigError, match="is of another run: seed 7, now 8"):
        run_serve(serve_settings(rounds=1, duration_s=0.2, seed=8), ["foretoken"], tmp_path)


def test_a_server_that_never_answers_ends_the_run(fakes, serve_settings):
    servers, _ = fakes
    servers["drafts"].breaks = lambda _: "event"
    with pytest.raises(ForetokenError, match=r"drafts does not even answer.*it broke"):
        run_serve(serve_settings(), ["foretoken"])
    servers["drafts"].breaks = lambda _: ""
    servers["drafts"].step_s = 5.0
    with pytest.raises(ForetokenError, match="drafts ended no request in"):
        run_serve(serve_settings(), ["foretoken"])
    assert all(server.is_closed for server in servers.values())


def test_report_and_pictures(serve_settings, tmp_path):
    settings = serve_settings(slo_first_token_ms=50.0)
    what = {"number": 1, "policy": "", "threads": 1, "command": ["foretoken"]}
    record = new_record(run.WHAT, settings=settings.as_json(), **what)
    record["lengths"] = {"mean_prompt_tokens": 30.0, "mean_new_tokens": 7.0}
    capacity = {"requests_per_s": 12.0, "tokens_per_s": 345.0}
    record["capacity"] = {"plain": capacity, "drafts": capacity}
    plain, drafts = [turn_of([1.0, 3.0])], [turn_of([0.5, 1.5])]
    single = [turn_of([1.0], num_tokens=1)]  # nothing between tokens
    record["cells"] = [
        entry_of(settings, plain, drafts),
        entry_of(settings, single, single, load=1.2),
    ]
    out = io.StringIO()
    print_report(record, Console(file=out, width=120))
    text = out.getvalue()
    assert "target, greedy; trace.csv: 40 requests of 1 minutes" in text
    assert "Drafts over plain decoding" in text
    assert "1.2 drafts" in text
    assert "plain 12 requests/s, 345 tokens/s" in text
    assert "yes  no errors: 0 errors, 0 sent away" in text
    assert "yes  mean latency is at most 0.7 × plain below 1: at 1 of 1 loads" in text
    paths = write_plots(record, tmp_path)
    assert [path.name for path in paths] == ["latency.png", "goodput.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drafters": ("none",)}, "got no drafter"),
        ({"loads": (0.5, 0.0)}, "--load is a number > 0; got 0.0"),
        ({"duration_s": float("nan")}, "--duration is a number > 0; got nan"),
        ({"slo_first_token_ms": -1.0}, "--slo-first-token is a number > 0"),
    ],
)
def test_settings_are_checked(serve_settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        serve_settings(**changes)
