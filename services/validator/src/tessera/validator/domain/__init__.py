"""What a dataset's numbers mean: pure functions over arrays, no I/O, the same answer for the same rows."""
