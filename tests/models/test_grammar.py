"""Grammars: what is written under their masks matches, however the states were reached."""

import json
import random
import re
import subprocess
import sys
import time

import jsonschema
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from foretoken.assets import EMBEDDED
from foretoken.core.draft import Draft
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.core.tree import TokenTree
from foretoken.errors import RequestError
from foretoken.models import grammar_errors
from foretoken.models.grammar import MAX_COMPILED, GrammarCompiler
from foretoken.models.tokenizer import Tokenizer
from foretoken.verifiers.base import TargetRows
from foretoken.verifiers.coupled import CoupledVerifier

PROMPT = [5, 6, 7]

PERSON = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1, "maximum": 99999},
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "role": {"enum": ["admin", "editor", "viewer"]},
        "active": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 8},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["city", "zip"],
            "additionalProperties": False,
        },
        "previous": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/year"}]},
    },
    "required": ["id", "name", "role", "tags", "address"],
    "additionalProperties": False,
    "$defs": {"year": {"type": "integer", "minimum": 1900, "maximum": 2100}},
}
COMPACT = {
    "x-guidance": {"whitespace_flexible": False},
    "type": "object",
    "properties": {"side": {"enum": ["left", "right"]}, "opening": {"const": "Once upon a time"}},
    "required": ["side", "opening"],
    "additionalProperties": False,
}
REGEXES = [
    r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]",
    r"(yes|no|maybe)( [a-zé]{1,8}){0,3}[.!?]",
    r"[^\x00-\x7f]{2,5}",
    r"a/b\\[\"'] ?(?i:END)",
]
GREETING = """
start: greeting ("," greeting)~0..3 "."
greeting: ("hi" | "hello") NAME
NAME: / [A-Z][a-z]{1,5}/
"""
ALL_GRAMMARS = [
    {"json_schema": PERSON},
    {"json_schema": COMPACT},
    {"json_schema": {}},
    *({"regex": regex} for regex in REGEXES),
    {"regex": "a{1,3}"},
    {"regex": ".*"},
    {"lark": GREETING},
    {"lark": 'start: a\na: "(" a ")" | "x" | a "+" a'},
]


def byte_fallback_tokenizer():
    """Return a tokenizer as Llama 2's: texts begin with a space, unknown characters are bytes."""
    pieces = ["▁", *"abcdenm{}:,0123456789", '"', "▁{", '{"', "na", "me", "name", '":', "▁a"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("n", "a"), ("m", "e"), ("na", "me"), ("{", '"'), ('"', ":"), ("▁", "{"), ("▁", "a")]
    vocabulary = {text: token_id for token_id, text in enumerate(tokens)}
    raw = RawTokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw))


@pytest.fixture(scope="module")
def stories():
    return Tokenizer.load(str(EMBEDDED["stories"].target))


@pytest.fixture(scope="module")
def neox(shared_data):
    path = shared_data / "tokenizers" / "gpt_neox_20B_tokenizer.json"
    if not path.is_file():
        pytest.skip(f"no tokenizer at {path}")
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_file=str(path)))


# What a model's end-of-sequence tokens and logits may look like.
KINDS = {
    "stories": (2048, (1,)),
    "stories-two-eos-padded": (2112, (0, 1)),
    "stories-no-eos": (2048, ()),
    "byte-fallback": (290, (2,)),
    "neox": (50304, (0,)),
}


@pytest.fixture(scope="module")
def compilers(request):
    built = {}

    def get(kind):
        if kind not in built:
            name = kind.split("-", maxsplit=1)[0]
            if name == "byte":
                tokenizer = byte_fallback_tokenizer()
            else:
                tokenizer = request.getfixturevalue(name)
            built[kind] = (GrammarCompiler(tokenizer, *KINDS[kind]), tokenizer, KINDS[kind][1])
        return built[kind]

    return get


@pytest.fixture(scope="module", params=KINDS)
def model(request, compilers):
    """A compiler with its tokenizer and end-of-sequence tokens."""
    return compilers(request.param)


@pytest.fixture(scope="module")
def compiler(compilers):
    return compilers("stories")[0]


def state_of(compiler, **params):
    state = compiler.compile(SamplingParams(**params), len(PROMPT))
    assert state is not None
    return state


