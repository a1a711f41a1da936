"""The embedding cache: features are computed once, committed, and verified on every read."""
