"""Distillation: what counts in the loss, on and off policy, with fewer tokens, resumed."""

import copy
from dataclasses import replace

import pytest
import torch

from foretoken import SamplingParams
from foretoken.errors import ConfigError
from foretoken.models.blank import blank_model
from foretoken.models.continuation import continuations
from foretoken.models.draft_shape import DraftShape
from foretoken.models.trainable import TrainableModel, load_trainable
from foretoken.training.corpus import Example, seeded
from foretoken.training.draft import distil as algorithm
from foretoken.training.draft.distil import (
    DistilBatch,
    DistilConfig,
    Pace,
    asked_logits,
    distil,
    distil_loss,
    fitting_batch,
    measure_pace,
    own_outputs,
)
from foretoken.training.draft.initialise import initialise
from foretoken.training.draft.quality import quality
from foretoken.training.draft.teacher import Teacher
from foretoken.training.losses import DIVERGENCES, forward_kl
from tests.fakes import VOCAB_SIZE, greedy_ids
from tests.training.conftest import save_tiny

CONFIG = DistilConfig(num_steps=6, batch_size=3, learning_rate=3e-3, precision="float32")
PROMPTS = [[token_id, token_id + 9, 4][: 1 + token_id % 3] for token_id in range(8)]


@pytest.fixture(scope="module")
def target(models):
    return load_trainable(models.target, device="cpu")


@pytest.fixture(scope="module")
def student(models):
    return load_trainable(models.start, device="cpu")


@pytest.fixture(scope="module")
def examples(models):
    from foretoken import LLM

    params = seeded(SamplingParams(max_new_tokens=7, temperature=1.0), 0, len(PROMPTS))
    outputs = LLM(str(models.target), drafters="none").generate(PROMPTS, params)
    return [Example(tuple(o.prompt_ids), tuple(o.token_ids)) for o in outputs]


