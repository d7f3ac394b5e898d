"""`model.generate(..., custom_generate=foretoken.hf.generate)`: the tokens are the model's own.

Greedy output is compared with transformers' own loop, sampled output with Foretoken's engine under
the same settings. Models are tiny, in float64, where passes of different shapes agree.
"""

import gc
import weakref
from functools import partial

import pytest
import torch
import transformers
from transformers import LogitsProcessorList, StoppingCriteriaList

import foretoken
from foretoken import ConfigError, RequestError, SamplingParams
from foretoken.assets import EMBEDDED
from foretoken.errors import ModelError, UnknownNameError
from foretoken.hf import engines
from foretoken.models.generation import SpeculativeOutput
from tests.engines import finish, make_engine
from tests.fakes import FAMILIES, VOCAB_SIZE, build_module, tiny_config, tiny_language_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
NUM_TOKENS = 12
EOS_ID = 7


def module_of(family="llama", *, dtype=torch.float64, **changes):
    """Return a module as a user loads one: not with Foretoken's attention."""
    # One of them has no other, and transformers' sdpa leaves out the other's soft bound.
    kind = "eager" if family in ("gpt_oss", "gemma2") else "sdpa"
    return build_module(tiny_config(family, **changes), attn_implementation=kind, dtype=dtype)


@pytest.fixture
def module():
    return module_of()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same model on disk, to draft with: every greedy guess of it is right."""
    folder = tmp_path_factory.mktemp("draft")
    build_module(tiny_config("llama"), attn_implementation="sdpa").save_pretrained(folder)
    return f"draft-model:path={folder},max_depth=4"


def batch(*prompts):
    """Return inputs with padding at the left."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def ours(module, *prompts, **options):
    options = {"max_new_tokens": NUM_TOKENS, "custom_generate": foretoken.hf.generate, **options}
    return module.generate(**batch(*(prompts or [PROMPT])), **options)


def theirs(module, *prompts, **options):
    options = {"max_new_tokens": NUM_TOKENS, **options}
    return module.generate(**batch(*(prompts or [PROMPT])), **options)


def engine_ids(params, prompt_ids=PROMPT):
    """Return what Foretoken's own engine says."""
    engine = make_engine(tiny_language_model("llama"))
    request = engine.add_request(prompt_ids, params)
    finish(engine)
    return request.output_ids


# -- the tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in FAMILIES] + [("llama", torch.float64)],
)
def test_greedy_tokens_are_those_of_transformers(family, dtype):
    module = module_of(family, dtype=dtype)
    prompts = PROMPT, [8, 2, 8, 2, 8]
    output = ours(module, *prompts)
    for row, prompt in zip(output, prompts, strict=True):  # eager float64 cannot have padding
        assert torch.equal(row[len(PROMPT) - len(prompt) :], theirs(module, prompt)[0])


def test_drafts_are_accepted(module, saved):
    output = ours(module, drafters=saved, max_nodes=4, return_dict_in_generate=True)
    assert torch.equal(output.sequences, theirs(module))
    [stats] = output.stats
    assert stats.num_tokens == NUM_TOKENS
    assert stats.num_steps <= 4  # of up to five tokens, all guesses being right


GREEDY_OPTIONS = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "sequence_bias": {"sequence_bias": [[[5], 4.0], [[3, 1], -9.0]]},
    "infinite bias": {"sequence_bias": [[[5], float("-inf")]], "suppress_tokens": [40, 41]},
    "bad_words_ids": {"bad_words_ids": [[11], [5, 3]]},
    "suppress_tokens": {"suppress_tokens": list(range(20, 40))},
    "min_new_tokens": {"eos_token_id": list(range(40)), "min_new_tokens": 6},
    "min_length": {"eos_token_id": list(range(40)), "min_length": 16},
    "both least lengths": {"eos_token_id": list(range(40)), "min_length": 13, "min_new_tokens": 5},
    "forced_eos_token_id": {"forced_eos_token_id": 9},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(30))},
    "exponential_decay": {
        "eos_token_id": EOS_ID,
        "exponential_decay_length_penalty": (2, 1.5),
    },
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.3},
    "one that cannot be read, then one that can": {
        "begin_suppress_tokens": [1, 2],
        "suppress_tokens": [3, 4],
        "bad_words_ids": [[5]],
        "remove_invalid_values": True,
    },
    "max_length": {"max_new_tokens": None, "max_length": len(PROMPT) + 5},
}


