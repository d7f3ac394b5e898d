"""Hidden states are handed on, and multiplied, without the help of torch's threads."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from foretoken.core.options import ComponentSpec, build_options
from foretoken.drafters import DRAFTERS
from foretoken.models.heads import fusion
from foretoken.models.heads.fusion import CompiledFusion, TorchFusion, serve_fusion
from foretoken.models.loading import load_model
from foretoken.models.state_rows import as_rows, join_columns, join_rows, put_rows, take_rows
from tests.engines import finish, greedy, make_engine, make_host, plain_ids
from tests.fakes import build_module, tiny_config
from tests.heads import write_head

TASKS = Path("/proc/self/task")
WIDTH = 1024  # 64 rows of such states are more than torch leaves to one thread
PROMPTS = [[(step * place) % 31 for place in range(64)] for step in (3, 7)]

needs_tasks = pytest.mark.skipif(not TASKS.is_dir(), reason="threads are counted in /proc")


def num_helpers(work):
    """Return how many threads torch begins, to share some work with.

    A thread that shares work for the first time gets helpers of its own, so a new one does it.
    """
    found = []

    def count():
        torch.set_num_threads(2)
        before = set(TASKS.iterdir())
        work()
        found.append(len(set(TASKS.iterdir()) - before))

    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    torch.set_num_threads(1)
    return found[0]


def rows_of(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_are_joined_and_taken_as_torch_does(dtype):
    hidden = {layer: rows_of(6, 5, dtype=dtype, seed=layer) for layer in (1, 2, 4)}
    assert torch.equal(join_rows([hidden[1], hidden[2][2:]]), torch.cat((hidden[1], hidden[2][2:])))
    assert torch.equal(join_rows([hidden[4]]), hidden[4])
    assert torch.equal(join_columns([hidden[4], hidden[1]]), torch.cat((hidden[4], hidden[1]), 1))
    taken = take_rows(hidden[1], [3, 0, 3])
    assert torch.equal(taken, hidden[1][[3, 0, 3]])
    assert take_rows(hidden[1], []).shape == (0, 5)
    taken.zero_()
    assert hidden[1][0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_written_as_torch_does(dtype):
    states, values = rows_of(6, 5, dtype=dtype), rows_of(2, 5, dtype=dtype, seed=1)
    expected = states.clone()
    expected[[4, 1]] = values
    for rows in ([4, 1], torch.tensor([4, 1])):
        written = states.clone()
        put_rows(written, rows, values)
        assert torch.equal(written, expected)
    read = as_rows(states[:, 1:4])
    assert read.dtype == np.float32
    assert read.flags.c_contiguous
    assert torch.equal(torch.from_numpy(read), states[:, 1:4].float())


@needs_tasks
def test_rows_need_no_help():
    hidden = {layer: rows_of(64, WIDTH) for layer in (1, 2)}
    assert num_helpers(lambda: torch.cat((hidden[1], hidden[2]))) == 1  # or nothing is shown here
    assert num_helpers(lambda: join_rows(list(hidden.values()))) == 0
    assert num_helpers(lambda: join_columns(list(hidden.values()))) == 0
    assert num_helpers(lambda: take_rows(hidden[1], range(1, 64))) == 0
    assert num_helpers(lambda: put_rows(hidden[1], range(1, 64), hidden[2][1:])) == 0
    assert num_helpers(lambda: as_rows(hidden[1][:, 1:])) == 0


# -- products ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("num_columns", "depth"), [(40, 96), (33, 7), (64, 512)])
@pytest.mark.parametrize("num_rows", [1, 3, 25])
def test_fusion_is_the_product_of_normalized_states(dtype, has_norm, num_columns, depth, num_rows):
    states, weight = rows_of(num_rows, depth), rows_of(num_columns, depth, seed=1) * depth**-0.5
    bias, norm = rows_of(num_columns, seed=2), rows_of(depth, seed=3)
    served = serve_fusion(weight.to(dtype), bias, norm if has_norm else None, 1e-5)
    assert isinstance(served, TorchFusion if dtype == torch.float64 else CompiledFusion)
    if has_norm:
        states = functional.rms_norm(states, norm.shape, norm, 1e-5)
    expected = states.double() @ weight.double().T + bias
    # bfloat16 keeps 8 bits of either factor; sums of up to 512 terms of about 512 ** -0.5.
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    found = served(rows_of(num_rows, depth)).double()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_threads_change_no_bit(dtype, monkeypatch):
    states, weight = rows_of(17, 90), rows_of(200, 90, seed=1)
    alone = serve_fusion(weight.to(dtype), None)
    together = alone(states)
    for row in range(17):
        assert torch.equal(alone(states[row : row + 1])[0], together[row])
    monkeypatch.setattr(fusion, "BYTES_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    several = serve_fusion(weight.to(dtype), None)
    assert several._num_threads(17) == 3
    for _ in range(20):
        assert torch.equal(several(states), together)


# -- steps -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    config = tiny_config("llama", hidden_size=WIDTH, vocab_size=32, max_position_embeddings=256)
    build_module(config, 3, attn_implementation="eager", dtype=torch.float32).save_pretrained(
        folder
    )
    return folder


@needs_tasks
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("graft", {"layers": "2"}),
        ("eagle", {}),
        ("eagle", {"variant": "eagle-1"}),
        ("parallel", {}),
        ("medusa", {}),
        ("hydra", {}),
        ("kangaroo", {"layers": "1"}),
    ],
)
def test_steps_of_heads_need_no_help(folder, name, options):
    """Helpers that still spin would take a core from the target's next pass."""
    target = load_model(str(folder))
    path = write_head(folder, name, seed=len(options), **options)
    drafter_class = DRAFTERS.load(name)
    spec = ComponentSpec(name, {"path": path, "min_gain": 0.0})
    host = replace(make_host(target), dtype="auto")
    drafter = drafter_class.create(build_options(drafter_class.Options, spec), host)
    engine = make_engine(target, {name: drafter}, prefill_chunk=64)

    def serve(prompt):
        requests.append(engine.add_request(prompt, greedy(12)))
        finish(engine)

    requests = []
    # Our own workers and what is made once, such as tables of positions, may begin at first.
    num_helpers(lambda: serve(PROMPTS[0]))
    assert num_helpers(lambda: serve(PROMPTS[1])) == 0
    for prompt, request in zip(PROMPTS, requests, strict=True):
        assert request.stats.num_draft_tokens > 0
        assert request.output_ids == plain_ids(target, prompt, greedy(12))
