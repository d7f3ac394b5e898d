import sys

import pytest

from foretoken.bench.peers import openvino as peer_module
from foretoken.bench.peers.openvino import OpenVinoPeer
from foretoken.errors import ConfigError, RequestError
from tests.bench.peer_checks import PROMPT, greedy, greedy_reference, make_spec, sampled

pytest.importorskip("openvino", reason="needs the package openvino")
pytest.importorskip("openvino_genai", reason="needs the package openvino-genai")


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(scope="module", params=["draft", "stranger"])
def peer(request, pair, work_dir):
    """Both with all guesses right and with most of them wrong."""
    peer = OpenVinoPeer.load(make_spec(pair.target, getattr(pair, request.param), work_dir))
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


@pytest.mark.parametrize("speculative", [False, True])
def test_goes_on_after_an_end_of_sequence(peer, monkeypatch, speculative):
    expected = greedy(peer, 40, speculative=False).token_ids
    monkeypatch.setattr(peer_module, "_UNUSED_EOS", expected[5])
    assert greedy(peer, 40, speculative=speculative).token_ids == expected


def test_plain_sampling_repeats_itself(peer):
    samples = [sampled(peer, seed, speculative=False) for seed in range(4)]
    assert samples == [sampled(peer, seed, speculative=False) for seed in range(4)]
    assert len(set(map(tuple, samples))) == 4


def test_refuses_to_sample_with_a_draft_where_the_engine_is_known_to_fail(peer):
    if not peer._corrupts:
        pytest.skip("this release is not known to fail")
    with pytest.raises(RequestError, match=r"at temperature 1: .* wrong tokens"):
        sampled(peer, 0, speculative=True)


def test_failure_of_the_engine_is_named(peer, monkeypatch):
    def fail(*_):
        raise RuntimeError("Check 'x' failed at src/a.cpp:1:\nthe cache is full\n")

    monkeypatch.setattr(peer, "_plain", type("Broken", (), {"generate": fail})())
    with pytest.raises(RequestError, match="at temperature 0: the cache is full"):
        greedy(peer, 4, speculative=False)


def test_bfloat16_runs(pair, work_dir):
    spec = make_spec(pair.target, pair.draft, work_dir, dtype="bfloat16")
    peer = OpenVinoPeer.load(spec)
    for speculative in (False, True):
        assert len(greedy(peer, 20, speculative=speculative).token_ids) == 20
    assert peer.version.endswith("KV cache bfloat16")
    peer.close()


def test_real_pair_keeps_its_text(shared_data, work_dir):
    models = shared_data / "models"
    target = models / "babyllama105b-hf"
    peer = OpenVinoPeer.load(make_spec(target, models / "babyllama105-hf", work_dir))
    expected = greedy_reference(target, PROMPT, 60)
    output = greedy(peer, 60, speculative=True)
    assert output.token_ids == expected
    assert output.num_accepted > 30  # the two agree on 94 % of the target's text
    peer.close()


def test_speculation_needs_a_draft_model(pair, work_dir):
    peer = OpenVinoPeer.load(make_spec(pair.target, None, work_dir))
    with pytest.raises(ConfigError, match="without a draft model"):
        greedy(peer, 4, speculative=True)
    peer.close()


def test_missing_package_says_what_to_install(pair, work_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    with pytest.raises(ConfigError, match="--against openvino needs") as caught:
        OpenVinoPeer.load(make_spec(pair.target, None, work_dir))
    assert "pip install openvino openvino-genai" in caught.value.hint
