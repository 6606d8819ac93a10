"""Providers, streaming and the local engines."""
