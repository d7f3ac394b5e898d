"""Training of heads on the target's hidden states: data, kinds, and the run from end to end."""
