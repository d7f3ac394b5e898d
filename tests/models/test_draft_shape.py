"""Draft shapes: what they allow, how they are written, how many parameters they mean."""

from dataclasses import replace

import pytest

from foretoken.errors import ConfigError
from foretoken.models.draft_shape import DraftShape
from tests.fakes import build_module, tiny_config

SHAPE = DraftShape(layers=2, hidden=48, heads=6, kv_heads=2, head_dim=10, intermediate=70)


def test_text_and_back():
    assert DraftShape.parse(str(SHAPE)) == SHAPE
    small = replace(SHAPE, vocab=100)
    assert DraftShape.parse(str(small)) == small
    assert str(small).endswith(",vocab=100")


def test_what_is_left_out_is_as_in_another_shape():
    assert DraftShape.parse("layers=1, vocab=9", like=SHAPE) == replace(SHAPE, layers=1, vocab=9)
    assert DraftShape.parse("", like=SHAPE) == SHAPE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers=0", "layers is an integer >= 1; got 0"),
        ("vocab=0", "vocab is an integer >= 1; got 0"),
        ("hidden=50", "hidden is a multiple of heads=6; got 50"),
        ("heads=3", "heads is a multiple of kv_heads=2; got 3"),
        ("head_dim=9", "head_dim is an even number; got 9"),
        ("layers=two", "layers is an integer; got 'two'"),
        ("depth=2", "unknown option of shape 'depth'"),
        ("layers", "options are written key=value"),
    ],
)
def test_errors_say_what_is_allowed(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        DraftShape.parse(text, like=SHAPE)
    assert "layers, hidden, heads, kv_heads, head_dim, intermediate, vocab" in caught.value.hint


def test_without_another_shape_every_size_but_the_vocabulary_is_needed():
    with pytest.raises(ConfigError, match="needs the option 'hidden'"):
        DraftShape.parse("layers=2")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_as_transformers_builds_them(family, tied):
    target = tiny_config(family, tie_word_embeddings=tied)
    assert DraftShape.of(target).layers == 3
    for shape in (DraftShape.of(target), SHAPE, replace(SHAPE, vocab=40)):
        config = tiny_config(
            family,
            **{**shape.as_config(), "layer_types": None},
            tie_word_embeddings=tied,
            vocab_size=shape.vocab or target.vocab_size,
        )
        module = build_module(config, attn_implementation="eager")
        assert shape.num_parameters(target) == sum(it.numel() for it in module.parameters())
