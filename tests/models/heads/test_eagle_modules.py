"""EAGLE and parallel heads: what is trained and what is served say the same."""

import pytest
import torch

from foretoken.errors import ModelError
from foretoken.models.adapter import ModelInfo
from foretoken.models.batch import Segment
from foretoken.models.heads.eagle import (
    EAGLE_1,
    EAGLE_3,
    EagleDesign,
    EagleModule,
    fused_layers,
    load_eagle,
)
from foretoken.models.heads.eagle_compiled import CompiledHead
from foretoken.models.heads.eagle_init import main_columns
from foretoken.models.heads.eagle_layer import LayerSizes
from foretoken.models.heads.eagle_served import ServedEagle
from foretoken.models.heads.files import HeadFiles
from foretoken.models.heads.parallel import ParallelModule
from foretoken.models.heads.target import TargetShape
from foretoken.models.pools import LayerShape
from tests.heads import random_tensors, randomize

WIDE = LayerSizes(hidden=24, heads=4, kv_heads=2, head_dim=6, intermediate=40)
ODD = LayerSizes(hidden=22, heads=3, kv_heads=1, head_dim=10, intermediate=18, epsilon=1e-5)
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TARGET = TargetShape(vocab_size=50, hidden_size=24, num_layers=4)
LAYERS = (1, 2, 4)
DESIGNS = {
    "eagle-1": EagleDesign(variant=EAGLE_1, sizes=WIDE, target_layers=(4,)),
    "eagle-1 with norms": EagleDesign(
        variant=EAGLE_1,
        sizes=WIDE,
        target_layers=(4,),
        has_input_norm=True,
        has_output_norm=True,
        has_embedding_norm=True,
        fc_bias=True,
    ),
    "eagle-3": EagleDesign(
        variant=EAGLE_3, sizes=WIDE, target_layers=LAYERS, has_head=True, has_output_norm=True
    ),
    "eagle-3 narrow": EagleDesign(
        variant=EAGLE_3,
        sizes=ODD,
        target_layers=LAYERS,
        draft_vocab_size=17,
        has_embedding=True,
        has_head=True,
        has_output_norm=True,
        has_fc_norm=True,
        norm_before_residual=True,
    ),
    "eagle-3 as in qwen": EagleDesign(
        variant=EAGLE_3,
        sizes=LayerSizes(
            hidden=24,
            heads=2,
            kv_heads=2,
            head_dim=16,
            intermediate=40,
            qkv_bias=True,
            qk_norm=True,
            rope=LLAMA_3,
        ),
        target_layers=LAYERS,
        has_embedding=True,
        has_head=True,
        has_output_norm=True,
        fc_bias=True,
    ),
}
TYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def info_of(target):
    return ModelInfo(
        name="target",
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        num_layers=target.num_layers,
        context_limit=256,
        eos_ids=frozenset(),
        num_parameters=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
        kv_layers=(LayerShape(1, 1, 1),),
    )


def make_module(design, kind=EagleModule):
    torch.manual_seed(0)
    module = randomize(kind(design, TARGET, random_tensors(TARGET)))
    if design.draft_vocab_size:
        module.draft_ids.copy_(torch.randperm(TARGET.vocab_size)[: design.draft_vocab_size])
    return module.eval()


def make_text(num_tokens=14, batch=1):
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(0, TARGET.vocab_size, (batch, num_tokens), generator=generator)
    hidden = {
        layer: torch.randn(batch, num_tokens, TARGET.hidden_size, generator=generator)
        for layer in LAYERS
    }
    return token_ids, hidden


@pytest.fixture(params=DESIGNS)
def design(request):
    return DESIGNS[request.param]


def expand(module, logits):
    """Return logits of the tokens that a head can say in the columns of all."""
    if not module.design.draft_vocab_size:
        return logits
    full = torch.full((*logits.shape[:-1], TARGET.vocab_size), -torch.inf, dtype=logits.dtype)
    full[..., module.draft_ids] = logits
    return full


