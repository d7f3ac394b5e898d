"""Systems in other processes: same answers, errors with their hints, crashes survived."""

import os
import subprocess
import sys
import time
from functools import partial

import pytest

from foretoken.bench.systems import Task
from foretoken.bench.worker import WorkerHost
from foretoken.errors import ForetokenError, ModelError, RequestError
from tests.bench.fakes import FakeHost

TASKS = [Task(prompt_ids=(1, 2), max_new_tokens=2, temperature=0.0, seed=0)] * 3


@pytest.fixture
def host():
    host = WorkerHost("fake", FakeHost)
    yield host
    if host._process.is_alive():
        host.close()


def test_calls_are_served_by_another_process(host, capfd):
    assert host.info.version != f"process {os.getpid()}"
    turn = host.run(TASKS, batch_size=2, speculative=True)
    assert [output.token_ids for output in turn.outputs] == [[2, True]] * 3
    assert turn.unit_s == [0.5] * 3
    with pytest.raises(RequestError, match="too many at once"):
        host.run(TASKS, batch_size=FakeHost.REFUSED, speculative=False)
    assert host.run(TASKS, batch_size=1, speculative=False).outputs  # it still serves
    with pytest.raises(ForetokenError, match="unexpected KeyError: 'surprise'") as caught:
        host.run(TASKS, batch_size=FakeHost.BUG, speculative=False)
    assert "--debug" in caught.value.hint
    # What a library prints must not get into a record on standard output.
    assert "chatter" not in capfd.readouterr().out


def test_a_crash_over_there_is_an_error_here(host):
    with pytest.raises(ForetokenError, match="the process of fake ended with status 3"):
        host.run(TASKS, batch_size=FakeHost.CRASH, speculative=False)
    with pytest.raises(ForetokenError, match="the process of fake ended"):
        host.run(TASKS, batch_size=1, speculative=False)


def test_closing_does_not_wait_for_work_that_nobody_wants(host):
    host._pipe.send({"tasks": TASKS, "batch_size": FakeHost.SLOW, "speculative": False})
    host._is_answering = True  # as when Ctrl-C ends `run` while it waits
    start_s = time.perf_counter()
    host.close()
    assert time.perf_counter() - start_s < 5
    assert not host._process.is_alive()


def test_errors_keep_their_kind_and_hint():
    with pytest.raises(ModelError, match="there is no such model") as caught:
        WorkerHost("fake", partial(FakeHost, has_model=False))
    assert caught.value.hint == "name another"


def test_a_peers_process_does_not_import_torch():
    """What a peer's memory is said to be must not be that of libraries of ours."""
    code = "import sys, foretoken.bench.worker; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
