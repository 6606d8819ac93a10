"""What the gateway does, one function per act. Handlers know ports and domain, never an adapter or a framework."""
