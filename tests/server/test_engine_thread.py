"""The engine's thread: tokens, cancellation, deadlines, the queue, failures, drains."""

import asyncio
import random
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from foretoken import LLM, ConfigError, RequestError, SamplingParams
from foretoken.assets import EMBEDDED
from foretoken.core.draft import Draft
from foretoken.engine.request import FinishReason
from foretoken.errors import CapacityError
from foretoken.server import engine_thread
from foretoken.server.engine_loop import MAX_FAILURES
from foretoken.server.engine_thread import EngineThread
from foretoken.server.observer import Observer
from foretoken.server.settings import ServerSettings
from foretoken.server.submission import (
    DeadlineError,
    EngineFailedError,
    QueueFullError,
    ShuttingDownError,
    Submission,
)
from tests.engines import check_books, check_idle
from tests.server.conftest import MODEL_NAME

PROMPTS = ("Once upon a time", "One day", "Lily and Tom", "The dog", "There was a big red")
SETTINGS = ServerSettings(model_name=MODEL_NAME, drain_s=5.0)
LONG = SamplingParams(max_new_tokens=400, ignore_eos=True)
LABELS = ("draft-model", "suffix")


class Recorder(Observer):
    """Writes down what it is told."""

    def __init__(self):
        self.begun, self.ends, self.rejections, self.num_tokens = [], [], [], 0

    def submitted(self, request):
        self.begun.append(request.request_id)

    def rejected(self, reason):
        self.rejections.append(reason)

    def emitted(self, request_id, num_tokens, at_s):
        self.num_tokens += num_tokens

    def finished(self, request, outcome, waited_s):
        assert waited_s >= 0
        self.ends.append((request.request_id, outcome))

    def outcomes(self):
        return sorted(outcome for _, outcome in self.ends)


@pytest.fixture(scope="module")
def fixed_llm():
    """Drafters that draft in every step, so that what is broken is noticed."""
    drafters = [f"draft-model:path={EMBEDDED[MODEL_NAME].draft}", "suffix"]
    return LLM(MODEL_NAME, drafters=drafters, adaptive=False)


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def run(llm, recorder):
    """Run a coroutine function with a started thread; the engine holds nothing afterwards."""

    @asynccontextmanager
    async def started(settings, served):
        thread = EngineThread(served, settings, recorder)
        thread.start()
        try:
            yield thread
        finally:
            await thread.drain(5.0)

    def run_here(scenario, settings=SETTINGS, served=llm):
        async def main():
            async with started(settings, served) as thread:
                return await asyncio.wait_for(scenario(thread), 60)

        result = asyncio.run(main())
        check_idle(served.engine)
        assert sorted(recorder.begun) == sorted(request_id for request_id, _ in recorder.ends)
        return result

    return run_here


def submission(llm, name, prompt=PROMPTS[0], params=None, **more):
    params = params or SamplingParams(max_new_tokens=24, seed=1)
    return Submission(request_id=name, prompt_ids=llm.encode(prompt), params=params, **more)


async def submit(thread, *submissions):
    runnings = await thread.submit(submissions)
    return runnings[0] if len(runnings) == 1 else runnings


async def read(running):
    """Return all emissions of a request."""
    return [emission async for emissions in running for emission in emissions]


def ids_of(emissions):
    return [token_id for emission in emissions for token_id in emission.token_ids]


async def until(condition):
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen in time")


# -- tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafters", [None, ()])
def test_tokens_are_those_of_generate(llm, run, recorder, temperature, drafters):
    params = [
        SamplingParams(max_new_tokens=24 + 5 * index, seed=index, temperature=temperature)
        for index in range(len(PROMPTS))
    ]
    expected = llm.generate(list(PROMPTS), params)

    async def scenario(thread):
        runnings = await thread.submit(
            [
                submission(llm, f"r{index}", prompt, param, drafters=drafters)
                for index, (prompt, param) in enumerate(zip(PROMPTS, params, strict=True))
            ]
        )
        return await asyncio.gather(*map(read, runnings))

    results = run(scenario)
    for output, emissions in zip(expected, results, strict=True):
        assert ids_of(emissions) == output.token_ids
        assert "".join(emission.text for emission in emissions) == output.text
        assert [bool(emission.finish_reason) for emission in emissions].count(True) == 1
        assert emissions[-1].finish_reason is output.finish_reason
    assert recorder.num_tokens == sum(len(output.token_ids) for output in expected)
    assert set(recorder.outcomes()) <= {"length", "eos"}


