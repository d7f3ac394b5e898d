"""Small stand-ins that many tests share: models, a tokenizer, random trees.

Models are made by transformers from tiny configurations, with random weights, in float64 on CPU:
large enough that their outputs depend on the whole context, small enough that a pass takes a
millisecond. What costs time to build is built once a process; nobody may change it.
"""

import copy
from functools import lru_cache

import torch
import transformers
from hypothesis import strategies as st

from foretoken.core.tree import TokenTree
from foretoken.models.attention import IMPLEMENTATION
from foretoken.models.modules import adapt_module

VOCAB_SIZE = 61
WINDOW = 5
CONTEXT_LIMIT = 128

_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
_LLAMA_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": CONTEXT_LIMIT,
    **_ATTENTION,
}
_MIXED = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# Family: (transformers' configuration class, what differs from its defaults).
_FAMILIES = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", {**_LLAMA_LIKE, "head_dim": 8}),
    "mistral": ("MistralConfig", {**_LLAMA_LIKE, "sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        {
            **_LLAMA_LIKE,
            **_MIXED,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": ("Gemma3TextConfig", {**_LLAMA_LIKE, **_MIXED, "head_dim": 8}),
    "phi3": ("Phi3Config", _LLAMA_LIKE),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": CONTEXT_LIMIT,
        },
    ),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT_LIMIT,
        },
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT_LIMIT,
        },
    ),
    "mixtral": ("MixtralConfig", {**_LLAMA_LIKE, "num_local_experts": 4}),
    "olmo2": ("Olmo2Config", _LLAMA_LIKE),
    "granite": ("GraniteConfig", _LLAMA_LIKE),
    "smollm3": ("SmolLM3Config", {**_LLAMA_LIKE, "no_rope_layers": [1, 0, 1]}),
    "cohere2": ("Cohere2Config", {**_LLAMA_LIKE, **_MIXED, "logit_scale": 1.0}),
    "gpt_oss": (
        "GptOssConfig",
        {**_LLAMA_LIKE, **_MIXED, "head_dim": 8, "num_local_experts": 4},
    ),
}
FAMILIES = tuple(_FAMILIES)
# Families some of whose layers see only the last `WINDOW` positions.
WINDOWED_FAMILIES = ("mistral", "gemma2", "gemma3", "cohere2", "gpt_oss")
_COMMON = {
    # Many defaults lie far outside 61 ids; no family ends a sequence by itself.
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    # Tied random weights mostly repeat the last token.
    "tie_word_embeddings": False,
}


def tiny_config(family, **changes):
    """Return a fresh configuration of a family; `changes` override its fields."""
    name, values = _FAMILIES[family]
    settings = {**_COMMON, **copy.deepcopy(values), **changes}
    return getattr(transformers, name)(**settings)