def write(state, eos_ids, rng, max_tokens=400):
    """Decode with random logits under the masks; return the tokens of the text.

    Fails if the text is not whole in time.
    """
    token_ids = list(PROMPT)
    while not state.is_complete(token_ids):
        assert len(token_ids) < max_tokens, "the text has no end"
        row = state.allowed(token_ids)
        chosen = int(np.argmax(np.where(row, rng.standard_normal(len(row)), -np.inf)))
        assert row[chosen]
        if chosen in eos_ids:
            break
        token_ids.append(chosen)
    return token_ids[len(PROMPT) :]


def text_of(tokenizer, token_ids):
    """Return the text of an output: behind another token, so that no first space is lost."""
    [before] = tokenizer.encode("a")[-1:]
    return tokenizer.decode([before, *token_ids])[len(tokenizer.decode([before])) :]


# -- what is written matches -----------------------------------------------------------------


@pytest.mark.parametrize("schema", [PERSON, COMPACT], ids=["person", "compact"])
def test_random_models_write_json_that_validates(model, schema):
    compiler, tokenizer, eos_ids = model
    for seed in range(15):
        state = state_of(compiler, json_schema=schema)
        token_ids = write(state, eos_ids, np.random.default_rng(seed))
        jsonschema.validate(json.loads(text_of(tokenizer, token_ids)), schema)


@pytest.mark.parametrize("regex", REGEXES)
def test_random_models_write_texts_that_match(model, regex):
    compiler, tokenizer, eos_ids = model
    for seed in range(15):
        state = state_of(compiler, regex=regex)
        token_ids = write(state, eos_ids, np.random.default_rng(seed))
        text = text_of(tokenizer, token_ids)
        assert re.fullmatch(regex, text), text


def test_random_models_follow_lark(model):
    compiler, tokenizer, eos_ids = model
    for seed in range(15):
        state = state_of(compiler, lark=GREETING)
        text = text_of(tokenizer, write(state, eos_ids, np.random.default_rng(seed)))
        greeting = r"(hi|hello) [A-Z][a-z]{1,5}"
        assert re.fullmatch(rf"{greeting}(,{greeting}){{0,3}}\.", text), text


def test_sampled_text_ends_where_it_may(compiler, stories):
    """Where going on and ending are both allowed, the choice is the model's."""
    state = state_of(compiler, regex="(ha)+")
    token_ids = [*PROMPT, *stories.encode("haha")[1:]]
    row = state.allowed(token_ids)
    assert row[1]
    assert row.sum() > 1
    assert not state.is_complete(token_ids)
    assert not state.allowed(PROMPT)[1]


def test_space_between_json_tokens_is_bounded_unless_the_schema_says_so(compiler, stories):
    newlines = stories.encode("\n\n\n")[1:]
    assert stories.decode(newlines) == "\n\n\n"
    for chosen, num_allowed in [({}, 2), ({"x-guidance": {"whitespace_flexible": True}}, 3)]:
        schema = {"type": "array", "items": {"type": "null"}, **chosen}
        state = state_of(compiler, json_schema=schema)
        text = [*PROMPT, *stories.encode("[")[1:]]
        count = 0
        for token_id in newlines:
            if not state.allowed(text)[token_id]:
                break
            text.append(token_id)
            count += 1
        assert stories.decode(text[len(PROMPT) + 1 :]).count("\n") == num_allowed, count


# -- the end ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_end_of_sequence_follows_a_complete_text(compilers, kind):
    compiler, tokenizer, eos_ids = compilers(kind)
    state = state_of(compiler, regex="[ab]{2}")
    by_text = {text_of(tokenizer, [i]): i for i in tokenizer.vocabulary.values()}
    token_ids = [*PROMPT, by_text["a"]]
    assert not state.is_complete(token_ids)
    assert not state.allowed(token_ids)[list(eos_ids)].any()
    for token_id in (by_text["a"], by_text["b"]):
        assert state.is_complete(token_ids, [token_id])
        assert np.flatnonzero(state.allowed(token_ids, [token_id])).tolist() == list(eos_ids)
    for eos_id in eos_ids:
        assert not state.is_complete(token_ids, [eos_id]), "the text is not whole"
        ended = [by_text["a"], eos_id]
        assert state.is_complete(token_ids, ended)
        assert np.flatnonzero(state.allowed(token_ids, ended)).tolist() == list(eos_ids)


