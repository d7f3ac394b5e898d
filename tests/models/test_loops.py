"""Models that run layers in loops: where layers lie, and that copies of them give the same bits."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from foretoken.errors import ModelError
from foretoken.models.batch import Segment
from foretoken.models.decoder import CompiledDecoder
from foretoken.models.decoder_config import is_plain_decoder, read_plain_config
from foretoken.models.loaded import adapt_loaded
from foretoken.models.loading import load_config, load_model
from foretoken.models.loops import MODEL_TYPE, LoopShape
from foretoken.models.module_pass import ModulePass
from foretoken.models.partial import LayerSet
from tests.bits import Histories
from tests.fakes import VOCAB_SIZE, tiny_config
from tests.looped import looped_config, looped_module, make_looped, unrolled

SHAPE = {"prelude": 1, "group": 2, "loops": 3, "coda": 2}
TOKEN_IDS = [(7 * place * place + 3 * place) % VOCAB_SIZE for place in range(40)]


@pytest.fixture(scope="module")
def looped(tmp_path_factory):
    """Return the folder of a looped model and its module."""
    path = tmp_path_factory.mktemp("looped") / "model"
    make_looped(path, **SHAPE)
    return path, looped_module(**SHAPE)


def output_of(model, hidden_layers=()):
    cache = model.new_cache(len(TOKEN_IDS))
    segment = Segment(cache.open(), TOKEN_IDS, range(-1, len(TOKEN_IDS) - 1))
    batch = model.batch(cache, [segment])
    return model.forward(batch, range(len(TOKEN_IDS)), hidden_layers=hidden_layers)


# -- where layers lie ------------------------------------------------------------------------


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_layers_run_in_the_order_of_the_loops(prelude, group, loops, coda):
    shape = LoopShape(prelude=prelude, group=group, loops=loops, coda=coda)
    before = list(range(prelude))
    looped = list(range(prelude, prelude + group))
    after = list(range(prelude + group, prelude + group + coda))
    assert list(shape.stored_layers) == before + loops * looped + after
    assert shape.num_layers == len(shape.stored_layers)
    assert shape.num_stored == prelude + group + coda
    virtual = [layer for loop in range(loops) for layer in shape.layers_of_loop(loop)]
    assert virtual == list(range(prelude, shape.first_of_coda))
    assert shape.first_of_coda + coda == shape.num_layers


def test_places_that_do_not_exist():
    shape = LoopShape(group=2, loops=3)
    for layer in (-1, 6):
        with pytest.raises(ValueError, match=f"virtual layers are 0 to 5; got {layer}"):
            shape.stored_of(layer)
    for loop in (-1, 3):
        with pytest.raises(ValueError, match=f"loops are 0 to 2; got {loop}"):
            shape.layers_of_loop(loop)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 0}, "group to be an integer of at least 1; got 0"),
        ({"loops": 0}, "loops to be an integer of at least 1; got 0"),
        ({"prelude": -1}, "prelude to be an integer of at least 0; got -1"),
        ({"coda": "2"}, "coda to be an integer of at least 0; got '2'"),
    ],
)
def test_shapes_that_make_no_sense(change, message):
    with pytest.raises(ModelError, match=message) as caught:
        LoopShape(**{**SHAPE, **change})
    assert "config.json" in caught.value.hint


def test_the_shape_of_a_configuration():
    assert LoopShape.of(looped_config(**SHAPE)) == LoopShape(**SHAPE)
    assert LoopShape.of(tiny_config("llama")) is None
    assert LoopShape.of(SimpleNamespace()) is None


# -- loading ---------------------------------------------------------------------------------


def test_a_looped_model_is_a_plain_decoder_that_holds_its_weights_once(looped):
    path, module = looped
    model = load_model(str(path))
    assert isinstance(model.forward_pass, CompiledDecoder)
    assert model.info.loops == LoopShape(**SHAPE)
    assert model.info.num_layers == len(model.info.kv_layers) == 9
    assert model.info.num_parameters == sum(weight.numel() for weight in module.parameters())
    num_bytes = [array.nbytes for array in model.forward_pass._weights]
    copied = load_weights(unrolled(module))
    assert sum(num_bytes) < 0.7 * sum(array.nbytes for array in copied)


def load_weights(module):
    return adapt_loaded(module).forward_pass._weights


def test_its_configuration_is_read_without_transformers(looped):
    path, _ = looped
    found = read_plain_config(str(path))
    assert found is not None
    assert is_plain_decoder(found)
    assert LoopShape.of(found) == LoopShape.of(load_config(str(path))) == LoopShape(**SHAPE)
    code = (
        "import sys; from foretoken.models.loading import load_model; "
        f"load_model({str(path)!r}); sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_configuration_leaves_out_transformers_knows(looped, tmp_path):
    path, _ = looped
    values = json.loads((path / "config.json").read_text())
    for key in ("prelude_layers", "coda_layers", "attention_bias"):
        shortened = {name: value for name, value in values.items() if name != key}
        (tmp_path / "config.json").write_text(json.dumps(shortened))
        assert read_plain_config(str(tmp_path)) is None
    assert values["model_type"] == MODEL_TYPE


def test_a_missing_stored_layer_is_named(looped, tmp_path):
    path, _ = looped
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.4.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(ModelError, match=r"the first is 'model\.layers\.4\.mlp\.up_proj"):
        load_model(str(tmp_path))


def test_modules_that_somebody_has_loaded(looped):
    path, module = looped
    compiled = adapt_loaded(module)
    assert isinstance(compiled.forward_pass, CompiledDecoder)
    assert compiled.info.loops == LoopShape(**SHAPE)
    assert torch.equal(output_of(compiled).logits, output_of(load_model(str(path))).logits)


def test_other_types_go_through_modules(looped):
    path, module = looped
    model = load_model(str(path), dtype="float64")
    assert isinstance(model.forward_pass, ModulePass)
    assert model.info.loops == LoopShape(**SHAPE)
    assert model.info.num_layers == 9
    # The module runs in float32, so it is good for about 1e-5.
    expected = module(torch.tensor([TOKEN_IDS])).logits[0].double()
    torch.testing.assert_close(output_of(model).logits, expected, rtol=0, atol=1e-4)


# -- the same as copied layers ---------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copied_layers_give_the_same_bits(tied, dtype):
    module = looped_module(dtype=dtype, tie_word_embeddings=tied, **SHAPE)
    ours, copied = adapt_loaded(module), adapt_loaded(unrolled(module))
    assert isinstance(copied.forward_pass, CompiledDecoder)
    assert copied.info.loops is None
    layers = range(ours.info.num_layers + 1)
    found, expected = output_of(ours, layers), output_of(copied, layers)
    assert torch.equal(found.logits, expected.logits)
    assert found.logits.std() > 0.3, "logits that hardly differ prove nothing"
    for layer in layers:
        assert torch.equal(found.hidden[layer], expected.hidden[layer])


def test_it_agrees_with_transformers(looped):
    path, _ = looped
    layers = range(10)
    found = output_of(load_model(str(path)), layers)
    with torch.inference_mode():
        expected = looped_module(**SHAPE)(torch.tensor([TOKEN_IDS]), output_hidden_states=True)
    torch.testing.assert_close(found.logits, expected.logits[0], rtol=1e-4, atol=1e-4)
    for layer in layers:
        torch.testing.assert_close(
            found.hidden[layer], expected.hidden_states[layer][0], rtol=1e-4, atol=1e-4
        )


def test_views_skip_layers_as_those_of_the_copies_do():
    """A layer of the first loop and one of the last, with the same weights, are two layers."""
    module = looped_module(**SHAPE)
    ours, copied = adapt_loaded(module), adapt_loaded(unrolled(module))
    for layers in (
        LayerSet.all(4),
        LayerSet.of([0, 2, 5, 6, 8]),
        LayerSet.without(9, attention=[1, 6], mlp=[3]),
    ):
        found, expected = (output_of(model.with_layers(layers)) for model in (ours, copied))
        assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_node_has_the_bits_of_plain_decoding(looped, dtype):
    path, _ = looped
    histories = Histories(load_model(str(path), dtype=dtype), 1)
    assert histories.check_random_history(3, 5) > 30
