"""A draft model with other tokens: what it is told is the context, what it says is translated."""

import json
import math
import random
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from foretoken import LLM
from foretoken.assets import EMBEDDED
from foretoken.core.draft import Draft, DraftBudget, SiblingDraw
from foretoken.core.options import ComponentSpec
from foretoken.core.sampling import Sampler
from foretoken.core.tree import TokenTree
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.drafters import prepare_drafter
from foretoken.drafters.base import DraftContext, Outcome, RequestView
from foretoken.drafters.retokenize import (
    MAX_PIECE,
    Retokenizer,
    Vocabulary,
    continue_ids,
    pair_special,
    shared_tokens,
    text_behind,
)
from foretoken.drafters.translate import TextTranslation
from foretoken.drafters.universal import UniversalDrafter, UniversalOptions
from foretoken.errors import ConfigError, ModelError
from foretoken.models.tokenizer import Tokenizer
from tests.engines import (
    check_idle,
    counting_model,
    finish,
    greedy,
    make_engine,
    make_host,
    micro_model,
    plain_ids,
    sampled,
)
from tests.fakes import UTF8_ALPHABET, ByteTokenizer, build_module, tiny_config

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play with her big, red "
    'ball in the park. One day, her mom said, "Lily, we have to go home now." Lily was sad, but '
    "she put her ball in a bag and went with her mom. When they got home, they had a snack."
)
STORIES = EMBEDDED["stories"]
TEXTS = st.text(
    st.one_of(st.sampled_from("ab \n'.,é世🙂"), st.characters(exclude_categories=["Cs"])),
    max_size=160,
)


def as_tokenizer(raw):
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw))


def byte_level_tokenizer(merges=(("t", "h"), ("th", "e"), ("Ġ", "the"), ("n", "d"))):
    """Return a tokenizer as GPT-2's, with few merges."""
    pieces = [
        "<|end|>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *("".join(m) for m in merges),
    ]
    raw = RawTokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|end|>"])
    return as_tokenizer(raw)