def served_text(served, token_ids, hidden, pieces=(5, 7)):
    """Run a head over a text in pieces; return its cache, sequence, logits and outputs."""
    cache = served.new_cache(256)
    sequence, found, start = cache.open(), [], 0
    states = served.fuse({layer: it[0] for layer, it in hidden.items()})
    for length in pieces:
        rows = range(start, start + length)
        ids = token_ids[0, start + 1 : start + 1 + length].tolist()
        batch = served.batch(cache, [Segment(sequence, ids, range(-1, length - 1))])
        found.append(served.score(batch, range(length), states[rows.start : rows.stop]))
        cache.commit([(sequence, range(length))])
        start += length
    logits = torch.cat([it.logits for it in found])
    return cache, sequence, logits, torch.cat([it.hidden[1] for it in found])


# Sums are taken in other orders; bfloat16 keeps 8 bits of each factor of a few chained products.
TOLERANCES = {"float32": 2e-5, "float64": 1e-5, "bfloat16": 0.15}


@pytest.mark.parametrize("dtype", TYPES)
def test_served_head_says_what_the_module_says(design, dtype):
    module = make_module(design)
    token_ids, hidden = make_text()
    [states] = module(token_ids, hidden)
    expected = expand(module, module.logits(states[0])).detach()
    _, _, logits, outputs = served_text(
        ServedEagle(make_module(design), info_of(TARGET), dtype), token_ids, hidden
    )
    tolerance = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
    torch.testing.assert_close(logits.double(), expected.double(), **tolerance)
    torch.testing.assert_close(outputs.double(), states[0].detach().double(), **tolerance)
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.8


