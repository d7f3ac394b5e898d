"""`LLM`: prompts in, outputs out, from a model directory with and without a tokenizer."""

import itertools

import numpy as np
import pytest
import tokenizers
import transformers

from foretoken import LLM, FinishReason, RequestError, SamplingParams
from foretoken.assets import EMBEDDED
from foretoken.core.options import ComponentSpec
from foretoken.core.verdict import Exactness
from foretoken.engine.names import resolve_drafters
from foretoken.errors import ConfigError, ModelError, UnknownNameError
from foretoken.models.loading import load_model
from foretoken.planner.adaptive import AdaptivePlanner
from foretoken.planner.base import FixedPlanner
from tests.engines import check_idle, greedy, sampled
from tests.fakes import build_module, tiny_config

NUM_BYTES = 256
EOS_ID = NUM_BYTES
CONTEXT_LIMIT = 96
PROMPTS = ["ab", "once upon a time", "b", "abcabcabc", "é世"]


def save_tokenizer(folder):
    """Save a byte-level tokenizer: one token per byte, and one special token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: token_id for token_id, text in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with a tokenizer, and the same model without one."""
    config = tiny_config(
        "llama",
        vocab_size=NUM_BYTES + 1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        max_position_embeddings=CONTEXT_LIMIT,
        eos_token_id=EOS_ID,
    )
    whole, bare = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("bare")
    for folder in (whole, bare):
        build_module(config, seed=2).save_pretrained(folder)
    save_tokenizer(whole)
    return str(whole), str(bare)


@pytest.fixture(scope="module")
def shared_llm(folders):
    return build(folders[0], drafters="prompt-lookup")


@pytest.fixture
def llm(shared_llm):
    yield shared_llm
    check_idle(shared_llm.engine)


def build(folder, **options):
    options = {"dtype": "float64", "device": "cpu", "kv_cache_tokens": 512, **options}
    return LLM(folder, **options)


def sampled_text(num_tokens=20, seed=1, **values):
    return sampled(num_tokens, seed, ignore_eos=True, **values)


# -- generate --------------------------------------------------------------------------------


def test_outputs_come_in_the_order_of_the_prompts(llm):
    params = [greedy(length) for length in (20, 3, 11, 1, 8)]
    outputs = llm.generate(PROMPTS, params)
    assert [output.index for output in outputs] == [0, 1, 2, 3, 4]
    assert [output.prompt for output in outputs] == PROMPTS
    for output, wanted in zip(outputs, params, strict=True):
        assert len(output.token_ids) == wanted.max_new_tokens or EOS_ID in output.token_ids
        assert output.prompt_ids == llm.encode(output.prompt)
        assert output.exactness is Exactness.NUMERICAL


def test_each_prompt_has_its_own_parameters(llm):
    params = [sampled_text(6, seed=3), sampled_text(9, seed=4, temperature=0.5), greedy(4)]
    together = llm.generate(PROMPTS[:3], params)
    for prompt, wanted, output in zip(PROMPTS, params, together, strict=False):
        [alone] = llm.generate(prompt, wanted, drafters=[])
        assert (alone.token_ids, alone.text) == (output.token_ids, output.text)


def test_finished_outputs_come_as_soon_as_they_are_finished(llm):
    params = [sampled_text(30), sampled_text(2)]
    assert [output.index for output in llm.generate_iter(["ab", "cd"], params)] == [1, 0]


def test_token_id_prompts(llm):
    [by_text] = llm.generate("abc", greedy(5))
    [by_ids] = llm.generate(llm.encode("abc"), greedy(5))
    several = llm.generate([llm.encode("abc"), llm.encode("b")], greedy(5))
    assert by_ids.token_ids == several[0].token_ids == by_text.token_ids
    assert by_ids.prompt == "abc"
    assert len(several) == 2


def test_no_prompts_give_no_outputs(llm):
    assert llm.generate([]) == []


