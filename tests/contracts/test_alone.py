"""Each service is complete by itself: its code and its unit tests run with nothing installed but what it declares."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.contracts.catalogue import SERVICES

pytestmark = [pytest.mark.contract, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
ISOLATION = Path(__file__).with_name("isolation.py")
TOOLS = ("tessera-testkit", "pytest-timeout", "hypothesis", "scipy", "scikit-learn", "onnx", "openai", "jsonschema")
"""What the tests of every service may use beside the service itself. The grid of verdicts is left out: it is statistics only."""


def _alone(distributions: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TESSERA", "SLIPCOVER", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, str(ISOLATION), ",".join(distributions), *arguments],
        cwd=ROOT,
        env=kept | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "HYPOTHESIS_EXAMPLES": "5"},  # what they find is found elsewhere
        capture_output=True,
        text=True,
        check=False,
        timeout=230,
    )


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stdout + done.stderr)[-6_000:]


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_only_what_it_declares(service: str) -> None:
    done = _alone((f"tessera-{service}",), "import", service)
    assert done.returncode == 0, _said(done)


@pytest.mark.parametrize("service", SERVICES)
def test_the_unit_tests_of_a_service_pass_without_the_other_five(service: str) -> None:
    plugins = ("-p", "pytest_asyncio.plugin", "-p", "pytest_timeout", "--ignore-glob=*/test_verdicts.py")
    done = _alone((f"tessera-{service}", *TOOLS), "pytest", "-q", "-x", *plugins, f"services/{service}/tests/unit")
    assert done.returncode == 0, _said(done)
    assert " passed" in done.stdout, _said(done)


def test_another_service_is_really_hidden() -> None:
    done = _alone(("tessera-tokenizer",), "import", "memory")
    assert done.returncode != 0
    assert "it belongs to tessera-memory" in done.stderr


def test_an_undeclared_library_is_really_hidden() -> None:
    done = _alone(("tessera-contracts",), "import", "bus")
    assert done.returncode != 0
    assert "ModuleNotFoundError" in done.stderr
