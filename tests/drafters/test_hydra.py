"""What is special about Hydra: every head sees the drafted tokens before its own."""

import random

import pytest
import torch

from foretoken.core.draft import DraftBudget, SiblingDraw
from foretoken.core.sampling import Sampler
from foretoken.drafters.base import DraftContext, RequestView, StandingStates
from foretoken.drafters.hydra import HydraDrafter, HydraOptions
from foretoken.drafters.levels import RACE_TEMPERATURE
from foretoken.errors import ConfigError, ModelError
from foretoken.models.heads.files import save_head, target_tensors
from foretoken.models.heads.hydra import HydraDesign, HydraHeads, load_hydra
from foretoken.models.loading import load_model
from tests.engines import finish, greedy, make_engine, make_host, sampled, states_of
from tests.fakes import build_module, tiny_config
from tests.heads import write_counting_target, write_head

SIZES = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
NUM_HEADS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_module(tiny_config("llama", **SIZES), seed=3).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def target(folder):
    return load_model(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module", params=[True, False], ids=["own heads", "shared head"])
def path(folder, request):
    own = request.param
    return write_head(folder, "hydra", int(own), heads=NUM_HEADS, layers=2, own_lm_heads=own)


def build(target, path, **options):
    return HydraDrafter.create(HydraOptions(path=path, **options), make_host(target))


def context_of(token_ids, request_id="r", **budget):
    return DraftContext(
        request_id=request_id,
        token_ids=token_ids,
        sampler=Sampler(greedy(8), 0, 1),
        budget=DraftBudget(**{"max_nodes": 12, "max_depth": 8, **budget}),
        siblings=SiblingDraw.COUPLED,
    )


def tell(drafter, target, token_ids, request_id="r"):
    """Start a request and tell all states before its pending token; return the last of them."""
    layer = target.info.num_layers
    hidden = states_of(target, token_ids[:-1], [layer])
    drafter.start(RequestView(request_id=request_id, prompt_ids=token_ids))
    drafter.observe([StandingStates(request_id=request_id, start=0, hidden=hidden)])
    return hidden[layer][-1]


def test_heads_that_are_right_give_all_of_their_tokens_in_every_step(tmp_path):
    """Head i reads the i + 1 tokens behind the state, the newest last."""
    folder, shape = write_counting_target(tmp_path)
    heads = HydraHeads(shape, HydraDesign(heads=3), target_tensors(folder))
    size = shape.hidden_size
    with torch.no_grad():
        for block in heads.blocks:
            residual = block[0].linear.weight[:size]
            residual.zero_()
            residual[:, -size:] = torch.eye(size)  # the newest token alone
    save_head(heads.state_dict(), "hydra", shape, {"heads": 3}, tmp_path / "head", "")
    target = load_model(folder, dtype="float32", device="cpu")
    for params in (greedy(21), sampled(21, seed=2)):
        drafter = build(target, str(tmp_path / "head"))
        engine = make_engine(target, {"hydra": drafter}, max_nodes=8)
        requests = [engine.add_request(ids, params) for ids in ([3], [5, 9, 1, 7])]
        finish(engine)
        for request in requests:
            first = request.token_ids[-22] + 1
            assert request.output_ids == [(first + step) % size for step in range(21)]
            # One token behind the prompt, then three heads' tokens and the target's own.
            assert request.stats.num_steps == 1 + 20 // 4


def test_every_node_has_the_probability_that_its_path_gives_it(target, path):
    drafter, heads = build(target, path, min_gain=0.0), load_hydra(path, target.info)
    rng = random.Random(1)
    for _ in range(5):
        text = [rng.randrange(41) for _ in range(9)]
        state = tell(drafter, target, text)
        [draft] = drafter.propose([context_of(text, max_nodes=14)])
        tree = draft.tree
        assert max(tree.depths) > 1
        for node in range(1, len(tree)):
            ids = torch.tensor([tree.token_ids[step] for step in tree.path(node)])
            logits = heads.head_logits(len(ids) - 2, state, ids[:-1]).detach()
            expected = (logits / RACE_TEMPERATURE).log_softmax(dim=-1)[ids[-1]]
            assert draft.draft_logprobs[node] == pytest.approx(float(expected), abs=1e-4)


def test_siblings_get_different_children(target, path):
    """What Medusa cannot do."""
    drafter = build(target, path, expansion=(4, 3))
    different = 0
    for first in range(10):
        text = [first, 7, 8]
        tell(drafter, target, text)
        [draft] = drafter.propose([context_of(text, max_nodes=16)])
        tree = draft.tree
        below = {tuple(tree.token_ids[it] for it in tree.children[node]) for node in range(1, 5)}
        different += len(below) > 1
    assert different > 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_served_heads_agree_with_the_module(folder, path, dtype):
    target = load_model(str(folder), dtype=dtype, device="cpu")
    drafter = build(target, path)
    states, token_ids = torch.randn(7, SIZES["hidden_size"]), torch.randint(41, (7, NUM_HEADS))
    heads = load_hydra(path, target.info)
    served = torch.cat(
        [
            drafter._served.logits(heads.see(states, token_ids[:, : head + 1]), head, 1)
            for head in range(NUM_HEADS)
        ]
    )
    # Rounding of sums of up to 64 terms: float32 to 7 digits, bfloat16 to 2 and a half.
    tolerance = {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    torch.testing.assert_close(served, heads(states, token_ids), rtol=tolerance, atol=tolerance)


def test_training_and_drafting_see_the_same(target, path):
    """`forward` on known tokens is what `head_logits` says along a path."""
    heads = load_hydra(path, target.info)
    states, token_ids = torch.randn(2, 5, 16), torch.randint(41, (2, 5, NUM_HEADS))
    logits = heads(states, token_ids)
    assert logits.shape == (NUM_HEADS, 2, 5, 41)
    for head in range(NUM_HEADS):
        one = heads.head_logits(head, states[1, 2], token_ids[1, 2, : head + 1])
        torch.testing.assert_close(logits[head, 1, 2], one)


def test_a_level_takes_one_product_for_all_requests(target, path):
    drafter = build(target, path, expansion=(2, 2, 1))
    calls = []
    inner = drafter._served.logits
    drafter._served.logits = lambda seen, first, num_heads: (
        calls.append((first, num_heads, *seen.shape)) or inner(seen, first, num_heads)
    )
    texts = {f"r{index}": [index, 2, 3] for index in range(5)}
    for request_id, text in texts.items():
        tell(drafter, target, text, request_id)
    contexts = [context_of(text, request_id, max_nodes=30) for request_id, text in texts.items()]
    drafter.propose(contexts)
    size = SIZES["hidden_size"]
    assert calls == [(0, 1, 5, 2 * size), (1, 1, 10, 3 * size), (2, 1, 20, 4 * size)]


def test_a_head_of_another_kind_is_refused(folder, target):
    with pytest.raises(ModelError, match="kind 'medusa'; 'hydra' is needed"):
        build(target, write_head(folder, "medusa"))


def test_the_targets_files_are_needed(folder, path, tmp_path):
    """The embedding is the target's; a target that has none on disk cannot have it read."""
    copy = tmp_path / "target"
    build_module(tiny_config("llama", **SIZES), seed=3).save_pretrained(copy)
    target = load_model(str(copy), dtype="float32", device="cpu")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights"):
        build(target, path)


@pytest.mark.parametrize("options", [{"heads": 0}, {"layers": 0}])
def test_designs_that_cannot_be_are_refused(options):
    with pytest.raises(ConfigError, match="at least 1 head"):
        HydraDesign.read(options)