def test_defaults_are_greedy_until_the_context_is_full(llm):
    [output] = llm.generate("abc")
    assert output.finish_reason in {FinishReason.LENGTH, FinishReason.EOS}
    assert len(output.prompt_ids) + len(output.token_ids) <= CONTEXT_LIMIT


def test_end_of_sequence_and_its_text(llm):
    params = sampled(400, seed=2, temperature=3.0, logit_bias={EOS_ID: 6.0})
    [output] = llm.generate("abc", params)
    assert output.finish_reason is FinishReason.EOS
    assert output.token_ids[-1] == EOS_ID
    assert "<eos>" not in output.text
    assert output.text == llm.tokenizer.decode(output.token_ids)


def test_stop_texts_end_the_output_before_them(llm):
    [whole] = llm.generate("abc", sampled_text(40, top_k=5))
    letters = [text for text in whole.text if text.isascii() and text.isprintable()]
    stop = letters[len(letters) // 2]
    [output] = llm.generate("abc", sampled_text(40, top_k=5, stop=(stop,)))
    assert output.finish_reason is FinishReason.STOP
    assert output.text == whole.text[: whole.text.index(stop)]
    assert output.token_ids == whole.token_ids[: len(output.token_ids)]


def test_a_fresh_seed_is_reported(llm):
    first, second = llm.generate(["abc", "abc"], SamplingParams(temperature=1.0, max_new_tokens=20))
    assert first.seed != second.seed
    [again] = llm.generate("abc", sampled(20, first.seed))
    assert again.token_ids == first.token_ids


def test_a_string_of_stories_is_counted(llm):
    [output] = llm.generate("abcabcabcabc", greedy(20))
    assert output.stats.num_tokens == len(output.token_ids)
    assert output.stats.prefill_s > 0


# -- streams and iterators -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_streamed_chunks_add_up_to_the_text(llm, seed):
    params = sampled_text(40, seed=seed, temperature=1.5, top_k=100)
    chunks = list(llm.stream("é abc", params))
    [whole] = llm.generate("é abc", params)
    output = chunks[-1].output
    assert [chunk.output for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert "".join(chunk.text for chunk in chunks) == output.text == whole.text
    assert [i for chunk in chunks for i in chunk.token_ids] == output.token_ids == whole.token_ids
    assert all(len(chunk.token_ids) == len(chunk.sources) for chunk in chunks)


def test_a_closed_stream_frees_its_request(llm):
    stream = llm.stream("abc", sampled_text(60))
    next(stream)
    assert llm.engine.num_unfinished == 1
    stream.close()
    check_idle(llm.engine)


def test_a_closed_iterator_ends_what_still_runs(llm):
    outputs = llm.generate_iter(["a", "b", "c"], [sampled_text(2), sampled_text(50), greedy(50)])
    assert next(outputs).index == 0
    outputs.close()
    check_idle(llm.engine)


@pytest.mark.parametrize("make", ["stream", "generate_iter"])
def test_an_iterator_that_is_never_read_leaves_nothing(llm, make):
    """Requests were queued before the first read, and closing could not reach them."""
    iterator = getattr(llm, make)("abc", greedy(5))
    iterator.close()
    check_idle(llm.engine)


def test_several_streams_can_be_read_in_turn(llm):
    params = [sampled_text(25, seed=seed) for seed in range(3)]
    streams = [llm.stream("abc", wanted) for wanted in params]
    chunks = list(itertools.zip_longest(*streams))
    for column, wanted in enumerate(params):
        [alone] = llm.generate("abc", wanted)
        mine = [row[column] for row in chunks if row[column]]
        assert "".join(chunk.text for chunk in mine) == alone.text
        assert mine[-1].output.token_ids == alone.token_ids


def test_generate_inside_a_stream_takes_nothing_from_it(llm):
    """Each call's steps serve the other's requests; their tokens used to be lost."""
    texts = []
    for chunk in llm.stream("abc", sampled_text(25)):
        texts.append(chunk.text)
        llm.generate("other", greedy(7))
    assert "".join(texts) == llm.generate("abc", sampled_text(25))[0].text


def test_a_request_that_is_aborted_in_the_engine_ends_its_stream(llm, monkeypatch):
    steps = itertools.count()
    step = llm.engine.step

    def counted_step():
        assert next(steps) < 200, "the stream waits for a request that is gone"
        return step()

    monkeypatch.setattr(llm.engine, "step", counted_step)
    stream = llm.stream("abc", sampled_text(60))
    next(stream)
    [request_id] = llm.engine._requests
    llm.engine.abort(request_id)
    assert list(stream) == []


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["ok", ""], greedy(2), "the prompt is empty"),
        ([[1], []], greedy(2), "the prompt is empty"),
        (["ok", "x" * CONTEXT_LIMIT], greedy(2), "the model's context holds 96"),
        ([[1], [999]], greedy(2), "token id 999 in the prompt is outside"),
        (["ok"], greedy(2, logit_bias={999: 1.0}), "token id 999 in logit_bias is outside"),
    ],
)
@pytest.mark.parametrize("make", ["generate", "generate_iter"])
def test_one_wrong_prompt_is_refused_before_anything_runs(llm, make, prompts, params, message):
    with pytest.raises(RequestError, match=message) as caught:
        getattr(llm, make)(prompts, params)
    assert caught.value.hint