def test_without_end_of_sequence_the_text_ends_when_nothing_can_follow(compiler, stories):
    """With `ignore_eos` no such token is ever allowed, and the request still has an end."""
    state = state_of(compiler, regex="a{1,2}", ignore_eos=True)
    [a] = stories.encode("a")[1:]
    assert not state.allowed([*PROMPT, a])[1]
    assert not state.is_complete([*PROMPT, a])
    assert state.is_complete([*PROMPT, a, a])
    assert not state.allowed([*PROMPT, a, a]).any()


def test_special_tokens_are_no_text(compilers):
    for kind, special_ids in [("stories", [0]), ("byte-fallback", [0, 1]), ("neox", [1])]:
        compiler, _, eos_ids = compilers(kind)
        row = state_of(compiler, regex=r"(?s).*").allowed(PROMPT)
        assert not row[special_ids].any()
        assert row[list(eos_ids)].all()
        assert row.sum() > len(row) / 4


def test_end_of_sequence_token_that_is_text_elsewhere_is_no_text(stories):
    """It would end the request inside the text."""
    [a] = stories.encode("a")[1:]
    compiler = GrammarCompiler(stories, 2048, {a})
    state = state_of(compiler, regex="[ab]{2}")
    assert not state.allowed(PROMPT)[a]
    [b] = stories.encode("b")[1:]
    assert np.flatnonzero(state.allowed(PROMPT, [b, b])).tolist() == [a]


# -- widths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [300, 2047, 2048, 2049, 5000])
def test_masks_are_as_wide_as_the_logits(stories, compiler, vocab_size):
    whole = state_of(compiler, regex="[a-z ]{5,}").allowed(PROMPT)
    state = state_of(GrammarCompiler(stories, vocab_size, (1,)), regex="[a-z ]{5,}")
    row = state.allowed(PROMPT)
    assert (row.shape, row.dtype) == ((vocab_size,), np.dtype(bool))
    size = min(vocab_size, 2048)
    assert np.array_equal(row[:size], whole[:size])
    assert not row[size:].any()
    beyond = [*PROMPT, vocab_size - 1] if vocab_size > 2048 else PROMPT
    assert state.allowed(beyond).any() == (vocab_size <= 2048)


def test_text_that_the_model_cannot_spell_is_refused(stories):
    state = state_of(GrammarCompiler(stories, 20, (1,)), regex="[é世]x")
    with pytest.raises(RequestError, match="no tokens for") as caught:
        state.allowed(PROMPT)
    assert "spell" in caught.value.hint


def test_masks_belong_to_the_caller(compiler):
    state = state_of(compiler, regex="a{1,3}")
    row = state.allowed(PROMPT)
    before = row.copy()
    row[:] = True
    assert np.array_equal(state.allowed(PROMPT), before)


# -- purity ----------------------------------------------------------------------------------


def answers(state, token_ids, path, order):
    """Ask a state everything, in some order."""
    ask = {
        "allowed": lambda: state.allowed(token_ids, path).tolist(),
        "is_complete": lambda: state.is_complete(token_ids, path),
        "forced": lambda: state.forced([*token_ids, *path]),
    }
    return {name: ask[name]() for name in order}


@pytest.mark.parametrize("grammar", ALL_GRAMMARS, ids=lambda grammar: str(grammar)[:40])
def test_answers_do_not_depend_on_what_was_asked_before(compilers, grammar):
    """A state that has wandered over a tree answers as one that has seen nothing, and as one that
    was taken there token by token.
    """
    rng = random.Random(str(grammar))
    for round_number in range(12):
        kind = ("stories", "stories-two-eos-padded", "byte-fallback")[round_number % 3]
        compiler, _, eos_ids = compilers(kind)
        params = {**grammar, "ignore_eos": round_number % 4 == 3}
        state, token_ids = state_of(compiler, **params), list(PROMPT)
        for _ in range(12):
            base = token_ids[: rng.randint(len(PROMPT), len(token_ids))]
            path = random_path(state_of(compiler, **params), base, rng)
            order = rng.sample(["allowed", "is_complete", "forced"], 3)
            got = answers(state, base, path, order)
            assert got == answers(state_of(compiler, **params), base, path, sorted(order))
            stepwise = state_of(compiler, **params)
            for place in range(len(path)):
                stepwise.allowed([*base, *path[:place]])
            assert got["allowed"] == stepwise.allowed([*base, *path]).tolist()
            choices = np.flatnonzero(state.allowed(token_ids))
            if len(choices) == 0 or set(choices) <= set(eos_ids):
                break
            token_ids.append(rng.choice([int(i) for i in choices if i not in eos_ids]))


