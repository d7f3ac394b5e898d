"""What is special about Medusa: trees over products of heads, from one state of the target."""

import itertools
import random

import pytest
import torch

from foretoken.core.draft import DraftBudget, SiblingDraw
from foretoken.core.sampling import Sampler
from foretoken.drafters.base import DraftContext, RequestView, StandingStates
from foretoken.drafters.levels import RACE_TEMPERATURE
from foretoken.drafters.medusa import MedusaDrafter, MedusaOptions
from foretoken.errors import ConfigError, ModelError
from foretoken.models.heads.files import TargetShape, save_head, target_tensors
from foretoken.models.heads.medusa import MedusaDesign, MedusaHeads, load_medusa
from foretoken.models.loading import load_model
from tests.engines import finish, greedy, make_engine, make_host, plain_ids, sampled, states_of
from tests.fakes import build_module, tiny_config
from tests.heads import random_tensors, randomize, write_counting_target, write_head

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


@pytest.fixture(scope="module")
def path(folder):
    return write_head(folder, "medusa", heads=NUM_HEADS, layers=2)


def build(target, path, **options):
    return MedusaDrafter.create(MedusaOptions(path=path, **options), make_host(target))


def context_of(token_ids, request_id="r", params=None, siblings=None, **budget):
    params = params or greedy(8)
    return DraftContext(
        request_id=request_id,
        token_ids=token_ids,
        sampler=Sampler(params, params.seed or 0, 1),
        budget=DraftBudget(**{"max_nodes": 12, "max_depth": 8, **budget}),
        siblings=siblings or SiblingDraw.COUPLED,
    )


def tell(drafter, target, token_ids, request_id="r"):
    """Start a request and tell all states before its pending token; return the last of them."""
    layer = target.info.num_layers
    hidden = states_of(target, token_ids[:-1], [layer])
    drafter.start(RequestView(request_id=request_id, prompt_ids=token_ids))
    drafter.observe([StandingStates(request_id=request_id, start=0, hidden=hidden)])
    return hidden[layer][-1]


# -- what is drafted -------------------------------------------------------------------------


def test_heads_that_are_right_give_all_of_their_tokens_in_every_step(tmp_path):
    """Head i is told the token t + 2 + i by the state of token t, neither more nor less."""
    folder, shape = write_counting_target(tmp_path)
    heads = MedusaHeads(shape, MedusaDesign(heads=4), random_tensors(shape).head)
    count = shape.vocab_size
    with torch.no_grad():
        for index, lm_head in enumerate(heads.lm_heads):
            follower = [(token_id + 2 + index) % count for token_id in range(count)]
            lm_head.weight.zero_()
            lm_head.weight[follower, range(count)] = 10.0
    save_head(heads.state_dict(), "medusa", shape, {"heads": 4}, tmp_path / "head", "")
    target = load_model(folder, dtype="float32", device="cpu")
    for params in (greedy(21), sampled(21, seed=2)):
        drafter = build(target, str(tmp_path / "head"))
        engine = make_engine(target, {"medusa": drafter}, max_nodes=8)
        requests = [engine.add_request(ids, params) for ids in ([3], [5, 9, 1, 7])]
        finish(engine)
        for request in requests:
            first = request.token_ids[-22] + 1
            assert request.output_ids == [(first + step) % count for step in range(21)]
            # One token behind the prompt, then four heads' tokens and the target's own.
            assert request.stats.num_steps == 1 + 20 // 5


def best_paths(probs, num_nodes, max_depth):
    """Return the likeliest paths by products of rows of probabilities, by brute force."""
    scored = {}
    for depth in range(1, max_depth + 1):
        for path in itertools.product(range(probs.shape[1]), repeat=depth):
            scored[path] = float(torch.stack([probs[i, t] for i, t in enumerate(path)]).prod())
    return set(sorted(scored, key=scored.get, reverse=True)[:num_nodes])


@pytest.mark.parametrize("num_nodes", [1, 5, 12])
def test_tree_holds_the_likeliest_products_of_the_heads(folder, target, path, num_nodes):
    drafter = build(target, path, min_gain=0.0, width=12)
    heads = load_medusa(path, target.info)
    rng = random.Random(num_nodes)
    for _ in range(5):
        text = [rng.randrange(41) for _ in range(9)]
        state = tell(drafter, target, text)
        [draft] = drafter.propose([context_of(text, max_nodes=num_nodes, max_depth=2)])
        probs = (heads(state) / RACE_TEMPERATURE).softmax(dim=-1).detach()
        tree = draft.tree
        drafted = {
            tuple(tree.token_ids[step] for step in tree.path(node)[1:])
            for node in range(1, len(tree))
        }
        assert drafted == best_paths(probs, num_nodes, 2)
        for node in range(1, len(tree)):
            expected = probs[tree.depths[node] - 1, tree.token_ids[node]].log()
            assert draft.draft_logprobs[node] == pytest.approx(float(expected), abs=1e-4)


