"""The programs that a machine must bring along. Standard library alone: `make doctor` uses it before anything is installed."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from tessera.local.errors import MissingToolError

KAFKA_VERSION = "4.3.1"
KAFKA_NAMES = ("KAFKA_BOOTSTRAP_SERVERS", "TESSERA__KAFKA__BOOTSTRAP_SERVERS")
"""Either gives the address of a Kafka that is already there."""
PYTHON_MINIMUM = (3, 11)
JAVA_MINIMUM = 17
ALTERNATIVE = "Or use `docker compose up`, or set KAFKA_BOOTSTRAP_SERVERS to the address of a Kafka that is already there."


def python() -> str:
    """This interpreter; raises MissingToolError when it is too old."""
    if sys.version_info < PYTHON_MINIMUM:
        wanted = ".".join(map(str, PYTHON_MINIMUM))
        raise MissingToolError(
            f"Python {wanted} or newer is needed, this is {sys.version.split()[0]}: install it. Or use `docker compose up`."
        )
    return sys.executable


def java() -> str:
    """Path of a Java 17+; raises MissingToolError with what to install."""
    home = os.environ.get("JAVA_HOME")
    candidates = [str(Path(home) / "bin" / "java") if home else None, shutil.which("java")]
    found = next((path for path in candidates if path and os.access(path, os.X_OK)), None)
    if found is None:
        raise MissingToolError(f"Java is missing: install a Java {JAVA_MINIMUM}+ runtime (on Debian: default-jre-headless). {ALTERNATIVE}")
    told = java_version(found)
    version = re.search(r'version "(\d+)', told)
    if version is None or int(version.group(1)) < JAVA_MINIMUM:
        raise MissingToolError(
            f"Java {JAVA_MINIMUM} or newer is needed, {found} says {told.partition(chr(10))[0]!r}: install it. {ALTERNATIVE}"
        )
    return found


def java_version(program: str) -> str:
    """All that a Java says of itself: its version and its build."""
    return _told_by_java(program, Path(program).stat().st_mtime_ns)


@lru_cache
def _told_by_java(program: str, _written: int) -> str:
    """Asking takes a tenth of a second: once per process, unless the program was replaced."""
    return subprocess.run([program, "-version"], capture_output=True, text=True, check=False).stderr


def maven() -> str:
    """Path of `mvn`; raises MissingToolError with what to install. Only needed until Kafka's jars are cached."""
    found = shutil.which("mvn")
    if found is None:
        raise MissingToolError(
            f"Maven is missing: install Maven 3.8+, which fetches Kafka {KAFKA_VERSION} (on Debian: maven). {ALTERNATIVE}"
        )
    return found


def missing(*, kafka_is_given: bool, kafka_is_cached: bool) -> Iterator[str]:
    """One sentence for each program that is absent."""
    checks = [python, *([] if kafka_is_given else [java]), *([] if kafka_is_given or kafka_is_cached else [maven])]
    for check in checks:
        try:
            check()
        except MissingToolError as problem:
            yield str(problem)
