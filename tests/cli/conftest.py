"""Tiny models on disk, and the command line in this process."""

import logging
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from foretoken.cli.main import run
from tests.fakes import build_module, tiny_config

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
LONG_CONTEXT = 200_000


def byte_tokenizer(alphabet):
    """Return a tokenizer with one token per byte, and an end-of-sequence token."""
    vocabulary = {symbol: token_id for token_id, symbol in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def save_model(folder, *, seed, context_limit=128, alphabet=ALPHABET, family="llama"):
    """Write a random model and its tokenizer; return the folder as text."""
    name = "n_positions" if family == "gpt2" else "max_position_embeddings"
    config = tiny_config(family, vocab_size=len(ALPHABET) + 1, **{name: context_limit})
    module = build_module(config, seed, attn_implementation="eager", dtype=torch.float32)
    module.save_pretrained(folder)
    byte_tokenizer(alphabet).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def models_on_disk(tmp_path_factory):
    """Folders of models: a target, its draft, one of another vocabulary, one of long context."""
    folder = tmp_path_factory.mktemp("models")
    return SimpleNamespace(
        target=save_model(folder / "target", seed=0),
        draft=save_model(folder / "draft", seed=1, family="gpt2"),
        stranger=save_model(folder / "stranger", seed=2, alphabet=ALPHABET[::-1]),
        long=save_model(folder / "long", seed=0, context_limit=LONG_CONTEXT),
    )


@pytest.fixture(autouse=True)
def _loud_libraries():
    """Undo what the command line turns off for its own process."""
    hub = logging.getLogger("huggingface_hub")
    before = transformers_logging.get_verbosity(), hub.level
    yield
    transformers_logging.set_verbosity(before[0])
    transformers_logging.enable_progress_bar()
    hub.setLevel(before[1])


@pytest.fixture
def cli(capfd):
    """Run the command line here; return exit code, standard output and standard error.

    It captures what the process writes, so that nothing of any library goes unnoticed.
    """

    def run_here(*arguments):
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run_here


@pytest.fixture
def generate(cli, models_on_disk):
    """Run `foretoken generate` with the tiny target; later options win over the earlier ones."""

    def run_here(*arguments):
        return cli("generate", "--model", models_on_disk.target, *arguments)

    return run_here
