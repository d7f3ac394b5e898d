"""A target that runs loop by loop, through the wire: the same bits, and figures that add up."""

from contextlib import closing

import httpx
import pytest

from foretoken import LLM, SamplingParams
from foretoken.server.app import create_app
from foretoken.server.settings import ServerSettings
from tests.cli.conftest import ALPHABET, byte_tokenizer
from tests.looped import make_looped
from tests.server.conftest import MODEL_NAME, START_S, served
from tests.server.test_exact_over_http import CASES, NUM_TOKENS, ask_all, read, wanted

PROMPT = "Once upon a time"
ASKED = [
    (case, PROMPT, stream, enabled)
    for case in ("greedy with penalties", "sampled", "sampled stop", "sampled regex", "processed")
    for stream, enabled in ((True, True), (False, True), (False, False))
]


@pytest.fixture(scope="module")
def looped_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("looped")
    make_looped(path, loops=4, group=1, vocab=len(ALPHABET) + 1)
    byte_tokenizer(ALPHABET).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def expected(looped_path):
    """Return what plain decoding says for each case, one request at a time."""
    known = {}
    with closing(LLM(looped_path, drafters="none", max_requests=1)) as llm:
        for case, _, _, _ in ASKED:
            values = {"max_new_tokens": NUM_TOKENS, "logprobs": 2, **CASES[case]}
            [known[case]] = llm.generate(PROMPT, SamplingParams.from_mapping(values))
    return known


@pytest.mark.parametrize("check", ["eager", "lazy"])
def test_all_at_once_with_and_without_speculation(looped_path, expected, check):
    settings = ServerSettings(model_name=MODEL_NAME, port=0, drain_s=5.0)
    with (
        closing(LLM(looped_path, drafters=f"speed:check={check}")) as llm,
        served(create_app(llm, settings), settings) as server,
        httpx.Client(base_url=server.base_url, timeout=START_S) as client,
    ):
        answers = ask_all(server, ASKED)
        for (case, *_), answer in zip(ASKED, answers, strict=True):
            assert read(answer) == wanted(expected[case])
        num_tokens = sum(len(expected[case].token_ids) for case, *_ in ASKED)
        samples = dict(
            line.rsplit(" ", 1)
            for line in client.get("/metrics").text.splitlines()
            if not line.startswith("#")
        )
        [given] = [value for name, value in samples.items() if "generation_tokens_total" in name]
        assert float(given) == num_tokens
        assert client.get("/health").status_code == 200
        assert llm.engine.num_unfinished == 0
        assert llm.engine.cache.num_sequences == 0
