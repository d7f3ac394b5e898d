"""Tiny models that carry multi-token-prediction layers, under published checkpoints' names."""

import json

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.fakes import CONTEXT_LIMIT, VOCAB_SIZE, WINDOW, build_module

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": CONTEXT_LIMIT,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
# Family: (configuration class, what differs from its defaults). GLM-4.5 and DeepSeek-V3 (latent
# attention) have layers of experts, Mellum's are dense here and see a few positions only.
_FAMILIES = {
    "glm4_moe": ("Glm4MoeConfig", {**_ROUTED, "head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_ROUTED,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "mellum": ("MellumConfig", {"head_dim": 8, "num_experts": 4, "sliding_window": WINDOW}),
}
MTP_FAMILIES = tuple(_FAMILIES)


def write_mtp_model(folder, family, *, num_layers=3, num_mtp=1, seed=1, **changes):
    """Write a model with multi-token-prediction layers after its own; return its path.

    Args:
        folder: Where to.
        family: One of `MTP_FAMILIES`.
        num_layers: The model's own layers.
        num_mtp: Layers that predict further tokens.
        seed: Of its weights.
        changes: Override fields of the configuration.
    """
    name, values = _FAMILIES[family]
    total, is_mellum = num_layers + num_mtp, family == "mellum"
    values = {**_SIZES, **values, "num_hidden_layers": total, **changes}
    if is_mellum:
        kinds = ["sliding_attention", *["full_attention"] * (num_layers - 1), "sliding_attention"]
        values |= {"layer_types": kinds, "mlp_layer_types": ["dense"] * total}
    config = getattr(transformers, name)(**values)
    build_module(config, seed, dtype=torch.float32).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    add = _as_mellum if is_mellum else _as_deepseek
    for layer in range(num_layers, total):
        add(tensors, layer, torch.Generator().manual_seed(seed + layer))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    written |= {"num_hidden_layers": num_layers, "num_nextn_predict_layers": num_mtp}
    if is_mellum:
        for key in ("layer_types", "mlp_layer_types"):
            written[f"mtp_{key}"] = written[key][num_layers:]
            written[key] = written[key][:num_layers]
    (folder / "config.json").write_text(json.dumps(written))
    return str(folder)


def _extras(size, generator):
    """Return the projection of two states to one, and three norms."""
    projection = torch.randn(size, 2 * size, generator=generator) * (2 * size) ** -0.5
    return projection * 1.5, [1 + 0.2 * torch.randn(size, generator=generator) for _ in range(3)]


def _as_deepseek(tensors, layer, generator):
    prefix = f"model.layers.{layer}."
    projection, norms = _extras(tensors["model.norm.weight"].shape[0], generator)
    names = ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
    tensors.update({prefix + name: norm for name, norm in zip(names, norms, strict=True)})
    tensors[prefix + "eh_proj.weight"] = projection
    # Published checkpoints repeat what is shared.
    tensors[prefix + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    tensors[prefix + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()


def _as_mellum(tensors, layer, generator):
    prefix = f"model.layers.{layer}."
    for name in [name for name in tensors if name.startswith(prefix)]:
        tensors["mtp.layers.0." + name.removeprefix(prefix)] = tensors.pop(name)
    projection, norms = _extras(tensors["model.norm.weight"].shape[0], generator)
    names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    tensors.update({f"mtp.{name}.weight": norm for name, norm in zip(names, norms, strict=True)})
    tensors["mtp.fc.weight"] = projection
