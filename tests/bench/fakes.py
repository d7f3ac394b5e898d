"""Stand-ins for systems under test; at module level, so that other processes can import them."""

import os
import time

from foretoken.bench.peers.base import PeerOutput
from foretoken.bench.systems import HostInfo, Turn
from foretoken.errors import ModelError, RequestError


class FakePeer:
    """Counts upwards; with drafts it may say something else, or too little."""

    name = "fake"
    version = "fake 1.0"
    loaded = None
    changes_text = False
    num_missing = 0
    refuses = ()
    calls: list = []  # noqa: RUF012 - reset between tests

    @classmethod
    def reset(cls):
        cls.loaded, cls.changes_text, cls.num_missing = None, False, 0
        cls.refuses, cls.calls = (), []

    @classmethod
    def load(cls, spec):
        cls.loaded = spec
        return cls()

    def generate(self, prompt_ids, *, max_new_tokens, temperature, seed, speculative):
        self.calls.append((tuple(prompt_ids), max_new_tokens, temperature, seed, speculative))
        if (temperature, speculative) in self.refuses:
            raise RequestError("fake cannot do this", hint="do not ask for it")
        start = len(prompt_ids) + (speculative and self.changes_text)
        token_ids = list(range(start, start + max_new_tokens - self.num_missing))
        return PeerOutput(token_ids=token_ids, seconds=0.001 if speculative else 0.002)

    def close(self):
        type(self).loaded = None


class FakeHost:
    """Tells what it was asked, from wherever it runs; some batch sizes make trouble."""

    SLOW, REFUSED, BUG, CRASH = 96, 97, 98, 99

    def __init__(self, *, has_model=True):
        if not has_model:
            raise ModelError("there is no such model", hint="name another")
        self.info = HostInfo(version=f"process {os.getpid()}", dtype="float32")

    def run(self, tasks, *, batch_size, speculative):
        print("chatter of a library")
        if batch_size == self.CRASH:
            os._exit(3)
        if batch_size == self.SLOW:
            time.sleep(600)
        if batch_size == self.REFUSED:
            raise RequestError("too many at once", hint="send fewer")
        if batch_size == self.BUG:
            raise KeyError("surprise")
        outputs = [PeerOutput(token_ids=[batch_size, speculative], seconds=0.5) for _ in tasks]
        return Turn(outputs=outputs, unit_s=[0.5] * len(tasks))

    def close(self):
        pass
