"""Observers: what is not overridden does nothing, and several are one."""

import inspect

from foretoken.server.observer import Observer, Observers

CALLS = {
    "watch": ("engine",),
    "submitted": ("request",),
    "rejected": ("queue_full",),
    "emitted": ("r", 3, 1.5),
    "finished": ("request", "eos", 0.5),
}


class Recorder(Observer):
    def __init__(self, calls, name):
        for method in CALLS:
            setattr(self, method, lambda *args, method=method: calls.append((name, method, args)))


def test_every_call_is_tried():
    assert set(CALLS) == {name for name, _ in inspect.getmembers(Observer, inspect.isfunction)}


def test_an_observer_may_leave_calls_out():
    for method, args in CALLS.items():
        assert getattr(Observer(), method)(*args) is None


def test_all_observers_are_told_in_order():
    calls = []
    both = Observers([Recorder(calls, "a"), Recorder(calls, "b")])
    for method, args in CALLS.items():
        getattr(both, method)(*args)
    assert calls == [(name, method, args) for method, args in CALLS.items() for name in "ab"]
