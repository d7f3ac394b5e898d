"""Layer skipping: the set may change while requests run, tokens never."""

import pytest
import torch

from foretoken.core.options import ComponentSpec, build_options
from foretoken.drafters import layer_skip
from foretoken.drafters.base import RequestView
from foretoken.drafters.layer_skip import LayerSkipDrafter, LayerSkipOptions
from foretoken.drafters.skip_search import SkipSet
from foretoken.errors import ConfigError
from foretoken.models.loading import load_model
from tests.engines import (
    check_idle,
    finish,
    greedy,
    make_engine,
    make_host,
    plain_ids,
    sampled,
)
from tests.fakes import build_module, tiny_config, tiny_language_model

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [7], [2, 7, 1, 8, 2, 8]]
PARAMS = {"greedy": greedy(40), "sampled": sampled(40, seed=3, temperature=0.8, top_k=20)}
NUM_LAYERS = 6
FREE = (2, 3)  # layers of `useless` that add nothing


def save(path, free=()):
    config = tiny_config("llama", num_hidden_layers=NUM_LAYERS)
    module = build_module(config, 5, dtype=torch.float32, attn_implementation="eager")
    for layer in free:
        module.model.layers[layer].self_attn.o_proj.weight.zero_()
        module.model.layers[layer].mlp.down_proj.weight.zero_()
    module.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def useless(tmp_path_factory):
    """A model that can do without some of its layers."""
    return save(tmp_path_factory.mktemp("useless"), FREE)


@pytest.fixture(params=["compiled", "modules"])
def target(request, folder):
    if request.param == "modules":
        return tiny_language_model("qwen2", dtype=torch.float32, num_hidden_layers=NUM_LAYERS)
    return load_model(folder)


def make_drafter(target, **options):
    return LayerSkipDrafter.create(LayerSkipOptions(**options), make_host(target))


def context_after(target, drafter, params, num_steps, monkeypatch):
    """Return the context of a request that has run for some steps."""
    contexts = []
    propose = drafter.propose
    monkeypatch.setattr(drafter, "propose", lambda seen: contexts.extend(seen) or propose(seen))
    engine = make_engine(target, {"it": drafter}, max_nodes=4)
    engine.add_request(PROMPTS[0], params)
    for _ in range(num_steps):
        engine.step()
    monkeypatch.setattr(drafter, "propose", propose)
    return contexts[-1]  # its tokens and its past are those of now


def outputs(engine, params, prompts=PROMPTS):
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    finish(engine)
    check_idle(engine)
    return [request.output_ids for request in requests]


class Clock:
    """A clock that moves a fixed time with each look."""

    def __init__(self, monkeypatch, step_s=1.0):
        self.now_s, self.step_s = 0.0, step_s
        monkeypatch.setattr(layer_skip, "perf_counter", self)

    def __call__(self):
        self.now_s += self.step_s
        return self.now_s


# -- same tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("skip", ["1-3", "a1-m2-4", "auto"])
def test_output_equals_plain_decoding(target, kind, skip):
    expected = [plain_ids(target, prompt, PARAMS[kind]) for prompt in PROMPTS]
    drafter = make_drafter(target, skip=skip, min_gain=0)
    engine = make_engine(target, {"it": drafter}, max_nodes=7, prefill_chunk=4)
    assert outputs(engine, PARAMS[kind]) == expected


@pytest.mark.parametrize("kind", PARAMS)
def test_changing_the_set_in_every_step_changes_no_token(target, kind, monkeypatch):
    """Requests that run, and those that wait for a later draft, go over to the new cache."""
    expected = [plain_ids(target, prompt, PARAMS[kind]) for prompt in PROMPTS]
    drafter = make_drafter(target, min_gain=0, search_share=1.0, enough=1.0, window=8)
    used = []
    observe = drafter._search.observe

    def always_better(score, score_in_use):
        observe(score, score_in_use)
        used.append(drafter._search._tried)
        drafter._search.best_score = None
        return True

    monkeypatch.setattr(drafter._search, "observe", always_better)
    engine = make_engine(target, {"it": drafter}, max_nodes=7, prefill_chunk=4, max_requests=2)
    assert outputs(engine, PARAMS[kind]) == expected
    assert len({tuple(mask) for mask in used}) > 5


def test_old_caches_are_let_go(folder, monkeypatch):
    target = load_model(folder)
    drafter = make_drafter(target, min_gain=0)
    first = drafter._cache
    drafter.start(RequestView(request_id="r", prompt_ids=[1, 2]))
    drafter._take_model(drafter._view)
    assert drafter._cache is not first
    assert drafter._cache.num_sequences == 1
    drafter.stop("r")
    drafter._cache.check_integrity()
    assert drafter._cache.num_sequences == 0


# -- where the past comes from ---------------------------------------------------------------


def test_past_is_the_targets_own(folder, monkeypatch):
    target = load_model(folder)
    drafter = make_drafter(target, skip="a1-m2-4", min_gain=0)
    context = context_after(target, drafter, greedy(30), 6, monkeypatch)
    drafter.propose([context])
    cache, sequence = context.past.cache, context.past.sequence
    [state] = drafter._states.values()
    kept = [layer for layer in range(NUM_LAYERS) if layer not in (1, 4)]
    num_cached = sequence.num_cached
    assert state.sequence.num_cached == num_cached == len(context.token_ids) - 1
    own = torch.from_numpy(drafter._cache.slots(state.sequence, 0, num_cached))
    theirs = torch.from_numpy(cache.slots(sequence, 0, num_cached))
    for index, layer in enumerate(kept):
        assert torch.equal(drafter._cache.keys[index][own], cache.keys[layer][theirs])
        assert torch.equal(drafter._cache.values[index][own], cache.values[layer][theirs])


