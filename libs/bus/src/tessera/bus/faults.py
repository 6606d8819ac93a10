"""Named points at which a test may kill this process, to prove that nothing is lost there.

Only the profile `test` arms a point. Reaching an unarmed one costs a comparison. `name:3` dies at the third time.
"""

from __future__ import annotations

import os
import signal

CONSUMED_BEFORE_COMMIT = "consumed_before_commit"
COMMITTED_BEFORE_OFFSET = "committed_before_offset"
OFFSET_COMMITTED = "offset_committed"
RELAY_READ_BEFORE_PUBLISH = "relay_read_before_publish"
RELAY_PUBLISHED_BEFORE_DELETE = "relay_published_before_delete"
HANDLED_BEFORE_EMIT = "handled_before_emit"
EMITTED_BEFORE_OFFSET = "emitted_before_offset"
JOB_BEFORE_COMMIT = "job_before_commit"
JOB_COMMITTED = "job_committed"


class _Armed:
    """The process's one armed point; a class attribute, because points are reached from everywhere."""

    name: str | None = None
    passes: int = 0
    """How often it is still passed unharmed."""


def arm(point: str | None) -> None:
    """Arms one point, `name` or `name:nth` (None disarms). `run_service` calls it, and only in the profile `test`."""
    name, _, nth = (point or "").partition(":")
    _Armed.name, _Armed.passes = name or None, int(nth or 1) - 1


def reach(name: str) -> None:
    """Kills this process with SIGKILL if `name` is the armed point and its time has come; otherwise returns at once."""
    if _Armed.name != name:
        return
    if _Armed.passes <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
    _Armed.passes -= 1
