import sys

import pytest

from foretoken.bench.peers import llama_cpp as peer_module
from foretoken.bench.peers.llama_cpp import LlamaCppPeer
from foretoken.errors import ConfigError, VocabularyMismatchError
from tests.bench.peer_checks import PROMPT, greedy, greedy_reference, make_spec, sampled

pytest.importorskip("llama_cpp", reason="needs the package llama-cpp-python")
pytest.importorskip("gguf", reason="needs the package gguf")


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(params=["draft", "stranger"])
def peer(request, pair, work_dir):
    """Both with all guesses right and with most of them wrong."""
    peer = LlamaCppPeer.load(make_spec(pair.target, getattr(pair, request.param), work_dir))
    yield peer
    peer.close()


@pytest.mark.parametrize("speculative", [False, True])
def test_greedy_tokens_are_those_of_transformers(peer, pair, speculative):
    expected = greedy_reference(pair.target, PROMPT, 40)
    assert greedy(peer, 40, speculative=speculative).token_ids == expected


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 6, 17])
@pytest.mark.parametrize("speculative", [False, True])
def test_makes_exactly_the_tokens_asked_for(peer, num_tokens, speculative):
    output = greedy(peer, num_tokens, speculative=speculative)
    assert output.token_ids == greedy(peer, 40, speculative=False).token_ids[:num_tokens]
    assert output.num_steps + (output.num_accepted or 0) == num_tokens
    assert 0 < output.prefill_s <= output.seconds


def test_sampling_draws_the_same_tokens_with_a_draft(peer):
    plain = [sampled(peer, seed, speculative=False) for seed in range(4)]
    assert plain == [sampled(peer, seed, speculative=True) for seed in range(4)]
    assert len(set(map(tuple, plain))) == 4


def test_a_request_leaves_nothing_behind(peer):
    first = greedy(peer, 20, speculative=True).token_ids
    greedy(peer, 20, speculative=True, prompt_ids=PROMPT[::-1])
    assert greedy(peer, 20, speculative=True).token_ids == first


def test_contexts_grow(pair, work_dir, monkeypatch):
    monkeypatch.setattr(peer_module, "_CONTEXT_STEP", 8)
    peer = LlamaCppPeer.load(make_spec(pair.target, pair.draft, work_dir))
    for num_tokens in (2, 30, 60):
        expected = greedy_reference(pair.target, PROMPT, num_tokens)
        assert greedy(peer, num_tokens, speculative=True).token_ids == expected
    peer.close()


def test_a_prompt_may_be_longer_than_a_batch(pair, work_dir, monkeypatch):
    monkeypatch.setattr(peer_module, "_BATCH_SIZE", 8)
    peer = LlamaCppPeer.load(make_spec(pair.target, pair.draft, work_dir))
    prompt_ids = PROMPT * 5
    expected = greedy_reference(pair.target, prompt_ids, 20)
    for speculative in (False, True):
        output = greedy(peer, 20, speculative=speculative, prompt_ids=prompt_ids)
        assert output.token_ids == expected
    peer.close()


def test_bfloat16_runs(pair, work_dir):
    spec = make_spec(pair.target, pair.draft, work_dir, dtype="bfloat16")
    peer = LlamaCppPeer.load(spec)
    tokens = greedy(peer, 20, speculative=False).token_ids
    assert greedy(peer, 20, speculative=True).token_ids == tokens
    assert peer.version.endswith("KV cache float16")
    peer.close()


def test_real_pair_keeps_its_text(shared_data, work_dir):
    models = shared_data / "models"
    target = models / "babyllama105b-hf"
    peer = LlamaCppPeer.load(make_spec(target, models / "babyllama105-hf", work_dir))
    expected = greedy_reference(target, PROMPT, 60)
    output = greedy(peer, 60, speculative=True)
    assert output.token_ids == expected
    assert output.num_accepted > 30  # the two agree on 94 % of the target's text
    peer.close()


def test_speculation_needs_a_draft_model(pair, work_dir):
    peer = LlamaCppPeer.load(make_spec(pair.target, None, work_dir))
    with pytest.raises(ConfigError, match="without a draft model"):
        greedy(peer, 4, speculative=True)
    peer.close()


def test_refuses_a_draft_of_another_vocabulary(pair, shared_data, work_dir):
    spec = make_spec(pair.target, shared_data / "models" / "stories260K-hf", work_dir)
    with pytest.raises(VocabularyMismatchError, match="draft 512 ids"):
        LlamaCppPeer.load(spec)


@pytest.mark.parametrize("package", ["llama_cpp", "gguf"])
def test_missing_package_says_what_to_install(pair, work_dir, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"--against llama\.cpp needs") as caught:
        LlamaCppPeer.load(make_spec(pair.target, None, work_dir))
    assert "pip install llama-cpp-python gguf" in caught.value.hint
