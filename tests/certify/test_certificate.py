"""Certificates: right rules pass, each wrong one fails for its own reason.

All runs draw as many tokens as `foretoken verify` does by default. Seeds are fixed; a right rule
fails a certificate with probability 1e-6.
"""

import io
import json

import pytest
from rich.console import Console

from foretoken.certify.certificate import FAIL, INCOMPLETE, PASS, Certification
from foretoken.certify.report import print_report
from foretoken.certify.settings import FALSE_ALARM, CertifyPrompt, CertifySettings
from foretoken.core.draft import Draft
from foretoken.core.params import SamplingParams
from foretoken.errors import RequestError
from tests.certify.rules import (
    BitwiseTable,
    CrowdedTable,
    EavesdroppingDrafter,
    MaskedWrongly,
    PretendingDrafter,
    RoundingTable,
    certify,
    tables,
)
from tests.engines import make_engine

FAVOURED_BY_PLACE = "tokens the drafter favours, by place"
FAVOURED = "tokens the drafter favours, all places"
RANKED = "likely or unlikely tokens, by place"
COUNTED = "counts of tokens after equal prefixes"
REPEATED = "tokens repeated within a step"
PAIRS = "pairs of consecutive tokens"
FEW_SAMPLES = {"num_samples": 160}  # where part one is what finds it


def alarms(record):
    """Return the names of tests that rejected."""
    return {
        test["name"]
        for entry in record["distribution"]
        for test in entry["tests"]
        if test["adjusted_p_value"] < FALSE_ALARM
    }


def is_clean(record):
    """Return whether all texts and all rows of part one are plain decoding's."""
    return all(
        item["num_same_texts"] == item["num_texts"] and item["num_same_rows"] == item["num_rows"]
        for item in record["identity"]["comparisons"]
    )


def as_text(record):
    """Return what a person is shown."""
    text = io.StringIO()
    print_report(record, Console(file=text, width=120))
    return text.getvalue()


# -- right rules ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "widths", "params"),
    [
        ("coupled", (2, 1), {"top_p": 0.9}),
        ("naive", (2, 2, 1), {"frequency_penalty": 1.0}),
        ("rejection", (1, 1, 1), {"top_k": 9}),
        ("mss", (3, 2, 1), {}),
        ("rrs", (3, 2, 1), {}),
        ("k-seq", (2, 2, 1), {}),
        ("block", (1, 1, 1), {}),
        ("traversal", (2, 2, 1), {}),
    ],
)
def test_right_rules_pass(rule, widths, params):
    record = certify(rule, widths=widths, **params)
    assert (record["verdict"], record["reasons"]) == (PASS, [])
    assert is_clean(record)
    [entry] = record["distribution"]
    assert entry["num_same_rows"] == entry["num_rows"] == entry["num_tokens"]
    assert entry["num_tokens"] == CertifySettings(prompts=()).num_samples * 10
    # Rules with a draft distribution are asked about it; those whose drafts are fixed as well.
    assert FAVOURED in {test["name"] for test in entry["tests"]}


def test_a_rule_that_claims_less_is_compared_where_it_promises():
    """Distribution-exact rules promise tokens with temperature 0 only; plain batches always."""
    record = certify("rejection", settings=FEW_SAMPLES)
    ways = [
        (item["temperature"], item["is_speculative"], item["batch_size"], item["num_texts"])
        for item in record["identity"]["comparisons"]
    ]
    assert ways == [
        (0.0, False, 8, 8),  # four prompts, each twice, to fill the batch
        (0.0, True, 1, 4),
        (0.0, True, 3, 4),
        (0.0, True, 8, 8),
        (0.6, False, 8, 16),
    ]


