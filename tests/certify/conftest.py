"""The tests of certificates know rules that are wrong."""

from tests.certify.rules import broken_rules

__all__ = ["broken_rules"]
