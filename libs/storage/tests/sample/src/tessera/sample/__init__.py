"""A service that exists for these tests only."""
