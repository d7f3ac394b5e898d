"""Parallel heads: several tokens in one pass; what the conformance suite does not ask."""

import random

import pytest
import torch
from transformers import LlamaForCausalLM

from foretoken.core.options import ComponentSpec, build_options
from foretoken.drafters.parallel import ParallelDrafter, ParallelOptions
from foretoken.models.heads.eagle import EAGLE_1, EagleDesign
from foretoken.models.heads.eagle_layer import LayerSizes
from foretoken.models.heads.files import TargetShape, target_tensors
from foretoken.models.heads.parallel import ParallelModule
from foretoken.models.loading import load_model
from tests.drafters.test_eagle import (
    PARAMS,
    draft_of,
    some_prompts,
    start,
    tell,
    write_target,
)
from tests.engines import (
    check_idle,
    finish,
    greedy,
    make_engine,
    make_host,
    plain_ids,
    states_of,
)
from tests.heads import write_head

VARIANTS = {
    "eagle-1": {"variant": "eagle-1", "steps": 4},
    "eagle-3": {"steps": 4},
    "narrow": {"width": 12, "heads": 2, "draft_vocab": 20, "steps": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def target(folder):
    return load_model(str(folder), dtype="float32")


@pytest.fixture(params=VARIANTS)
def path(request, folder):
    seed = list(VARIANTS).index(request.param)
    return write_head(folder, "parallel", seed, **VARIANTS[request.param])


def make_drafter(target, path, **options):
    spec = ComponentSpec("parallel", {"path": path, **options})
    return ParallelDrafter.create(build_options(ParallelOptions, spec), make_host(target))


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("chunk", [3, 64])
def test_output_is_that_of_plain_decoding(target, path, kind, chunk):
    prompts = some_prompts(random.Random(chunk))
    drafter = make_drafter(target, path)
    engine = make_engine(target, {"parallel": drafter}, prefill_chunk=chunk, max_requests=3)
    requests = [engine.add_request(prompt, PARAMS[kind]) for prompt in prompts]
    finish(engine)
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output_ids == plain_ids(target, prompt, PARAMS[kind])
        assert request.stats.num_draft_tokens > 0
    assert engine.cache.num_prefix_hits > 0
    check_idle(engine)


def test_a_draft_takes_one_pass(target, path, monkeypatch):
    drafter, text = make_drafter(target, path), list(range(9))
    passes = []
    score = drafter._head.score
    monkeypatch.setattr(
        drafter._head, "score", lambda batch, *rest: passes.append(batch) or score(batch, *rest)
    )
    start(drafter, text)
    tell(drafter, states_of(target, text, drafter.needs.hidden_layers), 0, 8)
    draft = draft_of(drafter, text)
    num_said = drafter._max_depth
    assert max(draft.tree.depths) > 1
    assert [batch.num_rows for batch in passes] == [8 + num_said - 1]
    drafter.stop("r")


def test_nodes_of_a_level_have_the_same_children(target, path):
    """What a place says does not depend on the tokens before it."""
    drafter, text = make_drafter(target, path, expansion="2-2-1"), list(range(9))
    start(drafter, text)
    tell(drafter, states_of(target, text, drafter.needs.hidden_layers), 0, 8)
    tree = draft_of(drafter, text).tree
    drafter.stop("r")
    for depth in range(2):
        nodes = [node for node, level in enumerate(tree.depths) if level == depth]
        below = {tuple(tree.token_ids[child] for child in tree.children[node]) for node in nodes}
        assert len(below) == 1
        assert len(below.pop()) == 2


def test_drafts_are_no_deeper_than_the_head_says(target, folder):
    path = write_head(folder, "parallel", 9, steps=2)
    drafter = make_drafter(target, path, max_depth=6, expansion="1-1-1-1-1-1")
    text = list(range(9))
    start(drafter, text)
    tell(drafter, states_of(target, text, drafter.needs.hidden_layers), 0, 8)
    assert max(draft_of(drafter, text).tree.depths) == 2


def test_head_that_is_always_right_reaches_the_full_depth(tmp_path):
    """A target that says one token for ever, and a head whose every place says it too."""
    folder = write_target(tmp_path, tie_word_embeddings=False)
    module = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # all states are one vector, which the head's row 7 points along
        for layer in module.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        module.model.embed_tokens.weight.fill_(1.0)
        module.model.norm.weight.fill_(1.0)
        module.lm_head.weight[7] = 3.0
    module.save_pretrained(folder)
    target = load_model(str(folder), dtype="float32")
    design = EagleDesign(
        variant=EAGLE_1,
        sizes=LayerSizes(hidden=32, heads=2, kv_heads=2, head_dim=16, intermediate=8),
        target_layers=(target.info.num_layers,),
        fc_bias=True,
        num_steps=4,
    )
    head = ParallelModule(design, TargetShape.of(target.info), target_tensors(str(folder)))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.fc.bias.fill_(1.0)
    drafter = ParallelDrafter(head, ParallelOptions(path="unused", width=1), make_host(target))
    engine = make_engine(target, {"parallel": drafter}, max_nodes=8)
    request = engine.add_request([4, 9, 1], greedy(21))
    finish(engine)
    assert request.output_ids == [7] * 21
    # The first step has no states to go on from; each of the others says four tokens and one.
    assert (request.stats.num_steps, request.stats.num_accepted) == (1 + 4, 4 * 4)
    check_idle(engine)