# -- the search ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARAMS)
def test_it_finds_the_layers_that_add_nothing(useless, kind, monkeypatch):
    target = load_model(useless)
    Clock(monkeypatch)
    drafter = make_drafter(target, share=0.5, min_gain=0, search_share=1.0, width=1, enough=1.0)
    assert drafter.skipped != SkipSet(FREE, FREE)
    engine = make_engine(target, {"it": drafter}, max_nodes=4)
    params = {"greedy": greedy(80), "sampled": sampled(80, seed=3)}[kind]
    prompts = PROMPTS * 2
    expected = [plain_ids(target, prompt, params) for prompt in prompts]
    assert outputs(engine, params, prompts) == expected
    assert drafter.skipped == SkipSet(FREE, FREE)
    assert drafter._search.is_over
    request = engine.add_request([9, 8, 7], params)
    finish(engine)
    assert request.stats.num_accepted == request.stats.num_draft_tokens > 20


def test_search_keeps_to_its_share_of_the_time(folder, monkeypatch):
    """On a clock by which every look takes a second."""
    target = load_model(folder)
    Clock(monkeypatch)
    drafter = make_drafter(target, search_share=0.25, min_gain=0, enough=1.0)
    trials = []
    original = drafter._try_another

    def count(search, context):
        trials.append(context.request_id)
        original(search, context)

    monkeypatch.setattr(drafter, "_try_another", count)
    engine = make_engine(target, {"it": drafter}, max_nodes=4)
    outputs(engine, greedy(80))
    assert 3 <= len(trials) <= 0.25 * drafter._step_s + 1
    assert drafter._search_s <= 0.25 * drafter._step_s + 1


def test_texts_take_turns_once_they_are_long_enough(folder, monkeypatch):
    target = load_model(folder)
    drafter = make_drafter(target, search_share=1.0, enough=1.0, min_gain=0)
    seen = []

    def note(search, context):
        window = drafter._window(context)
        seen.append(context.request_id)
        assert 8 <= len(window) <= 32
        assert window.start >= drafter._num_prompt_ids[context.request_id]
        assert window.stop == len(context.token_ids)
        search.num_trials += 1

    monkeypatch.setattr(drafter, "_try_another", note)
    outputs(make_engine(target, {"it": drafter}, max_nodes=4), greedy(50))
    assert len(set(seen)) == 3


def test_a_good_set_ends_the_search(folder, monkeypatch):
    drafter = make_drafter(load_model(folder), enough=0.5, search_share=1.0)
    monkeypatch.setattr(drafter, "_agreement", lambda *_: 0.5)
    outputs(make_engine(drafter._target, {"it": drafter}, max_nodes=4), greedy(60))
    assert drafter._search.num_trials == 1


def test_agreement_of_the_whole_model_is_one(folder, monkeypatch):
    """The window's rows are the target's own, so its own layers choose what it chose."""
    target = load_model(folder)
    for params in (greedy(110), sampled(110, seed=3, temperature=0.8, top_k=20)):
        drafter = make_drafter(target, min_gain=0, search_share=0.01)
        context = context_after(target, drafter, params, 25, monkeypatch)
        whole = layer_skip._view_without(target, SkipSet())
        assert drafter._agreement(whole, context) == 1.0
        poor = layer_skip._view_without(target, SkipSet((1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)))
        assert drafter._agreement(poor, context) < 0.9


@pytest.mark.parametrize("family", ["opt", "gpt_oss"])
def test_whole_layers_are_skipped_where_parts_are_not_apart(family):
    target = tiny_language_model(family)
    drafter = make_drafter(target, min_gain=0)
    assert drafter.skipped.attention == drafter.skipped.mlp
    engine = make_engine(target, {"it": drafter}, max_nodes=4)
    expected = [plain_ids(target, prompt, PARAMS["greedy"]) for prompt in PROMPTS]
    assert outputs(engine, PARAMS["greedy"]) == expected


# -- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "skipped"),
    [
        ("3-1", SkipSet((1, 3), (1, 3))),
        ("a2-m4-3", SkipSet((2, 3), (3, 4))),
        ("a1-m1", SkipSet((1,), (1,))),
    ],
)
def test_sets_are_read(text, skipped):
    options = build_options(LayerSkipOptions, ComponentSpec.parse(f"layer-skip:skip={text}"))
    assert options.fixed_set() == skipped


@pytest.mark.parametrize("text", ["x3", "3--4", "", "a", "1-b2", "0.5"])
def test_sets_that_cannot_be_read_are_refused(text):
    with pytest.raises(ConfigError, match="skip is auto or layers joined by '-'"):
        LayerSkipOptions(skip=text)


@pytest.mark.parametrize("skip", ["6", "0-1-2-3-4-5", "a0-a1-a2-a3-a4-a5"])
def test_layers_that_are_not_there_or_all_of_them_are_refused(folder, skip):
    with pytest.raises(ConfigError, match="layers 0 to 5, and keeps one with attention"):
        make_drafter(load_model(folder), skip=skip)


@pytest.mark.parametrize(
    "options",
    [{"share": 0}, {"enough": 1.1}, {"search_share": -1}, {"window": 7}, {"max_trials": -1}],
)
def test_values_out_of_range_are_refused(options):
    [name] = options
    with pytest.raises(ConfigError, match=f"layer-skip:.*{name}"):
        LayerSkipOptions(**options)


def test_a_target_of_one_layer_has_none_to_leave_out():
    target = tiny_language_model("llama", num_hidden_layers=1)
    with pytest.raises(ConfigError, match="this one has 1"):
        make_drafter(target)
