"""Postgres, the object store and DuckDB behind the ports."""
