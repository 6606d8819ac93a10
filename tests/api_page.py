"""The curl lines of docs/api.md, run as printed."""

import os
import re
import subprocess
from datetime import timedelta
from pathlib import Path

from tessera.testkit import eventually_blocking
from tessera.testkit.platform import Platform

_PAGE = Path(__file__).parents[1] / "docs" / "api.md"
_PATIENCE = timedelta(seconds=60)
"""The page says where an answer needs a moment, such as until a memory is searchable."""


def lines() -> list[str]:
    """Every example of the page, in order."""
    return re.findall(r"```bash\n(.*?)```", _PAGE.read_text(encoding="utf-8"), re.DOTALL)


def run(platform: Platform, line: str, key: str) -> str:
    """What an example prints, once it succeeds. Blocks."""
    environment = {**os.environ, **platform.client_environment(), "TESSERA_API_KEY": key}

    def succeed() -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line], env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout or " "

    return eventually_blocking(succeed, _PATIENCE).strip()
