"""Settings read again while a service runs: all of them, or none."""

import asyncio
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from structlog.testing import capture_logs

from tessera.bus.reloading import Quiet, Reloader, Swap, follow_file
from tessera.bus.settings import ServiceSettings
from tessera.storage.tls import fingerprint
from tessera.testkit import eventually


class Limits(BaseModel):
    """Nested settings."""

    model_config = ConfigDict(extra="forbid")

    requests: int = 1
    token: SecretStr = SecretStr("hidden")


class MemorySettings(ServiceSettings, service="memory"):
    """As a service has them."""

    reloadable: ClassVar[frozenset[str]] = ServiceSettings.reloadable | {"limits.requests", "names"}

    limits: Limits = Field(default_factory=Limits)
    names: dict[str, str] = Field(default_factory=dict)
    port: int = 1


@pytest.fixture(autouse=True)
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    for name in ("WORKER", "CLIENT"):
        monkeypatch.setenv(f"TESSERA__POSTGRES__{name}_PASSWORD", "p")
    named = tmp_path / "settings.env"
    named.write_text("TESSERA_MEMORY__LIMITS__REQUESTS=2\nTESSERA_GATEWAY__PORT=5\n")
    monkeypatch.setenv("TESSERA_SETTINGS_FILE", str(named))
    return named


def taken_by(into: list[int]) -> Callable[[MemorySettings], Swap]:
    def prepare(settings: MemorySettings) -> Swap:
        if settings.limits.requests == 13:
            raise ValueError("13 cannot be put into effect")
        return lambda: into.append(settings.limits.requests)

    return prepare


def test_lines_of_the_file_come_after_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('# a comment\nTESSERA__PORT=7\nTESSERA_MEMORY__NAMES=\'{"GPT": "b"}\'\nTESSERA_MEMORY__LIMITS__REQUESTS=3\n')
    assert (MemorySettings().port, MemorySettings().names, MemorySettings().limits.requests) == (7, {"GPT": "b"}, 3)
    monkeypatch.setenv("TESSERA__LIMITS__REQUESTS", "4")
    assert MemorySettings().limits.requests == 4


def test_a_file_that_is_not_there_is_told(file: Path) -> None:
    file.unlink()
    with pytest.raises(ValueError, match=r"TESSERA_SETTINGS_FILE names .*settings\.env, which cannot be read"):
        MemorySettings()


def test_every_follower_has_the_new_ones_at_once(file: Path) -> None:
    reloader, first, second = Reloader(MemorySettings()), list[int](), list[int]()
    reloader.follow(taken_by(first))
    reloader.follow(taken_by(second))
    file.write_text('TESSERA_MEMORY__LIMITS__REQUESTS=9\nTESSERA_MEMORY__NAMES=\'{"a": "b"}\'\n')
    with capture_logs() as logs:
        assert reloader.reload()
    assert (first, second, reloader.settings.names) == ([9], [9], {"a": "b"})
    assert logs[0]["changed"] == ["TESSERA_MEMORY__LIMITS__REQUESTS", "TESSERA_MEMORY__NAMES"]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("LIMITS__REQUESTS=many\nNAMES={no json\nPORT=x", ["LIMITS__REQUESTS", "NAMES", "PORT", "3 settings are wrong"]),
        ("LIMITS__REQUESTS=9\nPORT=8\nLIMITS__TOKEN=new", ["a restart is needed", "TESSERA_MEMORY__LIMITS__TOKEN, TESSERA_MEMORY__PORT"]),
        ("LIMTS__REQUESTS=9\nLIMITS__REQUEST=9", ["LIMTS__REQUESTS: Extra inputs", "LIMITS__REQUEST: Extra inputs"]),
        ("LIMITS__REQUESTS=13", ["13 cannot be put into effect"]),
    ],
)
def test_what_cannot_be_taken_whole_changes_nothing(file: Path, lines: str, told: list[str]) -> None:
    reloader, taken = Reloader(MemorySettings()), list[int]()
    for _ in range(2):
        reloader.follow(taken_by(taken))
    before = reloader.settings
    file.write_text("".join(f"TESSERA_MEMORY__{line}\n" for line in lines.split("\n")))
    with capture_logs() as logs:
        assert not reloader.reload()
    assert (taken, reloader.settings) == ([], before)
    assert all(part in logs[0]["problems"] for part in told)
    assert "new" not in logs[0]["problems"]


def test_a_file_is_read_once_nobody_writes_to_it() -> None:
    quiet = Quiet("old")
    looks = ["old", "half", "whole", "whole", "whole", None, "again", "again", None, None]
    assert [found for found in looks if quiet.has_changed(found)] == ["whole", "again", None]


async def test_a_file_that_is_replaced_is_followed(file: Path) -> None:
    read: list[str] = []
    following = asyncio.create_task(follow_file(file, fingerprint(file), lambda: read.append(file.read_text()), timedelta(milliseconds=5)))
    for text in ("first", "second"):
        replacement = file.with_suffix(".new")
        replacement.write_text(text)
        os.replace(replacement, file)  # noqa: PTH105 - as editors and Kubernetes do
        await eventually(lambda: read[-1:] == [text])  # noqa: B023
    following.cancel()
    assert read == ["first", "second"]
