"""`loopspec` in the real loop: the law of the output, and what it does not depend on."""

import itertools

import pytest
import torch

from foretoken import LLM, SamplingParams
from foretoken.errors import ConfigError
from tests.goodness import FALSE_FAILURE, fit_probability
from tests.looped import looped_module

VOCAB_SIZE, LOOPS, NUM_TOKENS, NUM_REQUESTS = 5, 3, 3, 1200
PROMPT = [3, 1, 4]
SHAPE = {"temperature": 0.8, "top_k": 4}
PROMPTS = [[3, 1, 4, 1, 0], [2], [4, 4, 4, 4, 2, 1, 0, 3]]
EXITS = "first_exit=1,second_exit=2"


@pytest.fixture(scope="module")
def module():
    """Return a looped model whose depths disagree, and which is neither sure nor indifferent."""
    module = looped_module(3, loops=LOOPS, vocab=VOCAB_SIZE)
    with torch.no_grad():
        module.lm_head.weight *= 5
    return module


@pytest.fixture(scope="module")
def path(module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("looped")
    module.save_pretrained(folder)
    return str(folder)


def joint_law(module):
    """Return the law of the tokens after the prompt, flat, by transformers."""
    law = torch.ones(1, dtype=torch.float64)
    for length in range(NUM_TOKENS):
        paths = [list(path) for path in itertools.product(range(VOCAB_SIZE), repeat=length)]
        logits = module(torch.tensor([PROMPT + path for path in paths])).logits[:, -1].double()
        logits /= SHAPE["temperature"]
        floor = logits.topk(SHAPE["top_k"], dim=-1).values[:, -1:]
        probs = logits.masked_fill(logits < floor, -torch.inf).softmax(dim=-1)
        law = (law.unsqueeze(1) * probs).flatten()
    return law


@pytest.mark.parametrize(
    ("verifier", "options"),
    [
        ("mss", EXITS),
        ("mss", "first_exit=1,second_exit=2,max_in_flight=2"),
        ("rrs", EXITS),
        ("rejection", "first_exit=1,second_exit=0"),
        ("coupled", EXITS),
        ("naive", EXITS),
    ],
)
def test_outputs_fit_the_target(module, path, verifier, options):
    """Chi-square of all three tokens together; correct code fails for one seed in a million."""
    llm = LLM(path, drafters=f"loopspec:{options}", verifier=verifier, max_requests=16)
    params = [
        SamplingParams(max_new_tokens=NUM_TOKENS, seed=seed, **SHAPE)
        for seed in range(NUM_REQUESTS)
    ]
    outputs = llm.generate([PROMPT] * NUM_REQUESTS, params)
    powers = VOCAB_SIZE ** torch.arange(NUM_TOKENS - 1, -1, -1)
    winners = (torch.tensor([output.token_ids for output in outputs]) * powers).sum(dim=1)
    assert fit_probability(winners, joint_law(module)) > FALSE_FAILURE
    # The rule had something to do: some guesses stood, and some did not.
    num_accepted = sum(output.stats.num_accepted for output in outputs)
    num_drafted = sum(output.stats.num_draft_tokens for output in outputs)
    assert 0 < num_accepted < num_drafted


def generate(path, params, *, drafters, prompts=PROMPTS, **options):
    llm = LLM(path, drafters=drafters, **options)
    return [output.token_ids for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("options", ["", f":{EXITS}", ":first_exit=2,second_exit=0"])
@pytest.mark.parametrize("verifier", ["coupled", "mss", "rrs", "naive"])
def test_greedy_is_plain_decoding_by_every_rule(path, verifier, options):
    params = SamplingParams(max_new_tokens=24)
    plain = generate(path, params, drafters="none")
    assert generate(path, params, drafters=f"loopspec{options}", verifier=verifier) == plain


@pytest.mark.parametrize("options", ["", f":{EXITS},max_in_flight=3"])
def test_samples_with_coupled_verification_are_plain_decoding(path, options):
    params = SamplingParams(max_new_tokens=24, temperature=1.1, top_p=0.9, seed=4)
    plain = generate(path, params, drafters="none")
    assert generate(path, params, drafters=f"loopspec{options}") == plain


@pytest.mark.parametrize("verifier", ["mss", "rrs"])
def test_what_is_said_depends_on_the_seed_and_not_on_room_or_company(path, verifier):
    """Draws are made whether there is room for their rows or not."""
    params = [SamplingParams(max_new_tokens=16, temperature=0.9, seed=seed) for seed in range(3)]
    settings = {"verifier": verifier, "max_requests": 4}
    said = generate(path, params, drafters=f"loopspec:{EXITS}", **settings)
    assert said == generate(path, params, drafters=f"loopspec:{EXITS}", **settings)
    for max_in_flight in (2, 3, 5, 40):
        options = f"{EXITS},max_in_flight={max_in_flight}"
        assert generate(path, params, drafters=f"loopspec:{options}", **settings) == said
    for index, prompt in enumerate(PROMPTS):
        alone = generate(
            path, params[index], drafters=f"loopspec:{EXITS}", prompts=[prompt], **settings
        )
        assert alone == [said[index]]
    others = [SamplingParams(max_new_tokens=16, temperature=0.9, seed=9)] * 3
    assert generate(path, others, drafters=f"loopspec:{EXITS}", **settings) != said


@pytest.mark.parametrize("verifier", ["block", "traversal", "typical", "k-seq", "rejection"])
def test_rules_that_cannot_settle_a_pair_of_draws_are_refused(path, verifier):
    with pytest.raises(ConfigError, match=f"verifier '{verifier}'"):
        LLM(path, drafters=f"loopspec:{EXITS}", verifier=verifier)
