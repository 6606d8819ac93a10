"""The first key of a production installation: made beside the gateway, shown once, good for everything."""

import json
import os
import subprocess
import sys

import pytest

from tessera.testkit.platform import Platform

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def _operator_key(platform: Platform, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = json.loads((platform.processes["gateway"].folder / "environment.json").read_text())
    command = [sys.executable, "-m", "tessera.gateway.operator_key", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60)


def test_an_operators_key_may_do_everything(platform: Platform) -> None:
    first, second = (_operator_key(platform, "operators") for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout != second.stdout
    for key in (first.stdout.strip(), second.stdout.strip()):
        assert platform.request("GET", "/v1/tenants", key=key).status_code == 200


def test_a_tenant_that_cannot_be_is_refused(platform: Platform) -> None:
    refused = _operator_key(platform, "Not A Tenant")
    assert refused.returncode == 2
    assert "TENANT" in refused.stderr
