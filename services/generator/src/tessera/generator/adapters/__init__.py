"""Postgres, HTTP providers and local engines behind the ports."""
