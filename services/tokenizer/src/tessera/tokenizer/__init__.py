"""Encodings, token budgets and the content-addressed vocabulary."""
