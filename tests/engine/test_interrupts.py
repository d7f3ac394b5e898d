"""Ctrl-C during a step: an interrupt wherever it falls, also while native code returns arrays."""

import ctypes
import signal

import numba
import numpy as np
import pytest

from tests.engines import check_idle, counting_drafter, counting_model, finish, greedy, make_engine

_raise_signal = ctypes.CDLL(None)["raise"]
_raise_signal.argtypes, _raise_signal.restype = [ctypes.c_int], ctypes.c_int


@numba.njit
def interrupted_array(number):
    """Return an array; the signal waits for the first Python code, which is numba's own."""
    _raise_signal(number)
    return np.zeros(1), np.zeros(2)


@pytest.fixture
def _interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts")
def test_an_interrupt_in_native_code_of_a_step_stays_one():
    """Four of a hundred interrupts ended as "unexpected SystemError", with exit code 1."""
    drafter = counting_drafter()
    working = drafter.propose

    def interrupted(contexts):
        interrupted_array(int(signal.SIGINT))
        return working(contexts)

    interrupted_array(0)  # compiled before, as a step's kernels are
    engine = make_engine(counting_model(), {"it": drafter})
    request = engine.add_request([1], greedy(20))
    engine.step()
    drafter.propose = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    drafter.propose = working
    finish(engine)
    assert request.output_ids == list(range(2, 22))
    check_idle(engine)
