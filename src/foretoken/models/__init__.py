"""Target and draft models: the only package that imports transformers."""
