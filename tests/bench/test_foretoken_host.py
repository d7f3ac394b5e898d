"""Foretoken as a system under test: batches that are done in parts, with others in between."""

import pytest

from foretoken.bench.foretoken_host import ForetokenHost, ForetokenSpec
from foretoken.bench.systems import Task, joined
from foretoken.models.loading import load_model

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def spec(pair):
    return ForetokenSpec(
        model=pair.target,
        drafters=("prompt-lookup",),
        max_nodes=4,
        dtype="float32",
        device="cpu",
        threads=1,
        max_batch=3,
        max_tokens=64,
    )


@pytest.fixture(scope="module")
def target(pair):
    return load_model(pair.target, dtype="float32", device="cpu")


@pytest.fixture
def hosts(spec, target):
    hosts = [ForetokenHost(spec, target) for _ in range(2)]
    yield hosts
    for host in hosts:
        host.close()


def tasks_saying(*scripts):
    return [
        Task(
            prompt_ids=(5, 6, number),
            max_new_tokens=NUM_TOKENS,
            temperature=0.0,
            seed=number,
            script=script,
        )
        for number, script in enumerate(scripts)
    ]


def said(turn):
    return [tuple(output.token_ids) for output in turn.outputs]


def test_parts_are_a_whole_batch(hosts):
    tasks = tasks_saying((), (), ())
    [whole, divided] = hosts
    expected = whole.run(tasks, batch_size=3, speculative=True)
    parts = list(divided.run_in_parts(tasks, num_parts=4, speculative=True))
    assert len(parts) == 4
    assert [len(part.outputs) for part in parts] == [0, 0, 0, 3]
    assert said(joined(parts)) == said(expected)
    assert [it.num_steps for it in parts[-1].outputs] == [it.num_steps for it in expected.outputs]
    assert joined(parts).cpu_s > 0
    # Outputs have the seconds of their batch.
    assert parts[-1].outputs[0].seconds == pytest.approx(sum(part.unit_s[0] for part in parts))


def test_each_part_makes_its_tokens(hosts):
    host = hosts[0]
    requests = host._llm.engine._requests
    parts = host.run_in_parts(tasks_saying((), ()), num_parts=4, speculative=False)
    made = []
    for _ in range(3):
        next(parts)
        made.append(sum(len(request.output_ids) for request in requests.values()))
    assert made == [6, 12, 18]
    next(parts)
    assert not requests


def test_a_part_whose_tokens_are_made_has_no_step(hosts):
    host = hosts[0]
    parts = list(host.run_in_parts(tasks_saying(()), num_parts=3 * NUM_TOKENS, speculative=False))
    assert len(parts) == 3 * NUM_TOKENS
    assert len(said(parts[-1])[0]) == NUM_TOKENS


def test_two_systems_take_turns_with_one_target_that_says_something_else_to_each(hosts):
    ours, theirs = tuple(range(20, 20 + NUM_TOKENS)), tuple(range(60, 60 + NUM_TOKENS))
    runs = [
        host.run_in_parts(tasks_saying(script, script[::-1]), num_parts=6, speculative=True)
        for host, script in zip(hosts, (ours, theirs), strict=True)
    ]
    turns = [(next(runs[0]), next(runs[1])) for _ in range(6)]
    assert said(turns[-1][0]) == [ours, ours[::-1]]
    assert said(turns[-1][1]) == [theirs, theirs[::-1]]


def test_a_batch_that_is_given_up_leaves_nothing_running(hosts, target):
    host = hosts[0]
    parts = host.run_in_parts(tasks_saying((1,) * NUM_TOKENS), num_parts=4, speculative=True)
    next(parts)
    assert host._llm.engine.num_unfinished == 1
    parts.close()
    assert host._llm.engine.num_unfinished == 0
    assert "forward" not in vars(target)