def byte_fallback_tokenizer():
    """Return a tokenizer as Llama 2's: texts begin with a space, unknown characters are bytes."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyzLOSW.,", '"', "th", "the", "▁the", "an", "▁an", "and"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "n"), ("▁", "an"), ("an", "d")]
    vocabulary = {piece: at for at, piece in enumerate(pieces)}
    raw = RawTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    raw.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    return as_tokenizer(raw)


def vocabulary_of(tokenizer):
    return Vocabulary(tokenizer, "some model", 1 + max(tokenizer.vocabulary.values()))


@pytest.fixture(scope="module")
def vocabularies():
    """Tokenizers of every kind, by name."""
    tokenizers = {
        "stories": Tokenizer.load(str(STORIES.target)),
        "byte level": byte_level_tokenizer(),
        "byte fallback": byte_fallback_tokenizer(),
        "bytes": ByteTokenizer(UTF8_ALPHABET),
    }
    return {name: vocabulary_of(tokenizer) for name, tokenizer in tokenizers.items()}


PAIRS = [
    ("stories", "byte level"),
    ("byte level", "byte fallback"),
    ("byte fallback", "stories"),
    ("bytes", "byte fallback"),
]


def retokenizer(target, draft):
    return Retokenizer(target, draft, pair_special(target, draft, (), ()))


def encode_once(target, draft, token_ids):
    text = retokenizer(target, draft)
    text.take(token_ids)
    return text.encode()


# -- what tokens spell -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stories", "byte level", "byte fallback"])
@given(text=TEXTS)
def test_tokens_spell_the_text_that_they_encode(vocabularies, name, text):
    vocabulary = vocabularies[name]
    added = b" " if vocabulary.adds_space and text else b""
    assert vocabulary.spell(vocabulary.encode_start(text)) == added + text.encode()
    assert vocabulary.spell(vocabulary.encode_inner(text)) == text.encode()


def test_special_tokens_spell_nothing_and_begin_texts(vocabularies):
    assert vocabularies["stories"].start_ids == [0]
    assert vocabularies["stories"].special_ids == {"<|bos|>": 0, "<|eos|>": 1}
    assert vocabularies["byte fallback"].start_ids == [1]
    assert vocabularies["byte fallback"].spell([0, 1, 2]) == b""
    assert vocabularies["bytes"].special_ids == {}


def test_a_tokenizer_whose_tokens_spell_something_else_is_refused():
    pieces = {piece: at for at, piece in enumerate(["##a", "##b", "##cd", "##e"])}
    raw = RawTokenizer(models.WordPiece(pieces, unk_token="##a"))
    raw.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match=r"unknown kind.*'##"):
        vocabulary_of(as_tokenizer(raw))


def test_shared_tokens_are_those_that_spell_the_same(vocabularies):
    target, draft = vocabularies["byte level"], vocabularies["byte fallback"]
    shared = shared_tokens(target, draft)
    assert len(set(shared.values())) == len(shared) >= 256
    assert all(target.spelling(ours) == draft.spelling(theirs) for ours, theirs in shared.items())
    # " the" is written in two ways, and "a" is the letter, not the byte.
    assert draft.spelling(shared[target.id_of[b" the"]]) == b" the"
    [letter] = draft.encode_inner("a")
    assert shared[target.id_of[b"a"]] == letter


def test_special_tokens_are_paired_by_name_and_ends_by_what_they_are(vocabularies):
    target, draft = vocabularies["stories"], vocabularies["byte fallback"]
    assert pair_special(target, draft, (), (2,)) == {}
    assert pair_special(target, draft, (1,), (2,)) == {1: 2}
    assert pair_special(target, target, (1,), (1,)) == {0: 0, 1: 1}


# -- the context in the draft's tokens -------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
@given(text=TEXTS, data=st.data())
def test_a_context_that_grew_is_encoded_like_one_that_came_at_once(vocabularies, pair, text, data):
    target, draft = (vocabularies[name] for name in pair)
    token_ids = target.encode_start(text)
    grown = retokenizer(target, draft)
    num_taken = 0
    closed = []
    while num_taken < len(token_ids):
        num_taken += data.draw(st.integers(1, 9))
        grown.take(token_ids[:num_taken])
        encoded = grown.encode()
        assert encoded == encode_once(target, draft, token_ids[:num_taken])
        if encoded:
            # What was closed stands, because its keys and values stay in the cache.
            assert encoded[: len(closed)] == closed
            closed = encoded[: grown.num_closed]


@pytest.mark.parametrize("pair", PAIRS[:3], ids=" to ".join)
@given(text=TEXTS.filter(lambda text: text.strip(" ")))
def test_the_encoding_spells_the_context(vocabularies, pair, text):
    target, draft = (vocabularies[name] for name in pair)
    if target.adds_space:
        text = text.lstrip(" ")  # which of them was added cannot be seen
    encoded = encode_once(target, draft, target.encode_start(text))
    added = b" " if draft.adds_space else b""
    assert draft.spell(encoded) == added + text.encode()


@pytest.mark.parametrize("pair", PAIRS[:3], ids=" to ".join)
def test_pieces_of_a_text_are_encoded_as_the_whole(vocabularies, pair):
    target, draft = (vocabularies[name] for name in pair)
    words = (STORY * 3).split(" ")
    for count in range(1, len(words), 5):
        text = " ".join(words[:count])
        encoded = encode_once(target, draft, target.encode_start(text))
        assert encoded == [*draft.start_ids, *draft.encode_start(text)]


def test_only_the_end_of_a_context_is_encoded_anew(vocabularies):
    target, draft = vocabularies["stories"], vocabularies["byte level"]
    token_ids = target.encode_start(STORY * 20)
    text = retokenizer(target, draft)
    for count in range(1, len(token_ids)):
        text.take(token_ids[:count])
        assert len(text.encode()) - text.num_closed <= 4 * (MAX_PIECE + 2)
    assert text.num_closed > 0.98 * len(text.encode())


def test_a_part_of_a_character_is_no_context(vocabularies):
    target, draft = vocabularies["byte level"], vocabularies["byte fallback"]
    token_ids = target.encode_start("oh 🙂!")
    lengths = [len(encode_once(target, draft, token_ids[:n])) for n in range(4, len(token_ids) + 1)]
    assert len(token_ids) == 8
    # The emoji is four tokens here and four there.
    assert [length > 0 for length in lengths] == [False, False, False, True, True]


def test_a_tokenizer_that_changes_the_end_of_a_text_gets_no_context(vocabularies):
    raw = RawTokenizer(models.BPE({letter: at for at, letter in enumerate("abcdeh ")}, []))
    raw.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    raw.decoder = decoders.Fuse()
    draft, target = vocabulary_of(as_tokenizer(raw)), vocabularies["byte level"]

    def encode(text):
        return draft.spell(encode_once(target, draft, target.encode_start(text)))

    assert encode("Abe bade") == b"abe bade"  # changed, but it ends alike
    assert encode("abe B") == b""
    assert encode("abe ") == b""  # it would go on after another text: "abe"
    assert encode("abe ü") == b""


def test_special_tokens_of_the_context_become_the_drafts(vocabularies):
    target, draft = vocabularies["stories"], vocabularies["byte fallback"]
    text = Retokenizer(target, draft, {1: 2})
    first, second = target.encode_start("and the"), target.encode_start(" and")
    text.take([0, *first, 1, *second])
    encoded = text.encode()
    # The target's own beginning is not passed on, the draft's is put.
    assert encoded[0] == 1
    assert encoded.count(2) == 1
    assert draft.spell(encoded[: encoded.index(2)]) == b" and the"
    assert draft.spell(encoded[encoded.index(2) :]) == b" and"


# -- what the draft says in the target's tokens ----------------------------------------------


def test_a_continuation_has_the_tokens_of_the_whole_text(vocabularies):
    target = vocabularies["stories"]
    token_ids = target.encode_start(STORY)
    for count in range(1, len(token_ids)):
        rest = target.spell(token_ids[count:])
        found = continue_ids(target, text_behind(target, token_ids[:count]), rest)
        assert [token_id for token_id, _ in found] == token_ids[count:]
        ends = [end for _, end in found]
        assert ends == [
            len(target.spell(token_ids[count:stop]))
            for stop in range(count + 1, len(token_ids) + 1)
        ]


@pytest.mark.parametrize("name", ["stories", "byte level", "byte fallback"])
@given(before=TEXTS, after=TEXTS, cut=st.integers(0, 3))
def test_a_continuation_spells_what_it_continues(vocabularies, name, before, after, cut):
    vocabulary = vocabularies[name]
    spelled = after.encode()[: len(after.encode()) - cut]
    behind = text_behind(vocabulary, vocabulary.encode_start(before))
    found = continue_ids(vocabulary, behind, spelled)
    whole = vocabulary.spell([token_id for token_id, _ in found])
    assert spelled.startswith(whole)
    assert [end for _, end in found] == [
        len(vocabulary.spell([token_id for token_id, _ in found[: at + 1]]))
        for at in range(len(found))
    ]


def test_a_continuation_that_changes_the_last_token_is_dropped(vocabularies):
    vocabulary = vocabularies["byte fallback"]
    context = vocabulary.encode_start("to th")
    behind = text_behind(vocabulary, context)
    assert continue_ids(vocabulary, behind, b"e") == []  # "the" is one token
    [(token_id, end)] = continue_ids(vocabulary, behind, b"i")
    assert (vocabulary.spelling(token_id), end) == (b"i", 1)


def draft_of(own_ids, parents, probs):
    logprobs = (0.0, *map(math.log, probs))
    tree = TokenTree(tuple(own_ids), tuple(parents))
    return Draft.from_drafter("own", tree, draft_logprobs=logprobs)


def context_of(token_ids, params=None, *, request_id="r", siblings=SiblingDraw.COUPLED, **budget):
    params = params or greedy(40)
    return DraftContext(
        request_id=request_id,
        token_ids=token_ids,
        sampler=Sampler(params, params.seed or 0, 1),
        budget=DraftBudget(**{"max_nodes": 8, "max_depth": 8, **budget}),
        siblings=SiblingDraw.DETERMINISTIC if params.is_greedy else siblings,
    )


def text_translation(target, draft, special=None):
    return TextTranslation(target, draft, special or {}, max_ratio=4.0, min_gain=0.1)


def spelled_probs(draft, vocabulary):
    """Return what each node's path spells, and its estimated probability."""
    return {
        vocabulary.spell(draft.tree.sequence(node)[1:]): math.exp(total)
        for node, total in enumerate(draft.path_logprobs())
        if node
    }