@pytest.mark.parametrize("name", GREEDY_OPTIONS)
def test_greedy_options_do_what_they_do_in_transformers(module, saved, name):
    options = {"do_sample": False, **GREEDY_OPTIONS[name]}
    assert torch.equal(ours(module, drafters=saved, **options), theirs(module, **options))


SAMPLED_OPTIONS = {
    "temperature": ({"temperature": 0.6, "top_k": 0}, {"temperature": 0.6}),
    "top_k": ({"top_k": 9}, {"top_k": 9}),
    "top_p": ({"top_k": 0, "top_p": 0.7}, {"top_p": 0.7}),
    "min_p": ({"top_k": 0, "min_p": 0.05}, {"min_p": 0.05}),
    "typical_p": ({"top_k": 0, "typical_p": 0.6}, {"typical_p": 0.6}),
    "epsilon_cutoff": ({"top_k": 0, "epsilon_cutoff": 0.02}, {"epsilon_cutoff": 0.02}),
    "eta_cutoff": ({"top_k": 0, "eta_cutoff": 0.02}, {"eta_cutoff": 0.02}),
    "top_h": ({"top_k": 0, "top_h": 0.4}, {"top_h": 0.4}),
    "several": (
        {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
        {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    ),
    "with bans": (
        {"top_k": 0, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [3, 1]]},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[5], [3, 1]]},
    ),
}


@pytest.mark.parametrize("name", SAMPLED_OPTIONS)
def test_sampled_tokens_are_those_of_foretoken(module, saved, name):
    options, values = SAMPLED_OPTIONS[name]
    for seed in range(3):
        output = ours(module, drafters=saved, do_sample=True, seed=seed, **options)
        params = SamplingParams(
            max_new_tokens=NUM_TOKENS, seed=seed, **{"temperature": 1.0, **values}
        )
        assert output[0, len(PROMPT) :].tolist() == engine_ids(params)


def test_the_embedded_pair():
    pair = EMBEDDED["stories"]
    model = transformers.AutoModelForCausalLM.from_pretrained(pair.target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.target)
    llm = foretoken.LLM("stories", dtype="bfloat16")
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    for options, values in (
        ({"do_sample": False}, {}),
        ({"do_sample": True, "temperature": 0.8, "top_k": 0}, {"temperature": 0.8}),
    ):
        output = model.generate(
            **inputs,
            **options,
            max_new_tokens=48,
            custom_generate=foretoken.hf.generate,
            drafters=f"draft-model:path={pair.draft}",
            seed=7,
            return_dict_in_generate=True,
        )
        own = llm.generate("Once upon a time", SamplingParams(max_new_tokens=48, seed=7, **values))[
            0
        ]
        assert output.sequences[0, inputs.input_ids.shape[1] :].tolist() == own.token_ids
        assert output.stats[0].tokens_per_step > 1.5
    engine = engines.engine_for(model, _plan_of(f"draft-model:path={pair.draft}"))
    assert engine.exactness is foretoken.Exactness.BITWISE  # compiled, as from its files


def _plan_of(drafter):
    from foretoken.planner.plan import Plan

    return Plan(drafters=(drafter,))


# -- rows ----------------------------------------------------------------------------------------


def test_rows_end_each_for_itself_and_are_filled_with_the_pad_token(module):
    prompts = [3, 1, 4], [8, 2, 8, 2, 8], PROMPT, [1]
    options = {"eos_token_id": list(range(30)), "pad_token_id": 60, "min_new_tokens": 1}
    output = ours(module, *prompts, **options)
    assert torch.equal(output, theirs(module, *prompts, **options))
    assert (output[:, len(PROMPT) :] == 60).any()


def test_without_a_pad_token_rows_are_filled_with_the_first_end_token(module):
    module.generation_config.pad_token_id = None
    options = {"eos_token_id": [60, *range(10)]}
    prompts = [3, 1, 4], [8, 2, 8, 2, 8], PROMPT
    output = ours(module, *prompts, **options)
    assert torch.equal(output, theirs(module, *prompts, **options))
    assert (output[:, -1] == 60).any()


