"""Postgres, Redis and the embedding model."""
