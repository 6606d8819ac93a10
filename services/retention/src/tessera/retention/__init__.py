"""Policies, dry runs, sweeps and archive."""
