"""Admits, embeds, indexes and recalls."""
