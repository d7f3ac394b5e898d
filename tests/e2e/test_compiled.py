"""The whole way from files to tokens on compiled models, in the arithmetic that users run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken import LLM, SamplingParams
from foretoken.core.verdict import Exactness
from tests.fakes import CONTEXT_LIMIT, VOCAB_SIZE, build_module, tiny_config

DTYPES = ["float32", "bfloat16"]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture(scope="module", params=FAMILIES)
def directories(request, tmp_path_factory):
    """Return directories of a target and of a draft that often agrees with it."""
    root = tmp_path_factory.mktemp(request.param)
    target = build_module(
        tiny_config(request.param), 1, attn_implementation="eager", dtype=torch.float32
    )
    target.save_pretrained(root / "target")
    generator = torch.Generator().manual_seed(2)
    for parameter in target.parameters():
        parameter.data += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    target.save_pretrained(root / "draft")
    return root


@pytest.fixture(scope="module", params=DTYPES)
def llm(directories, request):
    drafters = (f"draft-model:path={directories / 'draft'},max_depth=4", "prompt-lookup")
    return LLM(
        str(directories / "target"),
        drafters=drafters,
        max_nodes=7,
        dtype=request.param,
        prefill_chunk=13,
    )


def params_strategy():
    return st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.7, 1.3]),
        top_p=st.sampled_from([1.0, 0.9]),
        top_k=st.sampled_from([0, 9]),
        repetition_penalty=st.sampled_from([1.0, 1.2]),
        seed=st.integers(0, 2**32),
        max_new_tokens=st.integers(1, 20),
        ignore_eos=st.just(True),
    )


prompts_strategy = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=60)


def test_speculation_changes_no_token(llm):
    @settings(max_examples=8)
    @given(st.lists(st.tuples(prompts_strategy, params_strategy()), min_size=1, max_size=3))
    def check(requests):
        prompts, params = zip(*requests, strict=True)
        fast = llm.generate(list(prompts), list(params))
        for output, prompt, wanted in zip(fast, prompts, params, strict=True):
            [plain] = llm.generate([prompt], wanted, drafters="none")
            assert output.token_ids == plain.token_ids
            assert output.exactness == Exactness.BITWISE

    check()


@pytest.mark.parametrize("length", [1, CONTEXT_LIMIT - 1, CONTEXT_LIMIT - 9])
def test_shortest_prompt_and_full_context(llm, length):
    prompt = [index * 7 % VOCAB_SIZE for index in range(length)]
    wanted = SamplingParams(max_new_tokens=CONTEXT_LIMIT, ignore_eos=True)
    [fast] = llm.generate([prompt], wanted)
    [plain] = llm.generate([prompt], wanted, drafters="none")
    assert fast.token_ids == plain.token_ids
    assert len(fast.token_ids) == CONTEXT_LIMIT - length


def test_guesses_are_accepted(llm):
    """Otherwise the tests above would show nothing."""
    [output] = llm.generate([[1, 2, 3]], SamplingParams(max_new_tokens=60, ignore_eos=True))
    assert output.stats.num_accepted > 10
