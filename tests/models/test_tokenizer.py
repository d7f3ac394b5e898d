"""Tokenizers: text survives the way to ids and back; vocabularies of a pair must agree."""

import random
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from foretoken.assets import EMBEDDED
from foretoken.errors import ModelError, VocabularyMismatchError
from foretoken.models.tokenizer import Tokenizer, check_same_vocabulary
from tests.fakes import (
    ASCII_ALPHABET,
    UTF8_ALPHABET,
    VOCAB_SIZE,
    ByteTokenizer,
    tiny_language_model,
)

TEXTS = ["Once upon a time there was a cat.", "The cat sat on the mat; the end.", "é 世界 🙂"]


def train_tokenizer():
    """Return a small byte-level BPE tokenizer that puts <s> before every text."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


train_tokenizer_once = cache(train_tokenizer)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer.load(str(directory))


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_come_in_and_go_out(tokenizer):
    ids = tokenizer.encode("the cat")
    assert ids[0] == tokenizer.vocabulary["<s>"]
    assert tokenizer.decode([*ids, tokenizer.vocabulary["</s>"]]) == "the cat"


def test_text_of_special_tokens_is_read_as_such(tokenizer):
    assert tokenizer.encode("</s>") == [tokenizer.vocabulary[text] for text in ("<s>", "</s>")]


def test_prompts_are_never_cut(tokenizer):
    assert len(tokenizer.encode("z" * 5000)) == 5001


def test_no_ids_have_no_text(tokenizer):
    assert tokenizer.decode([]) == ""


def test_vocabulary_names_every_id_once(tokenizer):
    vocabulary = tokenizer.vocabulary
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    vocabulary.clear()
    assert tokenizer.vocabulary, "the caller gets a copy"


def test_directory_without_tokenizer_has_none(tmp_path):
    assert Tokenizer.load(str(tmp_path)) is None


@pytest.mark.parametrize("text", ["", "{", '{"version": "1.0"}', "[]"])
def test_broken_tokenizer_is_refused(directory, tmp_path, text):
    config = (directory / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"the tokenizer of .* cannot be loaded") as caught:
        Tokenizer.load(str(tmp_path))
    assert "tokenizer.json" in caught.value.hint
    assert "\n" not in str(caught.value)


# -- the fake that other tests use -----------------------------------------------------------


@pytest.mark.parametrize("alphabet", [ASCII_ALPHABET, UTF8_ALPHABET])
def test_fake_has_one_token_per_id_of_the_tiny_models(alphabet):
    fake = ByteTokenizer(alphabet)
    assert sorted(fake.vocabulary.values()) == list(range(VOCAB_SIZE))
    text = "A cat? No.\n"
    assert len(fake.encode(text)) == len(text)
    assert fake.decode(fake.encode(text)) == text


def test_fake_may_need_several_tokens_for_a_character():
    fake = ByteTokenizer(UTF8_ALPHABET)
    assert len(fake.encode("🙂")) == 4
    assert fake.decode(fake.encode("é世🙂")) == "é世🙂"
    assert fake.decode(fake.encode("🙂")[:3]) == "\ufffd"


# -- pairs -----------------------------------------------------------------------------------


def model_with(vocab_size):
    return tiny_language_model("llama", vocab_size=vocab_size)


def test_models_without_tokenizers_need_equal_widths():
    check_same_vocabulary(model_with(61), None, model_with(61), None)
    with pytest.raises(VocabularyMismatchError, match="draft 64 tokens, target 61") as caught:
        check_same_vocabulary(model_with(61), None, model_with(64), None)
    assert "prompt-lookup" in caught.value.hint


@pytest.mark.parametrize("which", ["target", "draft"])
def test_one_tokenizer_alone_says_nothing(which):
    given_one = {"target": (ByteTokenizer(), None), "draft": (None, ByteTokenizer())}[which]
    check_same_vocabulary(model_with(61), given_one[0], model_with(61), given_one[1])
    with pytest.raises(VocabularyMismatchError, match="draft 64 tokens, target 61"):
        check_same_vocabulary(model_with(61), given_one[0], model_with(64), given_one[1])


@pytest.mark.parametrize(("target_width", "draft_width"), [(61, 61), (64, 61), (61, 64)])
def test_padded_logits_are_no_difference(target_width, draft_width):
    check_same_vocabulary(
        model_with(target_width), ByteTokenizer(), model_with(draft_width), ByteTokenizer()
    )


def test_vocabularies_of_different_length_are_refused():
    with pytest.raises(VocabularyMismatchError, match="draft 59 tokens, target 61"):
        check_same_vocabulary(
            model_with(61), ByteTokenizer(), model_with(61), ByteTokenizer(ASCII_ALPHABET[:59])
        )


def test_first_token_with_another_id_is_named():
    swapped = ASCII_ALPHABET[:4] + ASCII_ALPHABET[5:6] + ASCII_ALPHABET[4:5] + ASCII_ALPHABET[6:]
    with pytest.raises(VocabularyMismatchError, match=r"draft 5 for 'c', target 4$"):
        check_same_vocabulary(
            model_with(61), ByteTokenizer(), model_with(61), ByteTokenizer(swapped)
        )


def test_token_that_the_draft_lacks_is_named():
    other = ASCII_ALPHABET[:-1] + b"#"
    with pytest.raises(VocabularyMismatchError, match="draft None for '\"', target 60"):
        check_same_vocabulary(model_with(61), ByteTokenizer(), model_with(61), ByteTokenizer(other))


def test_draft_model_needs_a_logit_for_every_token():
    with pytest.raises(VocabularyMismatchError, match="draft model 50 logits for 61 tokens"):
        check_same_vocabulary(model_with(61), ByteTokenizer(), model_with(50), ByteTokenizer())


def test_tokenizer_of_vocabulary_and_merges_alone_is_found(tmp_path):
    """GPT-2's original layout, without tokenizer.json, used to count as no tokenizer."""
    raw = train_tokenizer().backend_tokenizer
    raw.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


@pytest.mark.parametrize("adds_special", [True, False])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_encoding_past_transformers_gives_the_same_tokens(adds_special, text):
    theirs = train_tokenizer_once()
    ours = Tokenizer(theirs)
    assert ours._encoder is not None
    for each in (text, f"{text}</s>{text}"):
        expected = theirs.encode(each, truncation=False, add_special_tokens=adds_special)
        theirs(text, truncation=True, max_length=3, padding="max_length")
        assert ours.encode(each, adds_special=adds_special) == expected


def test_special_tokens_are_split_where_the_tokenizer_says_so(directory):
    ours = Tokenizer(PreTrainedTokenizerFast.from_pretrained(directory, split_special_tokens=True))
    assert ours.decode(ours.encode("</s>")) == "</s>"


def test_decoding_past_transformers_gives_the_same_text():
    target = EMBEDDED["stories"].target
    ours = Tokenizer.load(str(target))
    theirs = AutoTokenizer.from_pretrained(target)
    assert ours._decoder is not None
    rng = random.Random(1)
    for count in (0, 1, 2, 30):
        token_ids = [rng.randrange(2048) for _ in range(count)]
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
    assert ours.decode(range(5)) == theirs.decode(list(range(5)), skip_special_tokens=True)
