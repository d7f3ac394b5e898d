"""Planning: how much to draft, for whom, from which drafters."""
