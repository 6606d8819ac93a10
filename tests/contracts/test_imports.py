"""Every import contract holds, and each one fails on a planted violation."""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.contract, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
_PREFIX = "importlinter:contract:"

PLANTS = {
    "services-apart": ("services/memory/src/tessera/memory/domain", "tessera.tokenizer"),
    "libraries-below": ("libs/storage/src/tessera/storage", "tessera.memory"),
    "contracts-alone": ("libs/contracts/src/tessera/contracts", "structlog"),
    "resilience-pure": ("libs/resilience/src/tessera/resilience", "tessera.telemetry"),
    "telemetry-apart": ("libs/telemetry/src/tessera/telemetry", "tessera.resilience"),
    "storage-below-bus": ("libs/storage/src/tessera/storage", "tessera.bus"),
    "bus-knows-four": ("libs/bus/src/tessera/bus", "tessera.encodings"),
    "encodings-alone": ("libs/encodings/src/tessera/encodings", "tessera.contracts"),
    "client-knows-contracts": ("libs/client/src/tessera/client", "tessera.bus"),
    "testkit-in-tests": ("services/generator/src/tessera/generator", "tessera.testkit"),
    "local-stays-local": ("services/generator/src/tessera/generator", "tessera.local"),
    "domain-pure": ("services/memory/src/tessera/memory/domain", "sqlalchemy"),
    "ports-below-handlers": ("services/memory/src/tessera/memory/ports.py", "tessera.memory.adapters"),
    "handlers-see-ports": ("services/memory/src/tessera/memory/handlers.py", "tessera.memory.adapters"),
    "adapters-see-ports": ("services/memory/src/tessera/memory/adapters", "tessera.memory.handlers"),
    "only-app-sees-all": ("services/memory/src/tessera/memory/consumers.py", "tessera.memory.adapters"),
    "kafka-in-its-place": ("services/memory/src/tessera/memory/handlers.py", "aiokafka"),
    "databases-in-their-place": ("services/memory/src/tessera/memory/handlers.py", "sqlalchemy"),
}


def _contracts() -> set[str]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / ".importlinter")
    return {section.removeprefix(_PREFIX) for section in parser.sections() if section.startswith(_PREFIX)}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of every room's source, in which something may be planted."""
    copy = tmp_path_factory.mktemp("house")
    shutil.copy(ROOT / ".importlinter", copy)
    for source in (*ROOT.glob("libs/*/src"), *ROOT.glob("services/*/src"), ROOT / "deploy/local/src"):
        shutil.copytree(source, copy / source.relative_to(ROOT), ignore=shutil.ignore_patterns("__pycache__", "data"))
    return copy


def _lint(house: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(path) for path in sorted((*house.glob("libs/*/src"), *house.glob("services/*/src"), house / "deploy/local/src"))]
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [str(program), "--no-cache", *arguments],
        cwd=house,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_every_contract_has_a_plant() -> None:
    assert _contracts() == set(PLANTS)


def test_the_house_keeps_every_contract(house: Path) -> None:
    done = _lint(house)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("contract", sorted(PLANTS))
def test_a_planted_violation_breaks_its_contract(house: Path, contract: str) -> None:
    place, module = PLANTS[contract]
    target = house / place
    planted = target if target.suffix else target / "planted.py"
    before = planted.read_text() if planted.exists() else None
    planted.write_text(f"{before or ''}\nimport {module}\n")
    try:
        done = _lint(house, "--contract", contract)
    finally:
        planted.unlink() if before is None else planted.write_text(before)
    assert done.returncode == 1, done.stdout
    assert "1 broken" in done.stdout