def test_stream_refuses_at_once(llm):
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.stream("")


def test_check_prompt_refuses_without_generating(llm):
    llm.check_prompt("abc", greedy(2))
    with pytest.raises(RequestError, match="context holds 96"):
        llm.check_prompt("x" * 200, greedy(2))


def test_one_params_for_all_or_one_for_each(llm):
    with pytest.raises(ConfigError, match="3 prompts and 2 sampling parameters"):
        llm.generate(["a", "b", "c"], [greedy(1), greedy(2)])


def test_unknown_drafters_of_a_call_are_refused(llm):
    with pytest.raises(UnknownNameError, match="'prompt-lokup'") as caught:
        llm.generate("abc", drafters=["prompt-lokup"])
    assert "'prompt-lookup'" in caught.value.hint


def test_a_request_larger_than_the_cache_is_refused(folders):
    llm = build(folders[0], kv_cache_tokens=48)
    with pytest.raises(RequestError, match="there are 48"):
        llm.generate("abc", greedy(60))
    assert llm.generate("abc", greedy(10))[0].stats.num_tokens == 10


def test_a_model_without_tokenizer_takes_token_ids(folders):
    llm = build(folders[1])
    assert llm.tokenizer is None
    [output] = llm.generate([5, 6, 7], sampled_text(9))
    assert (output.prompt, output.text, len(output.token_ids)) == ("", "", 9)
    assert [chunk.text for chunk in llm.stream([5], sampled_text(3))][-1] == ""
    with pytest.raises(RequestError, match="no tokenizer"):
        llm.generate("abc")
    with pytest.raises(RequestError, match="stop texts need a tokenizer"):
        llm.generate([5], greedy(3, stop=("x",)))
    check_idle(llm.engine)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"drafters": "prompt-lokup"}, UnknownNameError, "drafter 'prompt-lokup'"),
        ({"drafters": ["auto", "prompt-lookup"]}, ConfigError, "stand alone"),
        ({"drafters": ["none", "none"]}, ConfigError, "stand alone"),
        ({"drafters": []}, ConfigError, "at least one"),
        ({"drafters": "prompt-lookup:max_dept=3"}, UnknownNameError, "'max_dept'"),
        ({"drafters": "prompt-lookup:max_depth=x"}, ConfigError, "an integer"),
        ({"drafters": "draft-model"}, ConfigError, "needs the option 'path'"),
        ({"drafters": "draft-model:path=/nowhere"}, ModelError, "does not exist"),
        ({"verifier": "coupeld"}, UnknownNameError, "verifier 'coupeld'"),
        ({"max_nodes": -1}, ConfigError, "max_nodes is an integer >= 0"),
        ({"max_requests": 0}, ConfigError, "max_requests"),
        ({"prefill_chunk": 0}, ConfigError, "prefill_chunk"),
        ({"mixed_chunk": 0}, ConfigError, "mixed_chunk"),
        ({"prefix_caching": "no"}, ConfigError, "prefix_caching is true or false"),
        ({"kv_cache_tokens": 0}, ConfigError, "kv_cache_tokens"),
        ({"threads": -2}, ConfigError, "threads"),
        ({"dtype": "float8"}, ConfigError, "dtype is auto or one of"),
        ({"device": "abacus"}, ConfigError, "device 'abacus'"),
    ],
)
def test_bad_options_are_refused(folders, options, error, message):
    with pytest.raises(error, match=message) as caught:
        build(folders[0], **options)
    assert caught.value.hint