def test_only_the_rows_asked_for_have_logits(design):
    token_ids, hidden = make_text()
    served = ServedEagle(make_module(design), info_of(TARGET))
    states = served.fuse({layer: it[0, :6] for layer, it in hidden.items()})
    found = []
    for rows in (range(6), [4, 1], []):
        cache = served.new_cache(64)
        segment = Segment(cache.open(), token_ids[0, 1:7].tolist(), range(-1, 5))
        found.append(served.score(served.batch(cache, [segment]), rows, states))
    assert torch.equal(found[1].logits, found[0].logits[[4, 1]])
    assert found[2].logits.shape == (0, TARGET.vocab_size)
    assert torch.equal(found[2].hidden[1], found[0].hidden[1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_unrolled_drafts_are_those_of_a_served_head_that_goes_on_by_itself(design, dtype):
    """Training-time test: row i of step k is draft k of a request that stands at position i."""
    module, num_steps = make_module(design), 3
    token_ids, hidden = make_text()
    steps = module(token_ids, hidden, num_steps)
    served = ServedEagle(make_module(design), info_of(TARGET), dtype)
    for standing in (1, 4, 8):
        cache, sequence, _, outputs = served_text(served, token_ids, hidden, (standing,))
        state = outputs[-1:]
        for step in range(1, num_steps):
            token_id = int(token_ids[0, standing + step])
            batch = served.batch(cache, [Segment(sequence, [token_id], [step - 2])])
            output = served.score(batch, [0], state)
            state = output.hidden[1]
            expected = expand(module, module.logits(steps[step][0, standing - 1])).detach()
            torch.testing.assert_close(
                output.logits[0].double(), expected.double(), rtol=5e-5, atol=5e-5
            )


def test_unrolled_parallel_head_is_the_served_one(design):
    design = EagleDesign.from_options({**design.as_options(), "num_steps": 4})
    module = make_module(design, ParallelModule)
    token_ids, hidden = make_text()
    steps = module(token_ids, hidden, 4)
    other = make_module(design, ParallelModule)
    served = ServedEagle(other, info_of(TARGET), extra_embeddings=other.mask_embeddings)
    for standing in (1, 6, 9):
        cache = served.new_cache(64)
        sequence = cache.open()
        ids = [*token_ids[0, 1 : standing + 1].tolist(), 50, 51, 52]
        batch = served.batch(cache, [Segment(sequence, ids, range(-1, len(ids) - 1))])
        states = served.fuse({layer: it[0, :standing] for layer, it in hidden.items()})
        states = torch.cat((states, module.mask_state.detach().expand(3, -1)))
        output = served.score(batch, range(standing - 1, standing + 3), states)
        expected = torch.stack([expand(module, module.logits(it[0, standing - 1])) for it in steps])
        torch.testing.assert_close(output.logits, expected.detach(), rtol=5e-5, atol=5e-5)


def test_later_tokens_change_nothing_before_them(design):
    module = make_module(design)
    token_ids, hidden = make_text()
    before = module(token_ids, hidden, 3)
    token_ids = token_ids.clone()
    token_ids[:, 9:] = 3
    changed = {layer: torch.cat((it[:, :9], it[:, 9:] + 1), dim=1) for layer, it in hidden.items()}
    for index, (old, new) in enumerate(zip(before, module(token_ids, changed, 3), strict=True)):
        # Row i of step k reads the token at i + k + 1.
        assert torch.equal(old[:, : 8 - index], new[:, : 8 - index])
        assert not torch.equal(old[:, 8 - index], new[:, 8 - index])


def test_padding_changes_nothing(design):
    module = make_module(design)
    token_ids, hidden = make_text()
    short = module(token_ids[:, :10], {layer: it[:, :10] for layer, it in hidden.items()}, 2)
    long = module(token_ids, hidden, 2)
    for few, many in zip(short, long, strict=True):
        torch.testing.assert_close(few, many[:, : few.shape[1]])


def test_a_head_comes_back_from_its_options_and_tensors(design):
    module = make_module(design)
    files = HeadFiles("eagle", TARGET, design.as_options(), module.state_dict(), "somewhere")
    again = load_eagle(files, TARGET, random_tensors(TARGET))
    token_ids, hidden = make_text()
    assert again.design == design
    [states], [expected] = again(token_ids, hidden), module(token_ids, hidden)
    assert torch.equal(again.logits(states), module.logits(expected))


def test_shared_tensors_are_not_among_a_heads_own():
    names = make_module(DESIGNS["eagle-1"]).state_dict().keys()
    assert not any("embed" in name or "head" in name for name in names)


def test_options_of_another_head_are_refused():
    with pytest.raises(ModelError, match="not those of an EAGLE head"):
        EagleDesign.from_options({"heads": 3})
    with pytest.raises(ModelError, match="not those of an EAGLE head"):
        EagleDesign.from_options({**DESIGNS["eagle-1"].as_options(), "wings": 2})


def test_head_is_not_run_without_states():
    served = ServedEagle(make_module(DESIGNS["eagle-1"]), info_of(TARGET))
    with pytest.raises(ValueError, match="call score"):
        served.forward(None, [])


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(32, (2, 16, 29)), (12, (2, 6, 9)), (8, (2, 4, 5)), (4, (1, 2, 4)), (2, (1, 2)), (1, (1,))],
)
def test_layers_read_are_low_middle_and_high(num_layers, expected):
    assert fused_layers(num_layers) == expected


def test_main_columns_keep_inner_products():
    matrix = torch.randn(40, 3) @ torch.randn(3, 12)
    found = main_columns(matrix, 3)
    torch.testing.assert_close(found @ found.T, matrix @ matrix.T, rtol=1e-3, atol=1e-3)
    assert torch.equal(main_columns(matrix, 12), matrix)
    assert main_columns(matrix, 15).shape == (40, 15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_change_no_bit(design, dtype, monkeypatch):
    token_ids, hidden = make_text(40)
    found = []
    for num_threads in (1, 3):
        monkeypatch.setattr(CompiledHead, "_num_threads", lambda self, rows, n=num_threads: n)
        served = ServedEagle(make_module(design), info_of(TARGET), dtype)
        found.append(served_text(served, token_ids, hidden, (1, 30, 7))[2:])
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)
