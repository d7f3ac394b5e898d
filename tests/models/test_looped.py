"""Looped models: a Llama of copied layers, whose copies are one."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from foretoken.errors import ModelError
from foretoken.models.blank import blank_model
from foretoken.models.draft_shape import DraftShape
from foretoken.models.looped import LoopedLlamaConfig, LoopedLlamaForCausalLM, register
from foretoken.models.loops import LoopShape
from foretoken.models.trainable import load_trainable, save_trainable
from tests.fakes import VOCAB_SIZE, build_module, tiny_config

SHAPES = (
    LoopShape(prelude=0, group=2, loops=4, coda=0),
    LoopShape(prelude=1, group=2, loops=3, coda=2),
    LoopShape(prelude=2, group=1, loops=1, coda=1),
)
IDS = torch.randint(0, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(3))

register()


def llama_config(shape, **changes):
    return tiny_config("llama", num_hidden_layers=shape.num_layers, **changes)


def looped_module(shape, seed=0, *, dtype=torch.float64, **changes):
    config = LoopedLlamaConfig.of_llama(llama_config(shape, **changes), shape)
    module = build_module(config, seed, attn_implementation="eager", dtype=dtype)
    return module.requires_grad_(True)


def unrolled(module):
    """Return a plain Llama whose later layers are copies of the group's."""
    shape = module.config.loop_shape
    stored = module.state_dict()
    weights = {name: it for name, it in stored.items() if ".layers." not in name}
    for layer in range(shape.num_layers):
        start = f"model.layers.{shape.stored_of(layer)}."
        for name, weight in stored.items():
            if name.startswith(start):
                weights[f"model.layers.{layer}.{name.removeprefix(start)}"] = weight.clone()
    tied = module.config.tie_word_embeddings
    config = llama_config(shape, tie_word_embeddings=tied)
    llama = build_module(config, 7, attn_implementation="eager", dtype=module.dtype)
    llama.load_state_dict(weights)
    return llama.requires_grad_(True)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return request.param


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_llama_of_copied_layers(shape, tied):
    looped = looped_module(shape, tie_word_embeddings=tied)
    plain = unrolled(looped)
    ours, theirs = (it(IDS, output_hidden_states=True) for it in (looped, plain))
    assert torch.equal(ours.logits, theirs.logits)
    assert len(ours.hidden_states) == shape.num_layers + 1
    assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))


def test_it_generates_what_the_llama_does_with_a_cache_and_without(shape):
    """Each loop has keys and values of its own: with one cache for all it would say others."""
    looped = looped_module(shape)
    plain = unrolled(looped)
    asked = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    expected = plain.generate(IDS, **asked)
    assert torch.equal(looped.generate(IDS, **asked), expected)
    assert torch.equal(looped.generate(IDS, **asked, use_cache=False), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_holds_stored_layers_and_comes_back(shape, tied, tmp_path):
    looped = looped_module(shape, dtype=torch.float32, tie_word_embeddings=tied)
    looped.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    places = {int(name.split(".")[2]) for name in names if ".layers." in name}
    assert places == set(range(shape.num_stored))
    assert ("lm_head.weight" in names) is not tied
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["num_hidden_layers"] == shape.num_layers
    assert written["model_type"] == "looped_llama"

    found, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert type(found) is LoopedLlamaForCausalLM
    assert not any(report.values())
    assert AutoConfig.from_pretrained(tmp_path).loop_shape == shape
    assert torch.equal(found(IDS).logits, looped(IDS).logits)
    # What came back shares its layers, as what was saved does.
    assert found.num_parameters() == looped.num_parameters()
    with torch.no_grad():
        for weight in found.parameters():
            weight.mul_(1.5)
    assert torch.equal(found(IDS).logits, unrolled(found)(IDS).logits)


def test_parameters_are_counted_once(shape):
    looped = looped_module(shape)
    stored = DraftShape.of(llama_config(shape))
    stored = DraftShape(**{**_sizes(stored), "layers": shape.num_stored})
    assert looped.num_parameters() == stored.num_parameters(looped.config)


def test_a_deep_copy_shares_within_itself_only(shape):
    looped = looped_module(shape)
    before = looped(IDS).logits
    twin = copy.deepcopy(looped)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(1.5)
    assert torch.equal(looped(IDS).logits, before)
    assert torch.equal(twin(IDS).logits, unrolled(twin)(IDS).logits)
    twin.load_state_dict(looped.state_dict())
    assert torch.equal(twin(IDS).logits, before)


def test_a_state_without_a_layer_is_refused():
    looped = looped_module(SHAPES[1])
    state = {name: it for name, it in looped.state_dict().items() if ".layers.2." not in name}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*model\.layers\.2\."):
        looped.load_state_dict(state)


def test_the_layers_are_a_list_in_the_order_that_they_run():
    layers = looped_module(SHAPES[1]).model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(9))
    assert [layers[index] for index in range(-9, 0)] == list(layers)
    assert list(layers[3:5]) == [layers[3], layers[4]]
    assert layers[3].mlp is layers[1].mlp
    assert layers[3].self_attn is not layers[1].self_attn
    assert layers[3].self_attn.q_proj is layers[1].self_attn.q_proj
    assert layers[7].mlp is not layers[1].mlp


