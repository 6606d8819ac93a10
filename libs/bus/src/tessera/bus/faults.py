"""Named points at which a test may kill this process, to prove that nothing is lost there.

Only the profile `test` arms a point. Reaching an unarmed one costs a comparison.
"""

from __future__ import annotations

import os
import signal

CONSUMED_BEFORE_COMMIT = "consumed_before_commit"
COMMITTED_BEFORE_OFFSET = "committed_before_offset"
RELAY_PUBLISHED_BEFORE_DELETE = "relay_published_before_delete"
EMITTED_BEFORE_OFFSET = "emitted_before_offset"


class _Armed:
    """The process's one armed point; a class attribute, because points are reached from everywhere."""

    name: str | None = None


def arm(name: str | None) -> None:
    """Arms one point (None disarms). `run_service` calls it, and only in the profile `test`."""
    _Armed.name = name


def reach(name: str) -> None:
    """Kills this process with SIGKILL if `name` is the armed point; otherwise returns at once."""
    if _Armed.name == name:
        os.kill(os.getpid(), signal.SIGKILL)
