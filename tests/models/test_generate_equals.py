"""Greedy decoding equals transformers' own `generate`, for every family."""

import pytest
import torch

from foretoken.drafters.prompt_lookup import PromptLookupDrafter, PromptLookupOptions
from tests.engines import check_idle, finish, greedy, make_engine
from tests.fakes import FAMILIES, VOCAB_SIZE, plain_module, tiny_language_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]  # longer than any window
NUM_TOKENS = 10


def generated_ids(family, prompt_ids, **changes):
    module = plain_module(family, **changes)
    input_ids = torch.tensor([prompt_ids])
    output = module.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
    )
    return output[0, len(prompt_ids) :].tolist()


@pytest.mark.parametrize("max_nodes", [0, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_equals_generate(family, max_nodes):
    target = tiny_language_model(family)
    drafter = PromptLookupDrafter(PromptLookupOptions())
    engine = make_engine(target, {"prompt-lookup": drafter}, max_nodes=max_nodes, prefill_chunk=4)
    request = engine.add_request(PROMPT, greedy(NUM_TOKENS))
    finish(engine)
    assert request.output_ids == generated_ids(family, PROMPT)
    check_idle(engine)


def test_end_of_sequence_ends_both():
    free = generated_ids("llama", PROMPT)
    eos_id = free[4]
    target = tiny_language_model("llama", eos_ids=(eos_id,))
    engine = make_engine(target)
    request = engine.add_request(PROMPT, greedy(NUM_TOKENS))
    finish(engine)
    assert request.output_ids == generated_ids("llama", PROMPT, eos_ids=(eos_id,))
    assert request.output_ids == free[: free.index(eos_id) + 1]
    assert eos_id < VOCAB_SIZE
