"""Published EAGLE heads: SafeAILab's EAGLE-3 and the speculators format, by their real names."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from foretoken.errors import ModelError
from foretoken.models.heads.eagle import load_eagle
from foretoken.models.heads.files import TargetShape, read_head
from tests.heads import random_tensors

VOCAB_SIZE, HIDDEN, DRAFT_VOCAB = 40, 24, 16
TARGET = TargetShape(VOCAB_SIZE, HIDDEN, 12)
SHARED = random_tensors(TARGET)
LAYERS = (2, 6, 9)  # the paper's, of twelve
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 700.0,
    "max_position_embeddings": 128,
}
EAGLE_3 = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "draft_vocab_size": DRAFT_VOCAB,
    "tie_word_embeddings": False,
    **SIZES,
}
SPECULATORS_3 = {
    "architectures": ["Eagle3Speculator"],
    "speculators_model_type": "eagle3",
    "draft_vocab_size": DRAFT_VOCAB,
    "norm_before_residual": False,
    "transformer_layer_config": {"model_type": "llama", **SIZES},
    "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "org/target"}},
}
SPECULATORS_1 = {
    "architectures": ["EagleSpeculator"],
    "speculators_model_type": "eagle",
    "layernorms": False,
    "fusion_bias": False,
    "transformer_layer_config": {"model_type": "llama", **SIZES},
}


def random_state(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        state[name] = 1 + 0.2 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5
    return state


def eagle3_state(prefix, seed=0):
    """Return the tensors of a published EAGLE-3 head whose layer has a name."""
    state = random_state(
        {
            "fc.weight": (HIDDEN, 3 * HIDDEN),
            f"{prefix}.self_attn.q_proj.weight": (24, 2 * HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (12, 2 * HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (12, 2 * HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, 24),
            f"{prefix}.mlp.gate_proj.weight": (20, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": (20, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (HIDDEN, 20),
            f"{prefix}.hidden_norm.weight": (HIDDEN,),
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
            "norm.weight": (HIDDEN,),
            "lm_head.weight": (DRAFT_VOCAB, HIDDEN),
        },
        seed,
    )
    draft_ids = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    draft_ids = draft_ids[:DRAFT_VOCAB].sort().values
    state["d2t"] = draft_ids - torch.arange(DRAFT_VOCAB)  # offsets
    state["t2d"] = torch.zeros(VOCAB_SIZE, dtype=torch.bool).index_fill_(0, draft_ids, True)
    return state


def norm_of(state, name, x, size=HIDDEN):
    norm = LlamaRMSNorm(size, eps=1e-5)
    norm.weight.data = state[name]
    return norm(x)


def expected_eagle3(state, prefix, token_ids, hidden, *, normed_residual=False, fc_norm=None):
    """Return logits and outputs by the published code's steps: row i reads token i + 1, state i."""
    embedding = state.get("embed_tokens.weight", SHARED.embedding)
    joined = torch.cat([hidden[layer][0] for layer in LAYERS], dim=-1)
    if fc_norm:
        joined = norm_of(state, fc_norm, joined, 3 * HIDDEN)
    states = (joined @ state["fc.weight"].T)[:-2]
    residual, rows = states, len(states)
    normed = norm_of(state, f"{prefix}.hidden_norm.weight", states)
    if normed_residual:
        residual = normed
    embeds = norm_of(state, f"{prefix}.input_layernorm.weight", embedding[token_ids[0, 1:-1]])
    x = torch.cat((embeds, normed), dim=-1)
    q, k, v = (
        (x @ state[f"{prefix}.self_attn.{name}_proj.weight"].T).view(1, rows, -1, 6).transpose(1, 2)
        for name in "qkv"
    )
    rotary = LlamaRotaryEmbedding(LlamaConfig(**SIZES))
    q, k = apply_rotary_pos_emb(q, k, *rotary(x, torch.arange(rows)[None]))
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    mixed = mixed.transpose(1, 2).reshape(rows, -1)
    x = residual + mixed @ state[f"{prefix}.self_attn.o_proj.weight"].T
    inner = norm_of(state, f"{prefix}.post_attention_layernorm.weight", x)
    gate = nn.functional.silu(inner @ state[f"{prefix}.mlp.gate_proj.weight"].T)
    up = inner @ state[f"{prefix}.mlp.up_proj.weight"].T
    x = x + (gate * up) @ state[f"{prefix}.mlp.down_proj.weight"].T
    return norm_of(state, "norm.weight", x) @ state["lm_head.weight"].T, x


