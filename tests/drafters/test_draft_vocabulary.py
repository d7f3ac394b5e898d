"""The draft model with a reduced vocabulary: same tokens as plain decoding, same contract."""

import shutil

import pytest
import torch

from foretoken import LLM, SamplingParams
from foretoken.assets import EMBEDDED
from foretoken.errors import VocabularyMismatchError
from foretoken.models.draft_shape import DraftShape
from foretoken.models.draft_vocabulary import ReducedModel
from foretoken.models.loading import load_model
from foretoken.models.trainable import load_trainable, save_trainable
from foretoken.training.draft.initialise import initialise
from tests.contracts import test_drafters as suite
from tests.contracts.test_drafters import (  # noqa: F401 - collected here, for this drafter
    build,
    drafter,
    test_draft_after_a_commit_is_that_of_the_whole_text,
    test_draft_stays_within_its_budget_below_the_pending_token,
    test_every_way_is_the_same_alone_in_a_batch_and_again,
    test_every_way_keeps_to_the_budget_and_says_what_it_was,
    test_output_equals_plain_decoding,
    test_proposals_are_the_same_alone_and_in_a_batch,
    test_proposing_again_without_commit_gives_the_same_draft,
    test_samples_come_with_their_draws_and_nothing_else_does,
    test_stop_forgets_a_request_and_may_come_twice,
    way_drafter,
)
from tests.fakes import build_module, tiny_config

# The suite's texts are of the tokens 0 to 4; plain decoding says any.
KEPT = [0, 1, 2, 4, *range(9, 33)]


def reduce(target, kept, folder):
    """Save a target with fewer tokens as a draft model."""
    shape = DraftShape.parse(f"vocab={len(kept)}", like=DraftShape.of(target.config))
    folder.mkdir()
    save_trainable(initialise(target, shape, [kept], "prune", seed=0), folder, "card")
    return folder


# -- the contract ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("target")
    module = build_module(tiny_config("llama", **suite.SIZES), seed=3, attn_implementation="sdpa")
    module.to(torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(target_folder, tmp_path_factory):
    """Return the folder of the suite's drafter, a draft model."""
    return reduce(load_trainable(target_folder), KEPT, tmp_path_factory.mktemp("draft") / "it")


@pytest.fixture(scope="module")
def target(target_folder):
    return load_model(str(target_folder), dtype="float64", device="cpu")


@pytest.fixture
def name():
    return "draft-model"


@pytest.fixture(params=list(suite.SiblingDraw), ids=lambda way: way.value)
def way(request):
    return "draft-model", request.param


def test_the_suite_is_about_a_reduced_draft(drafter):  # noqa: F811 - the fixture
    assert isinstance(drafter._model, ReducedModel)
    assert not drafter._has_fewer_tokens


# -- with text -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories_draft(tmp_path_factory):
    """The embedded draft model, with 600 of its 2,048 tokens."""
    llm = LLM("stories")
    params = [SamplingParams(max_new_tokens=120, seed=seed, temperature=1) for seed in range(8)]
    texts = [output.token_ids for output in llm.generate(["Once upon a time"] * 8, params)]
    draft = load_trainable(EMBEDDED["stories"].draft)
    shape = DraftShape.parse("vocab=600", like=DraftShape.of(draft.config))
    path = tmp_path_factory.mktemp("stories") / "draft"
    path.mkdir()
    save_trainable(initialise(draft, shape, texts, "prune", seed=0), path, "card")
    return path


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("spec", ["draft-model:path={}", "cascade:of=draft-model(path={})"])
def test_same_tokens_in_fewer_steps(stories_draft, spec, temperature):
    prompts = ["One day a cat", "The zebra met xylophone players in Kazakhstan"]
    params = [SamplingParams(max_new_tokens=60, seed=3, temperature=temperature)] * 2
    plain = LLM("stories", drafters="none").generate(prompts, params)
    drafted = LLM("stories", drafters=spec.format(stories_draft)).generate(prompts, params)
    assert [it.token_ids for it in drafted] == [it.token_ids for it in plain]
    # A good draft: of two steps at least one token is accepted.
    assert sum(it.stats.num_steps for it in drafted) < sum(len(it.token_ids) for it in plain) / 1.5


def test_a_draft_of_another_target_is_refused(stories_draft, tmp_path, target_folder):
    with pytest.raises(VocabularyMismatchError, match="draft 2048 tokens, target 41"):
        LLM(str(target_folder), drafters=f"draft-model:path={stories_draft}")
    shutil.copytree(stories_draft, tmp_path / "draft")
    (tmp_path / "draft" / "draft_vocabulary.safetensors").unlink()
    with pytest.raises(VocabularyMismatchError, match="draft model 600 logits for 2048 tokens"):
        LLM("stories", drafters=f"draft-model:path={tmp_path / 'draft'}")