def random_path(state, token_ids, rng):
    """Return a path that mostly follows the grammar, sometimes leaves it or ends the text."""
    path = []
    for _ in range(rng.randint(0, 6)):
        row = state.allowed(token_ids, path)
        choices = np.flatnonzero(row)
        if len(choices) == 0 or rng.random() < 0.1:
            path.append(rng.randrange(len(row)))
        else:
            path.append(int(rng.choice(choices)))
    return path


def test_nothing_is_allowed_after_what_the_grammar_does_not_allow(compiler, stories):
    state = state_of(compiler, regex="ab+")
    [a], [b], [z] = (stories.encode(text)[1:] for text in "abz")
    for path in ([z], [z, a], [a, z], [1], [a, b, 1, a], [2047, 5], [a, a, b]):
        if path != [a, b, 1, a]:
            assert not state.allowed(PROMPT, path).any()
            assert not state.is_complete(PROMPT, path)
            assert state.forced([*PROMPT, *path]) == []
        assert state.allowed(PROMPT, [a])[b], "the state survives nonsense"


class Rows:
    """Logits that depend on the whole text before them, as a model's do."""

    def __init__(self, vocab_size):
        self._vocab_size = vocab_size

    def row(self, token_ids):
        seed = hash(tuple(token_ids)) % 2**32
        generator = np.random.default_rng(seed)
        return torch.from_numpy(generator.standard_normal(self._vocab_size) * 3)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    "grammar",
    [{"json_schema": PERSON}, {"regex": REGEXES[1]}, {"lark": GREETING}],
    ids=["json", "regex", "lark"],
)
def test_trees_give_the_tokens_of_plain_decoding(compiler, grammar, temperature):
    """Draft trees of truth, of allowed tokens, of nonsense and of forced tokens change nothing."""
    rows, rng = Rows(2048), random.Random(3)
    for seed in range(4):
        params = SamplingParams(**grammar, temperature=temperature, seed=seed)

        def sampler(params=params, seed=seed):
            state = compiler.compile(params, len(PROMPT))
            return Sampler(params, seed, len(PROMPT), grammar=state)

        plain, truth = sampler(), list(PROMPT)
        while truth[-1] != 1 and len(truth) < 120:
            truth.append(plain.choose(rows.row(truth), truth))
        assert plain.failure is None
        speculative, token_ids, num_steps = sampler(), list(PROMPT), 0
        while len(token_ids) < len(truth):
            tree = random_tree(token_ids, truth, speculative.grammar, rng)
            logits = torch.stack(
                [rows.row([*token_ids, *tree.sequence(i)[1:]]) for i in range(len(tree))]
            )
            draft = Draft.from_drafter("random", tree)
            verdict = CoupledVerifier().verify(
                draft, TargetRows(logits, []), speculative, token_ids
            )
            token_ids += verdict.token_ids
            num_steps += 1
        assert token_ids[: len(truth)] == truth
        assert speculative.failure is None
        assert num_steps < len(truth) - len(PROMPT)


def random_tree(token_ids, truth, grammar, rng):
    """Return a tree of the forced tokens, a part of the truth, allowed tokens and nonsense."""
    rest = truth[len(token_ids) :]
    sequences = [grammar.forced(token_ids)[:8], rest[: rng.randint(0, 4)]]
    for _ in range(3):
        path = rest[: rng.randint(0, 2)]
        allowed = np.flatnonzero(grammar.allowed(token_ids, path))
        if len(allowed):
            path = [*path, int(rng.choice(allowed))]
        sequences.append([*path, rng.randrange(2048)])
    return TokenTree.from_sequences(token_ids[-1], sequences)


# -- forced tokens ---------------------------------------------------------------------------


def test_forced_tokens_are_those_of_plain_decoding(model):
    """Where tokens are forced, masks leave one choice each, and it is that token."""
    compiler, _, eos_ids = model
    num_forced = 0
    for grammar in ({"json_schema": COMPACT}, {"json_schema": PERSON}, {"lark": GREETING}):
        for seed in range(6):
            state = state_of(compiler, **grammar)
            text = write(state, eos_ids, np.random.default_rng(seed))
            for end in range(len(text)):
                token_ids = [*PROMPT, *text[:end]]
                forced_ids = state.forced(token_ids)
                num_forced += len(forced_ids)
                for place, token_id in enumerate(forced_ids):
                    row = state.allowed(token_ids, forced_ids[:place])
                    assert np.flatnonzero(row).tolist() == [token_id]
                assert text[end : end + len(forced_ids)] == forced_ids
    assert num_forced > 100