def test_returned_sequences_have_seeds_of_their_own(module):
    output = ours(module, do_sample=True, top_k=0, num_return_sequences=3, seed=2**64 - 2)
    rows = output[:, len(PROMPT) :].tolist()
    params = [
        SamplingParams(max_new_tokens=NUM_TOKENS, temperature=1.0, seed=seed)
        for seed in (2**64 - 2, 2**64 - 1, 0)
    ]
    assert rows == [engine_ids(wanted) for wanted in params]
    assert len({tuple(row) for row in rows}) == 3


def test_without_a_seed_torch_settles_the_tokens(module):
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(ours(module, do_sample=True, top_k=0).tolist())
    assert outputs[0] == outputs[1] != outputs[2]


def test_more_rows_than_run_at_once(module):
    prompts = [[1 + number, 2, 3] for number in range(20)]
    assert torch.equal(ours(module, *prompts), theirs(module, *prompts))


@pytest.mark.parametrize(
    ("mask", "position_ids", "message"),
    [
        ([1] * 10 + [0], None, "masks something else than padding at the left"),
        ([1, 0] + [1] * 9, None, "masks something else than padding at the left"),
        ([1] * 11, list(range(1, 12)), "prompts are numbered from 0"),
    ],
)
def test_other_masks_and_positions_are_refused(module, mask, position_ids, message):
    inputs = {"input_ids": torch.tensor([PROMPT]), "attention_mask": torch.tensor([mask])}
    if position_ids:
        inputs["position_ids"] = torch.tensor([position_ids])
    with pytest.raises(RequestError, match=message):
        module.generate(**inputs, max_new_tokens=4, custom_generate=foretoken.hf.generate)


# -- processors, criteria, streamers -------------------------------------------------------------


class LeansOnTheLength(transformers.LogitsProcessor):
    """Looks at the row as `generate` holds it, its padding included."""

    def __call__(self, input_ids, scores):
        return scores - (torch.arange(scores.shape[1]) % 4 == input_ids.shape[1] % 4) * 50.0


def test_processors_of_the_users_own_see_the_row_with_its_padding(module, saved):
    prompts = PROMPT, [8, 2, 8, 2, 8]
    options = {"logits_processor": LogitsProcessorList([LeansOnTheLength()])}
    output = ours(module, *prompts, drafters=saved, repetition_penalty=1.3, **options)
    assert torch.equal(output, theirs(module, *prompts, repetition_penalty=1.3, **options))
    assert not torch.equal(output, theirs(module, *prompts, repetition_penalty=1.3))


def test_a_warper_of_the_users_own_comes_before_those_of_the_call(module):
    own = transformers.TopKLogitsWarper(3)
    options = {"do_sample": True, "seed": 5, "temperature": 2.0, "top_k": 0}
    output = ours(module, logits_processor=LogitsProcessorList([own]), **options)
    params = SamplingParams(
        max_new_tokens=NUM_TOKENS, seed=5, temperature=2.0, logits_processors=[own]
    )
    assert output[0, len(PROMPT) :].tolist() == engine_ids(params)


class EndsAfter(transformers.StoppingCriteria):
    """Ends a row with the first token below a bound."""

    def __call__(self, input_ids, scores, **_):
        return input_ids[:, -1] < 25


def test_stopping_criteria_end_a_row_inside_an_accepted_path(module, saved):
    options = {"stopping_criteria": StoppingCriteriaList([EndsAfter()])}
    output = ours(module, drafters=saved, **options)
    assert torch.equal(output, theirs(module, **options))
    assert len(PROMPT) < output.shape[1] < len(PROMPT) + NUM_TOKENS


def test_stop_strings():
    pair = EMBEDDED["stories"]
    model = transformers.AutoModelForCausalLM.from_pretrained(pair.target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.target)
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    own = transformers.StopStringCriteria(tokenizer, [" sun", "zebra"])
    stops = {"max_new_tokens": 40, "stopping_criteria": StoppingCriteriaList([own])}
    output = model.generate(**inputs, **stops, custom_generate=foretoken.hf.generate)
    assert torch.equal(output, model.generate(**inputs, **stops))
    assert tokenizer.decode(output[0]).endswith(" sun")


