"""Every example of docs/api.md works as printed, in order, and no endpoint is without one."""

import json
import re

import api_page
import pytest

from tessera.testkit.platform import Platform

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def test_every_line_works_as_printed(platform: Platform) -> None:
    for line in api_page.lines():
        printed = api_page.run(platform, line, platform.admin_key)
        if "DELETE" in line and "keys" in line and "completions" not in line:
            assert printed == ""  # 204
        elif "-sSN" in line:
            assert printed.endswith("data: [DONE]")
        else:
            assert json.loads(printed)


def test_every_endpoint_has_a_line(platform: Platform) -> None:
    document = platform.request("GET", "/openapi.json").json()
    offered = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
    shown = {call for line in api_page.lines() for call in _calls(line)}
    missing = {(method, path) for method, path in offered if not any(m == method and _matches(path, p) for m, p in shown)}
    assert not missing


def _calls(line: str) -> set[tuple[str, str]]:
    """(method, path) of every curl of an example."""
    found = set()
    for command in re.split(r"(?=\bcurl )", line)[1:]:
        (path,) = re.findall(r"\$TESSERA_URL(/[^\s\"?]*)", command)
        method = re.search(r"-X (\w+)", command)
        found.add((method[1] if method else "POST" if re.search(r" -[dF] ", command) else "GET", path))
    return found


def _matches(template: str, path: str) -> bool:
    return re.fullmatch(re.sub(r"\\{\w+\\}", r"\\S+", re.escape(template)), path) is not None
