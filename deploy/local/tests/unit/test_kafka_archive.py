"""The class data archive is made again when Java would no longer take it."""

import os
import shutil
from pathlib import Path

import pytest

from tessera.local.kafka import KafkaDistribution


@pytest.fixture
def java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "jdk" / "bin" / "java"
    program.parent.mkdir(parents=True)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    _install(program, "17.0.15+6")
    return program


def _install(program: Path, build: str) -> None:
    program.with_suffix(".new").write_text(f"#!/bin/sh\necho 'openjdk version \"17.0.15\" (build {build})' >&2\n")
    program.with_suffix(".new").chmod(0o755)
    program.with_suffix(".new").replace(program)


@pytest.fixture
def distribution(java: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KafkaDistribution:
    """Complete, as `ensure` has left it; a broker is not run for it."""
    monkeypatch.setattr(KafkaDistribution, "_write_archive", lambda _, file: file.write_text("classes"))
    made = KafkaDistribution(tmp_path / "cache" / "kafka")
    made.jars.mkdir(parents=True)
    for name in ("one.jar", "two.jar"):
        (made.jars / name).write_text(name)
    made.ensure()
    assert made.is_complete()
    return made


def _archives(distribution: KafkaDistribution) -> list[Path]:
    return sorted(distribution.folder.glob("*.jsa"))


def _assert_made_again(distribution: KafkaDistribution, before: Path) -> None:
    assert not distribution.is_complete()
    distribution.ensure()
    assert distribution.is_complete()
    assert _archives(distribution) == [distribution.archive], "the one that is of no use is gone"
    assert distribution.archive != before


def test_one_that_is_good_stays(distribution: KafkaDistribution, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KafkaDistribution, "_write_archive", lambda *_: pytest.fail("made again"))
    before = distribution.archive
    KafkaDistribution(distribution.folder).ensure()
    assert _archives(distribution) == [before]


def test_a_jar_of_another_time(distribution: KafkaDistribution) -> None:
    before, jar = distribution.archive, distribution.jars / "one.jar"
    os.utime(jar, (1, 1))
    _assert_made_again(distribution, before)


def test_a_jar_of_another_size(distribution: KafkaDistribution) -> None:
    before, jar = distribution.archive, distribution.jars / "one.jar"
    written = jar.stat()
    jar.write_text("more than before")
    os.utime(jar, ns=(written.st_atime_ns, written.st_mtime_ns))
    _assert_made_again(distribution, before)


def test_another_jar(distribution: KafkaDistribution) -> None:
    before = distribution.archive
    (distribution.jars / "three.jar").write_text("three")
    _assert_made_again(distribution, before)


def test_a_checkout_that_was_moved(distribution: KafkaDistribution, tmp_path: Path) -> None:
    moved = KafkaDistribution(Path(shutil.move(distribution.folder, tmp_path / "elsewhere")))
    (before,) = _archives(moved)
    _assert_made_again(moved, before)


def test_another_build_of_java(distribution: KafkaDistribution, java: Path) -> None:
    before = distribution.archive
    _install(java, "17.0.15+7")
    _assert_made_again(distribution, before)


def test_an_archive_of_an_earlier_version_of_this_code_goes(distribution: KafkaDistribution) -> None:
    distribution.archive.unlink()
    (distribution.folder / "kafka.jsa").write_text("classes")
    distribution.ensure()
    assert _archives(distribution) == [distribution.archive]


def test_reached_by_a_link_it_is_the_same(distribution: KafkaDistribution, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(distribution.folder.parent)
    linked = KafkaDistribution(tmp_path / "link" / "kafka")
    assert linked.class_path == distribution.class_path
    assert linked.archive.samefile(distribution.archive)
