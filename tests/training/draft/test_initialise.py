"""How draft models begin: cut from the target or from nothing, always the same."""

import pytest
import torch

from foretoken.errors import ConfigError
from foretoken.models.draft_shape import DraftShape
from foretoken.models.trainable import load_trainable
from foretoken.training.draft.initialise import choose_vocabulary, initialise
from tests.fakes import VOCAB_SIZE, build_module, tiny_config

IDS = torch.randint(VOCAB_SIZE, (4, 15), generator=torch.Generator().manual_seed(0))
EXAMPLES = IDS.tolist()


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    config = tiny_config("qwen3", eos_token_id=[60])
    build_module(config, attn_implementation="sdpa", dtype=torch.float32).save_pretrained(folder)
    return load_trainable(folder)


def shape_of(target, text):
    return DraftShape.parse(text, like=DraftShape.of(target.config))


def weights(model):
    return torch.cat([weight.detach().flatten() for weight in model.module.parameters()])


@pytest.mark.parametrize("method", ["prune", "scratch"])
@pytest.mark.parametrize("sizes", ["layers=2,hidden=16,intermediate=20", "layers=1,vocab=30"])
def test_it_has_the_shape_and_the_seed_decides(target, method, sizes):
    shape = shape_of(target, sizes)
    one, same, other = (initialise(target, shape, EXAMPLES, method, seed) for seed in (1, 1, 2))
    assert DraftShape.of(one.config).layers == shape.layers
    assert one.logits(IDS).shape[-1] == (shape.vocab or VOCAB_SIZE)
    assert torch.equal(weights(one), weights(same))
    # Pruning draws nothing.
    assert torch.equal(weights(one), weights(other)) == (method == "prune")


def test_pruning_takes_the_targets_weights_and_scratch_does_not(target):
    whole = DraftShape.of(target.config)
    with torch.no_grad():
        expected = target.logits(IDS)
        assert torch.equal(initialise(target, whole, EXAMPLES, "prune", 0).logits(IDS), expected)
        blank = initialise(target, whole, EXAMPLES, "scratch", 0)
        assert (blank.logits(IDS) - expected).abs().max() > 1


@pytest.mark.parametrize("method", ["prune", "scratch"])
def test_it_can_be_trained(target, method):
    draft = initialise(target, shape_of(target, "layers=1,vocab=30"), EXAMPLES, method, 0)
    draft.logits(IDS).square().mean().backward()
    assert all(weight.grad is not None for weight in draft.module.parameters())
    assert all(weight.grad is None for weight in target.module.parameters())


def test_ends_of_texts_are_kept_however_rare(target):
    vocabulary = choose_vocabulary(target, 5, [[7, 8, 9, 10, 11, 12]])
    assert vocabulary.d2t.tolist() == [7, 8, 9, 10, 60]


def test_errors(target):
    whole = DraftShape.of(target.config)
    with pytest.raises(ConfigError, match="initialised by prune or scratch; got 'clone'"):
        initialise(target, whole, EXAMPLES, "clone", 0)
    with pytest.raises(ConfigError, match="judged by texts of the target; got none"):
        initialise(target, shape_of(target, "vocab=9"), [], "scratch", 0)
    with pytest.raises(ConfigError, match="layers=4 cannot be cut"):
        initialise(target, shape_of(target, "layers=4"), EXAMPLES, "prune", 0)
    assert initialise(target, shape_of(target, "layers=4"), [], "scratch", 0).num_parameters
