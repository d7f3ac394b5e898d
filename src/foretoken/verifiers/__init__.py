"""Verifiers: rules that keep of a draft what the target would have said."""

from __future__ import annotations

from foretoken.core.registry import Registry
from foretoken.verifiers.base import Verifier

VERIFIERS: Registry[type[Verifier]] = Registry(
    "verifier",
    {
        "coupled": "foretoken.verifiers.coupled:CoupledVerifier",
    },
    group="foretoken.verifiers",
)