def test_missing_models_are_refused():
    with pytest.raises(ModelError, match="does not exist"):
        build("/nowhere/at/all")


# -- drafters --------------------------------------------------------------------------------


def test_auto_is_the_embedded_draft_or_what_needs_no_training():
    embedded, past = resolve_drafters(["auto"], "stories")
    assert embedded.name == "draft-model"
    assert embedded.options["path"] == str(EMBEDDED["stories"].draft)
    assert past == ComponentSpec("suffix")
    assert [spec.name for spec in resolve_drafters(["auto"], "elsewhere")] == [
        "suffix",
        "token-recycling",
    ]


def test_auto_is_adaptive_and_drafters_by_name_are_not(folders):
    assert isinstance(build(folders[0], drafters="auto").engine.parts.planner, AdaptivePlanner)
    for options in (
        {"drafters": "suffix"},
        {"drafters": "auto", "adaptive": False},
        {"drafters": "auto", "max_nodes": 0},
        {"drafters": "none", "adaptive": True},
    ):
        assert isinstance(build(folders[0], **options).engine.parts.planner, FixedPlanner)
    named = build(folders[0], drafters=["suffix", "prompt-lookup"], adaptive=True)
    assert isinstance(named.engine.parts.planner, AdaptivePlanner)


def test_auto_without_a_planner_is_its_first_drafter(folders):
    llm = build(folders[0], drafters="auto", adaptive=False)
    assert [label for label in llm.engine.drafters if label not in ("forced", "reference")] == [
        "suffix"
    ]


def test_an_adaptive_plan_needs_a_rule_that_never_changes_tokens(folders):
    with pytest.raises(ConfigError, match="make output depend on the clock") as caught:
        build(folders[0], drafters="draft-model:path=x", verifier="mss", adaptive=True)
    assert "coupled" in caught.value.hint


def test_adaptive_output_is_that_of_plain_decoding(folders):
    plain = build(folders[0], drafters="none")
    auto = build(folders[0], drafters="auto")
    params = [greedy(24), *(sampled(24, seed=seed) for seed in range(4))]
    wanted = plain.generate(PROMPTS, params)
    for _ in range(3):  # what was learned differs from call to call
        got = auto.generate(PROMPTS, params)
        assert [it.token_ids for it in got] == [it.token_ids for it in wanted]
    check_idle(auto.engine)


def test_an_adaptive_plan_takes_drafters_made_of_others(folders):
    """Their nodes carry the names of inner drafters, of which the planner knew nothing."""
    spec = "merged:of=suffix+prompt-lookup"
    llm = build(folders[0], drafters=[spec], adaptive=True)
    params = greedy(24)
    for _ in range(2):
        got, wanted = llm.generate(PROMPTS, params), llm.generate(PROMPTS, params, drafters="none")
        assert [it.token_ids for it in got] == [it.token_ids for it in wanted]


def test_references_are_for_all_or_one_each_and_change_nothing(folders):
    llm = build(folders[0], drafters="suffix")
    plain = llm.generate(PROMPTS, greedy(20), drafters="none")
    texts = [it.text or "x" for it in plain]
    for references in (None, "abc", texts, [[97, 98, 99]], ["", "a", "", "b", ""]):
        got = llm.generate(PROMPTS, greedy(20), references=references)
        assert [it.token_ids for it in got] == [it.token_ids for it in plain]
    with pytest.raises(ConfigError, match="5 prompts and 2 references"):
        llm.generate(PROMPTS, greedy(4), references=["a", "b"])
    with pytest.raises(RequestError, match="in the reference is outside"):
        llm.generate("ab", greedy(4), references=[[100000]])


