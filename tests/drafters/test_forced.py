"""Forced tokens: right by construction, within the budget, nothing without a grammar."""

import json

import jsonschema
import pytest

from foretoken import LLM
from foretoken.assets import EMBEDDED
from foretoken.core.draft import DraftBudget, SiblingDraw
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.drafters.base import DraftContext, RequestView
from foretoken.drafters.forced import ForcedDrafter, ForcedOptions
from foretoken.engine.request import FinishReason
from foretoken.errors import RequestError
from foretoken.models.grammar import GrammarCompiler
from foretoken.models.tokenizer import Tokenizer
from tests.engines import counting_model, make_host

PROMPT = [5, 6, 7]


class ScriptedGrammar:
    """A grammar that forces what a function of the tokens says."""

    def __init__(self, forced):
        self.forced = forced


def make_context(grammar, token_ids=PROMPT, *, max_nodes=8, max_depth=8):
    return DraftContext(
        request_id="r",
        token_ids=token_ids,
        sampler=Sampler(SamplingParams(), 0, len(PROMPT), grammar=grammar),
        budget=DraftBudget(max_nodes=max_nodes, max_depth=max_depth),
    )


@pytest.fixture
def drafter():
    drafter = ForcedDrafter.create(ForcedOptions(), make_host(counting_model()))
    drafter.start(RequestView(request_id="r", prompt_ids=PROMPT))
    return drafter


def test_drafts_the_forced_tokens_as_a_chain_that_is_certain(drafter):
    [draft] = drafter.propose([make_context(ScriptedGrammar(lambda token_ids: [1, 2, 3]))])
    assert draft.tree.token_ids == (7, 1, 2, 3)
    assert draft.tree.is_chain
    assert draft.source == ("", "forced", "forced", "forced")
    assert draft.draft_logprobs == (0.0,) * 4
    assert draft.siblings is SiblingDraw.DETERMINISTIC


@pytest.mark.parametrize(("max_nodes", "max_depth"), [(2, 8), (8, 2), (2, 2)])
def test_draft_ends_with_the_budget(drafter, max_nodes, max_depth):
    grammar = ScriptedGrammar(lambda token_ids: [1, 2, 3])
    context = make_context(grammar, max_nodes=max_nodes, max_depth=max_depth)
    assert drafter.propose([context])[0].tree.token_ids == (7, 1, 2)


def test_grammar_is_not_asked_without_a_budget(drafter):
    def fail(token_ids):
        raise AssertionError("asked")

    [draft] = drafter.propose([make_context(ScriptedGrammar(fail), max_nodes=0)])
    assert draft.tree.num_draft_tokens == 0


def test_nothing_is_drafted_without_a_grammar_or_where_nothing_is_forced(drafter):
    contexts = [make_context(None), make_context(ScriptedGrammar(lambda token_ids: []))]
    assert [draft.tree.token_ids for draft in drafter.propose(contexts)] == [(7,), (7,)]


def test_each_context_has_its_own_grammar(drafter):
    contexts = [
        make_context(ScriptedGrammar(lambda token_ids: [token_ids[-1] + 1]), [5, last])
        for last in (3, 8)
    ]
    assert [draft.tree.token_ids for draft in drafter.propose(contexts)] == [(3, 4), (8, 9)]


# -- with real tokens ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories():
    return Tokenizer.load(str(EMBEDDED["stories"].target))


@pytest.fixture(scope="module")
def compiler(stories):
    return GrammarCompiler(stories, 2048, (1,))


def compile_state(compiler, **grammar):
    return compiler.compile(SamplingParams(**grammar), len(PROMPT))


def test_whole_texts_are_drafted_up_to_the_choices(drafter, compiler, stories):
    """An enumeration is chosen by one token; all around it is drafted."""
    schema = {
        "x-guidance": {"whitespace_flexible": False},
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "animal": {"const": "a small cat"}},
        "required": ["colour", "animal"],
        "additionalProperties": False,
    }
    state = compile_state(compiler, json_schema=schema)
    first = drafter.propose([make_context(state, max_nodes=32, max_depth=32)])[0].tree
    opening = stories.decode(first.token_ids[1:])
    assert opening.startswith('{"colour":')
    [chosen] = [
        i for i in stories.encode("g")[1:] if state.allowed([*PROMPT, *first.token_ids[1:]])[i]
    ]
    token_ids = [*PROMPT, *first.token_ids[1:], chosen]
    second = drafter.propose([make_context(state, token_ids, max_nodes=64, max_depth=64)])[0].tree
    whole = [*token_ids, *second.token_ids[1:]]
    assert stories.decode(whole[len(PROMPT) :]) == '{"colour":"green","animal":"a small cat"}'
    assert state.is_complete(whole)
    for place in range(len(token_ids), len(whole)):
        row = state.allowed(token_ids, whole[len(token_ids) : place])
        assert [whole[place]] == [i for i in range(2048) if row[i]]


def test_grammar_that_fails_forces_nothing(drafter, compiler):
    """The error belongs to the target's own choice, which asks next."""
    state = compile_state(compiler, lark='start: "a" b\nb: "b" b')
    token_ids = [*PROMPT, state.forced(PROMPT)[0]]
    assert drafter.propose([make_context(state, token_ids)])[0].tree.token_ids == (token_ids[-1],)
    with pytest.raises(RequestError, match="too complex"):
        state.allowed(token_ids)


def test_complete_text_forces_nothing(drafter, compiler):
    state = compile_state(compiler, regex="cat")
    token_ids = [*PROMPT, *state.forced(PROMPT)]
    assert state.is_complete(token_ids)
    assert drafter.propose([make_context(state, token_ids)])[0].tree.num_draft_tokens == 0


def test_embedded_model_writes_the_same_json_in_fewer_steps():
    schema = {
        "x-guidance": {"whitespace_flexible": False},
        "type": "object",
        "properties": {
            "hero": {"type": "string", "maxLength": 12},
            "animal": {"enum": ["cat", "dog", "bird"]},
            "friends": {"type": "array", "items": {"type": "string", "maxLength": 8}},
            "happy_ending": {"type": "boolean"},
        },
        "required": ["hero", "animal", "friends", "happy_ending"],
        "additionalProperties": False,
    }
    llm = LLM("stories", drafters="prompt-lookup")
    for temperature in (0, 1):
        params = SamplingParams(json_schema=json.dumps(schema), temperature=temperature, seed=3)
        [plain] = llm.generate("Once upon a time there was", params, drafters="none")
        [forced] = llm.generate("Once upon a time there was", params, drafters="forced")
        jsonschema.validate(json.loads(plain.text), schema)
        assert forced.token_ids == plain.token_ids
        assert forced.finish_reason is plain.finish_reason is FinishReason.STOP
        assert forced.stats.num_accepted == forced.stats.num_draft_tokens
        assert plain.stats.num_steps >= 2 * forced.stats.num_steps
