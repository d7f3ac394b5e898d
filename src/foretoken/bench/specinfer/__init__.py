"""The tables of SpecInfer (arXiv:2305.09781) for a pair of models, and ours beside them."""
