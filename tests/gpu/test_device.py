"""The reference path on an accelerator: same tokens with and without speculation, and as on CPU."""

import pytest
import torch

from foretoken.drafters.prompt_lookup import PromptLookupDrafter, PromptLookupOptions
from foretoken.drafters.speed import SpeedDrafter, SpeedOptions
from foretoken.models.modules import adapt_module
from tests.engines import finish, greedy, make_engine, plain_ids, sampled
from tests.fakes import build_module, tiny_config
from tests.looped import looped_module

pytestmark = pytest.mark.gpu

PROMPT = [5, 9, 5, 9, 5, 9, 7]


@pytest.fixture(params=["llama", "gemma3", "gpt_oss"])
def models(request):
    """One model on CPU and its copy on the accelerator, in float64."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    on_cpu, on_gpu = (build_module(tiny_config(request.param)) for _ in range(2))
    return adapt_module(on_cpu, name="cpu"), adapt_module(on_gpu.to("cuda"), name="cuda")


@pytest.mark.parametrize("params", [greedy(24), sampled(24, seed=3, temperature=0.8)])
def test_tokens_on_the_device_equal_those_on_cpu(models, params):
    on_cpu, on_gpu = models
    assert plain_ids(on_gpu, PROMPT, params) == plain_ids(on_cpu, PROMPT, params)


@pytest.mark.parametrize("params", [greedy(24), sampled(24, seed=3, temperature=0.8)])
def test_speculation_on_the_device_changes_nothing(models, params):
    _, on_gpu = models
    drafter = PromptLookupDrafter(PromptLookupOptions())
    engine = make_engine(on_gpu, {"prompt-lookup": drafter})
    requests = [engine.add_request(PROMPT[start:], params) for start in (0, 2)]
    finish(engine)
    for request, start in zip(requests, (0, 2), strict=True):
        assert request.output_ids == plain_ids(on_gpu, PROMPT[start:], params)


@pytest.mark.parametrize("params", [greedy(24), sampled(24, seed=3, temperature=0.8)])
def test_rows_in_flight_on_the_device_change_nothing(params):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    module = looped_module(dtype=torch.float64, attn_implementation="foretoken")
    model = adapt_module(module.to("cuda"), name="cuda")
    engine = make_engine(model, {"speed": SpeedDrafter(SpeedOptions(), model.info.loops)})
    requests = [engine.add_request(PROMPT[start:], params) for start in (0, 2)]
    finish(engine)
    for request, start in zip(requests, (0, 2), strict=True):
        assert request.output_ids == plain_ids(model, PROMPT[start:], params)
        assert request.stats.num_ticks