def test_probabilities_are_of_all_paths_that_spell_a_token(vocabularies):
    target, draft = vocabularies["byte fallback"], vocabularies["byte level"]
    ids = draft.id_of
    # "th" .5 then "e" .8 or "i" .1; "t" .25 then "he" in two tokens, which spell "the" too.
    tokens = [b"x", b"th", b"e", b"i", b"t", b"h", b"e"]
    own = draft_of(
        [ids[token] for token in tokens], (-1, 0, 1, 1, 0, 4, 5), (0.5, 0.8, 0.1, 0.25, 0.5, 0.4)
    )
    context = context_of(target.encode_start("a"))
    translated = text_translation(target, draft).translate(own, context)
    assert spelled_probs(translated, target) == pytest.approx(
        {
            b"the": 0.5 * 0.8 + 0.25 * 0.5 * 0.4,  # the product, over both paths
            b"th": 0.5,  # complete with its first node, whatever comes then
            b"thi": 0.5 * 0.1,
        },
        rel=1e-9,
    )


def test_tokens_that_share_one_token_of_the_draft_follow_from_each_other(vocabularies):
    target, draft = vocabularies["bytes"], vocabularies["byte level"]
    own = draft_of([draft.id_of[b"x"], draft.id_of[b" the"]], (-1, 0), (0.3,))
    translated = text_translation(target, draft).translate(
        own, context_of(target.encode_start("a"))
    )
    assert target.spell(translated.tree.token_ids[1:]) == b" the"
    assert [math.exp(logprob) for logprob in translated.draft_logprobs] == pytest.approx(
        [1, 0.3, 1, 1, 1], rel=1e-9
    )