def test_max_nodes_reaches_the_engine(fixed_llm, run):
    async def scenario(thread):
        running = await submit(thread, submission(fixed_llm, "a", max_nodes=1))
        await read(running)
        return running.request

    request = run(scenario, SETTINGS, fixed_llm)
    assert request.max_nodes == 1
    assert 0 < request.stats.num_draft_tokens <= request.stats.num_steps


# -- the loop and the thread -------------------------------------------------------------------


def test_the_loop_goes_on_while_a_step_takes_long(llm, run, gate):
    async def scenario(thread):
        gate.close()
        running = await submit(thread, submission(llm, "a"))
        await until(gate.waiting.is_set)
        other = await submit(thread, submission(llm, "b"))  # not even this waits for the step
        assert thread.num_waiting + thread.num_running == 2
        gate.open()
        await asyncio.gather(read(running), read(other))
        assert (thread.num_waiting, thread.num_running) == (0, 0)

    run(scenario)


GRAMMAR = SamplingParams(max_new_tokens=4, seed=1, regex="[a-z ]+")


def test_grammars_are_compiled_in_another_thread(llm, run, monkeypatch):
    names = []
    new_request = llm.engine.new_request

    def watched(*arguments, **more):
        names.append(threading.current_thread().name)
        return new_request(*arguments, **more)

    monkeypatch.setattr(llm.engine, "new_request", watched)

    async def scenario(thread):
        await read(await submit(thread, submission(llm, "a")))
        await read(await submit(thread, submission(llm, "b", params=GRAMMAR)))

    run(scenario)
    assert [name.startswith("foretoken-build") for name in names] == [False, True]


def test_a_grammar_that_takes_too_long_is_given_up(llm, run, monkeypatch):
    """Without a deadline a hostile grammar kept its client, and all other grammars, waiting."""
    monkeypatch.setattr(engine_thread, "COMPILE_S", 0.2)
    release = threading.Event()
    new_request = llm.engine.new_request

    def slow(prompt_ids, params, **more):
        assert not params.has_grammar or release.wait(30)
        return new_request(prompt_ids, params, **more)

    monkeypatch.setattr(llm.engine, "new_request", slow)

    async def scenario(thread):
        first = asyncio.create_task(submit(thread, submission(llm, "a", params=GRAMMAR)))
        await asyncio.sleep(0.01)
        behind = asyncio.create_task(submit(thread, submission(llm, "b", params=GRAMMAR)))
        await read(await submit(thread, submission(llm, "c")))  # who has none does not wait
        with pytest.raises(RequestError, match=r"more than 0\.2 s to compile"):
            await first
        with pytest.raises(CapacityError, match="other grammars"):
            await behind
        release.set()
        await read(await submit(thread, submission(llm, "d", params=GRAMMAR)))
        assert thread.num_waiting == 0

    run(scenario)


def test_a_step_wakes_the_loop_once(llm, run, gate, monkeypatch):
    """Eight requests at once: as many calls as steps, and none per emission."""
    num_calls = 0

    async def scenario(thread):
        nonlocal num_calls
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def counted(function, *arguments, **more):
            nonlocal num_calls
            num_calls += threading.current_thread().name == "foretoken-engine"
            return call(function, *arguments, **more)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        runnings = await submit(thread, *(submission(llm, f"r{index}") for index in range(8)))
        emissions = await asyncio.gather(*map(read, runnings))
        return sum(map(len, emissions))

    num_emissions = run(scenario)
    assert num_emissions >= 8 * num_calls / 2 > 0
    assert num_calls <= len(gate.members)


def test_a_slow_reader_gets_what_has_arrived_at_once(llm, run):
    async def scenario(thread):
        running = await submit(thread, submission(llm, "a"))
        await until(lambda: running.is_over)
        return [len(emissions) async for emissions in running]

    [num_emissions] = run(scenario)
    assert num_emissions > 1


def test_who_waits_for_the_end_is_woken_once(llm, run):
    async def scenario(thread):
        running = await submit(thread, submission(llm, "a"))
        other = await submit(thread, submission(llm, "b"))
        num_wakes = 0
        wait = running._news.wait

        async def counted():
            nonlocal num_wakes
            await wait()
            num_wakes += 1

        running._news.wait = counted
        emissions, streamed = await asyncio.gather(running.read_all(), read(other))
        assert (ids_of(emissions), num_wakes) == (ids_of(streamed), 1)
        assert len(emissions) > 1

    run(scenario)