def test_closing_ends_requests_and_drafters(folders):
    llm = build(folders[0], drafters="suffix")
    chunks = llm.stream("ab", greedy(50))
    next(chunks)
    llm.close()
    assert llm.engine.num_unfinished == 0
    assert list(chunks) == []


def test_none_is_no_drafter():
    assert resolve_drafters(["none"], "stories") == []


def test_specs_are_read_in_order():
    specs = resolve_drafters(["prompt-lookup:max_depth=4", "draft-model:path=x"], "stories")
    assert [(spec.name, dict(spec.options)) for spec in specs] == [
        ("prompt-lookup", {"max_depth": "4"}),
        ("draft-model", {"path": "x"}),
    ]


def test_any_drafters_give_the_same_text(folders):
    path = folders[0]
    params = [greedy(15), sampled_text(15), sampled_text(15, seed=2, top_p=0.8)]
    prompts = ["abcabcab", "xyz", "the end"]
    texts = []
    for drafters in (
        "none",
        "auto",
        ["prompt-lookup", f"draft-model:path={path}"],
        [f"draft-model:path={path}", f"draft-model:path={path},expansion=2-1"],
    ):
        llm = build(path, drafters=drafters)
        texts.append([output.token_ids for output in llm.generate(prompts, params)])
        check_idle(llm.engine)
    assert texts[1:] == texts[:1] * 3


def test_a_drafter_named_twice_gets_a_number(folders):
    llm = build(folders[0], drafters=["prompt-lookup", "prompt-lookup:max_ngram=1"])
    assert list(llm.engine.drafters) == ["prompt-lookup", "prompt-lookup#2", "forced", "reference"]
    [output] = llm.generate("abc", greedy(4), drafters=["prompt-lookup#2"])
    assert output.stats.num_tokens == 4


def test_drafters_per_call_are_given_by_name(shared_llm):
    """One name as a text used to be read as a list of letters."""
    params = greedy(8)
    plain = shared_llm.generate("abab", params, drafters="none")[0]
    named = shared_llm.generate("abab", params, drafters="prompt-lookup")[0]
    assert plain.stats.num_draft_tokens == 0
    assert named.stats.num_draft_tokens > 0
    assert named.token_ids == plain.token_ids


def test_prompt_ids_may_be_numpy_integers(shared_llm):
    prompt_ids = [97, 98, 97]
    from_numpy = shared_llm.generate(np.array(prompt_ids), greedy(4))[0]
    assert from_numpy.token_ids == shared_llm.generate(prompt_ids, greedy(4))[0].token_ids


def test_mistyped_embedded_model_is_suggested_without_asking_the_hub():
    with pytest.raises(ModelError) as caught:
        LLM("storis")
    assert "stories" in caught.value.hint


def test_a_loaded_model_serves_several(folders, shared_llm):
    """Engines that take turns with one model say what each would say with its own."""
    target = load_model(folders[0], dtype="float64", device="cpu")
    plain, fast = build(target, drafters="none"), build(target, drafters="prompt-lookup")
    assert plain.engine.parts.target is fast.engine.parts.target is target
    assert plain.tokenizer is not None
    prompts = ["abcabcabc", "once upon a time"]
    wanted = shared_llm.generate(prompts, sampled_text(), drafters=())
    for llm in (plain, fast, plain, fast):
        outputs = llm.generate(prompts, sampled_text())
        assert [it.token_ids for it in outputs] == [it.token_ids for it in wanted]


def test_drafter_options_are_checked_before_the_target_is_loaded(tmp_path):
    """A typing error in a drafter's options used to be found after minutes of loading."""
    with pytest.raises(UnknownNameError, match="max_dept"):
        LLM(str(tmp_path / "no model here"), drafters="prompt-lookup:max_dept=3")
