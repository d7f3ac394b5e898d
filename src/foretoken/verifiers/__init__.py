"""Verifiers: rules that keep of a draft what the target would have said."""

from __future__ import annotations

from foretoken.core.registry import Registry
from foretoken.verifiers.base import Verifier

VERIFIERS: Registry[type[Verifier]] = Registry(
    "verifier",
    {
        "coupled": "foretoken.verifiers.coupled:CoupledVerifier",
        "naive": "foretoken.verifiers.naive:NaiveVerifier",
        "rejection": "foretoken.verifiers.rejection:RejectionVerifier",
        "mss": "foretoken.verifiers.mss:MultiStepVerifier",
        "rrs": "foretoken.verifiers.rrs:RecursiveRejectionWithoutReplacementVerifier",
        "k-seq": "foretoken.verifiers.k_seq:KSeqVerifier",
        "block": "foretoken.verifiers.block:BlockVerifier",
        "traversal": "foretoken.verifiers.traversal:TraversalVerifier",
        "typical": "foretoken.verifiers.typical:TypicalVerifier",
    },
    group="foretoken.verifiers",
)