def test_nothing_is_forced_where_there_is_a_choice(compiler):
    for grammar in ({"regex": "[ab]{1,3}"}, {"json_schema": {}}, {"regex": ".*"}):
        assert state_of(compiler, **grammar).forced(PROMPT) == []


# -- wrong grammars --------------------------------------------------------------------------

SCHEMA_ERRORS = {
    '{"type": "objekt"}': "at its top (line 1, column 1): Invalid type: objekt",
    '{"properties":\n  {"a": {"type": "string", "pattern": "(a"}}}': (
        "at /properties/a (line 2, column 9): invalid regex: unclosed group"
    ),
    '{"properties": {"a/b": {"items": {"not": {"type": "string"}}}}}': (
        'at /properties/a~1b/items (line 1, column 34): keywords that are not supported: "not"'
    ),
    '{"anyOf": [{"type": "null"},\n {"type": "string", "format": "é"}]}': (
        "at /anyOf/1 (line 2, column 2): Unknown format: é"
    ),
    '{"$defs": {"x": {"items": {"minItems": -1}}}, "items": {"$ref": "#/$defs/x"}}': (
        "at /$defs/x/items (line 1, column 27): Expected positive integer for 'minItems', got -1"
    ),
    '{"$ref": "#/nowhere"}': "at its top (line 1, column 1): Pointer '/nowhere' does not exist",
    '{"type": "integer", "minimum": 5, "maximum": 3}': "minimum (5) is greater than maximum (3)",
}
REGEX_ERRORS = {
    "a(b": "line 1, column 2: unclosed group; got 'a(b'",
    "[z-a]": "line 1, column 2: invalid character class range",
    "x/y/\nz{3,1}": "line 2, column 2: invalid repetition count range",
    "é*(?=a)b": "line 1, column 3: look-around, including look-ahead",
    "ab\\": "line 1, column 3: a backslash at the end escapes nothing",
    r"a\/\b": r"line 1, column 4: \b is not supported here",
    "a$b": "line 1, column 2: $ is not supported here",
    r"(a)/\1": "line 1, column 5: backreferences are not supported",
}
LARK_ERRORS = {
    "start: foo": 'line 1, column 8: unknown name: "foo"',
    'start: "héé" (': "line 1, column 15: Expected token ')'",
    "start: A\nA: /a(/": 'line 2, column 4: invalid regex "a(": unclosed group',
    'start: "x"\n  | %json {"type" 3}': "line 2, column 19: no valid JSON after %json: Expecting",
    'strt: "a"': "lark: no start rule found",
    "start: <|nothing|>": 'line 1, column 8: unknown special token: "<|nothing|>"',
}
ERRORS = [
    *(("json_schema", text, message) for text, message in SCHEMA_ERRORS.items()),
    *(("regex", text, message) for text, message in REGEX_ERRORS.items()),
    *(("lark", text, message) for text, message in LARK_ERRORS.items()),
    ("regex", r"[^\s\S]", "regex cannot be followed: no text matches it"),
    ("lark", "start: a\na: a a", "lark cannot be followed: no text matches it"),
    ("regex", "()", "regex cannot be followed: nothing but the empty text matches it"),
]


@pytest.mark.parametrize(("kind", "text", "message"), ERRORS, ids=lambda value: repr(value)[:40])
def test_wrong_grammars_are_refused_with_their_place(compiler, kind, text, message):
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        compiler.compile(SamplingParams(**{kind: text}), 0)
    assert str(caught.value).startswith(kind)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 450
    assert caught.value.hint


def test_the_search_for_the_place_takes_no_longer_than_it_may(monkeypatch):
    """A schema of 200 kB with one wrong type was compiled 500 times, for seven seconds."""
    monkeypatch.setattr(grammar_errors, "MAX_SEARCH_S", 0.1)
    schema = {"properties": {f"p{index}": {"type": "string"} for index in range(400)}}
    calls = []

    def explain(part):
        calls.append(part)
        time.sleep(0.02)
        return ""

    error = grammar_errors.schema_error(json.dumps(schema), schema, "no such type", explain)
    assert "json_schema at its top (line 1, column 1): no such type" in str(error)
    assert 1 <= len(calls) <= 6