@pytest.fixture
def reduced(target, examples):
    """A draft that has a third of the target's tokens."""
    shape = replace(DraftShape.of(target.config), vocab=VOCAB_SIZE // 3)
    return initialise(target, shape, [text.token_ids for text in examples], "scratch", 1)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# -- the loss ------------------------------------------------------------------------------------


def test_only_output_tokens_count(student, target, examples):
    """The loss of a padded batch is the mean over the outputs of the texts taken one by one."""
    total, count = 0.0, 0
    for text in examples:
        ids = torch.tensor([text.token_ids])
        places = slice(len(text.prompt_ids) - 1, len(text.token_ids) - 1)
        values = forward_kl(student.logits(ids)[0, places], target.logits(ids)[0, places])
        total, count = total + values.sum().item(), count + len(values)
    batch = DistilBatch.of(examples, student.device)
    found = distil_loss(student, asked_logits(target, batch), batch, forward_kl, 0.0).item()
    assert count == sum(len(text.output_ids) for text in examples)
    # float32 sums of another order; the texts of a batch are padded to one length.
    assert found == pytest.approx(total / count, rel=1e-5)


def test_no_gradient_reaches_the_target(student, target, examples):
    own = copy.deepcopy(student)
    batch = DistilBatch.of(examples, own.device)
    distil_loss(own, asked_logits(target, batch), batch, forward_kl, 0.0).backward()
    assert all(weight.grad is None for weight in target.module.parameters())
    assert any(weight.grad.abs().sum() > 0 for weight in own.module.parameters())


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_with_fewer_tokens_the_loss_is_the_divergence_over_all_but_for_a_constant(
    reduced, target, examples, temperature
):
    """KL(p || q) over the kept tokens, unnormalised p: what a draft of fewer tokens can change."""
    batch = DistilBatch.of(examples, reduced.device)
    loss_at = algorithm.at_temperature(forward_kl, temperature)
    scale = temperature or 1.0
    kept = reduced.vocabulary.d2t
    probs = (target.logits(batch.token_ids)[batch.is_asked] / scale).softmax(-1)[:, kept].detach()
    entropy = -(probs * (probs / probs.sum(-1, keepdim=True)).log()).sum(-1)

    def unnormalised():
        draft = (reduced.logits(batch.token_ids)[batch.is_asked] / scale).log_softmax(-1)
        return (-(probs * draft).sum(-1) - entropy).mean()

    found = distil_loss(reduced, asked_logits(target, batch), batch, loss_at, temperature)
    # rtol: float32 sums over the vocabulary in another order.
    torch.testing.assert_close(found, unnormalised(), rtol=1e-4, atol=1e-6)


def test_a_draft_that_is_its_target_has_nothing_to_learn(target, examples):
    batch = DistilBatch.of(examples, target.device)
    loss = distil_loss(target, asked_logits(target, batch), batch, forward_kl, 0.0)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert quality(target, target, examples, 0.0) == {
        "agreement": 1.0,
        "overlap": pytest.approx(1.0, abs=1e-6),
    }


# -- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", DIVERGENCES)
@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_every_loss_brings_the_draft_nearer(student, target, examples, loss, on_policy):
    own = copy.deepcopy(student)
    config = replace(CONFIG, num_steps=40, loss=loss, on_policy=on_policy, temperature=1.0)
    before = quality(own, target, examples, 1.0)
    losses = distil(own, target, examples, config)
    after = quality(own, target, examples, 1.0)
    assert sum(losses[-5:]) < sum(losses[:5])
    # Cross-entropy with the first choice knows nothing of the others.
    name = "agreement" if loss == "cross-entropy" else "overlap"
    assert after[name] > before[name]


def test_a_draft_of_fewer_tokens_learns(reduced, target, examples):
    before = quality(reduced, target, examples, 0.0)
    distil(reduced, target, examples, replace(CONFIG, num_steps=60, on_policy=0.5))
    after = quality(reduced, target, examples, 0.0)
    assert after["overlap"] > before["overlap"]


def test_the_target_stays_as_it_is(student, target, examples):
    before = weights(target)
    distil(copy.deepcopy(student), target, examples, CONFIG)
    assert same(before, weights(target))


class CrashError(Exception):
    """Stands for a crash."""


def test_resumed_on_policy_distillation_ends_with_the_same_bits(
    student, target, examples, tmp_path, monkeypatch
):
    """Half of the steps sample from the draft, so that the random state matters."""
    monkeypatch.setattr(
        DistilConfig,
        "loop",
        lambda self: algorithm.LoopConfig(num_steps=self.num_steps, num_checkpoint_steps=2),
    )
    config = replace(CONFIG, on_policy=0.5, temperature=1.0)
    assert {config.is_on_policy(step) for step in (4, 5)} == {True, False}
    whole, other, resumed = (copy.deepcopy(student) for _ in range(3))
    losses = distil(whole, target, examples, config)

    def stop(progress):
        if progress.done == 5:
            raise CrashError

    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(CrashError):
        distil(other, target, examples, config, checkpoint=checkpoint, on_progress=stop)
    torch.manual_seed(3)
    assert distil(resumed, target, examples, config, checkpoint=checkpoint) == losses
    assert same(weights(whole), weights(resumed))
    assert not same(weights(whole), weights(student))


def test_the_share_of_steps_on_policy_is_as_asked():
    config = replace(CONFIG, num_steps=1, on_policy=0.3)
    count = sum(config.is_on_policy(step) for step in range(2000))
    # Binomial(2000, 0.3) has a deviation of 20.5: five of them.
    assert abs(count - 600) < 103


def test_steps_are_timed_without_training(student, target, examples):
    before = weights(student)
    pace = measure_pace(student, target, examples, replace(CONFIG, on_policy=0.5))
    assert pace.first_s > 0
    assert pace.later_s > 0
    assert pace.num_first == 3  # 8 texts, 3 of them a step
    assert same(before, weights(student))


def test_the_steps_within_a_time():
    pace = Pace(first_s=2.0, later_s=0.5, num_first=10)
    assert [pace.steps_within(budget_s) for budget_s in (0.1, 9, 20, 22, 25)] == [1, 4, 10, 14, 20]


def test_logits_that_would_fill_the_memory_make_batches_smaller(target, examples, monkeypatch):
    longest = max(len(text.token_ids) for text in examples)
    assert fitting_batch(CONFIG, target, examples) == 3
    monkeypatch.setattr(algorithm, "MAX_LOGITS", 2 * longest * VOCAB_SIZE)
    assert fitting_batch(CONFIG, target, examples) == 2
    monkeypatch.setattr(algorithm, "MAX_LOGITS", 1)
    assert fitting_batch(CONFIG, target, examples) == 1


# -- the teacher ---------------------------------------------------------------------------------


def test_the_teacher_says_what_the_target_says_and_remembers_it(target, examples, monkeypatch):
    places = [3, 0, 5]
    batch = DistilBatch.of([examples[place] for place in places], target.device)
    wanted = asked_logits(target, batch)
    teacher = Teacher(target, examples)
    assert teacher.remembers
    # float32: alone or beside others, padded or not, sums may round differently.
    torch.testing.assert_close(teacher.logits(places), wanted, rtol=1e-4, atol=1e-5)
    first = teacher.logits(places)
    monkeypatch.setattr("foretoken.training.draft.teacher.last_states", None)
    assert torch.equal(teacher.logits(places), first)
    assert torch.equal(teacher.logits(places[1:]), first[len(examples[3].output_ids) :])


def test_a_teacher_without_room_says_the_same(target, examples):
    teacher = Teacher(target, examples, max_bytes=0)
    assert not teacher.remembers
    torch.testing.assert_close(
        teacher.logits([1, 2]), Teacher(target, examples).logits([1, 2]), rtol=1e-4, atol=1e-5
    )


def test_a_target_whose_logits_are_more_than_its_heads_product_is_not_remembered(
    target, examples, monkeypatch
):
    """Some families cap or scale the logits behind the head."""
    plain = TrainableModel.logits
    monkeypatch.setattr(TrainableModel, "logits", lambda self, ids: 0.5 * plain(self, ids))
    teacher = Teacher(target, examples)
    assert not teacher.remembers
    batch = DistilBatch.of(examples[:1], target.device)
    torch.testing.assert_close(
        teacher.logits([0]), asked_logits(target, batch), rtol=1e-4, atol=1e-5
    )


def test_drafts_that_share_a_teacher_learn_what_they_would_alone(student, target, examples):
    teacher = Teacher(target, examples)
    first, second, alone = (copy.deepcopy(student) for _ in range(3))
    distil(first, target, examples, CONFIG, teacher=teacher)
    distil(second, target, examples, CONFIG, teacher=teacher)
    distil(alone, target, examples, CONFIG)
    assert same(weights(first), weights(second))
    assert same(weights(first), weights(alone))


# -- what a draft says itself --------------------------------------------------------------------


def test_own_outputs_are_the_greedy_continuations(student, examples):
    """Prompts of different lengths go side by side and say what they say alone."""
    found = own_outputs(student, examples, 0.0)
    for text, own in zip(examples, found, strict=True):
        alone = greedy_ids(student.module, list(text.prompt_ids), len(text.output_ids))
        assert own.prompt_ids == text.prompt_ids
        assert list(own.output_ids) == alone


def test_continuations_end_with_the_end_of_the_text(tmp_path):
    first = greedy_ids(load_trainable(save_tiny(tmp_path / "a", seed=0)).module, [3, 7], 4)
    ending = load_trainable(save_tiny(tmp_path / "b", seed=0, eos_token_id=first[2]))
    written = continuations(ending, [[3, 7], [5]], 8, 0.0)
    assert written[0] == first[:3]
    assert len(written[1]) == 8 or written[1][-1] == first[2]


def test_continuations_of_fewer_tokens_are_the_targets_ids(reduced):
    written = continuations(reduced, PROMPTS, 12, 1.0)
    kept = set(reduced.vocabulary.d2t.tolist())
    assert {token_id for row in written for token_id in row} <= kept
    assert max(kept) >= reduced.vocabulary.size


def test_sampling_has_the_temperature_of_the_distribution(target):
    """400 samples of one token: the mean log-probability is that of the tempered distribution."""
    blank = blank_model(target, DraftShape.of(target.config), seed=2)
    blank.module.lm_head.weight.data.mul_(20)  # from nearly uniform to a few likely tokens
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [row[0] for row in continuations(blank, [[5]] * 400, 1, 0.5)]
    with torch.no_grad():
        logits = blank.logits(torch.tensor([[5]]))[0, -1].double()
    probs = (logits / 0.5).softmax(-1)
    values = logits.log_softmax(-1)
    mean = (probs * values).sum()
    deviation = ((probs * (values - mean) ** 2).sum() / 400).sqrt()
    # Five deviations: fails by chance once in 1.7 million, and the seed is fixed.
    assert abs(values[drawn].mean() - mean) < 5 * deviation


# -- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_steps": 0}, "num_steps is an integer >= 1; got 0"),
        ({"batch_size": 0}, "batch_size is an integer >= 1; got 0"),
        ({"learning_rate": float("nan")}, "learning_rate is a number above 0"),
        ({"on_policy": 1.5}, "on_policy is a share from 0 to 1; got 1.5"),
        ({"loss": "mse"}, "no loss 'mse'"),
        ({"temperature": -1.0}, "temperature is a number >= 0"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        DistilConfig(**{"num_steps": 3, **wrong})


def test_a_rate_that_is_too_high_stops_with_the_last_checkpoint(
    student, target, examples, tmp_path
):
    config = replace(CONFIG, num_steps=60, learning_rate=1e30)
    with pytest.raises(ConfigError, match="cannot go on") as caught:
        distil(copy.deepcopy(student), target, examples, config, checkpoint=tmp_path / "c")
    assert caught.value.hint == "lower the learning rate"