# -- depths --------------------------------------------------------------------------------------


def test_the_last_exit_is_the_model_and_earlier_ones_are_models_of_fewer_loops():
    """Without a coda, the head behind loop r says what a model of r loops says."""
    shape = SHAPES[0]
    looped = looped_module(shape)
    exits = looped.exit_logits(IDS)
    assert exits.shape == (4, *IDS.shape, VOCAB_SIZE)
    assert torch.equal(exits[-1], looped(IDS).logits)
    for loops in range(1, shape.loops):
        shorter = looped_module(LoopShape(group=2, loops=loops), seed=5)
        shorter.load_state_dict(looped.state_dict())
        assert torch.equal(exits[loops - 1], shorter(IDS).logits)


def test_early_exits_skip_the_coda_and_the_last_has_it():
    shape = SHAPES[1]
    looped = looped_module(shape)
    exits = looped.exit_logits(IDS)
    states = looped(IDS, output_hidden_states=True).hidden_states
    for loop in range(shape.loops - 1):
        behind = states[1 + 2 * (loop + 1)]
        assert torch.equal(exits[loop], looped.lm_head(looped.model.norm(behind)))
    assert torch.equal(exits[-1], looped(IDS).logits)


def test_every_depth_moves_the_shared_weights():
    """The gradient of a shared weight is the sum over all places that it is used in."""
    looped = looped_module(SHAPES[0])
    looped.exit_logits(IDS).pow(2).mean().backward()
    copies = unrolled(looped)
    norm, head = copies.model.norm, copies.lm_head
    states = copies(IDS, output_hidden_states=True).hidden_states
    exits = [*(head(norm(states[layer])) for layer in (2, 4, 6)), head(states[8])]
    torch.stack(exits).pow(2).mean().backward()
    shared = dict(looped.model.layers[1].named_parameters())
    for name, weight in shared.items():
        parts = [copies.model.layers[at].get_parameter(name).grad for at in (1, 3, 5, 7)]
        assert all(part.abs().max() > 0 for part in parts)
        # Another order of summation, in float64.
        torch.testing.assert_close(weight.grad, sum(parts), rtol=1e-9, atol=1e-15)


def test_the_gradient_of_shared_weights_is_the_numeric_one():
    """Along the gradient, the slope is its length."""
    looped = looped_module(SHAPES[0])
    looped.exit_logits(IDS).pow(2).mean().backward()
    weights = [it for it in looped.model.layers.parameters() if it.dim() == 2]
    slope = torch.stack([weight.grad.norm() for weight in weights]).norm()
    step, values = 1e-3, []
    with torch.no_grad():
        for shift in (step, -2 * step):
            for weight in weights:
                weight.add_(shift * weight.grad / slope)
            values.append(looped.exit_logits(IDS).pow(2).mean())
    # Norms compute in float32, which leaves a central difference of this step four digits.
    assert ((values[0] - values[1]) / (2 * step)).item() == pytest.approx(slope.item(), rel=1e-3)


def test_checkpointed_activations_give_the_same_gradients():
    plain, saving = looped_module(SHAPES[1]), looped_module(SHAPES[1])
    saving.activation_checkpointing_enable()
    for module in (plain, saving):
        module.train().exit_logits(IDS).pow(2).mean().backward()
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


# -- configurations ------------------------------------------------------------------------------


def test_the_number_of_layers_follows_and_is_checked():
    config = LoopedLlamaConfig(prelude_layers=1, group_layers=3, num_loops=2, coda_layers=1)
    assert config.num_hidden_layers == 8
    with pytest.raises(ModelError, match=r"= 8; got 6") as caught:
        LoopedLlamaConfig(group_layers=2, num_loops=4, num_hidden_layers=6)
    assert "leave num_hidden_layers out" in caught.value.hint
    with pytest.raises(ModelError, match="loops to be an integer of at least 1; got 0"):
        LoopedLlamaConfig(num_loops=0)


def test_a_llama_of_another_depth_is_no_template():
    with pytest.raises(ModelError, match=r"= 8; got 3"):
        LoopedLlamaConfig.of_llama(tiny_config("llama"), SHAPES[0])


def test_a_new_model_is_trained_and_saved_like_others(tmp_path):
    build_module(
        tiny_config("llama", tie_word_embeddings=True),
        attn_implementation="eager",
        dtype=torch.float32,
    ).save_pretrained(tmp_path / "like")
    like = load_trainable(tmp_path / "like")
    shape = DraftShape(layers=9, hidden=24, heads=3, kv_heads=1, head_dim=6, intermediate=20)
    model, other = (blank_model(like, shape, loops=SHAPES[1], seed=seed) for seed in (1, 2))
    assert LoopShape.of(model.config) == SHAPES[1]
    assert DraftShape.of(model.config) == shape
    assert not torch.equal(model.embedding, other.embedding)
    (tmp_path / "new").mkdir()
    save_trainable(model, tmp_path / "new", "card")
    found = load_trainable(tmp_path / "new")
    assert torch.equal(found.logits(IDS), model.logits(IDS))
    assert isinstance(blank_model(like, shape).module, LlamaForCausalLM)


def _sizes(shape):
    return {name: getattr(shape, name) for name in shape.__dataclass_fields__}
