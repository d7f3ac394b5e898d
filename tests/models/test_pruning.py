"""Pruning: nothing changes where nothing is cut, and what is cut is what matters least."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from foretoken import LLM, SamplingParams
from foretoken.assets import EMBEDDED
from foretoken.bench.inflate import Shape, inflate
from foretoken.errors import ConfigError, UnsupportedModelError
from foretoken.models.draft_shape import DraftShape
from foretoken.models.importance import Importance, measure_importance, select_layers, texts_of
from foretoken.models.loading import load_model
from foretoken.models.pruning import check_prunable, cut, prune, select_parts
from foretoken.models.trainable import load_trainable, save_trainable
from tests.fakes import VOCAB_SIZE, build_module, tiny_config

IDS = torch.randint(VOCAB_SIZE, (2, 17), generator=torch.Generator().manual_seed(0))
EXAMPLES = IDS.tolist()
TARGET = EMBEDDED["stories"].target


@pytest.fixture
def make(tmp_path):
    """Return a function that makes a random target of a family."""

    def make(family, **changes):
        config = tiny_config(family, **changes)
        module = build_module(config, attn_implementation="sdpa", dtype=torch.float32)
        module.save_pretrained(tmp_path / family)
        return load_trainable(tmp_path / family)

    return make


@pytest.fixture(scope="module")
def stories():
    return load_trainable(TARGET)


@pytest.fixture(scope="module")
def texts():
    """Texts of the target, as token ids: to judge by, and others to measure on."""
    prompts = ["Once upon a time", "Tom had a small boat", "The bunny was sad", "Mia wanted"] * 3
    params = [
        SamplingParams(max_new_tokens=80, temperature=0.8, seed=seed)
        for seed in range(len(prompts))
    ]
    outputs = LLM("stories").generate(prompts, params)
    ids = [output.prompt_ids + output.token_ids for output in outputs]
    return ids[:6], ids[6:]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.logits(ids)


def mean_loss(model, texts):
    losses = []
    for text in texts:
        found = logits(model, torch.tensor([text]))[0, :-1]
        losses.append(functional.cross_entropy(found, torch.tensor(text[1:])).item())
    return sum(losses) / len(losses)


FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_where_nothing_is_cut_logits_are_equal(make, family, tied):
    target = make(family, tie_word_embeddings=tied)
    whole = DraftShape.of(target.config)
    model = prune(target, whole, EXAMPLES)
    assert torch.equal(logits(model), logits(target))
    assert model.num_parameters == target.num_parameters
    with torch.no_grad():
        for weight in model.module.parameters():
            weight.add_(1)
    assert torch.equal(logits(prune(target, whole, EXAMPLES)), logits(target))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_may_be_cut_and_the_rest_is_served(make, tmp_path, family):
    target = make(family, num_attention_heads=8, num_key_value_heads=4, eos_token_id=3)
    shape = DraftShape(
        layers=2, hidden=20, heads=2, kv_heads=2, head_dim=2, intermediate=31, vocab=None
    )
    model = prune(target, shape, EXAMPLES)
    assert DraftShape.of(model.config) == shape
    assert model.num_parameters == shape.num_parameters(target.config)
    (tmp_path / "draft").mkdir()
    save_trainable(model, tmp_path / "draft", "card")
    again = load_trainable(tmp_path / "draft")
    assert torch.equal(logits(again), logits(model))
    assert load_model(str(tmp_path / "draft")).info.num_parameters == model.num_parameters


def test_layers_keep_their_own_kind_of_attention(make):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    target = make("qwen3", use_sliding_window=True, sliding_window=4, layer_types=kinds)
    shape = replace(DraftShape.of(target.config), layers=2)
    model = prune(target, shape, EXAMPLES)
    kept = select_layers(target, 2, texts_of(target, EXAMPLES)[:1])
    assert model.config.layer_types == [kinds[layer] for layer in kept]


def test_a_group_of_heads_may_be_split_with_copies_of_its_keys(make):
    """Two query heads of one key head, and two of one each, are the same function."""
    target = make("llama")
    shape = replace(DraftShape.of(target.config), kv_heads=4)
    model = prune(target, shape, EXAMPLES)
    assert torch.equal(logits(model), logits(target))


def test_it_is_deterministic_and_leaves_the_target_alone(make):
    target = make("llama")
    before = logits(target)
    shape = replace(DraftShape.of(target.config), layers=1, hidden=20, intermediate=30)
    first, second = (logits(prune(target, shape, EXAMPLES)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(logits(target), before)
    target.module.requires_grad_(False)  # as a target that only teaches
    assert torch.equal(logits(prune(target, shape, EXAMPLES)), first)
    assert not any(part._forward_hooks for part in target.module.modules())


@pytest.mark.parametrize(
    "sizes",
    [
        "hidden=128",
        "heads=2,kv_heads=1",
        "intermediate=256",
        "layers=9",
        "layers=10,hidden=144,heads=2,kv_heads=2,intermediate=320",
    ],
)
def test_importance_beats_chance_on_text(stories, texts, sizes):
    """Against three random choices of the same shape, on texts that were not looked at."""
    examples, held_out = texts
    shape = DraftShape.parse(sizes, like=DraftShape.of(stories.config))
    loss = mean_loss(prune(stories, shape, examples), held_out)
    at_random = [cut_at_random(stories, shape, examples, seed) for seed in range(3)]
    assert loss < min(mean_loss(model, held_out) for model in at_random)


def cut_at_random(target, shape, examples, seed):
    """Prune at random; norms are still scaled by what they see."""
    generator = torch.Generator().manual_seed(seed)
    num_layers = DraftShape.of(target.config).layers
    layers = sorted(torch.randperm(num_layers, generator=generator)[: shape.layers].tolist())
    measured = measure_importance(target, layers, texts_of(target, examples, 64))

    def random(scores):
        return torch.rand(scores.shape, generator=generator)

    chance = Importance(
        hidden=random(measured.hidden),
        heads=tuple(map(random, measured.heads)),
        channels=tuple(map(random, measured.channels)),
        energy=measured.energy,
    )
    return cut(target, shape, select_parts(layers, chance, shape))


@pytest.mark.parametrize(
    "sizes",
    [
        "hidden=192,layers=14,heads=6,intermediate=512,noise=0",
        "hidden=384,layers=13,heads=6,kv_heads=2,head_dim=64,intermediate=500",
    ],
)
def test_the_small_model_inside_a_widened_one_is_found(stories, texts, tmp_path, sizes):
    """What was added cannot be heard, so importance leaves exactly the model that was widened.

    Float32 arithmetic in another order, and a stream that has the noise of 1e-5 in the channels
    that are cut: 1e-3 is far above both, and far below a single channel that is missing.
    """
    path = inflate(TARGET, Shape.parse(sizes), dtype="float32", folder=tmp_path)
    examples, held_out = texts
    found = prune(load_trainable(path), DraftShape.of(stories.config), examples)
    ids = torch.tensor(held_out[:1])
    torch.testing.assert_close(logits(found, ids), logits(stories, ids), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 4}, "layers=4 cannot be cut from this target; it has to be at most 3"),
        ({"hidden": 36}, "hidden=36 cannot be cut"),
        ({"intermediate": 49}, "intermediate=49 cannot be cut"),
        ({"head_dim": 6}, "head_dim=6 .* has to be a divisor of 8"),
        ({"kv_heads": 1}, "heads per kv_head=4 .* at most 2 heads per kv_head"),
        ({"heads": 8, "kv_heads": 8}, "kv_heads=8 .* at most 4 with 1 heads each"),
    ],
)
def test_shapes_that_are_no_part_of_the_target_are_refused(changes, message):
    config = tiny_config("llama")
    with pytest.raises(ConfigError, match=message):
        check_prunable(config, replace(DraftShape.of(config), **changes))


def test_other_families_are_refused(make):
    target = make("gpt2")
    shape = DraftShape(layers=1, hidden=8, heads=2, kv_heads=2, head_dim=4, intermediate=8)
    with pytest.raises(UnsupportedModelError, match="'gpt2' cannot be pruned; those of type llama"):
        prune(target, shape, EXAMPLES)


def test_texts_are_needed(make):
    target = make("llama")
    with pytest.raises(ConfigError, match="none of 2 examples is one"):
        prune(target, DraftShape.of(target.config), [[], [4]])


def test_texts_are_cut_to_what_is_wanted_and_to_the_context(make):
    target = make("llama", max_position_embeddings=16)
    found = texts_of(target, [[1] * 40, [2], [3] * 5, [4] * 9], 24)
    assert [text.tolist() for text in found] == [[[1] * 16], [[3] * 5], [[4] * 3]]
