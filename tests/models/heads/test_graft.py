"""Grafts: what is trained and what is served say the same, and what they begin as."""

import pytest
import torch

from foretoken.errors import ModelError, UnsupportedModelError
from foretoken.models.batch import Segment
from foretoken.models.heads.files import HeadFiles, TargetShape
from foretoken.models.heads.graft import (
    DRAFT_FOLDER,
    GraftDesign,
    GraftModule,
    cut_layers,
    load_fc,
    spread_layers,
)
from foretoken.models.heads.graft_served import ServedGraft
from foretoken.models.loading import load_model
from tests.engines import states_of
from tests.fakes import build_module, tiny_config
from tests.heads import randomize

FAMILIES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
}
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]
# One computes in torch, the other compiled: the same float32, in other orders of summation.
TOLERANCE = 2e-5


def write_target(folder, family, **changes):
    config = tiny_config(family.partition(",")[0], **changes)
    build_module(config, 5, attn_implementation="eager", dtype=torch.float32).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"), request.param, **FAMILIES[request.param])


def make_graft(folder, layers, state_size=32):
    design = GraftDesign(layers=layers, num_steps=4)
    return GraftModule(design, cut_layers(folder, layers), state_size).eval()


def served(graft, folder, dtype="auto"):
    graft.save_model(folder / DRAFT_FOLDER)
    model = load_model(str(folder / DRAFT_FOLDER), dtype=dtype)
    return ServedGraft(model, graft.fc.weight.detach(), graft.design.layers)


def chain(sequence, token_ids):
    return Segment(sequence, token_ids, range(-1, len(token_ids) - 1))


@torch.no_grad()
def module_logits(graft, hidden, root):
    """Return what the module says behind each token of the text, those from `root` on a draft."""
    positions = torch.arange(len(TEXT))
    roots = torch.where(positions < root, 0, root)
    batched = {layer: states[None].float() for layer, states in hidden.items()}
    return graft.logits(graft(torch.tensor([TEXT]), batched, roots[None]))[0, root:]


def served_logits(head, hidden, root):
    """Return the same of a served graft: states of the text in two pieces, then the draft."""
    cache = head.model.new_cache(256)
    sequence = cache.open()
    for start, stop in ((0, 2), (2, root)):
        told = {layer: hidden[layer][start:stop] for layer in head.target_layers}
        head.fill(cache, [chain(sequence, [0] * (stop - start))], told)
    batch = head.model.batch(cache, [chain(sequence, TEXT[root:])])
    return head.model.forward(batch, range(batch.num_rows)).logits


@pytest.mark.parametrize("layers", [(2,), (0, 2)])
def test_served_and_trained_graft_say_the_same(folder, tmp_path, layers):
    graft, target = randomize(make_graft(folder, layers)), load_model(str(folder))
    head = served(graft, tmp_path)
    hidden = states_of(target, TEXT, layers)
    for root in (5, 11):
        torch.testing.assert_close(
            served_logits(head, hidden, root),
            module_logits(graft, hidden, root),
            rtol=TOLERANCE,
            atol=TOLERANCE,
        )


def test_served_through_modules_it_says_the_same(tmp_path):
    """In float64 nothing is compiled."""
    folder = write_target(tmp_path / "target", "llama")
    graft, target = randomize(make_graft(folder, (0, 2))), load_model(str(folder), dtype="float64")
    head = served(graft, tmp_path, "float64")
    hidden = states_of(target, TEXT, (0, 2))
    torch.testing.assert_close(
        served_logits(head, hidden, 6).float(),
        module_logits(graft, hidden, 6),
        rtol=TOLERANCE,
        atol=TOLERANCE,
    )


def test_untrained_graft_of_all_layers_is_its_target(folder, tmp_path):
    graft, target = make_graft(folder, (0, 1, 2)), load_model(str(folder))
    hidden = states_of(target, TEXT, (0, 1, 2))
    cache = target.new_cache(64)
    batch = target.batch(cache, [chain(cache.open(), TEXT)])
    own = target.forward(batch, range(len(TEXT))).logits[6:]
    for said in (
        module_logits(graft, hidden, 6),
        served_logits(served(graft, tmp_path), hidden, 6),
    ):
        torch.testing.assert_close(said, own, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_draft_sees_states_of_the_past_only(tmp_path):
    """States from the root on, and tokens before it, change nothing that is said behind it."""
    graft = randomize(make_graft(write_target(tmp_path, "llama"), (1, 2)))
    hidden = {layer: torch.randn(len(TEXT), 32) for layer in (1, 2)}
    before = module_logits(graft, hidden, 6)
    later = {layer: torch.cat((it[:6], it[6:] + 1)) for layer, it in hidden.items()}
    earlier = {layer: torch.cat((it[:5], it[5:] + 1)) for layer, it in hidden.items()}
    assert torch.equal(module_logits(graft, later, 6), before)
    assert not torch.allclose(module_logits(graft, earlier, 6), before)


def test_layers_are_evenly_spread_and_end_with_the_last():
    assert spread_layers(5, 1) == (4,)
    assert spread_layers(5, 3) == (1, 3, 4)
    assert spread_layers(32, 4) == (7, 15, 23, 31)
    assert spread_layers(3, 3) == (0, 1, 2)


def test_layers_of_other_kinds_are_refused(tmp_path):
    for family, changes in (
        ("mistral", {}),  # with a window
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("gemma3", {}),
    ):
        folder = write_target(tmp_path / family, family, **changes)
        with pytest.raises(UnsupportedModelError, match="cannot be grafted"):
            cut_layers(folder, (2,))


def test_files_of_another_head_are_refused():
    with pytest.raises(ModelError, match="not those of a graft"):
        GraftDesign.from_options({"heads": 3})
    shape = TargetShape(vocab_size=9, hidden_size=4, num_layers=3)
    options = GraftDesign(layers=(2,), num_steps=4).as_options()
    files = HeadFiles("graft", shape, options, {"fc.weight": torch.zeros(6, 8)}, "somewhere")
    with pytest.raises(ModelError, match=r"'fc.weight'.*\(6, 8\).*\(6, 4\)"):
        load_fc(files, 6)
