"""Reduced vocabularies: which tokens stay, what stands for the others, how they are served."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from foretoken.errors import ConfigError, ModelError, UnsupportedModelError
from foretoken.models import draft_vocabulary as module_under_test
from foretoken.models.batch import Segment
from foretoken.models.draft_shape import DraftShape
from foretoken.models.draft_vocabulary import FILE_NAME, DraftVocabulary, ReducedModel
from foretoken.models.loading import load_model
from foretoken.models.partial import LayerSet
from foretoken.models.pruning import prune
from foretoken.models.trainable import load_trainable, save_trainable
from tests.fakes import VOCAB_SIZE, build_module, tiny_config

KEPT = [1, 4, 5, 9, 20, 33, 60]
IDS = torch.tensor([[5, 9, 33, 1], [60, 2, 20, 4]])  # 2 is not kept


@pytest.fixture
def target(tmp_path):
    config = tiny_config("llama", eos_token_id=[4, 7], bos_token_id=1)
    module = build_module(config, attn_implementation="sdpa", dtype=torch.float32)
    module.save_pretrained(tmp_path / "target")
    return load_trainable(tmp_path / "target")


@pytest.fixture
def vocabulary(target):
    return DraftVocabulary.choose([KEPT], len(KEPT), target.embedding)


@pytest.fixture
def draft(target, vocabulary, tmp_path):
    """The target itself, with a few of its tokens; saved."""
    whole = DraftShape.of(target.config)
    model = prune(target, DraftShape.parse("vocab=7", like=whole), [KEPT], vocabulary=vocabulary)
    (tmp_path / "draft").mkdir()
    save_trainable(model, tmp_path / "draft", "card")
    return model, tmp_path / "draft"


def assert_same_sums(logits, expected):
    """Equal but for float32 sums in another order: a narrower head is multiplied otherwise."""
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


# -- which tokens ----------------------------------------------------------------------------


def test_the_most_frequent_tokens_are_kept_and_of_equals_the_first():
    embedding = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    texts = [[8, 8, 3], [3, 8, 5, 6]]
    assert DraftVocabulary.choose(texts, 2, embedding).d2t.tolist() == [3, 8]
    assert DraftVocabulary.choose(texts, 3, embedding).d2t.tolist() == [3, 5, 8]
    assert DraftVocabulary.choose(texts, 6, embedding).d2t.tolist() == [0, 1, 3, 5, 6, 8]
    assert DraftVocabulary.choose(texts, 2, embedding, {7}).d2t.tolist() == [7, 8]
    whole = DraftVocabulary.choose([], 9, embedding)
    assert whole.d2t.tolist() == whole.t2d.tolist() == list(range(9))


@pytest.mark.parametrize("at_a_time", [1, 1 << 24])
def test_other_tokens_are_read_as_the_one_whose_embedding_points_the_same_way(
    monkeypatch, at_a_time
):
    monkeypatch.setattr(module_under_test, "_NUM_COMPARED", at_a_time)
    embedding = torch.tensor([[1.0, 0.0], [0.0, 5.0], [9.0, 1.0], [-1.0, 0.0], [0.1, 0.2]])
    vocabulary = DraftVocabulary.choose([[1, 3, 0]], 3, embedding)
    assert vocabulary.d2t.tolist() == [0, 1, 3]
    # 2 lies along 0 although 1 has the larger product with much; 4 lies along 1.
    assert vocabulary.t2d.tolist() == [0, 1, 0, 2, 1]


def test_kept_tokens_are_read_as_themselves_though_others_have_the_same_embedding():
    vocabulary = DraftVocabulary.choose([[2, 3]], 2, torch.ones(5, 3))
    assert vocabulary.t2d[vocabulary.d2t].tolist() == [0, 1]


@pytest.mark.parametrize(("size", "required"), [(0, ()), (10, ()), (1, (2, 3))])
def test_sizes_out_of_range_are_refused(size, required):
    least = max(1, len(required))
    with pytest.raises(ConfigError, match=f"keeps from {least} to 9 of .* got {size}"):
        DraftVocabulary.choose([], size, torch.eye(9), required)


# -- the model -------------------------------------------------------------------------------


def test_a_draft_of_fewer_tokens_says_what_the_target_says_of_them(draft, target):
    model, path = draft
    with torch.no_grad():
        expected = target.logits(IDS[:1])[..., KEPT]
        assert_same_sums(model.logits(IDS[:1]), expected)
        assert torch.equal(load_trainable(path).logits(IDS), model.logits(IDS))
    assert model.num_parameters == DraftShape.parse(
        "vocab=7", like=DraftShape.of(target.config)
    ).num_parameters(target.config)


def test_tokens_that_it_does_not_know_are_read_as_the_nearest(draft, target, vocabulary):
    model, _ = draft
    stand_ins = vocabulary.d2t[vocabulary.t2d[IDS]]
    assert not torch.equal(stand_ins, IDS)
    with torch.no_grad():
        assert_same_sums(model.logits(IDS), target.logits(stand_ins)[..., KEPT])


def test_its_configuration_speaks_its_own_ids(draft):
    model, path = draft
    config = model.config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (7, 0, [1])
    assert load_model(str(path)).info.eos_ids == {4}


# -- served ----------------------------------------------------------------------------------


def served_logits(model, token_ids):
    cache = model.new_cache(64)
    ids = token_ids.tolist()
    batch = model.batch(cache, [Segment(cache.open(), ids, range(-1, len(ids) - 1))])
    assert batch.token_ids.tolist() == batch.layout.token_ids.tolist()
    return model.forward(batch, range(len(ids))).logits


@pytest.mark.parametrize("dtype", ["float32", "float64"])  # compiled, and through modules
def test_served_it_speaks_the_targets_tokens(draft, dtype):
    model, path = draft
    served = load_model(str(path), dtype=dtype, device="cpu")
    assert isinstance(served, ReducedModel)
    assert served.info.vocab_size == VOCAB_SIZE
    with torch.no_grad():
        expected = model.logits(IDS)
    for ids, rows in zip(IDS, expected, strict=True):
        logits = served_logits(served, ids)
        assert logits.shape == (4, VOCAB_SIZE)
        assert_same_sums(logits[:, KEPT].float(), rows)
        others = [it for it in range(VOCAB_SIZE) if it not in KEPT]
        assert (logits[:, others] == -math.inf).all()


def test_states_of_layers_are_handed_on(draft):
    served = load_model(str(draft[1]))
    cache = served.new_cache(64)
    batch = served.batch(cache, [Segment(cache.open(), [2, 60], [-1, 0])])
    output = served.forward(batch, [1], hidden_layers=[0, 3])
    assert output.logits.shape == (1, VOCAB_SIZE)
    assert [tuple(states.shape) for states in output.hidden.values()] == [(2, 32), (2, 32)]


def test_nobody_drafts_for_it_with_its_own_layers(draft):
    with pytest.raises(UnsupportedModelError, match="has a reduced vocabulary"):
        load_model(str(draft[1])).with_layers(LayerSet.of(range(1)))


# -- broken files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d2t", "t2d", "message"),
    [
        ([2, 1], [0, 1, 0], "d2t does not ascend within 0 to 2"),
        ([1, 3], [0, 0, 0], "d2t does not ascend within 0 to 2"),
        ([1, 2], [0, 0, 2], "t2d leaves 0 to 1"),
        ([1, 2], [0, 1, 0], "t2d does not lead kept tokens back"),
        ([], [0, 1], "vectors of at least one id"),
        ([[1]], [0, 1], "vectors of at least one id"),
    ],
)
def test_maps_that_are_none_are_refused(tmp_path, d2t, t2d, message):
    maps = {"d2t": torch.tensor(d2t, dtype=torch.int64), "t2d": torch.tensor(t2d)}
    save_file(maps, tmp_path / FILE_NAME)
    with pytest.raises(ModelError, match=message):
        DraftVocabulary.load(tmp_path)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    assert DraftVocabulary.load(tmp_path) is None
    save_file({"d2t": torch.arange(3)}, tmp_path / FILE_NAME)
    with pytest.raises(ModelError, match="cannot be read: 't2d'"):
        DraftVocabulary.load(tmp_path)
    Path(tmp_path / FILE_NAME).write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="cannot be read: "):
        DraftVocabulary.load(tmp_path)


def test_a_vocabulary_of_another_model_is_refused(draft):
    path = draft[1]
    DraftVocabulary.choose([[3]], 6, torch.eye(VOCAB_SIZE)).save(path)
    with pytest.raises(ModelError, match="is of 6 tokens, the weights of 7"):
        load_model(str(path))
