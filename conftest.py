"""Fixtures for every test of the checkout."""

pytest_plugins = ["tessera.testkit.plugin"]