def test_place_is_found_in_text_with_any_layout(compiler):
    """The scan for a value passes escapes, nested values, repeated names and empty containers."""
    text = """{ "title" : "a \\" } ] , b", "examples": [ {}, [ ] , {"a": [1]} ],
      "properties" : { "ok": true ,
        "ok2" : {"enum":["}", 1.5e3, null]}, "wrong" : { "type":
          "object", "properties": {"inner": {"type" : "nothing"} } } } }"""
    with pytest.raises(RequestError) as caught:
        compiler.compile(SamplingParams(json_schema=text), 0)
    assert "/properties/wrong/properties/inner (line 4, column 45)" in str(caught.value)
    assert text.splitlines()[3][44:].startswith('{"type"')


@pytest.mark.parametrize("text", ['{"not": ' * 300 + "{}" + "}" * 300, "[" * 100_000])
def test_bottomless_schemas_are_refused(compiler, text):
    params = SamplingParams(json_schema="{}")
    object.__setattr__(params, "json_schema", text)  # whatever the parameters let through
    with pytest.raises(RequestError, match=r"nested too deeply|no valid JSON"):
        compiler.compile(params, 0)


def test_broken_json_is_refused_with_its_place(compiler):
    params = SamplingParams(json_schema="{}")
    object.__setattr__(params, "json_schema", '{"type":\n  "object",}')
    with pytest.raises(RequestError, match=r"line 2, column 1[12]: no valid JSON: "):
        compiler.compile(params, 0)


def test_grammar_that_becomes_too_complex_ends_its_request_alone(compiler):
    """The error comes each time it is asked for, and other states are as before."""
    state = state_of(compiler, lark='start: "a" b\nb: "b" b')
    [first] = np.flatnonzero(state.allowed(PROMPT))
    for _ in range(2):
        with pytest.raises(RequestError, match=r"too complex to follow any further: .*Too many"):
            state.allowed(PROMPT, [int(first)])
        assert state.forced([*PROMPT, int(first)]) == []
        assert not state.is_complete(PROMPT, [int(first)])
        assert np.flatnonzero(state.allowed(PROMPT)).tolist() == [first]


# -- the compiler ----------------------------------------------------------------------------


def test_library_is_loaded_with_the_first_grammar_only():
    code = """
import sys
import time
from foretoken import LLM, SamplingParams
from foretoken.models.grammar import GrammarCompiler
GrammarCompiler(None, 8, ()).compile(SamplingParams(), 0)
sys.exit("llguidance" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_request_without_grammar_has_no_state(compiler):
    assert compiler.compile(SamplingParams(), 3) is None


def test_model_without_fast_tokenizer_is_told_so(stories):
    class Slow:
        pass

    for tokenizer in (None, Tokenizer(Slow())):
        compiler = GrammarCompiler(tokenizer, 10, ())
        assert compiler.compile(SamplingParams(), 0) is None
        with pytest.raises(RequestError, match="a grammar needs a tokenizer") as caught:
            compiler.compile(SamplingParams(regex="a"), 0)
        assert "tokenizer.json" in caught.value.hint


def test_tokenizer_of_an_unknown_kind_is_told_so():
    raw = RawTokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw))
    with pytest.raises(RequestError, match="cannot be used with grammars"):
        GrammarCompiler(tokenizer, 2, ()).compile(SamplingParams(regex="a"), 0)


def test_compiled_grammars_are_kept_and_bounded(stories):
    compiler = GrammarCompiler(stories, 2048, (1,))
    for number in range(MAX_COMPILED + 5):
        compiler.compile(SamplingParams(regex=f"a{{{number + 1}}}"), 0)
    assert len(compiler._compiled) == MAX_COMPILED
    kept = compiler._compiled["regex", f"a{{{MAX_COMPILED}}}"]
    compiler.compile(SamplingParams(regex=f"a{{{MAX_COMPILED}}}"), 0)
    assert compiler._compiled["regex", f"a{{{MAX_COMPILED}}}"] is kept


def test_states_of_one_grammar_are_independent(compiler, stories):
    [a] = stories.encode("a")[1:]
    first, second = (state_of(compiler, regex="a{1,2}") for _ in range(2))
    assert first.is_complete([*PROMPT, a, a])
    assert not second.is_complete([*PROMPT, a])
    assert second.allowed(PROMPT)[a]
