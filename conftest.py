"""Fixtures for every test of the checkout."""

import os
from pathlib import Path

from hypothesis import HealthCheck, settings

# Also where pytest is started by hand: nothing is kept beside the one ignored folder.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(__file__).parent / ".tessera" / "cache" / "hypothesis"))
pytest_plugins = ["tessera.testkit.plugin"]

# A shared machine may pause any example; what is slow by itself meets the time-out of its test.
settings.register_profile(
    "tessera",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "100")),
)
settings.load_profile("tessera")
