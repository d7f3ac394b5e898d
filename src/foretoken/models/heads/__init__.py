"""Trained heads that draft from the target's hidden states: modules, and the files they are in."""
