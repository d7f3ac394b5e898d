"""Training of decoders whose layers are run in loops, and of plain ones to compare them with."""
