"""Widened models say what the small ones say."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from foretoken.assets import EMBEDDED
from foretoken.bench.inflate import Shape, inflate, resolve_sizes
from foretoken.bench.widen import Sizes
from foretoken.errors import ConfigError, ModelError
from foretoken.models.loading import load_model
from foretoken.models.loops import LoopShape
from tests.looped import make_looped

SMALL = Sizes(hidden=24, layers=2, head_dim=6, heads=4, kv_heads=2, intermediate=20)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """Return a function that writes a random Llama of the small sizes."""

    def make(*, kv_heads=2, tied=False, **more):
        torch.manual_seed(0)
        config = LlamaConfig(
            **{**SMALL.as_config(), "num_key_value_heads": kv_heads},
            vocab_size=31,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            rms_norm_eps=1e-3,
            **more,
        )
        module = LlamaForCausalLM(config).double()
        with torch.no_grad():  # fresh norms are ones, which would hide a mistake in their scale
            for name, weight in module.named_parameters():
                weight.normal_(1.0, 0.3) if "norm" in name else weight.normal_(0.0, 0.4)
        folder = tmp_path_factory.mktemp("small")
        module.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def exact_norms(monkeypatch):
    """Let norms compute in the model's own dtype: transformers rounds them to float32."""

    def forward(norm, hidden):
        mean_square = hidden.pow(2).mean(-1, keepdim=True)
        return norm.weight * hidden * torch.rsqrt(mean_square + norm.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@torch.inference_mode()
def logits(folder, dtype=torch.float64):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    return model(torch.randint(model.config.vocab_size, (2, 23), generator=generator)).logits


@pytest.mark.parametrize(
    "shape",
    [
        "hidden=24",
        "hidden=60",
        "hidden=60,head_dim=12",
        "hidden=72,head_dim=18,heads=4,layers=5",
        "hidden=45,layers=3,head_dim=12,heads=9,kv_heads=3,intermediate=50",
        "hidden=48,heads=12,kv_heads=2",
        "hidden=48,heads=8,kv_heads=8",  # each key head is copied for its query heads
        "hidden=48,heads=12,kv_heads=6,head_dim=24",
    ],
)
@pytest.mark.usefixtures("exact_norms")
def test_the_function_is_the_same(small_model, tmp_path, shape):
    """Double arithmetic in another order: 1e-10 is far above its error, far below any mistake."""
    source = small_model()
    wide = inflate(source, Shape.parse(f"{shape},noise=0"), dtype="float64", folder=tmp_path)
    torch.testing.assert_close(logits(wide), logits(source), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.usefixtures("exact_norms")
def test_so_it_is_for_other_small_models(small_model, tmp_path, kv_heads, tied):
    source = small_model(kv_heads=kv_heads, tied=tied)
    shape = Shape(hidden=72, layers=4, head_dim=12, heads=8, noise=0)
    wide = inflate(source, shape, dtype="float64", folder=tmp_path)
    torch.testing.assert_close(logits(wide), logits(source), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("exact_norms")
def test_scaled_rotary_positions(small_model, tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    source = small_model(rope_parameters=rope)
    shape = Shape(hidden=48, head_dim=18, heads=4, noise=0)
    wide = inflate(source, shape, dtype="float64", folder=tmp_path)
    torch.testing.assert_close(logits(wide), logits(source), rtol=0, atol=1e-10)


def test_noise_keeps_the_text_and_makes_all_matrices_different(tmp_path):
    """With noise only the norms' mean square moves, by less than a millionth here."""
    source = EMBEDDED["stories"].target
    small = Sizes.of(json.loads((source / "config.json").read_text()))
    shape = Shape(hidden=2 * small.hidden, layers=small.layers + 3, noise=1e-5)
    wide = inflate(source, shape, dtype="float32", folder=tmp_path)
    torch.testing.assert_close(
        logits(wide, torch.float32), logits(source, torch.float32), rtol=0, atol=1e-3
    )
    texts = []
    for folder in (source, wide):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        output = model.generate(
            torch.tensor([[1, 40, 50]]), max_new_tokens=32, do_sample=False, pad_token_id=0
        )
        texts.append(output.tolist())
    assert texts[0] == texts[1]
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    sums = {(weight.shape, weight.double().sum().item()) for weight in matrices}
    assert len(sums) == len(matrices)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.usefixtures("exact_norms")
def test_looped_models_keep_their_loops(tmp_path, tied):
    options = {"prelude": 1, "loops": 3, "coda": 1, "hidden": 24, "tie_word_embeddings": tied}
    source = Path(make_looped(tmp_path / "small", dtype=torch.float64, **options))
    shape = Shape.parse("hidden=60,head_dim=12,intermediate=90,noise=0")
    wide = inflate(source, shape, dtype="float64", folder=tmp_path)
    torch.testing.assert_close(logits(wide), logits(source), rtol=0, atol=1e-10)
    loops = load_model(str(wide)).info.loops
    assert loops == LoopShape(prelude=1, group=2, loops=3, coda=1)
    names = load_file(wide / "model.safetensors").keys()
    assert {name.split(".")[2] for name in names if ".layers." in name} == set("0123")


def test_layers_of_looped_models_stay(tmp_path):
    source = Path(make_looped(tmp_path / "small", hidden=24))
    with pytest.raises(ConfigError, match=r"runs its layers in loops.*got layers=9") as caught:
        inflate(source, Shape(hidden=48, layers=9), dtype="float32", folder=tmp_path)
    assert "leave layers out" in caught.value.hint


def test_files_are_those_of_a_model_and_made_once(small_model, tmp_path):
    source = small_model()
    (source / "tokenizer.json").write_text("{}")
    shape = Shape(hidden=48)
    wide = inflate(source, shape, dtype="bfloat16", folder=tmp_path / "new" / "folder")
    assert (wide / "tokenizer.json").read_text() == "{}"
    config = json.loads((wide / "config.json").read_text())
    assert (config["hidden_size"], config["dtype"]) == (48, "bfloat16")
    before = (wide / "model.safetensors").stat().st_mtime_ns
    assert inflate(source, shape, dtype="bfloat16", folder=wide.parent) == wide
    assert (wide / "model.safetensors").stat().st_mtime_ns == before
    assert inflate(source, shape, dtype="float32", folder=wide.parent) != wide
    assert len(list(wide.parent.iterdir())) == 2


def test_the_reference_setting():
    """A 0.94M model with the cost of 488M, as in the documentation."""
    small = Sizes(hidden=128, layers=5, head_dim=16, heads=8, kv_heads=4, intermediate=352)
    shape = Shape.parse("hidden=1536,layers=20,head_dim=64,intermediate=4096")
    big = resolve_sizes(small, shape)
    assert (big.heads, big.kv_heads) == (24, 4)
    attention = 2 * big.heads * big.head_dim + 2 * big.kv_heads * big.head_dim
    num_weights = big.layers * big.hidden * (attention + 3 * big.intermediate + 2)
    num_weights += big.hidden * (105 + 1)
    assert round(num_weights / 1e6) == 488


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("hidden=12", "hidden=12; it has to be at least 24"),
        ("hidden=48,layers=1", "layers=1; it has to be at least 2"),
        ("hidden=48,head_dim=16", "head_dim=16; it has to be a multiple of 6"),
        ("hidden=48,heads=2", "heads=2; it has to be at least 4"),
        ("hidden=48,intermediate=8", "intermediate=8; it has to be at least 20"),
        ("hidden=48,heads=8,kv_heads=3", "kv_heads=3; it has to be for heads=8 one of 2, 4, 8"),
        ("hidden=48,heads=5", "heads=5; it has to be a divisor of hidden=48"),
        ("hidden=48,noise=-1", "noise=-1.0; it has to be at least 0"),
    ],
)
def test_shapes_that_cannot_be_made(shape, message):
    with pytest.raises(ConfigError, match=message):
        resolve_sizes(SMALL, Shape.parse(shape))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden", "options are written"),
        ("hiden=48", "unknown option of inflate 'hiden'"),
        ("layers=4", "needs the option 'hidden'"),
        ("hidden=big", "hidden is an integer"),
    ],
)
def test_shapes_that_cannot_be_read(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Shape.parse(text)
    assert "hidden=1536,layers=20" in caught.value.hint


def test_models_that_cannot_be_widened(small_model, tmp_path):
    shape = Shape(hidden=48)
    with pytest.raises(ModelError, match=r"no config.json"):
        inflate(tmp_path, shape, dtype="float32", folder=tmp_path)
    source = tmp_path / "source"
    for change, message in [
        ({"model_type": "gpt2"}, "of type 'gpt2'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary positions of type 'yarn'"),
        ({"attention_bias": True}, "biases"),
    ]:
        shutil.copytree(small_model(), source, dirs_exist_ok=True)
        config = json.loads((source / "config.json").read_text()) | change
        (source / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=message):
            inflate(source, shape, dtype="float32", folder=tmp_path)
    with pytest.raises(ConfigError, match="float16"):
        inflate(small_model(), shape, dtype="float16", folder=tmp_path)
