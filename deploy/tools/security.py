"""`make security`: static analysis, a scan for secrets, and known vulnerabilities of the locked dependencies where a network allows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
_ONLY_LINES_MOVED = 3
_UNREACHABLE = ("ConnectionError", "Failed to connect", "Max retries", "NameResolution", "ServiceError", "Connection refused", "timed out")


def static_analysis() -> bool:
    """bandit over everything that runs."""
    sources = [str(path) for path in sorted(ROOT.glob("*/*/src")) if path.parent.name != "testkit"]
    done = subprocess.run(
        [f"{BIN}/bandit", "-q", "-r", "-c", "bandit.yaml", *sources], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return _told("bandit", done.returncode == 0, done.stdout)


def secrets() -> bool:
    """detect-secrets over every tracked file; what the baseline names was looked at, wherever it stands in its file by now."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    skipped = (".lock", "go.sum", ".gz", ".onnx", ".json", ".xz", ".secrets.baseline")
    files = [name for name in tracked if name and not name.endswith(skipped) and (ROOT / name).is_file()]
    with tempfile.TemporaryDirectory() as folder:
        # The hook writes new line numbers into its baseline: a check changes nothing in the checkout, and does not fail for that.
        baseline = shutil.copy(ROOT / ".secrets.baseline", folder)
        command = [f"{BIN}/detect-secrets-hook", "--baseline", baseline, *files]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return _told("detect-secrets", done.returncode in (0, _ONLY_LINES_MOVED), done.stdout)


def vulnerabilities() -> bool:
    """pip-audit over the lock; says loudly where no advisory service is reachable."""
    command = [
        f"{BIN}/pip-audit",
        "--requirement",
        "requirements.lock",
        "--require-hashes",
        "--disable-pip",
        "--format",
        "json",
        "--timeout",
        "10",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode and not done.stdout.strip() and any(word in done.stderr for word in _UNREACHABLE):
        sys.stdout.write("SKIPPED pip-audit: no advisory service is reachable from here\n")
        return True
    dependencies = json.loads(done.stdout or "{}").get("dependencies", [])
    skipped = sum("skip_reason" in item for item in dependencies)
    if dependencies and skipped == len(dependencies):
        sys.stdout.write(f"SKIPPED pip-audit: the advisory service knows none of {skipped} dependencies, so none was audited\n")
        return True
    found = [item for item in dependencies if item.get("vulns")]
    told = "\n".join(f"{item['name']} {item['version']}: {item['vulns']}" for item in found) or done.stderr
    return _told(f"pip-audit ({len(dependencies) - skipped} of {len(dependencies)} audited)", done.returncode == 0, told)


def _told(name: str, passed: bool, output: str) -> bool:
    sys.stdout.write(f"{'ok  ' if passed else 'FAIL'} {name}\n{'' if passed else output}")
    return passed


def main() -> int:
    """The command line; returns the exit code."""
    results = [static_analysis(), secrets(), vulnerabilities()]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