def test_sampling_ranks_by_the_race_that_the_target_will_run(target, path):
    drafter = build(target, path, max_depth=1, min_gain=0.0)
    heads = load_medusa(path, target.info)
    firsts = set()
    for seed in range(20):
        text, params = [4, 2, seed], sampled(8, seed=seed, temperature=0.8)
        state = tell(drafter, target, text)
        context = context_of(text, params=params)
        [draft] = drafter.propose([context])
        scores = context.sampler.race_scores(heads.head_logits(0, state)[None], text, [()])
        assert draft.tree.token_ids[1] == int(scores.argmax())
        firsts.add(draft.tree.token_ids[1])
    assert len(firsts) > 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_served_heads_agree_with_the_module(folder, path, dtype):
    target = load_model(str(folder), dtype=dtype, device="cpu")
    drafter = build(target, path)
    states = torch.randn(7, SIZES["hidden_size"])
    expected = load_medusa(path, target.info)(states)
    served = drafter._served.logits(states, 0, NUM_HEADS)
    # Rounding of sums of 16 terms: float32 to 7 digits, bfloat16 to 2 and a half.
    tolerance = {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    torch.testing.assert_close(served, expected, rtol=tolerance, atol=tolerance)


def test_heads_can_share_the_targets_own_head(folder, target):
    path = write_head(folder, "medusa", seed=1, own_lm_heads=False)
    heads = load_medusa(path, target.info)
    assert torch.equal(heads.lm_heads[2].weight, target_tensors(str(folder)).head.float())
    states = torch.randn(3, SIZES["hidden_size"])
    served = build(target, path)._served.logits(states, 0, 4)
    torch.testing.assert_close(served, heads(states), rtol=1e-5, atol=1e-5)


def test_expansion_grows_the_tree_that_it_says(target, path):
    drafter = build(target, path, expansion=(3, 2, 1))
    text = [1, 2, 3, 4]
    tell(drafter, target, text)
    [draft] = drafter.propose([context_of(text, max_nodes=30)])
    assert [draft.tree.depths.count(depth) for depth in range(5)] == [1, 3, 6, 6, 0]


def test_no_path_is_longer_than_there_are_heads(target, path):
    drafter = build(target, path, min_gain=0.0, max_depth=8)
    text = [1, 2, 3, 4]
    tell(drafter, target, text)
    [draft] = drafter.propose([context_of(text, max_nodes=40)])
    assert max(draft.tree.depths) == NUM_HEADS


# -- what it knows ---------------------------------------------------------------------------


def test_nothing_is_drafted_before_the_state_is_known(target, path):
    drafter = build(target, path)
    text = [1, 2, 3, 4]
    drafter.start(RequestView(request_id="r", prompt_ids=text))
    assert drafter.propose([context_of(text)])[0].tree.num_draft_tokens == 0
    tell(drafter, target, text)
    assert drafter.propose([context_of(text)])[0].tree.num_draft_tokens > 0
    # A state of an earlier token would be another head's.
    assert drafter.propose([context_of([*text, 5])])[0].tree.num_draft_tokens == 0
    drafter.start(RequestView(request_id="r", prompt_ids=text))  # thrown back, begins anew
    assert drafter.propose([context_of(text)])[0].tree.num_draft_tokens == 0


def test_a_step_runs_all_heads_for_all_requests_in_one_call(target, path):
    drafter = build(target, path, min_gain=0.0)
    calls = []
    inner = drafter._served.logits
    drafter._served.logits = lambda seen, first, num_heads: (
        calls.append((len(seen), first, num_heads)) or inner(seen, first, num_heads)
    )
    texts = {f"r{index}": [index, 2, 3] for index in range(5)}
    for request_id, text in texts.items():
        tell(drafter, target, text, request_id)
    drafter.propose([context_of(text, request_id) for request_id, text in texts.items()])
    drafter.propose([context_of(texts["r1"], "r1", max_depth=2)])
    assert calls == [(5, 0, NUM_HEADS), (1, 0, 2)]


def test_what_is_kept_of_a_request_is_one_state(target, path):
    drafter = build(target, path)
    tell(drafter, target, list(range(40)))
    assert drafter._states["r"].state.untyped_storage().nbytes() == SIZES["hidden_size"] * 4


def test_a_prompt_in_the_prefix_cache_is_drafted_for_as_well(folder, target, path):
    """The states of its cached part are never told; that of its last token is."""
    prompt, drafted = [*range(36), 1, 2], []
    drafter = build(target, path, min_gain=0.0)
    engine = make_engine(target, {"medusa": drafter}, max_nodes=6)
    for _ in range(2):
        request = engine.add_request(prompt, greedy(9))
        finish(engine)
        drafted.append(request.stats.num_draft_tokens)
        assert request.output_ids == plain_ids(target, prompt, greedy(9))
    assert drafted[0] == drafted[1] > 0


# -- errors ----------------------------------------------------------------------------------


def test_a_head_of_another_kind_is_refused(folder, target):
    path = write_head(folder, "hydra")
    with pytest.raises(ModelError, match="kind 'hydra'; 'medusa' is needed"):
        build(target, path)


def test_a_head_for_another_target_is_refused(tmp_path, target):
    shape = TargetShape(41, 24, 2)
    heads = randomize(MedusaHeads(shape, MedusaDesign(heads=1), random_tensors(shape).head))
    save_head(heads.state_dict(), "medusa", shape, {"heads": 1}, tmp_path, "")
    with pytest.raises(ModelError, match=r"hidden_size 24.*this target has 16"):
        build(target, str(tmp_path))


@pytest.mark.parametrize("options", [{"heads": 0}, {"layers": -1}])
def test_designs_that_cannot_be_are_refused(options):
    with pytest.raises(ConfigError, match="at least 1 head"):
        MedusaDesign.read(options)