# -- wrong rules ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "options", "found_by"),
    [
        ("broken-AcceptsTooMuch", {}, FAVOURED),
        pytest.param("broken-AcceptsAlways", {}, FAVOURED, marks=pytest.mark.slow),
        ("broken-ForgetsResidual", {}, FAVOURED_BY_PLACE),
        ("broken-ForgetsTemperature", {}, FAVOURED_BY_PLACE),
        ("broken-LikeliestBonus", {}, RANKED),
        pytest.param("broken-EarlyBonus", {}, RANKED, marks=pytest.mark.slow),
        ("broken-StalePenalty", {"widths": (2, 2, 1), "frequency_penalty": 1.0}, REPEATED),
        ("broken-SameDiceEachStep", {}, PAIRS),
        pytest.param("broken-SameDiceEachRequest", {}, COUNTED, marks=pytest.mark.slow),
        ("broken-KeepsDraftProbs", {"widths": (3, 2, 1)}, FAVOURED_BY_PLACE),
        ("mss", {"widths": (2, 2, 1), "drafter": PretendingDrafter}, FAVOURED),
        ("rejection", {"drafter": EavesdroppingDrafter}, COUNTED),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_distributions_are_found(rule, options, found_by):
    record = certify(rule, **options)
    assert record["verdict"] == FAIL
    assert found_by in alarms(record)
    assert any(found_by in reason for reason in record["reasons"])
    # Greedy decoding shows only what is wrong about scores, not about chance.
    assert is_clean(record) == (rule != "broken-StalePenalty")


def test_a_lossy_rule_fails_unless_it_is_allowed():
    record = certify("typical")
    assert (record["verdict"], record["reasons"]) == (
        FAIL,
        ["the rule is lossy by its own account"],
    )
    assert alarms(record)
    distances = {item["order"]: item for item in record["distribution"][0]["distances"]}
    assert all(item["distance"] > 5 * item["resolution"] for item in distances.values())
    allowed = certify("typical", settings={"allow_lossy": True, **FEW_SAMPLES})
    assert (allowed["verdict"], allowed["reasons"]) == (PASS, [])
    assert any("lossy" in text for text in allowed["notes"])


def test_a_rule_that_takes_near_misses_is_caught_by_its_own_row():
    record = certify("broken-TakesNearMisses", settings=FEW_SAMPLES)
    assert record["verdict"] == FAIL
    found = [it for item in record["identity"]["comparisons"] for it in item["divergences"]]
    assert found
    for entry in found:
        assert entry["is_failure"]
        assert (entry["cause"], entry["rows_same"]) == ("rule", True)
        assert 0 < entry["margin"] < 0.3
        assert entry["plain"]["token_id"] != entry["found"]["token_id"]
        assert entry["plain"]["plain_score"] - entry["found"]["plain_score"] == pytest.approx(
            entry["margin"]
        )


def test_a_coupled_rule_with_stale_penalties():
    record = certify("broken-StaleCoupledPenalty", settings=FEW_SAMPLES, frequency_penalty=1.0)
    assert record["verdict"] == FAIL
    causes = [
        it["cause"] for item in record["identity"]["comparisons"] for it in item["divergences"]
    ]
    assert causes
    assert set(causes) == {"rule"}


# -- wrong targets -------------------------------------------------------------------------------


def test_a_target_whose_rows_depend_on_the_batch():
    """The tokens are the same; the bits are not, although they are claimed to be."""
    record = certify("coupled", target=CrowdedTable, settings=FEW_SAMPLES)
    assert record["verdict"] == FAIL
    comparisons = record["identity"]["comparisons"]
    assert all(item["num_same_texts"] == item["num_texts"] for item in comparisons)
    assert all(item["num_same_rows"] < item["num_rows"] for item in comparisons)
    assert all("claims bitwise" in reason for reason in record["reasons"])
    assert len(record["reasons"]) == len(comparisons) + 1  # and the rows of the samples


def test_rounding_that_is_admitted_passes():
    record = certify("coupled", target=RoundingTable, settings=FEW_SAMPLES)
    assert (record["verdict"], record["exactness"]) == (PASS, "numerical")
    largest = max(item["row_difference"] for item in record["identity"]["comparisons"])
    assert 0 < largest <= record["identity"]["tolerance"]


def test_a_wrong_mask_is_more_than_rounding():
    record = certify("coupled", target=MaskedWrongly, widths=(2, 1), settings=FEW_SAMPLES)
    assert record["verdict"] == FAIL
    assert all("rounding explains" in reason for reason in record["reasons"])


class NearTie(RoundingTable):
    """Two tokens within rounding of each other after every token."""

    SHIFT = 1e-6

    def __init__(self, logits):
        logits = logits.clone()
        logits[:, 0] = logits[:, 15] = 9.0
        super().__init__(logits)

    def forward(self, batch, rows, *, hidden_layers=()):
        output = super().forward(batch, rows)
        if batch.num_rows % 2:  # an even number of rows prefers one of them, an odd the other
            output.logits[:, 0] += 1e-4
        return output


def test_a_near_tie_that_rounding_decides_is_explained_and_passes():
    record = certify("coupled", target=NearTie, widths=(2, 1), settings=FEW_SAMPLES)
    assert (record["verdict"], record["reasons"]) == (PASS, [])
    found = [it for item in record["identity"]["comparisons"] for it in item["divergences"]]
    assert found
    text = as_text(record)
    assert text.startswith("PASS  the rule of plain decoding, on logits that agree up to rounding")
    assert "count as rounding" in text
    assert ": a near tie, decided by rounding" in text
    for entry in found:
        assert (entry["cause"], entry["is_failure"]) == ("logits", False)
        assert {entry["plain"]["token_id"], entry["found"]["token_id"]} == {0, 15}
        assert entry["margin"] <= 2 * entry["row_difference"] + 1e-12
        assert entry["margin_ulp"] > 0


# -- the record ----------------------------------------------------------------------------------


def one_prompt(**changes):
    return CertifySettings(
        prompts=(
            CertifyPrompt(
                prompt_ids=(1, 2),
                params=SamplingParams(max_new_tokens=6, stop=(), seed=11),
                temperatures=(0.0, 0.7),
                place="here",
            ),
        ),
        **{"num_samples": 200, **changes},
    )


def test_the_record_depends_on_the_seed_alone():
    records = [certify("rejection", settings={"seed": seed, **FEW_SAMPLES}) for seed in (3, 3, 4)]
    texts = [json.dumps(record, allow_nan=False) for record in records]
    assert texts[0] == texts[1]
    assert records[0]["distribution"] != records[2]["distribution"]


def test_an_interrupted_certificate_says_so_and_keeps_what_is_finished():
    logits, _ = tables()
    certification = Certification(make_engine(BitwiseTable(logits), max_requests=16), one_prompt())
    seen = []

    def interrupt(progress):
        seen.append(progress)
        if "samples" in progress.detail:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certification.run(interrupt)
    record = certification.record()
    assert record["verdict"] == INCOMPLETE
    assert record["reasons"] == []
    assert record["distribution"][0]["num_texts"] == 16
    assert [progress.done for progress in seen] == list(range(1, len(seen) + 1))
    assert certification._identity._engine.num_unfinished == 0


def test_progress_ends_at_its_total():
    logits, _ = tables()
    certification = Certification(make_engine(BitwiseTable(logits), max_requests=16), one_prompt())
    seen = []
    certification.run(seen.append)
    assert seen[-1].done == seen[-1].total == len(seen)
    record = certification.record()
    assert record["notes"] == ["nothing was drafted, so speculation was not put to the test"]


def test_too_few_samples_are_no_pass():
    logits, _ = tables()
    engine = make_engine(BitwiseTable(logits), max_requests=16)
    certification = Certification(engine, one_prompt(num_samples=1, sample_tokens=1))
    certification.run()
    record = certification.record()
    assert record["verdict"] == FAIL
    assert record["reasons"] == ["temperature 0.7: too few samples for any test"]


def test_only_greedy_has_no_distribution_to_test():
    logits, _ = tables()
    settings = one_prompt()
    [prompt] = settings.prompts
    greedy = CertifyPrompt(
        prompt_ids=prompt.prompt_ids, params=prompt.params, temperatures=(0.0,), place=""
    )
    engine = make_engine(BitwiseTable(logits), max_requests=16)
    certification = Certification(engine, CertifySettings(prompts=(greedy,)))
    certification.run()
    record = certification.record()
    assert (record["verdict"], record["distribution"], record["false_alarm"]) == (PASS, [], 0.0)


def test_a_rule_that_refuses_its_drafts_is_an_error():
    """A drafter that breaks the agreement on draws ends the run with the rule's own words."""

    class Wrong(PretendingDrafter):
        def _tree(self, context):
            draft = super()._tree(context)
            return Draft.from_drafter("wrong", draft.tree)

    with pytest.raises(RequestError, match="siblings drawn as iid"):
        certify("mss", drafter=Wrong, settings=FEW_SAMPLES)
