"""Losses of EAGLE and parallel heads against their definition, and that they teach."""

import pytest
import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from foretoken.core.options import ComponentSpec
from foretoken.drafters import prepare_drafter
from foretoken.errors import ConfigError, UnknownNameError
from foretoken.models.heads.files import TargetShape, read_head, target_tensors
from foretoken.training.heads.data import HeadBatch
from foretoken.training.heads.eagle import LayerOptions
from foretoken.training.heads.kinds import KINDS
from foretoken.training.losses import forward_kl, total_variation
from tests.engines import finish, greedy, make_engine, make_host, states_of
from tests.heads import random_tensors, randomize

SHAPE = TargetShape(vocab_size=13, hidden_size=8, num_layers=3)
TENSORS = random_tensors(SHAPE)
SMALL = {"heads": "2", "intermediate": "12"}
CASES = {
    "eagle-1": ("eagle", {**SMALL, "variant": "eagle-1", "steps": "2"}),
    "eagle-3": ("eagle", {**SMALL, "steps": "3"}),
    "narrow": ("eagle", {**SMALL, "steps": "2", "width": "4", "draft_vocab": "9"}),
    "parallel": ("parallel", {**SMALL, "steps": "3"}),
    "parallel of eagle-1": ("parallel", {**SMALL, "variant": "eagle-1", "steps": "3"}),
}


@pytest.fixture(params=CASES)
def case(request):
    name, options = CASES[request.param]
    kind = KINDS.load(name)
    torch.manual_seed(0)
    return kind, randomize(kind.build(SHAPE, TENSORS, options))


def random_batch(num_texts=3, length=9, seed=0):
    """Return a batch of texts of different lengths, three tokens of each a prompt."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(13, (num_texts, length), generator=generator)
    lengths = torch.tensor([length - 2 * text for text in range(num_texts)]).unsqueeze(1)
    is_token = torch.arange(length) < lengths
    hidden = {
        layer: torch.randn(num_texts, length, 8, generator=generator) * is_token.unsqueeze(2)
        for layer in (1, 2, 3)
    }
    is_output = is_token & (torch.arange(length) >= 3)
    return HeadBatch(token_ids, is_token, is_output, hidden, hidden[3] @ TENSORS.head.t())


def expected_loss(module, batch, divergence):
    """Compute the loss place by place: row i of step k says token i + k + 2."""
    design, total, weights = module.design, 0.0, 0.0
    is_eagle1 = design.variant == "eagle-1" and not hasattr(module, "mask_state")
    for step, states in enumerate(module(batch.token_ids, batch.hidden, design.num_steps)):
        divergences, distances = [], []
        for text, position in batch.is_output.nonzero().tolist():
            row = position - step - 2
            if row < 0:
                continue
            wanted = batch.logits[text, position - 1]
            is_known = True
            if design.draft_vocab_size:
                is_known = bool(wanted.argmax() in module.draft_ids)
                wanted = wanted[module.draft_ids]
            if is_known:
                divergences.append(divergence(module.logits(states[text, row]), wanted))
            state = batch.hidden[3][text, position - 1]
            if is_eagle1:
                distances.append(functional.smooth_l1_loss(states[text, row], state))
        loss = torch.stack(divergences).mean()
        if is_eagle1:
            loss = 0.1 * loss + torch.stack(distances).mean()
        total, weights = total + 0.8**step * loss, weights + 0.8**step
    return total / weights


@pytest.mark.parametrize("divergence", [forward_kl, total_variation])
def test_loss_is_what_its_definition_says(case, divergence):
    kind, module = case
    batch = random_batch()
    torch.testing.assert_close(
        kind.loss(module, batch, divergence), expected_loss(module, batch, divergence)
    )


def test_what_is_not_counted_changes_nothing(case):
    """Padding, and the target's logits and states in the prompt that only say what comes there."""
    kind, module = case
    batch = random_batch()
    before = kind.loss(module, batch, forward_kl)
    predicted = batch.is_output.roll(-1, dims=1)
    predicted[:, -1] = False
    batch.logits[~predicted] = 99.0 * torch.randn(int((~predicted).sum()), 13)
    for states in batch.hidden.values():
        states[~batch.is_token] = 7.0
    batch.token_ids[~batch.is_token] = 5
    torch.testing.assert_close(kind.loss(module, batch, forward_kl), before)


def test_every_parameter_learns(case):
    kind, module = case
    kind.loss(module, random_batch(), forward_kl).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_short_texts_give_a_loss_or_none(case, length):
    kind, module = case
    batch = random_batch(1, 9)
    short = HeadBatch(
        batch.token_ids[:, :length],
        batch.is_token[:, :length],
        batch.is_output[:, :length],
        {layer: states[:, :length] for layer, states in batch.hidden.items()},
        batch.logits[:, :length],
    )
    loss = kind.loss(module, short, forward_kl)
    loss.backward()
    assert loss.isfinite()
    design = module.design  # the fourth token is the first that counts
    is_known = not design.draft_vocab_size or batch.logits[0, 2].argmax() in module.draft_ids
    assert (loss > 0) == (length == 4 and is_known)