def test_time_is_a_criterion(module):
    output = ours(module, max_new_tokens=100, max_time=0.0)
    assert output.shape[1] == len(PROMPT) + 1


class Recorder:
    def __init__(self):
        self.values, self.has_ended = [], False

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.has_ended = True


def test_a_streamer_gets_the_prompt_and_each_token(module, saved):
    own, other = Recorder(), Recorder()
    bound = partial(foretoken.hf.generate, streamer=own)
    output = ours(module, custom_generate=bound, drafters=saved)
    theirs(module, streamer=other)
    assert own.has_ended
    assert own.values == other.values
    assert own.values[0] == [PROMPT]
    assert [token_id for [token_id] in own.values[1:]] == output[0, len(PROMPT) :].tolist()


def test_a_streamer_is_for_one_row(module):
    bound = partial(foretoken.hf.generate, streamer=Recorder())
    with pytest.raises(RequestError, match="it takes one row, and there are 2"):
        ours(module, PROMPT, PROMPT, custom_generate=bound)


# -- what is returned, what is refused -----------------------------------------------------------


def test_the_output_as_a_dictionary(module):
    output = ours(module, PROMPT, [1, 2], return_dict_in_generate=True)
    assert isinstance(output, transformers.generation.GenerateDecoderOnlyOutput)
    assert isinstance(output, SpeculativeOutput)
    assert torch.equal(output.sequences, ours(module, PROMPT, [1, 2]))
    assert [stats.num_tokens for stats in output.stats] == [NUM_TOKENS] * 2
    assert output.scores is output.past_key_values is None


