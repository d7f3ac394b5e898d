"""The server under a recorded load: plain decoding beside drafts, at one load after another."""
