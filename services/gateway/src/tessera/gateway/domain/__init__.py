"""Pure rules of the gateway: keys, errors, frames and the assembly of a stream. No I/O, no framework."""
