"""transformers as a peer: same tokens, exact lengths, nothing kept between calls."""

import pytest

from foretoken import LLM, SamplingParams
from foretoken.bench.peers import PEERS
from foretoken.bench.peers.base import PeerSpec, missing_package

PROMPT = [5, 6, 7, 8]


def load(target, draft, tmp_path):
    spec = PeerSpec(
        model=target,
        draft=draft,
        dtype="float32",
        threads=1,
        num_draft_tokens=4,
        work_dir=tmp_path,
    )
    return PEERS.load("transformers").load(spec)


def run(peer, *, speculative, temperature=0.0, seed=0, num_tokens=24):
    return peer.generate(
        PROMPT,
        max_new_tokens=num_tokens,
        temperature=temperature,
        seed=seed,
        speculative=speculative,
    )


@pytest.fixture(scope="module")
def peer(pair, tmp_path_factory):
    return load(pair.target, pair.draft, tmp_path_factory.mktemp("work"))


def test_greedy_tokens_are_those_of_foretoken(peer, pair):
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    [ours] = LLM(pair.target, drafters="none", dtype="float32").generate([PROMPT], params)
    plain, fast = run(peer, speculative=False), run(peer, speculative=True)
    assert plain.token_ids == fast.token_ids == ours.token_ids
    assert plain.num_steps == 24
    assert fast.num_steps < 24  # the draft has the target's own weights


@pytest.mark.parametrize("speculative", [False, True])
def test_sampled_tokens_follow_the_seed_and_the_length(peer, speculative):
    first, again, other = (
        run(peer, speculative=speculative, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first.token_ids == again.token_ids != other.token_ids
    assert len(first.token_ids) == len(other.token_ids) == 24
    assert first.seconds > 0


def test_it_goes_on_after_the_end_of_a_sequence(shared_data, tmp_path):
    """stories260K ends its stories well before 400 tokens."""
    folder = shared_data / "models" / "stories260K-hf"
    peer = load(folder, folder, tmp_path)
    output = run(peer, speculative=True, num_tokens=400)
    assert len(output.token_ids) == 400
    assert run(peer, speculative=False, num_tokens=400).token_ids == output.token_ids
    peer.close()


def test_a_missing_package_is_a_hint():
    error = missing_package("llama.cpp", "llama-cpp-python")
    assert error.hint == "pip install llama-cpp-python"
    assert "llama.cpp" in str(error)
