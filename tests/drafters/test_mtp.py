"""`mtp`: the multi-token-prediction layers of a target's own checkpoint draft."""

import random

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from foretoken.core.draft import DraftBudget
from foretoken.core.sampling import Sampler
from foretoken.drafters.base import DraftContext, RequestView, StandingStates
from foretoken.drafters.levels import RACE_TEMPERATURE
from foretoken.drafters.mtp import MtpDrafter, MtpOptions
from foretoken.engine import scheduler
from foretoken.errors import ConfigError, ModelError, UnsupportedModelError
from foretoken.models.batch import Segment
from foretoken.models.heads.mtp import ServedMtp
from foretoken.models.loading import load_model
from tests.engines import (
    OracleDrafter,
    check_idle,
    finish,
    greedy,
    make_engine,
    make_host,
    micro_model,
    plain_ids,
    sampled,
)
from tests.fakes import VOCAB_SIZE, tiny_config, tiny_language_model
from tests.mtp import MTP_FAMILIES, write_mtp_model

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [7], [2, 7, 1, 8, 2, 8]]
PARAMS = {"greedy": greedy(20), "sampled": sampled(20, seed=3, temperature=0.8, top_k=20)}
# Both compute in the target's type, in other orders of summation.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.08}
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family in MTP_FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        write_mtp_model(made[family], family)
    return made


@pytest.fixture(params=MTP_FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def target(folders, family):
    return load_model(str(folders[family]), dtype="float32")


def make_drafter(target, host=None, **options):
    return MtpDrafter.create(MtpOptions(**{"min_gain": 0.0, **options}), host or make_host(target))


def plain_mtp(folder, dtype=torch.float32):
    """Return transformers' own main model and layers, with its own attention."""
    main = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, attn_implementation="eager"
    )
    # Its patterns name the depth of the published models; those of 3 layers are for us to name.
    main._keys_to_ignore_on_load_unexpected = [r"^mtp\.", r"layers\.3\.", r"layers\.4\."]
    return main, MtpModel.from_pretrained(main, device_map={"": "cpu"}).eval()


@torch.inference_mode()
def plain_outputs(main, layers, text, drafted=()):
    """Return what the layer says behind a text and drafted tokens: its logits' last row.

    Deeper rows take the layer's own outputs, all rows run anew in every pass.
    """
    whole = torch.tensor([[*text, *drafted]])
    states = main(whole[:, : len(text)], output_hidden_states=True).hidden_states[-1][:, :-1]
    num_passes = len(drafted) + 1
    for index in range(num_passes):
        length = states.shape[1]
        outputs = layers.forward_layer(
            0,
            states,
            torch.arange(1, length + 1)[None],
            MtpCache(config=main.config.get_mtp_config()),
            input_ids=whole[:, 1 : length + 1],
        )
        if index + 1 < num_passes:
            states = torch.cat((states, outputs[:, -1:]), dim=1)
    return main.lm_head(outputs[0, -1])


def states_of(target, text):
    cache, layer = target.new_cache(len(text) + 16), target.info.num_layers
    segment = Segment(cache.open(), text, range(-1, len(text) - 1))
    return target.forward(target.batch(cache, [segment]), [], hidden_layers=[layer]).hidden[layer]


def context_of(text, **budget):
    return DraftContext(
        request_id="r",
        token_ids=text,
        sampler=Sampler(greedy(50), 0, len(text)),
        budget=DraftBudget(**{"max_nodes": 8, "max_depth": 8, **budget}),
    )


def start(drafter, target, text):
    drafter.start(RequestView(request_id="r", prompt_ids=text))
    states = states_of(target, text)[:-1]
    hidden = {target.info.num_layers: states}
    drafter.observe([StandingStates(request_id="r", start=0, hidden=hidden)])


def outputs(engine, params, prompts=PROMPTS):
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    finish(engine)
    check_idle(engine)
    return [request.output_ids for request in requests]


# -- as transformers -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_agrees_with_transformers_own(folders, family, dtype):
    main, layers = plain_mtp(folders[family], dtype)
    target = load_model(str(folders[family]), dtype=str(dtype).removeprefix("torch."))
    served = ServedMtp(target)
    assert served.info.num_parameters == sum(it.numel() for it in layers.layers.parameters())
    token_ids = torch.tensor([TEXT])
    with torch.inference_mode():
        states = main(token_ids, output_hidden_states=True).hidden_states[-1][:, :-1]
        expected = layers.forward_layer(
            0,
            states,
            torch.arange(1, len(TEXT))[None],
            MtpCache(config=main.config.get_mtp_config()),
            input_ids=token_ids[:, 1:],
        )[0]
    assert expected.float().std() > 0.5, "states that hardly differ prove nothing"
    cache, found = served.new_cache(64), []
    sequence = cache.open()
    for begin, stop in ((0, 8), (8, len(TEXT) - 1)):  # in two chunks
        segment = Segment(sequence, TEXT[begin + 1 : stop + 1], range(-1, stop - begin - 1))
        batch = served.batch(cache, [segment])
        found.append(served.score(batch, range(batch.num_rows), states[0, begin:stop]))
        cache.commit([(sequence, range(stop - begin))])
    atol = TOLERANCE[dtype]
    whole = torch.cat([it.hidden[1] for it in found])
    torch.testing.assert_close(whole, expected, atol=atol, rtol=atol)
    with torch.inference_mode():
        wanted = main.lm_head(expected)
    logits = torch.cat([it.logits for it in found])
    torch.testing.assert_close(logits, wanted, atol=4 * atol, rtol=4 * atol)