def prefer_nothing(batch_id, input_ids):
    return list(range(VOCAB_SIZE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "options that ask for beam_search"),
        ({"num_beams": 3, "do_sample": True}, "options that ask for beam_sample"),
        ({"prompt_lookup_num_tokens": 3}, "options that ask for assisted_generation"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"encoder_repetition_penalty": 1.5}, "encoder_repetition_penalty"),
        ({"encoder_no_repeat_ngram_size": 2}, "encoder_no_repeat_ngram_size"),
        ({"prefix_allowed_tokens_fn": prefer_nothing}, "prefix_allowed_tokens_fn"),
        (
            {"watermarking_config": transformers.WatermarkingConfig(), "do_sample": True},
            "watermarking_config",
        ),
        ({"max_new_tokens": 200}, None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_served_is_refused_by_name(module, options, message):
    if message is None:  # the context holds 128 positions, and is where the output ends
        assert ours(module, **options).shape[1] == 128
        return
    with pytest.raises(RequestError, match=f"foretoken.hf.generate does not take {message}") as it:
        ours(module, **options)
    assert "leave custom_generate out" in it.value.hint


def test_a_cache_to_go_on_from_is_refused(module):
    cache = transformers.DynamicCache(config=module.config)
    ids = torch.tensor([PROMPT])
    module(ids[:, :4], past_key_values=cache)
    with pytest.raises(RequestError, match="past_key_values: it keeps its own cache"):
        module.generate(
            ids, past_key_values=cache, max_new_tokens=4, custom_generate=foretoken.hf.generate
        )


def test_embeddings_instead_of_tokens_are_refused(module):
    embeddings = module.get_input_embeddings()(torch.tensor([PROMPT]))
    with pytest.raises(RequestError, match="does not take inputs_embeds"):
        module.generate(
            inputs_embeds=embeddings, max_new_tokens=4, custom_generate=foretoken.hf.generate
        )


def test_options_are_checked_before_the_module_is_touched(module, monkeypatch):
    monkeypatch.setattr(engines, "adapt_loaded", lambda _: pytest.fail("adapted"))
    with pytest.raises(UnknownNameError, match="unknown drafter 'promt-lookup'"):
        ours(module, drafters="promt-lookup")
    with pytest.raises(ConfigError, match="max_nodes"):
        ours(module, max_nodes=-1)


def test_a_misspelt_option_is_found_by_transformers(module):
    with pytest.raises(ValueError, match="draftors"):
        ours(module, draftors="prompt-lookup")


def test_an_architecture_that_cannot_be_verified_is_refused():
    config = transformers.MambaConfig(
        vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=1, eos_token_id=None
    )
    with pytest.raises(ModelError, match="recurrent state"):
        ours(transformers.AutoModelForCausalLM.from_config(config))


# -- the user's module ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_module_stays_as_it_is(family, dtype):
    module = module_of(family, dtype=dtype).train().requires_grad_(True)
    ids = torch.tensor([PROMPT])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    parts = {name: (part, type(part)) for name, part in module.named_modules()}
    weights = dict(module.named_parameters())
    places = {name: weight.data_ptr() for name, weight in weights.items()}
    logits = module.eval()(ids).logits.detach()
    module.train()
    ours(module)
    assert module.training
    assert module.config._attn_implementation == "sdpa"
    assert all(weight.requires_grad for weight in module.parameters())
    assert dict(module.named_parameters()).keys() == weights.keys()
    assert all(weight is weights[name] for name, weight in module.named_parameters())
    assert {name: weight.data_ptr() for name, weight in weights.items()} == places
    assert {name: (part, type(part)) for name, part in module.named_modules()} == parts
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(module.eval()(ids).logits, logits)
    module(ids).logits.sum().backward()  # it can still be trained
    assert all(weight.grad is not None for weight in module.parameters())


def test_the_adapted_model_is_kept(module, monkeypatch):
    adapted = []
    original = engines.adapt_loaded
    monkeypatch.setattr(engines, "adapt_loaded", lambda it: adapted.append(it) or original(it))
    ours(module)
    ours(module, [1, 2, 3], do_sample=True)
    first = engines.engine_for(module, _plan_of("auto"))
    assert first is engines.engine_for(module, _plan_of("auto"))
    assert first is not engines.engine_for(module, _plan_of("suffix"))
    assert len(adapted) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_new_weights_are_noticed(dtype):
    module = module_of(dtype=dtype)
    first = ours(module)
    other = build_module(tiny_config("llama"), 1, attn_implementation="sdpa", dtype=dtype)
    module.load_state_dict(other.state_dict())
    second = ours(module)
    assert torch.equal(second, theirs(module))
    assert not torch.equal(first, second)


def test_weights_written_behind_the_back_are_known_after_forget():
    module = module_of("gpt2", dtype=torch.float32)
    ours(module)
    other = build_module(tiny_config("gpt2"), 1, attn_implementation="sdpa", dtype=torch.float32)
    for mine, new in zip(module.parameters(), other.parameters(), strict=True):
        mine.data.copy_(new)
    foretoken.hf.forget(module)
    assert torch.equal(ours(module), theirs(module))


def test_a_module_can_go_and_takes_with_it_what_was_made_of_it():
    module = module_of("gpt2", dtype=torch.float32)
    ours(module)
    engine = weakref.ref(engines.engine_for(module, _plan_of("auto")))
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
    assert engine() is None


class Doubled(torch.nn.Linear):
    """A layer that somebody has put into a model, as adapters do."""

    def forward(self, x):
        return super().forward(x) * 2


def test_a_module_that_was_changed_is_run_as_it_is():
    module = module_of(dtype=torch.float32)
    plain = theirs(module)
    layer = module.model.layers[1].mlp
    layer.down_proj.__class__ = Doubled
    changed = ours(module)
    assert torch.equal(changed, theirs(module))
    assert not torch.equal(changed, plain)


def test_a_hook_is_run():
    module = module_of(dtype=torch.float32)
    plain = theirs(module)
    module.model.layers[0].mlp.register_forward_hook(lambda part, inputs, output: output * 3)
    hooked = ours(module)
    assert torch.equal(hooked, theirs(module))
    assert not torch.equal(hooked, plain)


def test_a_request_that_fails_leaves_nothing_behind(module):
    def fail(input_ids, scores):
        if input_ids.shape[1] > 14:
            raise ValueError("enough")
        return scores

    with pytest.raises(RequestError, match="enough"):
        ours(module, PROMPT, [1, 2, 3], logits_processor=LogitsProcessorList([fail]))
    engine = engines.engine_for(module, _plan_of("auto"))
    assert engine.num_unfinished == 0
    assert torch.equal(ours(module), theirs(module))
