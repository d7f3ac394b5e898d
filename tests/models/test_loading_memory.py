"""Loading through transformers' modules holds no second copy of the weights."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Olmo2Config

from foretoken.core.verdict import Exactness
from foretoken.models.loading import load_model

CONFIG = {
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Memory without a file behind it, in MiB: the most while loading, and after it. A small model
# first, so that the libraries have taken what they need.
PROGRAM = """
import re, sys, threading, time
import torch
from foretoken.models.loading import load_model

def anonymous():
    status = open("/proc/self/status").read()
    return int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) / 1024

def watch():
    while not done.wait(0.002):
        sizes.append(anonymous())

torch.set_num_threads(1)
small, large, dtype = sys.argv[1:]
load_model(small, dtype=dtype, device="cpu")
before, sizes, done = anonymous(), [0.0], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = load_model(large, dtype=dtype, device="cpu")
done.set()
thread.join()
weights = model.info.num_parameters * model.info.dtype.itemsize / 2**20
print(weights, max(sizes) - before, anonymous() - before, model.info.exactness.value)
"""


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Return directories of a tiny model and of one of 113 million parameters, in bfloat16."""
    root = tmp_path_factory.mktemp("models")
    for name, changes in (("small", {"num_hidden_layers": 1, "hidden_size": 64}), ("large", {})):
        torch.manual_seed(0)
        config = Olmo2Config(**{**CONFIG, **changes})
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        module.save_pretrained(root / name)
    return root


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_weights(directories):
    """With conversion, which is the hard case; oneDNN keeps some 50 MiB of kernels besides."""
    arguments = [str(directories / "small"), str(directories / "large"), "float32"]
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    weights, most, left, exactness = program.stdout.split()
    assert exactness == "bitwise"
    assert float(weights) > 400
    assert float(left) <= float(most) <= 1.15 * float(weights)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("tied", [False, True])
def test_the_checkpoint_does_not_stay_mapped(tmp_path, tied):
    """Embeddings and norms used to lie in its mapping, which kept a second copy of everything."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96}
    config = Olmo2Config(**{**CONFIG, **sizes, "tie_word_embeddings": tied})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype="float32", device="cpu")
    assert model.info.exactness is Exactness.BITWISE
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
