"""The bench: what speculation gains on this machine, beside plain decoding and other systems."""