def build_module(config, seed=0, *, attn_implementation=IMPLEMENTATION, dtype=torch.float64):
    """Return a transformers model with random weights; the same seed gives the same weights.

    Weights keep the variance of their input and norms stay near 1, so that logits spread over
    several units and depend on every visible position.
    """
    with torch.random.fork_rng(devices=[]):  # some one-dimensional parameters start random
        torch.manual_seed(seed)
        module = transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config),  # from_config writes into it
            attn_implementation=attn_implementation,
            experts_implementation="eager",  # the grouped one knows no float64
            dtype=torch.float32,
        )
    generator = torch.Generator().manual_seed(seed)
    # Gemma multiplies embeddings by the root of their width; without this they drown the layers.
    embedding_scale = config.hidden_size**-0.5 if config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # norms and biases: near their initial value
                parameter.add_(0.2 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(noise * embedding_scale)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    return module.to(dtype).eval().requires_grad_(False)


@lru_cache(maxsize=64)
def tiny_language_model(family="llama", seed=0, *, dtype=torch.float64, eos_ids=(), **changes):
    """Return a shared model of a family behind our own interface.

    Args:
        family: One of `FAMILIES`.
        seed: Of its weights.
        dtype: Of weights and cache.
        eos_ids: Token ids that end a sequence; by default none does.
        changes: Override fields of the configuration; hashable values only.
    """
    config = tiny_config(family, eos_token_id=list(eos_ids) or None, **changes)
    module = build_module(config, seed, dtype=dtype)
    return adapt_module(module, name=f"tiny-{family}")


@lru_cache(maxsize=64)
def plain_module(family="llama", seed=0, *, dtype=torch.float64, eos_ids=(), **changes):
    """Return transformers' own model with the weights of `tiny_language_model`.

    Its attention is SDPA, or eager where the family has no SDPA.
    """
    config = tiny_config(family, eos_token_id=list(eos_ids) or None, **changes)
    try:
        return build_module(config, seed, attn_implementation="sdpa", dtype=dtype)
    except ValueError:
        return build_module(config, seed, attn_implementation="eager", dtype=dtype)


def greedy_ids(module, prompt_ids, num_tokens):
    """Return the greedy continuation by a plain transformers model, without any cache."""
    token_ids = list(prompt_ids)
    with torch.inference_mode():
        for _ in range(num_tokens):
            logits = module(input_ids=torch.tensor([token_ids]), use_cache=False).logits
            token_ids.append(int(logits[0, -1].argmax()))
    return token_ids[len(prompt_ids) :]


ASCII_ALPHABET = b"\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?'-\""
# Bytes of é, 世 and of an emoji among them: one character may take four tokens, and most random
# sequences of them are no text at all.
UTF8_ALPHABET = ASCII_ALPHABET[:45] + b".,!?'-\"" + "é世🙂".encode()


class ByteTokenizer:
    """One token per byte of a small alphabet; the interface of `foretoken.models.tokenizer`.

    Args:
        alphabet: Byte of each token id; bytes of prompts outside it become "?".
    """

    fast_tokenizer = None

    def __init__(self, alphabet=ASCII_ALPHABET):
        self._alphabet = alphabet
        self._id_of = {byte: token_id for token_id, byte in enumerate(alphabet)}

    def encode(self, text):
        unknown = self._id_of[ord("?")]
        return [self._id_of.get(byte, unknown) for byte in text.encode()]

    def decode(self, token_ids):
        return bytes(self._alphabet[token_id] for token_id in token_ids).decode(errors="replace")

    @property
    def vocabulary(self):
        texts = [chr(byte) if byte < 128 else f"<0x{byte:02X}>" for byte in self._alphabet]
        return {text: token_id for token_id, text in enumerate(texts)}


@st.composite
def token_trees(draw, max_nodes=12, vocab=VOCAB_SIZE, root_ids=None, distinct_siblings=True):
    """Draw token trees of 1 to `max_nodes` nodes, from chains to stars.

    Args:
        draw: Given by hypothesis.
        max_nodes: Upper bound on nodes, the root included.
        vocab: Token ids are below it.
        root_ids: Strategy for the root's token; by default any.
        distinct_siblings: Whether children of one node all have different tokens.
    """
    token_ids = [draw(st.integers(0, vocab - 1) if root_ids is None else root_ids)]
    parents = [-1]
    taken = set()
    for _ in range(draw(st.integers(0, max_nodes - 1))):
        parent = draw(st.integers(0, len(parents) - 1))
        token_id = draw(st.integers(0, vocab - 1))
        if distinct_siblings and (parent, token_id) in taken:
            continue
        taken.add((parent, token_id))
        token_ids.append(token_id)
        parents.append(parent)
    return TokenTree(tuple(token_ids), tuple(parents))


def random_parents(random, num_nodes, first=0):
    """Return parents of `num_nodes` nodes staged after `first` others; -1 is the cached past.

    Args:
        random: A `random.Random`.
        num_nodes: How many.
        first: Nodes staged before, any of which may become a parent.
    """
    return [random.randrange(-1, first + node) for node in range(num_nodes)]
