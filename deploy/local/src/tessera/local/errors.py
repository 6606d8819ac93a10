"""What can go wrong on one machine, in one sentence that says what to do."""


class LocalError(Exception):
    """The local stack cannot go on; the message is one or two sentences for the person at the terminal."""


class MissingToolError(LocalError):
    """A program that must be installed is absent or too old."""


class NotReadyError(LocalError):
    """A server or service did not become ready before its deadline, or ended while starting."""


class PortTakenError(LocalError):
    """Another process listens on a port that was chosen for us."""
