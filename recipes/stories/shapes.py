"""The shapes of the two models."""

from transformers import LlamaConfig, LlamaForCausalLM
from vocabulary import CONTEXT, VOCABULARY

TARGET = {
    "hidden_size": 160,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 448,
    "head_dim": 32,
}
DRAFT = {
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 288,
    "head_dim": 32,
}


def build(shape: dict[str, int], bos: int, eos: int) -> LlamaForCausalLM:
    """A freshly initialised Llama of this shape with tied embeddings."""
    config = LlamaConfig(
        **shape,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config)


def parameters(model: LlamaForCausalLM) -> int:
    """How many parameters the model has, the tied embedding counted once."""
    return sum(weight.numel() for weight in model.parameters())
