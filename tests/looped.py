"""Tiny looped models with random weights, and the Llamas that compute the same."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foretoken.models.looped import LoopedLlamaConfig, register
from foretoken.models.loops import LoopShape
from tests.fakes import CONTEXT_LIMIT, VOCAB_SIZE, build_module

_LOOPED_FIELDS = ("model_type", "prelude_layers", "group_layers", "num_loops", "coda_layers")


def looped_config(*, prelude=0, group=2, loops=3, coda=0, hidden=32, vocab=VOCAB_SIZE, **changes):
    """Return the configuration of a tiny looped model; `changes` override fields of Llama's."""
    settings = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": hidden + hidden // 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_LIMIT,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        **changes,
    }
    return LoopedLlamaConfig(
        prelude_layers=prelude, group_layers=group, num_loops=loops, coda_layers=coda, **settings
    )


def looped_module(seed=0, *, dtype=torch.float32, attn_implementation="eager", **sizes):
    """Return a looped module of transformers; `sizes` are those of `looped_config`."""
    register()
    return build_module(
        looped_config(**sizes), seed, attn_implementation=attn_implementation, dtype=dtype
    )


def make_looped(folder, *, seed=0, dtype=torch.float32, **sizes):
    """Write a looped model into a folder and return its path as text.

    Args:
        folder: Created if missing.
        seed: Of its weights.
        dtype: Of its weights.
        sizes: `prelude`, `group`, `loops`, `coda`, `hidden`, `vocab`; see `looped_config`.
    """
    looped_module(seed, dtype=dtype, **sizes).save_pretrained(folder)
    return str(folder)


def unrolled(module):
    """Return a Llama whose layers are copies of a looped module's, one for each that runs."""
    values = module.config.to_dict()
    config = LlamaConfig(
        **{key: value for key, value in values.items() if key not in _LOOPED_FIELDS}
    )
    shape = LoopShape.of(module.config)
    weights = module.state_dict()
    copies = {key: value for key, value in weights.items() if "model.layers." not in key}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{shape.stored_of(layer)}."
        copies |= {
            key.replace(prefix, f"model.layers.{layer}."): value.clone()
            for key, value in weights.items()
            if key.startswith(prefix)
        }
    llama = LlamaForCausalLM(config).to(module.dtype)
    llama.load_state_dict(copy.deepcopy(copies))
    return llama.eval().requires_grad_(False)