def test_every_node_is_what_the_layers_of_transformers_say(folders, family, target):
    """Chains of the layer applied to its own outputs, below a text and along every path."""
    check_nodes(target, folders[family])


def check_nodes(target, folder):
    main, layers = plain_mtp(folder)
    drafter = make_drafter(target, width=3)
    start(drafter, target, TEXT)
    [draft] = drafter.propose([context_of(TEXT, max_nodes=12)])
    assert max(draft.tree.depths) > 2
    for node in range(1, len(draft.tree)):
        *path, token_id = draft.tree.sequence(node)[1:]
        logits = plain_outputs(main, layers, TEXT, path)
        raced = (logits.log_softmax(dim=0) / RACE_TEMPERATURE).log_softmax(dim=0)
        assert draft.draft_logprobs[node] == pytest.approx(float(raced[token_id]), abs=1e-3)


# -- same tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("options", [{}, {"width": 1, "max_depth": 1}, {"expansion": (2, 1, 2)}])
def test_output_equals_plain_decoding_in_batches_and_chunks(target, kind, options):
    drafter = make_drafter(target, **options)
    engine = make_engine(target, {"it": drafter}, max_nodes=9, prefill_chunk=4)
    expected = [plain_ids(target, prompt, PARAMS[kind]) for prompt in PROMPTS]
    assert outputs(engine, PARAMS[kind]) == expected


@pytest.mark.parametrize("kind", PARAMS)
def test_output_equals_plain_decoding_beside_other_drafters(target, kind):
    expected = [plain_ids(target, prompt, PARAMS[kind]) for prompt in PROMPTS]
    truths = [prompt + ids for prompt, ids in zip(PROMPTS, expected, strict=True)]
    drafters = {"oracle": OracleDrafter(truths, VOCAB_SIZE), "it": make_drafter(target)}
    assert outputs(make_engine(target, drafters, max_nodes=12), PARAMS[kind]) == expected


def test_shared_prefixes_and_requests_thrown_back(target, monkeypatch):
    monkeypatch.setattr(scheduler, "GROWTH_BLOCKS", 0)
    rng = random.Random(2)
    common = [rng.randrange(9) for _ in range(40)]
    prompts = [[*common[: rng.randint(17, 40)], rng.randrange(40)] for _ in range(6)]
    drafter = make_drafter(target, make_host(target, kv_cache_tokens=16 * 12))
    engine = make_engine(target, {"it": drafter}, kv_tokens=16 * 12, max_requests=4)
    requests = [engine.add_request(prompt, greedy(40)) for prompt in prompts]
    finish(engine)
    check_idle(engine)
    assert sum(request.stats.num_preemptions for request in requests) > 0
    assert engine.cache.num_prefix_hits > 0
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output_ids == plain_ids(target, prompt, greedy(40))
        assert request.stats.num_draft_tokens > 0


# -- what has no such layers -----------------------------------------------------------------


@pytest.mark.parametrize("make", [micro_model, lambda: tiny_language_model("mixtral")])
def test_models_without_such_layers_are_refused(make):
    target = make()
    with pytest.raises(UnsupportedModelError, match="has no multi-token-prediction") as error:
        make_drafter(target)
    assert "early-exit" in error.value.hint


def test_compiled_decoders_are_refused(tmp_path):
    module = transformers.AutoModelForCausalLM.from_config(tiny_config("llama"))
    module.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="has no multi-token-prediction"):
        make_drafter(load_model(str(tmp_path)))


def test_a_checkpoint_that_was_saved_without_them_is_refused(tmp_path, family):
    write_mtp_model(tmp_path, family)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if ".layers.3." not in k and not k.startswith("mtp.")}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    target = load_model(str(tmp_path))
    with pytest.raises(ModelError, match="layers cannot be read") as error:
        make_drafter(target)
    assert "saved without them" in error.value.hint


def test_layers_that_hold_no_numbers_are_refused(tmp_path, family):
    write_mtp_model(tmp_path, family)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith(("eh_proj.weight", "mtp.fc.weight")))
    tensors[name][3, 4] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="NaN or infinite"):
        make_drafter(load_model(str(tmp_path)))


def test_of_several_layers_the_first_drafts(tmp_path):
    write_mtp_model(tmp_path, "glm4_moe", num_mtp=2)
    target = load_model(str(tmp_path))
    assert target.forward_pass.module.config.num_mtp_layers == 2
    check_nodes(target, tmp_path)


def test_target_is_as_before(folders, family):
    """The rotary table and the embedding are shared, and neither is converted."""
    target = load_model(str(folders[family]), dtype="bfloat16")
    before = plain_ids(target, PROMPTS[0], greedy(10))
    module = target.forward_pass.module
    dtypes = {name: it.dtype for name, it in [*module.named_parameters(), *module.named_buffers()]}
    make_drafter(target)
    after = {name: it.dtype for name, it in [*module.named_parameters(), *module.named_buffers()]}
    assert after == dtypes
    assert torch.float32 in dtypes.values()  # the rotary table
    assert plain_ids(target, PROMPTS[0], greedy(10)) == before


def test_options_are_checked():
    with pytest.raises(ConfigError, match="mtp:max_depth is at least 1"):
        MtpOptions(max_depth=0)
