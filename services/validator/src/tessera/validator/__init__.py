"""Datasets in, verdicts and reports out."""