def publish(folder, config, state, *, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    state = {key: value.clone() for key, value in state.items()}
    if name.endswith(".bin"):
        torch.save(state, folder / name)
    else:
        save_file(state, folder / name)
    return folder


def load(folder, target=TARGET):
    files = read_head(folder, "eagle", target)
    return load_eagle(files, target, SHARED)


def make_text(rows=9):
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(0, VOCAB_SIZE, (1, rows), generator=generator)
    hidden = {layer: torch.randn(1, rows, HIDDEN, generator=generator) for layer in (*LAYERS, 12)}
    return token_ids, hidden


def assert_says(module, logits, outputs):
    token_ids, hidden = make_text()
    [states] = module(token_ids, hidden)
    torch.testing.assert_close(module.logits(states[0]), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[0], outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("has_embedding", [False, True])
def test_eagle3_checkpoint_says_what_its_authors_code_says(tmp_path, name, has_embedding):
    state = eagle3_state("midlayer")
    if has_embedding:
        state["embed_tokens.weight"] = torch.randn(VOCAB_SIZE, HIDDEN)
    module = load(publish(tmp_path / "head", EAGLE_3, state, name=name))
    assert module.design.target_layers == LAYERS
    assert torch.equal(module.draft_ids, state["t2d"].nonzero().flatten())
    assert_says(module, *expected_eagle3(state, "midlayer", *make_text()))


def test_layers_that_the_files_name_are_read(tmp_path):
    config = {**EAGLE_3, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 5, 11]}}
    module = load(publish(tmp_path / "head", config, eagle3_state("midlayer")))
    assert module.design.target_layers == (1, 5, 11)


def test_head_of_the_whole_vocabulary_needs_no_table(tmp_path):
    state = eagle3_state("midlayer")
    state["lm_head.weight"] = torch.randn(VOCAB_SIZE, HIDDEN)
    state["d2t"] = torch.zeros(VOCAB_SIZE, dtype=torch.int64)
    state["t2d"] = torch.ones(VOCAB_SIZE, dtype=torch.bool)
    config = {**EAGLE_3, "draft_vocab_size": VOCAB_SIZE}
    module = load(publish(tmp_path / "head", config, state))
    assert module.design.draft_vocab_size is None
    assert_says(module, *expected_eagle3(state, "midlayer", *make_text()))