def test_an_end_becomes_the_targets_end_and_nothing_comes_after_it(vocabularies):
    target, draft = vocabularies["byte fallback"], vocabularies["byte level"]
    tokens = [draft.id_of[b"x"], draft.id_of[b"e"], 0, draft.id_of[b"e"]]
    own = draft_of(tokens, (-1, 0, 1, 2), (0.5, 0.5, 0.5))
    context = context_of(target.encode_start("a"))
    translated = text_translation(target, draft, {0: 2}).translate(own, context)
    assert translated.tree.token_ids[1:] == (target.id_of[b"e"], 2)
    without = text_translation(target, draft).translate(own, context)
    assert without.tree.token_ids[1:] == (target.id_of[b"e"],)


def test_the_race_decides_between_translated_candidates(vocabularies):
    """Two words, equally likely: the estimate follows the noise that the target will use."""
    target, draft = vocabularies["byte fallback"], vocabularies["byte level"]
    own = draft_of([draft.id_of[token] for token in (b"x", b"e", b"o")], (-1, 0, 0), (0.5, 0.5))
    winners = set()
    for seed in range(12):
        context = context_of(target.encode_start("a"), sampled(9, seed=seed), max_nodes=1)
        [chosen] = text_translation(target, draft).translate(own, context).tree.token_ids[1:]
        row = torch.full((len(target.spellings),), -torch.inf, dtype=torch.float64)
        row[[target.id_of[b"e"], target.id_of[b"o"]]] = 0
        assert chosen == context.sampler.choose(row, context.token_ids)
        winners.add(chosen)
    assert len(winners) == 2


