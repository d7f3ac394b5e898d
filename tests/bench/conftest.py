"""A tiny model pair on disk, and a peer that needs no package."""

from types import SimpleNamespace

import pytest

from foretoken.bench.peers import PEERS
from foretoken.bench.settings import BenchSettings
from foretoken.bench.workloads import Workload, WorkloadPrompt
from tests.bench.fakes import FakePeer
from tests.cli.conftest import save_model


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return SimpleNamespace(
        target=save_model(folder / "target", seed=0),
        draft=save_model(folder / "draft", seed=0),
        stranger=save_model(folder / "stranger", seed=1),
    )


@pytest.fixture(scope="module")
def registered_peer():
    PEERS.add("fake", FakePeer)
    yield FakePeer
    del PEERS._table["fake"]


@pytest.fixture
def fake_peer(registered_peer):
    yield registered_peer
    registered_peer.reset()


@pytest.fixture(scope="session")
def settings(pair, tmp_path_factory):
    """Return settings of a tiny run in this process; keywords replace some."""

    def make(**changes):
        prompts = [
            WorkloadPrompt(prompt=text, place=f"test, line {number}", category=category)
            for number, (text, category) in enumerate(
                [("hello", "a"), ("once upon", "b"), ("so", "a")], start=1
            )
        ]
        values = {
            "model": pair.target,
            "model_name": "target",
            "drafters": (f"draft-model:path={pair.draft}",),
            "max_nodes": (4,),
            "workload": Workload("test", tuple(prompts)),
            "max_new_tokens": 6,
            "temperatures": (0.0,),
            "batch_sizes": (1,),
            "rounds": 2,
            "seed": 0,
            "dtype": "float64",
            "device": "cpu",
            "threads": 1,
            "peers": (),
            "draft": None,
            "num_draft_tokens": 3,
            "work_dir": tmp_path_factory.mktemp("work") / "peers",
            "in_process": True,
        }
        return BenchSettings(**{**values, **changes})

    return make


@pytest.fixture(autouse=True, scope="session")
def _small_bandwidth_buffer():
    """Read a little, not what a measurement needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foretoken.bench.machine.BUFFER_BYTES", 2**16)
        yield
