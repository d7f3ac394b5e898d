"""Looped targets are served like all others: drafters that know nothing of loops, same tokens."""

import pytest

from foretoken.drafters.early_exit import EarlyExitDrafter, EarlyExitOptions
from foretoken.drafters.layer_skip import LayerSkipDrafter, LayerSkipOptions
from foretoken.drafters.prompt_lookup import PromptLookupDrafter, PromptLookupOptions
from foretoken.models.loading import load_model
from tests.engines import (
    check_idle,
    finish,
    greedy,
    make_draft_model,
    make_engine,
    make_host,
    plain_ids,
    sampled,
)
from tests.looped import looped_module, make_looped, unrolled

PROMPTS = [[5, 9, 5, 9, 5], [1, 2, 3, 4, 5, 6, 7, 8], [60]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a looped target, a looped draft and the target with copied layers."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"prelude": 1, "group": 1, "loops": 3, "coda": 1}
    target = load_model(make_looped(folder / "target", **sizes))
    draft = load_model(make_looped(folder / "draft", group=1, loops=2))
    unrolled(looped_module(**sizes)).save_pretrained(folder / "copied")
    return target, draft, load_model(str(folder / "copied"))


DRAFTERS = {
    "early-exit": lambda target, _: EarlyExitDrafter.create(
        EarlyExitOptions(layers=2, min_gain=0), make_host(target)
    ),
    "layer-skip": lambda target, _: LayerSkipDrafter.create(LayerSkipOptions(), make_host(target)),
    "draft-model": lambda target, draft: make_draft_model(target, draft, min_gain=0),
    "prompt-lookup": lambda target, _: PromptLookupDrafter.create(
        PromptLookupOptions(), make_host(target)
    ),
}


@pytest.mark.parametrize("params", [greedy(20), sampled(20, seed=3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_tokens_are_those_of_plain_decoding(models, name, params):
    target, draft, copied = models
    drafter = DRAFTERS[name](target, draft)
    engine = make_engine(target, {name: drafter})
    requests = [engine.add_request(prompt, params) for prompt in PROMPTS]
    finish(engine)
    for request, prompt in zip(requests, PROMPTS, strict=True):
        assert request.output_ids == plain_ids(target, prompt, params)
        assert request.output_ids == plain_ids(copied, prompt, params)
    assert sum(request.stats.num_draft_tokens for request in requests) > 0
    check_idle(engine)