# -- real models -----------------------------------------------------------------------------


def save_other(path, tokenizer, *, seed=1, **changes):
    """Write a random model with a tokenizer."""
    tokenizer._tokenizer.save_pretrained(path)
    size = 1 + max(tokenizer.vocabulary.values())
    config = tiny_config("llama", vocab_size=size, num_hidden_layers=2, **changes)
    build_module(config, seed, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    """The embedded draft model, with its tokens under other ids: the same model to anyone."""
    path = tmp_path_factory.mktemp("renamed")
    for file in STORIES.draft.iterdir():
        shutil.copyfile(file, path / file.name)
    raw = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = raw["model"]["vocab"]
    size = len(vocabulary)
    new_ids = [0, 1, *random.Random(0).sample(range(2, size), size - 2)]
    raw["model"]["vocab"] = {piece: new_ids[token_id] for piece, token_id in vocabulary.items()}
    (path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    weights = load_file(path / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.empty_like(table).index_copy_(
        0, torch.tensor(new_ids), table
    )
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def nonsense(tmp_path_factory):
    """A random model with a tokenizer as Llama 2's."""
    return save_other(tmp_path_factory.mktemp("nonsense"), byte_fallback_tokenizer())


PROMPTS = ["Once upon a time", "The big dog", "Tim saw a 🙂 and said: «é世»"]
CONTROLS = {
    "greedy": greedy(24),
    "sampled": sampled(24, seed=3),
    "controlled": sampled(
        24,
        seed=4,
        temperature=0.8,
        top_p=0.9,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        logit_bias={15: -100.0, 14: 1.0},
        ignore_eos=True,
    ),
}


@pytest.mark.parametrize("kind", CONTROLS)
@pytest.mark.parametrize("mode", ["text", "tokens"])
@pytest.mark.parametrize("model", ["renamed", "nonsense"])
def test_tokens_are_those_of_plain_decoding(request, model, mode, kind):
    path = request.getfixturevalue(model)
    plain = LLM("stories", drafters="none").generate(PROMPTS, CONTROLS[kind])
    llm = LLM("stories", drafters=f"universal:path={path},mode={mode}")
    drafted = llm.generate(PROMPTS, CONTROLS[kind])
    assert [output.token_ids for output in drafted] == [output.token_ids for output in plain]
    assert sum(output.stats.num_draft_tokens for output in drafted) > 20


def num_steps(drafter, params):
    outputs = LLM("stories", drafters=drafter).generate(PROMPTS[:2], params)
    return [output.stats.num_steps for output in outputs]


def test_shared_tokens_draft_exactly_what_the_same_model_drafts_by_itself(renamed):
    """All tokens are shared, so race, controls and trees are those of `draft-model`."""
    for params in CONTROLS.values():
        assert num_steps(f"universal:path={renamed}", params) == num_steps(
            f"draft-model:path={STORIES.draft}", params
        )


def test_drafts_by_text_are_taken_as_often_when_greedy_and_often_when_sampled(renamed):
    drafter = f"universal:path={renamed},mode=text"
    by_text, by_tokens, plain = (
        [sum(num_steps(name, params)) for params in (CONTROLS["greedy"], CONTROLS["sampled"])]
        for name in (drafter, f"draft-model:path={STORIES.draft}", "none")
    )
    assert by_text[0] <= 1.1 * by_tokens[0]
    assert by_text[1] <= 0.7 * plain[1]


def test_a_real_model_of_another_vocabulary_saves_steps(shared_data):
    path = shared_data / "models" / "stories260K-hf"
    if not path.is_dir():
        pytest.skip(f"no model at {path}")
    for params, share in ((CONTROLS["greedy"], 0.6), (CONTROLS["sampled"], 0.8)):
        steps = sum(num_steps(f"universal:path={path}", params))
        assert steps <= share * sum(num_steps("none", params))


# -- the drafter -----------------------------------------------------------------------------

TARGET_TOKENIZER = ByteTokenizer(UTF8_ALPHABET)


def make_drafter(*, tokenizer=None, model=None, host=None, target=None, **options):
    """Return a drafter over random models: a target of single bytes, a draft model as Llama 2."""
    draft = vocabulary_of(tokenizer or byte_fallback_tokenizer())
    size = len(draft.spellings)
    model = model or micro_model(seed=2, vocab_size=size, max_position_embeddings=512)
    target = target or byte_target()
    host = host or make_host(target, tokenizer=TARGET_TOKENIZER)
    options = UniversalOptions(path="unused", **{"mode": "text", "min_gain": 0, **options})
    return UniversalDrafter(model, options, host, vocabulary_of(TARGET_TOKENIZER), draft)


def byte_target(**changes):
    return micro_model(seed=1, vocab_size=len(UTF8_ALPHABET), **changes)


def start(drafter, token_ids, request_id="r"):
    drafter.start(RequestView(request_id=request_id, prompt_ids=list(token_ids)))


def tell(drafter, *token_ids):
    verdict = Verdict((), tuple(token_ids[-1:]), FinalKind.RECOVERED)
    draft = Draft.empty(0)
    drafter.commit([Outcome(request_id="r", verdict=verdict, draft=draft)])


def cached_keys(drafter):
    sequence = drafter._states["r"].sequence
    slots = drafter._cache.slots(sequence, 0, sequence.num_cached)
    return drafter._cache.keys[0][torch.from_numpy(slots)]


def test_the_cache_keeps_what_stands_and_is_that_of_the_whole_text():
    text = TARGET_TOKENIZER.encode("the cat and the dog and the world, 世界 and so and on, " * 4)
    drafter = make_drafter()
    start(drafter, text[:5])
    for stop in range(5, len(text), 7):
        drafter.propose([context_of(text[:stop])])
        is_fed = bool(drafter._texts["r"].encode())  # not after a part of a character
        tell(drafter, text[stop])
        drafter._cache.check_integrity()
        sequence, num_closed = drafter._states["r"].sequence, drafter._texts["r"].num_closed
        assert sequence.num_cached == num_closed or not is_fed
    fresh = make_drafter()
    start(fresh, text[:stop])
    fresh.propose([context_of(text[:stop])])
    tell(fresh, text[stop])
    kept = cached_keys(drafter)
    assert len(kept) > 100
    # float64 up to its last bits: the same numbers from passes of other shapes.
    torch.testing.assert_close(kept, cached_keys(fresh), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["text", "tokens"])
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_engine_says_what_plain_decoding_says_for_bytes(mode, kind):
    """Random bytes: most contexts end in a part of a character, or are no text at all."""
    target, params = byte_target(), {"greedy": greedy(40), "sampled": sampled(40, seed=2)}[kind]
    drafter = make_drafter(mode=mode, target=target)
    prompts = [TARGET_TOKENIZER.encode(text) for text in ("the cat", "世界", "a🙂")]
    engine = make_engine(target, {"it": drafter})
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    finish(engine)
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output_ids == plain_ids(target, prompt, params)
    check_idle(engine)


def test_tokens_that_a_request_forbids_are_not_drafted():
    forbidden = dict.fromkeys(range(40), -100.0)
    drafter = make_drafter(mode="tokens")
    text = TARGET_TOKENIZER.encode("the cat")
    start(drafter, text)
    for params in (greedy(9, logit_bias=forbidden), sampled(9, logit_bias=forbidden)):
        [draft] = drafter.propose([context_of(text, params)])
        assert draft.tree.num_draft_tokens
        assert min(draft.tree.token_ids[1:]) >= 40


def alphabet_drafter(host=None, **options):
    """Return a drafter whose model says the alphabet: after "c" comes "d"."""
    size = len(vocabulary_of(byte_fallback_tokenizer()).spellings)
    return make_drafter(model=counting_model(size, **options), host=host)


def propose_once(drafter, text):
    token_ids = TARGET_TOKENIZER.encode(text)
    start(drafter, token_ids)
    [draft] = drafter.propose([context_of(token_ids)])
    drafter.stop("r")
    return TARGET_TOKENIZER.decode(draft.tree.token_ids[1:])


def test_a_text_beyond_the_drafts_context_limit_gets_no_draft():
    drafter = alphabet_drafter(context_limit=24)
    assert propose_once(drafter, "bcd").startswith("efghi")
    assert propose_once(drafter, "bcd" * 6) == "efgh"  # 20 tokens stand, and the last is not fed
    assert propose_once(drafter, "bcd" * 9) == ""


def test_a_text_with_more_tokens_than_the_cache_has_room_for_gets_no_draft():
    """The cache is sized by what a token usually takes; a text may take more."""
    host = make_host(byte_target(), max_requests=1, kv_cache_tokens=32)
    drafter = alphabet_drafter(host, context_limit=10**6)
    num_tokens = 16 * drafter._cache.num_blocks
    assert propose_once(drafter, "bcd").startswith("efghi")
    assert propose_once(drafter, "bcd" * num_tokens) == ""
    assert drafter._cache.num_free_blocks == drafter._cache.num_blocks


def test_a_request_that_never_gets_tokens_leaves_nothing():
    drafter = make_drafter()
    start(drafter, [3, 4])
    drafter.stop("r")
    drafter.stop("r")
    assert not drafter._texts
    assert drafter._cache.num_free_blocks == drafter._cache.num_blocks


def test_the_mode_follows_from_how_many_tokens_are_shared(nonsense, renamed):
    llms = [LLM("stories", drafters=f"universal:path={path}") for path in (nonsense, renamed)]
    names = [type(llm.engine.drafters["universal"]._translation).__name__ for llm in llms]
    assert names == ["TextTranslation", "TokenTranslation"]


# -- refusals --------------------------------------------------------------------------------


def create(path, **host):
    spec = ComponentSpec("universal", {"path": str(path)})
    return prepare_drafter(spec)(make_host(byte_target(), **host))


def test_a_draft_model_of_the_same_tokens_is_referred_to_draft_model():
    with pytest.raises(ConfigError, match="has those of the target") as caught:
        create(STORIES.draft, tokenizer=Tokenizer.load(str(STORIES.target)))
    assert f"draft-model:path={STORIES.draft}" in caught.value.hint


def test_models_without_tokenizers_are_refused(nonsense, tmp_path):
    with pytest.raises(ModelError, match=r"the target .* has no tokenizer files"):
        create(nonsense)
    build_module(tiny_config("llama")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"the draft .* has no tokenizer files"):
        create(tmp_path, tokenizer=TARGET_TOKENIZER)


def test_tokens_alone_need_common_ones():
    upper = ByteTokenizer(b"?XYZ")
    raw = RawTokenizer(models.BPE({"x": 0, "y": 1, "z": 2}, []))
    raw.decoder = decoders.Fuse()
    lower = as_tokenizer(raw)
    options = UniversalOptions(path="unused", mode="tokens")
    target, draft = micro_model(vocab_size=4), micro_model(seed=2, vocab_size=3)
    host = make_host(target, tokenizer=upper)
    with pytest.raises(ConfigError, match="share none"):
        UniversalDrafter(draft, options, host, vocabulary_of(upper), vocabulary_of(lower))


def test_options_are_checked():
    with pytest.raises(ConfigError, match="universal:mode is one of auto, text, tokens"):
        UniversalOptions(path="x", mode="words")
    with pytest.raises(ConfigError, match="universal:max_depth is at least 1"):
        UniversalOptions(path="x", max_depth=0)
