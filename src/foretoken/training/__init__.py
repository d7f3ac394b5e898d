"""Training of draft models on what the target says: loop, corpus, boost-tuning, reports."""