def test_steps_of_a_request_that_is_read_at_its_end_leave_the_loop_alone(llm, run, gate):
    async def scenario(thread):
        gate.close()
        running = await submit(thread, submission(llm, "a", params=LONG))
        reading = asyncio.create_task(running.read_all())
        await asyncio.sleep(0)  # it reads now
        loop, num_calls = running.loop, 0
        call = loop.call_soon_threadsafe

        def counted(*args, **named):
            nonlocal num_calls
            num_calls += 1
            return call(*args, **named)

        loop.call_soon_threadsafe = counted
        gate.open()
        emissions = await reading
        assert sum(len(emission.token_ids) for emission in emissions) == 400
        assert len(emissions) > 10
        assert num_calls <= 2  # the end, and the step that the gate may have held

    run(scenario)


def test_errors_reach_who_waits_for_the_end(llm, run, gate):
    async def scenario(thread):
        running = await submit(thread, submission(llm, "a", params=LONG, deadline_s=0.1))
        gate.close()
        with pytest.raises(DeadlineError):
            await running.read_all()
        gate.open()

    run(scenario)


def test_an_idle_thread_takes_no_steps_and_no_time(llm, run, gate):
    async def scenario(thread):
        await read(await submit(thread, submission(llm, "a")))
        num_steps, start_s = len(gate.members), time.process_time()
        await asyncio.sleep(0.4)
        assert len(gate.members) == num_steps
        assert time.process_time() - start_s < 0.2  # one that spins takes all of it

    run(scenario)


# -- cancellation ------------------------------------------------------------------------------


def test_a_cancelled_request_is_in_no_further_step(llm, run, gate, recorder):
    async def scenario(thread):
        stays, leaves = await submit(
            thread, submission(llm, "stays"), submission(llm, "leaves", params=LONG)
        )
        await anext(leaves)
        gate.close()
        await until(gate.waiting.is_set)
        leaves.cancel()
        leaves.cancel()
        num_seen = len(gate.members)
        gate.open()
        expected = await read(stays)
        assert [emission async for emission in leaves] == []
        assert all(members <= {"stays"} for members in gate.members[num_seen:])
        return expected

    alone = llm.generate(PROMPTS[0], SamplingParams(max_new_tokens=24, seed=1))[0]
    assert ids_of(run(scenario)) == alone.token_ids
    assert sorted(recorder.ends) == [("leaves", "cancelled"), ("stays", "length")]


def test_a_waiting_request_can_be_cancelled(llm, run, gate, recorder):
    async def scenario(thread):
        gate.close()
        running = await submit(thread, submission(llm, "a"))
        await until(gate.waiting.is_set)
        waiting = await submit(thread, submission(llm, "b"))
        waiting.cancel()
        gate.open()
        await read(running)

    run(scenario)
    assert sorted(recorder.ends) == [("a", "length"), ("b", "cancelled")]
    assert all("b" not in members for members in gate.members)


def test_an_id_is_free_again_at_once(llm, run):
    async def scenario(thread):
        for _ in range(5):
            running = await submit(thread, submission(llm, "same", params=LONG))
            running.cancel()
        return await read(await submit(thread, submission(llm, "same")))

    alone = llm.generate(PROMPTS[0], SamplingParams(max_new_tokens=24, seed=1))[0]
    assert ids_of(run(scenario)) == alone.token_ids


def test_500_random_disconnects_leave_nothing(llm, run, recorder):
    """Those who stay get the tokens that they get alone; nothing is held for those who left."""
    rng = random.Random(7)
    params = SamplingParams(max_new_tokens=30, seed=3, temperature=1.0)
    alone = llm.generate(PROMPTS[1], params)[0].token_ids

    async def leave(thread, name):
        prompt = " ".join(rng.choices(PROMPTS, k=rng.randint(1, 4)))
        running = await submit(thread, submission(llm, name, prompt, LONG))
        patience = rng.choice((0, 0, 1, 2, 3))
        if patience:
            async for _ in running:
                patience -= 1
                if not patience:
                    break
        elif rng.random() < 0.5:
            await asyncio.sleep(rng.random() / 100)
        running.cancel()

    async def scenario(thread):
        places = asyncio.Semaphore(40)

        async def one(index):
            async with places:
                if index % 25 == 0:
                    running = await submit(thread, submission(llm, f"{index}", PROMPTS[1], params))
                    assert ids_of(await read(running)) == alone
                else:
                    await leave(thread, f"{index}")

        await asyncio.gather(*(one(index) for index in range(525)))

    run(scenario)
    assert recorder.outcomes().count("cancelled") == 504
    check_books(llm.engine)


