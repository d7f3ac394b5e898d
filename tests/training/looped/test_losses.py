"""The loss of every depth, and how they are weighted."""

import pytest
import torch
from torch.nn import functional

from foretoken.errors import ConfigError
from foretoken.models.blank import blank_model
from foretoken.models.draft_shape import DraftShape
from foretoken.models.loops import LoopShape
from foretoken.models.trainable import load_trainable
from foretoken.training.looped.losses import depth_weights, exit_loss, logits_by_depth

SHAPE = DraftShape(layers=6, hidden=16, heads=2, kv_heads=1, head_dim=8, intermediate=24)
LOOPS = LoopShape(prelude=0, group=2, loops=3, coda=0)
ROWS = torch.randint(0, 257, (3, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def looped(like):
    return blank_model(load_trainable(like), SHAPE, loops=LOOPS, seed=2)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("uniform", (1 / 3, 1 / 3, 1 / 3)),
        ("increasing", (1 / 6, 2 / 6, 3 / 6)),
        ("decreasing", (3 / 6, 2 / 6, 1 / 6)),
        ("last", (0.0, 0.0, 1.0)),
        ("2,0,6", (0.25, 0.0, 0.75)),
    ],
)
def test_weights_are_named_or_given_and_sum_to_one(text, weights):
    assert depth_weights(text, 3) == pytest.approx(weights)


@pytest.mark.parametrize(
    "text", ["even", "1,2", "1,2,3,4", "1,-1,1", "1,1,0", "nan,1,1", "1,inf,1"]
)
def test_other_weights_are_refused(text):
    with pytest.raises(ConfigError, match=r"depth weights are uniform.*or 3 numbers") as caught:
        depth_weights(text, 3)
    assert "--depth-weights" in caught.value.hint


def test_the_loss_is_the_weighted_sum_of_cross_entropies(looped):
    """The formula, term by term, from a model of each number of loops."""
    weights = (0.5, 0.2, 0.3)
    expected = 0.0
    for loops in (1, 2, 3):
        shape = DraftShape(**{**_sizes(SHAPE), "layers": 2 * loops})
        shorter = blank_model(looped, shape, loops=LoopShape(group=2, loops=loops))
        shorter.module.load_state_dict(looped.module.state_dict())
        log_probs = shorter.logits(ROWS[:, :-1]).log_softmax(dim=-1)
        said = log_probs.gather(2, ROWS[:, 1:, None])
        expected = expected - weights[loops - 1] * said.mean()
    torch.testing.assert_close(exit_loss(looped, ROWS, weights), expected)


def test_only_weighted_depths_count(looped):
    looped.module.zero_grad()
    loss = exit_loss(looped, ROWS, (0.0, 0.0, 1.0))
    logits = looped.logits(ROWS[:, :-1])
    torch.testing.assert_close(
        loss, functional.cross_entropy(logits.flatten(0, 1), ROWS[:, 1:].flatten())
    )
    with pytest.raises(ValueError, match="zip"):
        exit_loss(looped, ROWS, (1.0,))


def test_a_plain_model_has_one_depth(like):
    plain = blank_model(load_trainable(like), SHAPE, seed=2)
    (logits,) = logits_by_depth(plain, ROWS[:, :-1])
    assert torch.equal(logits, plain.logits(ROWS[:, :-1]))
    expected = functional.cross_entropy(logits.flatten(0, 1), ROWS[:, 1:].flatten())
    torch.testing.assert_close(exit_loss(plain, ROWS, (1.0,)), expected)


def _sizes(shape):
    return {name: getattr(shape, name) for name in shape.__dataclass_fields__}
