"""Draft models from nothing: of the shape asked for, and served compiled."""

from dataclasses import replace

import pytest
import torch

from foretoken.errors import ConfigError
from foretoken.models.blank import blank_model
from foretoken.models.decoder import CompiledDecoder
from foretoken.models.draft_shape import DraftShape
from foretoken.models.draft_vocabulary import DraftVocabulary
from foretoken.models.loading import load_model
from foretoken.models.trainable import load_trainable, save_trainable
from tests.fakes import CONTEXT_LIMIT, VOCAB_SIZE, build_module, tiny_config

SHAPE = DraftShape(layers=2, hidden=24, heads=3, kv_heads=1, head_dim=6, intermediate=20)
IDS = torch.tensor([[3, 9, 27, 20]])


@pytest.fixture
def save_target(tmp_path):
    def save(family, **changes):
        module = build_module(
            tiny_config(family, **changes), attn_implementation="eager", dtype=torch.float32
        )
        module.save_pretrained(tmp_path / family)
        return load_trainable(tmp_path / family)

    return save


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_it_has_the_shape_and_is_compiled_whatever_the_target_is(save_target, tmp_path, family):
    target = save_target(family, eos_token_id=5)
    model = blank_model(target, SHAPE)
    assert DraftShape.of(model.config) == SHAPE
    assert model.num_parameters == SHAPE.num_parameters(model.config)
    (tmp_path / "draft").mkdir()
    save_trainable(model, tmp_path / "draft", "card")
    served = load_model(str(tmp_path / "draft"))
    assert isinstance(served._forward_pass, CompiledDecoder)
    assert (served.info.vocab_size, served.info.context_limit) == (VOCAB_SIZE, CONTEXT_LIMIT)
    assert served.info.eos_ids == {5}


def test_positions_are_encoded_as_in_the_target(save_target):
    rope = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    model = blank_model(save_target("llama", rope_parameters=rope), SHAPE)
    assert model.config.rope_parameters == rope
    rope = {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 2.0}
    model = blank_model(save_target("llama", rope_parameters=rope), SHAPE)
    assert model.config.rope_parameters["rope_type"] == "default"


def test_the_seed_decides_and_other_randomness_is_left_alone(save_target):
    target = save_target("llama")
    before = torch.get_rng_state()
    with torch.no_grad():
        one, same, other = (blank_model(target, SHAPE, seed=seed).logits(IDS) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_shape_and_vocabulary_go_together(save_target):
    target = save_target("llama")
    vocabulary = DraftVocabulary.choose([[4, 7]], 20, target.embedding)
    reduced = replace(SHAPE, vocab=20)
    model = blank_model(target, reduced, vocabulary=vocabulary)
    assert model.num_parameters == reduced.num_parameters(target.config)
    assert model.logits(IDS).shape == (1, 4, 20)
    for shape, given in (
        (SHAPE, vocabulary),
        (reduced, None),
        (replace(SHAPE, vocab=21), vocabulary),
    ):
        with pytest.raises(ConfigError, match=r"the draft's shape says .*, its vocabulary "):
            blank_model(target, shape, vocabulary=given)