# -- deadlines ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own_s", "server_s", "shown"), [(0.2, None, 0.2), (None, 0.2, 0.2), (9.0, 0.2, 0.2)]
)
def test_a_request_whose_time_is_over_is_given_up(llm, run, gate, recorder, own_s, server_s, shown):
    async def scenario(thread):
        running = await submit(thread, submission(llm, "a", params=LONG, deadline_s=own_s))
        first = await anext(running)
        gate.close()  # so that it does not finish
        with pytest.raises(DeadlineError, match=rf"within its {shown:g} s"):
            await read(running)
        gate.open()
        return first

    assert ids_of(run(scenario, replace(SETTINGS, deadline_s=server_s)))
    assert recorder.ends == [("a", "deadline")]


def test_time_that_is_spent_waiting_counts(llm, run, gate, recorder):
    async def scenario(thread):
        gate.close()
        running = await submit(thread, submission(llm, "a"))
        await until(gate.waiting.is_set)
        waiting = await submit(thread, submission(llm, "b", deadline_s=0.05))
        start_s = time.perf_counter()
        with pytest.raises(DeadlineError):
            await read(waiting)
        assert time.perf_counter() - start_s < 5  # although the step still goes on
        gate.open()
        await read(running)

    run(scenario)
    assert sorted(recorder.ends) == [("a", "length"), ("b", "deadline")]


def test_time_that_is_spent_building_counts(llm, run, monkeypatch):
    monkeypatch.setattr(llm.engine, "new_request", lambda *_, **__: time.sleep(0.3))

    async def scenario(thread):
        with pytest.raises(DeadlineError):
            await submit(thread, submission(llm, "a", params=GRAMMAR, deadline_s=0.05))

    run(scenario)


def test_who_finishes_in_time_is_not_disturbed(llm, run, recorder):
    async def scenario(thread):
        await read(await submit(thread, submission(llm, "a", deadline_s=0.5)))
        await asyncio.sleep(0.6)

    run(scenario)
    assert recorder.ends == [("a", "length")]


# -- the queue ---------------------------------------------------------------------------------


def test_a_full_queue_turns_away_and_says_for_how_long(llm, run, gate, recorder):
    num_places = llm.engine.max_requests + 2

    async def scenario(thread):
        gate.close()
        names = [f"r{index}" for index in range(num_places - 1)]
        runnings = await submit(thread, *(submission(llm, name) for name in names))
        await until(gate.waiting.is_set)
        with pytest.raises(QueueFullError) as caught:  # both or none
            await submit(thread, submission(llm, "x"), submission(llm, "y"))
        assert 1 <= caught.value.retry_after_s <= 60
        assert f"{caught.value.retry_after_s} s" in caught.value.hint
        runnings.append(await submit(thread, submission(llm, "x")))
        with pytest.raises(QueueFullError):
            await submit(thread, submission(llm, "y"))
        runnings.pop(3).cancel()  # makes room at once
        runnings.append(await submit(thread, submission(llm, "y")))
        gate.open()
        await asyncio.gather(*map(read, runnings))

    run(scenario, replace(SETTINGS, max_queue=2))
    assert recorder.rejections == ["queue_full"] * 2
    assert len(recorder.ends) == num_places + 1


def test_the_wait_is_as_long_as_finishing_takes(llm, run, gate):
    """Sixteen places, requests that finish every 50 ms: the sixteenth in line waits 0.8 s."""

    async def scenario(thread):
        num_places = llm.engine.max_requests
        for index in range(30):
            runnings = await submit(thread, submission(llm, f"w{index}"))
            await read(runnings)
            await asyncio.sleep(0.05)
        gate.close()
        await submit(thread, *(submission(llm, f"r{index}") for index in range(num_places)))
        waits = []
        for _ in range(40):
            with pytest.raises(QueueFullError) as caught:
                await submit(thread, submission(llm, "x"))
            waits.append(caught.value.retry_after_s)
        gate.open()
        return waits

    waits = run(scenario, replace(SETTINGS, max_queue=0))
    assert waits == sorted(waits)  # each gets a later time than the one before
    assert waits[0] == 1
    assert waits[-1] <= 16  # as long as all that there is takes, and on a slow machine


def test_a_call_that_never_fits_is_an_error_of_its_own(llm, run):
    async def scenario(thread):
        with pytest.raises(RequestError, match="asks for 18 outputs; the server holds 17"):
            await submit(thread, *(submission(llm, f"r{index}") for index in range(18)))

    run(scenario, replace(SETTINGS, max_queue=1))


