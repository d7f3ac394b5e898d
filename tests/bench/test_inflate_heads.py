"""Heads that are widened with their target draft what they drafted before."""

import json
from pathlib import Path

import pytest
import torch

from foretoken.bench.inflate import Shape, inflate
from foretoken.bench.inflate_heads import inflate_drafter, inflate_head, is_head
from foretoken.core.options import ComponentSpec
from foretoken.drafters import prepare_drafter
from foretoken.errors import ModelError
from foretoken.models.heads.files import read_head
from foretoken.models.loading import load_model
from tests.engines import finish, greedy, make_engine, make_host, sampled
from tests.fakes import build_module, tiny_config
from tests.heads import shape_of, write_head

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4])
HEADS = {
    "narrow": ("eagle", {"width": 12, "heads": 2, "kv_heads": 1, "draft_vocab": 20}),
    "as wide as the small target": ("eagle", {"heads": 4}),
    "parallel": ("parallel", {"width": 16, "steps": 3}),
    "graft": ("graft", {"layers": 2}),
    "medusa": ("medusa", {"heads": 3, "layers": 2}),
    "medusa, shared": ("medusa", {"heads": 3, "own_lm_heads": False}),
    "hydra": ("hydra", {"heads": 3, "layers": 2, "own_lm_heads": True}),
    "hydra, shared": ("hydra", {"heads": 3}),
}


def write_small(folder, num_layers=3):
    config = tiny_config(
        "llama", vocab_size=32, hidden_size=32, head_dim=8, num_hidden_layers=num_layers
    )
    build_module(config, 3, dtype=torch.float64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def wide(small, tmp_path_factory):
    shape = Shape(hidden=80, layers=5, head_dim=16, noise=0)
    return inflate(small, shape, dtype="float64", folder=tmp_path_factory.mktemp("wide"))


def drafts_of(target_path, spec):
    """Return what a drafter drafts in all steps of some requests, and what comes of it."""
    target = load_model(str(target_path), dtype="float64")
    drafter = prepare_drafter(spec)(make_host(target))
    drafts, propose = [], drafter.propose

    def recorded(contexts):
        drafts.extend(propose(contexts))
        return drafts[-len(contexts) :]

    drafter.propose = recorded
    engine = make_engine(target, {spec.name: drafter})
    requests = [
        engine.add_request(prompt, params)
        for prompt, params in zip(
            PROMPTS, [greedy(20), sampled(20, seed=1), greedy(20)], strict=True
        )
    ]
    finish(engine)
    return drafts, [list(request.output_ids) for request in requests]


@pytest.mark.parametrize("name", HEADS)
def test_a_widened_head_drafts_the_same(small, wide, tmp_path, name):
    """Norms of transformers round to float32: a relative 1e-7, far below the 1e-4 allowed here."""
    kind, options = HEADS[name]
    head = write_head(small, kind, **options)
    spec = ComponentSpec(kind, {"path": head, "min_gain": 0.01})
    drafts, texts = drafts_of(small, spec)
    wide_drafts, wide_texts = drafts_of(wide, inflate_drafter(spec, small, wide, tmp_path))
    assert wide_texts == texts
    assert sum(len(draft.tree) > 1 for draft in drafts) > 10
    assert [draft.tree for draft in wide_drafts] == [draft.tree for draft in drafts]
    for draft, wide_draft in zip(drafts, wide_drafts, strict=True):
        assert wide_draft.draft_logprobs == pytest.approx(draft.draft_logprobs, abs=1e-4)


def test_only_what_reads_the_target_is_wide(small, wide, tmp_path):
    """A narrow layer stays narrow: that is why a wide target wants one."""
    head = write_head(small, "eagle", width=12, heads=2)
    made = inflate_head(Path(head), small, wide, tmp_path)
    before = read_head(head, "eagle", shape_of(small)).tensors
    after = read_head(made, "eagle", shape_of(wide)).tensors
    assert after["fc.weight"].shape == (12, 3 * 80)
    assert {name for name in after if after[name].shape != before[name].shape} == {"fc.weight"}


def test_files_are_made_once(small, wide, tmp_path):
    head = Path(write_head(small, "medusa", heads=2))
    folder = tmp_path / "new" / "folder"
    made = inflate_head(head, small, wide, folder)
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert inflate_head(head, small, wide, folder) == made
    assert (made / "model.safetensors").stat().st_mtime_ns == before
    write_head(small, "medusa", heads=3)  # another head in the same place
    assert inflate_head(head, small, wide, folder) != made
    assert len(list(folder.iterdir())) == 2


def test_drafters_without_a_head_stay_as_they_are(small, wide, tmp_path):
    for text in ("prompt-lookup:max_ngram=3", f"draft-model:path={small}", "eagle:path=nowhere"):
        spec = ComponentSpec.parse(text)
        assert inflate_drafter(spec, small, wide, tmp_path) == spec


def test_what_is_a_head(small, tmp_path):
    assert is_head(Path(write_head(small, "medusa", heads=1)))
    assert not is_head(small)
    (tmp_path / "config.json").write_text(json.dumps(["foretoken_head"]))
    assert not is_head(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert not is_head(tmp_path)


def test_heads_that_cannot_be_widened(small, wide, tmp_path):
    for kind, options, message in (
        ("eagle", {"variant": "eagle-1"}, "EAGLE-1"),
        ("kangaroo", {}, "of the kind 'kangaroo', not eagle, parallel"),
    ):
        head = Path(write_head(small, kind, **options))
        with pytest.raises(ModelError, match=message):
            inflate_head(head, small, wide, tmp_path)
    other = write_small(tmp_path / "other", num_layers=2)
    head = Path(write_head(other, "medusa", heads=1))
    with pytest.raises(ModelError, match="num_layers 2"):
        inflate_head(head, small, wide, tmp_path)