def test_head_is_read_as_it_was_saved(case, tmp_path):
    kind, module = case
    kind.save(module, SHAPE, tmp_path / "head", "# A head\n")
    files = read_head(tmp_path / "head", kind.name, SHAPE)
    again = type(module)(module.design, SHAPE, TENSORS)
    files.fill(again)
    assert type(module.design).from_options(files.options) == module.design
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"wings": "2"}, UnknownNameError, "wings"),
        ({"variant": "eagle-2"}, ConfigError, "eagle-1 or eagle-3; got 'eagle-2'"),
        ({"variant": "eagle-1", "width": "4"}, ConfigError, "are for eagle-3"),
        ({"steps": "0"}, ConfigError, "steps is at least 1"),
        ({"heads": "3"}, ConfigError, "got 3 heads"),
        ({"heads": "4", "kv_heads": "3"}, ConfigError, "3 of keys"),
        ({"draft_vocab": "14"}, ConfigError, "at most the target's 13"),
    ],
)
@pytest.mark.parametrize("name", ["eagle", "parallel"])
def test_options_that_do_not_fit_are_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        KINDS.load(name).build(SHAPE, TENSORS, options)


def test_layers_read_are_those_of_the_variant():
    layers = KINDS.load("eagle").hidden_layers
    assert layers(12, {"variant": "eagle-1"}) == (12,)
    assert layers(12, {}) == (2, 6, 9)
    assert layers(3, {"width": "4"}) == (1, 2, 3)


@pytest.mark.parametrize(
    ("width", "heads", "intermediate"), [(256, 4, 704), (160, 5, 448), (8, 1, 32), (6, 1, 32)]
)
def test_sizes_follow_the_width(width, heads, intermediate):
    sizes = LayerOptions(width=width).sizes(SHAPE)
    assert (sizes.hidden, sizes.heads, sizes.kv_heads) == (width, heads, heads)
    assert sizes.intermediate == intermediate


def test_narrow_head_begins_as_the_targets_main_columns():
    module = KINDS.load("eagle").build(SHAPE, TENSORS, {"width": "4", "heads": "2"})
    told = module.embed_tokens.weight @ module.embed_tokens.weight.T
    full = TENSORS.embedding @ TENSORS.embedding.T
    best = torch.linalg.eigvalsh(full)[-4:]
    torch.testing.assert_close(torch.linalg.eigvalsh(told)[-4:], best, rtol=1e-3, atol=1e-3)


# -- training makes drafts better ----------------------------------------------------------------


@pytest.mark.parametrize("case_name", CASES)
def test_trained_heads_draft_better(case_name, two_layers, texts):
    """A hundred steps on a dozen texts; then more of the drafts of these texts are taken."""
    name, options = CASES[case_name]
    kind, taken = KINDS.load(name), []
    target, shape = texts.target, TargetShape.of(texts.target.info)
    for num_steps in (0, 100):
        torch.manual_seed(0)
        module = kind.build(shape, target_tensors(str(two_layers)), options)
        batch = batch_of(texts.examples, target)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        for _ in range(num_steps):
            optimizer.zero_grad()
            kind.loss(module, batch, forward_kl).backward()
            optimizer.step()
        path = two_layers.parent / f"{case_name}-{num_steps}"
        kind.save(module, shape, path, "# Trained\n")
        taken.append(num_taken(name, path, target, texts.examples))
    assert taken[1] > 2 * taken[0]


def num_taken(name, path, target, examples):
    """Return how many drafted tokens are taken when the texts are written again."""
    spec = ComponentSpec(name, {"path": str(path), "max_depth": 3, "width": 1})
    drafter = prepare_drafter(spec)(make_host(target))
    engine = make_engine(target, {name: drafter})
    requests = [
        engine.add_request(it.prompt_ids, greedy(len(it.output_ids)))
        for it in examples
        if it.output_ids
    ]
    finish(engine)
    return sum(request.stats.num_accepted for request in requests)


def batch_of(examples, target):
    """Return texts with what their target computes of them, as one batch."""
    token_ids = [torch.tensor([*it.prompt_ids, *it.output_ids]) for it in examples]
    layers, head = (1, 2), target_tensors(target.info.name).head
    states = [states_of(target, ids.tolist(), layers) for ids in token_ids]
    hidden = {
        layer: pad_sequence([it[layer] for it in states], batch_first=True) for layer in layers
    }
    places = pad_sequence([torch.arange(len(ids)) for ids in token_ids], True, -1)
    num_prompt = torch.tensor([[len(it.prompt_ids)] for it in examples])
    return HeadBatch(
        pad_sequence(token_ids, batch_first=True),
        places >= 0,
        places >= num_prompt,
        hidden,
        hidden[2] @ head.T,
    )