@pytest.mark.parametrize("names", [["a", "a"], ["a", "b"]])
def test_ids_are_unique(llm, run, names):
    async def scenario(thread):
        running = await submit(thread, submission(llm, "b", params=LONG))
        with pytest.raises(RequestError, match="is in use"):
            await submit(thread, *(submission(llm, name) for name in names))
        running.cancel()

    run(scenario)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"prompt_ids": []}, RequestError),
        ({"prompt_ids": [10**6]}, RequestError),
        ({"drafters": ("nobody",)}, ConfigError),
        ({"max_nodes": -1}, ConfigError),
        ({"params": SamplingParams(regex="(")}, RequestError),
    ],
)
def test_errors_of_a_request_are_its_own_and_none_of_the_call_runs(
    llm, run, recorder, wrong, error
):
    async def scenario(thread):
        good = submission(llm, "good")
        with pytest.raises((error, RequestError)):
            await submit(thread, good, replace(good, request_id="bad", **wrong))
        assert (thread.num_waiting, thread.num_running) == (0, 0)
        await read(await submit(thread, good))

    run(scenario)
    assert recorder.rejections == ["invalid"]
    assert recorder.ends == [("good", "length")]


# -- failures ----------------------------------------------------------------------------------


def test_a_failed_step_ends_those_that_run_and_nobody_else(llm, run, gate, recorder, caplog):
    num_places = llm.engine.max_requests

    async def scenario(thread):
        gate.close()
        names = [f"r{index}" for index in range(num_places)]
        runnings = await submit(thread, *(submission(llm, name) for name in names))
        waiting = await submit(thread, submission(llm, "waits"))
        await until(gate.waiting.is_set)
        gate.fail_with = ValueError("secret prompt")
        failing = asyncio.gather(*map(read, runnings), return_exceptions=True)
        gate.open()
        errors = await failing
        assert all(isinstance(error, EngineFailedError) for error in errors)
        assert "secret" not in str(errors[0])
        assert thread.state == "ready"
        return ids_of(await read(waiting))

    alone = llm.generate(PROMPTS[0], SamplingParams(max_new_tokens=24, seed=1))[0]
    assert run(scenario) == alone.token_ids
    assert recorder.outcomes() == ["engine_failed"] * num_places + ["length"]
    assert "a step of the engine failed" in caplog.text


def test_an_engine_that_has_lost_a_block_serves_no_more(llm, run, gate, monkeypatch, caplog):
    async def scenario(thread):
        broken = RuntimeError("a block is neither free nor owned")
        monkeypatch.setattr(llm.engine.cache, "check_integrity", lambda: raise_(broken))
        gate.fail_with = ValueError("no")
        gate.close()
        running, other = await submit(thread, submission(llm, "a"), submission(llm, "b"))
        gate.open()
        for failed in (running, other):
            with pytest.raises(EngineFailedError, match="ValueError"):
                await read(failed)
        await until(lambda: thread.state == "failed")
        with pytest.raises(EngineFailedError):
            await submit(thread, submission(llm, "c"))
        monkeypatch.undo()

    run(scenario)
    assert "the engine is broken" in caplog.text


def test_an_engine_that_always_fails_is_broken(llm, run, gate):
    async def scenario(thread):
        for index in range(MAX_FAILURES):
            gate.fail_with = ValueError("no")
            await until(lambda: thread.state == "ready")
            with pytest.raises(EngineFailedError):
                await read(await submit(thread, submission(llm, f"r{index}")))
        await until(lambda: thread.state == "failed")

    run(scenario)


def test_failures_in_between_are_forgiven(llm, run, gate):
    async def scenario(thread):
        for index in range(2 * MAX_FAILURES):
            gate.fail_with = ValueError("no") if index % 2 else None
            running = await submit(thread, submission(llm, f"r{index}"))
            if index % 2:
                with pytest.raises(EngineFailedError):
                    await read(running)
            else:
                await read(running)
        assert thread.state == "ready"

    run(scenario)


def raise_(error):
    raise error


def too_many(contexts):
    return [Draft.empty(context.token_ids[-1]) for context in contexts] * 2


