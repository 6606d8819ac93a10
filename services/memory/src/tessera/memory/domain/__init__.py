"""The rules of memory: pure functions and records, no I/O."""
