"""Pure rules of the generator: no I/O, no framework."""