def wrong_root(contexts):
    return [Draft.empty(context.token_ids[-1] + 1) for context in contexts]


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        ("start", lambda *_: raise_(ValueError("no"))),
        ("propose", lambda *_: raise_(MemoryError)),
        ("propose", too_many),
        ("propose", wrong_root),
        ("commit", lambda *_: raise_(IndexError("no"))),
        ("stop", lambda *_: raise_(KeyError("no"))),
    ],
)
@pytest.mark.parametrize("label", LABELS)
def test_a_drafter_that_breaks_costs_speed_and_nothing_else(
    fixed_llm, run, recorder, monkeypatch, caplog, label, method, broken
):
    params = SamplingParams(max_new_tokens=24, seed=5, temperature=1.0)
    expected = [output.token_ids for output in fixed_llm.generate(list(PROMPTS), params)]
    drafter, stop = fixed_llm.engine.drafters[label], fixed_llm.engine.drafters[label].stop
    monkeypatch.setattr(drafter, method, broken)

    async def scenario(thread):
        results = []
        for turn in range(2):  # while it breaks, and after
            submissions = [
                submission(fixed_llm, f"{turn}-{index}", prompt, params)
                for index, prompt in enumerate(PROMPTS)
            ]
            runnings = await submit(thread, *submissions)
            results.append([ids_of(await read(running)) for running in runnings])
            for item in submissions:  # a broken drafter is not asked any more
                stop(item.request_id)
        return results

    assert run(scenario, SETTINGS, fixed_llm) == [expected, expected]
    assert {outcome for _, outcome in recorder.ends} <= {"length", "eos"}
    assert caplog.text.count(f"drafter {label} failed and is left out") == 1
    assert fixed_llm.engine.drafters[label] is drafter  # the guards are gone


# -- the end -----------------------------------------------------------------------------------


def test_a_drain_lets_requests_finish_and_takes_no_more(llm, run, recorder):
    async def scenario(thread):
        runnings = await submit(thread, *(submission(llm, f"r{index}") for index in range(20)))
        reading = asyncio.gather(*map(read, runnings))
        draining = asyncio.ensure_future(thread.drain(10))
        await asyncio.sleep(0)
        assert thread.state == "draining"
        with pytest.raises(ShuttingDownError) as caught:
            await submit(thread, submission(llm, "late"))
        assert caught.value.retry_after_s >= 1
        results = await reading
        await draining
        assert thread.state == "stopped"
        with pytest.raises(ShuttingDownError):
            await submit(thread, submission(llm, "later"))
        return results

    results = run(scenario)
    assert all(emissions[-1].finish_reason is not None for emissions in results)
    assert recorder.outcomes() == ["length"] * 20
    assert recorder.rejections == ["shutting_down"] * 2


def test_a_drain_does_not_wait_for_ever(llm, run, gate, recorder):
    async def scenario(thread):
        running = await submit(thread, submission(llm, "a", params=LONG))
        first = await anext(running)
        gate.close()
        await until(gate.waiting.is_set)
        draining = asyncio.ensure_future(thread.drain(0.05))
        with pytest.raises(ShuttingDownError):
            await read(running)
        gate.open()
        await draining
        assert thread.state == "stopped"
        return first

    assert run(scenario)[-1].finish_reason is not FinishReason.LENGTH
    assert recorder.ends == [("a", "shutdown")]


def test_who_watches_watches_while_it_runs(llm, run):
    """An observer may put a planner of its own into the engine; it is gone afterwards."""
    parts = llm.engine.parts

    class Watcher(Observer):
        def watch(self, engine):
            engine.parts = replace(engine.parts)

    async def scenario():
        thread = EngineThread(llm, SETTINGS, Watcher())
        thread.start()
        await until(lambda: thread.state == "ready")
        assert llm.engine.parts is not parts
        await thread.drain(1)

    asyncio.run(scenario())
    assert llm.engine.parts is parts


def test_who_cannot_watch_keeps_nobody_waiting(llm, run, recorder, monkeypatch, caplog):
    monkeypatch.setattr(recorder, "watch", lambda _: raise_(RuntimeError("no")))

    async def scenario(thread):
        return await read(await submit(thread, submission(llm, "a")))

    assert run(scenario)[-1].finish_reason is not None
    assert recorder.ends == [("a", "length")]
    assert "cannot be watched" in caplog.text


def test_a_request_that_comes_as_the_engine_breaks_ends_too(llm, run, recorder):
    async def scenario(thread):
        thread._loop.has_failed = True
        thread._check_open = lambda: None  # it was open when it looked
        with pytest.raises(EngineFailedError):
            await read(await submit(thread, submission(llm, "a")))

    run(scenario)
    assert recorder.ends == [("a", "engine_failed")]