@pytest.mark.parametrize("normed_residual", [False, True])
@pytest.mark.parametrize("fc_norm", [None, "input_norm.weight"])
def test_speculators_eagle3_checkpoint_says_what_the_library_says(
    tmp_path, normed_residual, fc_norm
):
    state = eagle3_state("layers.0")
    state["embed_tokens.weight"] = torch.randn(VOCAB_SIZE, HIDDEN)
    state["verifier_norm.weight"] = torch.ones(HIDDEN)
    state["verifier_lm_head.weight"] = torch.randn(DRAFT_VOCAB, HIDDEN)
    if fc_norm:
        state[fc_norm] = 1 + 0.2 * torch.randn(3 * HIDDEN)
    config = {
        **SPECULATORS_3,
        "norm_before_residual": normed_residual,
        "norm_before_fc": fc_norm is not None,
    }
    module = load(publish(tmp_path / "head", config, state))
    text = make_text()
    expected = expected_eagle3(
        state, "layers.0", *text, normed_residual=normed_residual, fc_norm=fc_norm
    )
    assert_says(module, *expected)


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("prefixes", [("transformer", "fusion_fc"), ("layers.0", "fc")])
def test_speculators_eagle_checkpoint_says_what_the_library_says(tmp_path, has_norms, prefixes):
    """The library's layer is transformers' own, without its first norm unless told."""
    layer_name, fc_name = prefixes
    torch.manual_seed(0)
    llama = LlamaConfig(**SIZES)
    llama._attn_implementation = "eager"
    layer = LlamaDecoderLayer(llama, 0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    state = {f"{layer_name}.{key}": value.data for key, value in layer.named_parameters()}
    state[f"{fc_name}.weight"] = torch.randn(HIDDEN, 2 * HIDDEN) * 0.2
    state[f"{fc_name}.bias"] = torch.randn(HIDDEN)
    token_ids, hidden = make_text()
    embeds, states = SHARED.embedding[token_ids[:, 1:-1]], hidden[12][:, :-2]
    if has_norms:
        for name in ("embedding_layernorm.weight", "pre_lm_head_layernorm.weight"):
            state[name] = 1 + 0.2 * torch.randn(HIDDEN)
        embeds = norm_of(state, "embedding_layernorm.weight", embeds)
    else:
        del state[f"{layer_name}.input_layernorm.weight"]
        layer.input_layernorm = nn.Identity()
    fused = torch.cat((embeds, states), dim=-1) @ state[f"{fc_name}.weight"].T
    fused = fused + state[f"{fc_name}.bias"]
    rows = torch.arange(fused.shape[1])[None]
    mask = torch.full((fused.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    found = layer(
        fused,
        attention_mask=mask,
        position_ids=rows,
        position_embeddings=LlamaRotaryEmbedding(llama)(fused, rows),
    )
    found = (found[0] if isinstance(found, tuple) else found).detach().view(-1, HIDDEN)
    said = norm_of(state, "pre_lm_head_layernorm.weight", found) if has_norms else found
    config = {**SPECULATORS_1, "layernorms": has_norms, "fusion_bias": True}
    module = load(publish(tmp_path / "head", config, state))
    assert_says(module, (said @ SHARED.head.T).detach(), found)


# -- refusals ----------------------------------------------------------------------------------


def test_head_of_another_kind_is_refused(tmp_path):
    folder = publish(tmp_path / "head", EAGLE_3, eagle3_state("midlayer"))
    with pytest.raises(ModelError, match="of the kind 'eagle'; 'medusa' is needed"):
        read_head(folder, "medusa", TARGET)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (TargetShape(VOCAB_SIZE + 1, HIDDEN, 12), "vocab_size 40.*this target has 41"),
        (TargetShape(VOCAB_SIZE, HIDDEN + 8, 12), "hidden_size 24.*this target has 32"),
    ],
    ids=["vocabulary", "width"],
)
@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_head_of_another_target_is_refused(tmp_path, layout, target, message):
    is_own = layout == "eagle3"
    state = eagle3_state("midlayer" if is_own else "layers.0")
    folder = publish(tmp_path / "head", EAGLE_3 if is_own else SPECULATORS_3, state)
    with pytest.raises(ModelError, match=message):
        read_head(folder, "eagle", target)


@pytest.mark.parametrize("kind", ["mlp", "dflash", "peagle"])
def test_speculators_of_other_kinds_are_refused(tmp_path, kind):
    config = {**SPECULATORS_3, "speculators_model_type": kind}
    folder = publish(tmp_path / "head", config, eagle3_state("layers.0"))
    with pytest.raises(ModelError, match=f"of the kind '{kind}'"):
        read_head(folder, "eagle", TARGET)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


BROKEN = {
    "no d2t": (EAGLE_3, lambda state: without(state, "d2t"), "needs a table 'd2t'"),
    "short d2t": (
        EAGLE_3,
        lambda state: {**state, "d2t": state["d2t"][:-1]},
        r"it has one of shape \(15,\)",
    ),
    "wild d2t": (
        EAGLE_3,
        lambda state: {**state, "d2t": state["d2t"] + 30},
        "its target has 40",
    ),
    "no fc": (EAGLE_3, lambda state: without(state, "fc.weight"), "'fc.weight'.*it is missing"),
    "other sizes": (
        {**EAGLE_3, "intermediate_size": 28},
        lambda state: state,
        "'layer.mlp.down_proj.weight'",
    ),
    "unknown tensor": (
        EAGLE_3,
        lambda state: {**state, "wings.weight": torch.ones(3)},
        "'wings.weight'.*asks for no such tensor",
    ),
    "not finite": (
        EAGLE_3,
        lambda state: {**state, "norm.weight": torch.full((HIDDEN,), torch.nan)},
        "NaN or infinite",
    ),
    "two layers": ({**EAGLE_3, "num_hidden_layers": 2}, lambda state: state, "one layer"),
    "another layer": ({**EAGLE_3, "model_type": "bert"}, lambda state: state, "'bert'"),
    "no embedding": (
        {**EAGLE_3, "target_hidden_size": 48},
        lambda state: state,
        "has no 'embed_tokens.weight'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused(tmp_path, case):
    config, change, message = BROKEN[case]
    folder = publish(tmp_path / "head", config, change(eagle3_state("midlayer")))
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_directory_without_weights_is_refused(tmp_path):
    folder = tmp_path / "head"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(EAGLE_3))
    with pytest.raises(ModelError, match=r"has no model.safetensors"):
        load(folder)
