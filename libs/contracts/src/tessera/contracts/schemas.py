"""Committed JSON Schemas of every event, their revisions, and the check that keeps old and new able to talk.

    python -m tessera.contracts.schemas write    new revisions for classes that changed compatibly; the lock grows
    python -m tessera.contracts.schemas check    exit 1 and one sentence for everything that is wrong

A revision is immutable. `lock.json` holds the hash of every revision and example ever committed; the check reads it
from git's history, so that a commit cannot rewrite the lock and what it protects together.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tessera.contracts.base import EventData, event_version
from tessera.contracts.catalogue import EVENT_TYPES
from tessera.contracts.compatibility import Schema, incompatibilities, opened_schema
from tessera.contracts.errors import InvalidError
from tessera.contracts.upcasting import UPCASTERS, Upcasters

Lock = dict[str, str]


@dataclass(frozen=True)
class Revision:
    """One committed shape of one version of an event."""

    path: Path
    writer: Schema
    reader: Schema

    @property
    def number(self) -> int:
        """3 for `r3.json`."""
        return int(self.path.stem[1:])


def writer_schema(event: type[EventData]) -> Schema:
    """What a writer may say: closed."""
    return event.model_json_schema(mode="validation")


def reader_schema(event: type[EventData]) -> Schema:
    """What a reader accepts: open, so that it survives fields it does not know yet."""
    return opened_schema(writer_schema(event))


class SchemaStore:
    """The folder of committed schemas and examples. Reads and writes files; blocking."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def lock_path(self) -> Path:
        """The lock file."""
        return self._root / "schemas" / "lock.json"

    def revisions(self, event: type[EventData]) -> list[Revision]:
        """Every committed revision of the event's version, oldest first."""
        folder = self._folder("schemas", event)
        found = [_load_revision(path) for path in folder.glob("r*.json")] if folder.is_dir() else []
        return sorted(found, key=lambda revision: revision.number)

    def examples(self, event: type[EventData]) -> dict[str, Any]:
        """Every committed example of the event's version, by file name."""
        folder = self._folder("examples", event)
        paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
        return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}

    def former_examples(self, event: type[EventData]) -> dict[str, dict[str, Any]]:
        """The examples of every committed version before the class's, by type; empty where a version has none."""
        name = event.event_type.rsplit(".v", 1)[0]
        versions = (int(folder.name[1:]) for folder in self._folder("schemas", event).parent.glob("v*"))
        found: dict[str, dict[str, Any]] = {}
        for version in sorted(version for version in versions if version < event_version(event)):
            paths = sorted((self._folder("examples", event).parent / f"v{version}").glob("*.json"))
            found[f"{name}.v{version}"] = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
        return found

    def write(self) -> list[Path]:
        """Write a new revision for every class that differs from its newest one, and lock all files."""
        written = []
        for event in EVENT_TYPES.values():
            revisions = self.revisions(event)
            if revisions and revisions[-1].writer == writer_schema(event):
                continue
            path = self._folder("schemas", event) / f"r{len(revisions) + 1}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_pretty({"writer": writer_schema(event), "reader": reader_schema(event)}), encoding="utf-8")
            written.append(path)
        self.lock_path.write_text(_pretty({**self.lock(), **self.hashes()}), encoding="utf-8")
        return written

    def lock(self) -> Lock:
        """The lock as it stands."""
        return json.loads(self.lock_path.read_text(encoding="utf-8")) if self.lock_path.exists() else {}

    def hashes(self) -> Lock:
        """SHA-256 of every revision and example file."""
        paths = [*self._root.glob("schemas/*/v*/r*.json"), *self._root.glob("examples/*/v*/*.json")]
        return {path.relative_to(self._root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}

    def historic_locks(self) -> Iterator[Lock]:
        """The lock of every commit that changed it. Raises OSError where git or its history is missing."""
        name = self.lock_path.relative_to(self._root).as_posix()
        for commit in _git(self._root, "log", "--format=%H", "--", name).split():
            shown = subprocess.run(
                ["git", "-C", str(self._root), "show", f"{commit}:./{name}"], capture_output=True, text=True, check=False
            )
            if shown.returncode == 0:
                yield json.loads(shown.stdout)

    def _folder(self, kind: str, event: type[EventData]) -> Path:
        name = event.event_type.removeprefix("tessera.").rsplit(".v", 1)[0]
        return self._root / kind / name / f"v{event_version(event)}"


def problems(store: SchemaStore, *, with_history: bool = True) -> list[str]:
    """Everything that breaks a rule of the schemas, one sentence each."""
    found = [*_lock_problems(store.hashes(), store.lock(), "the lock")]
    if with_history:
        for lock in store.historic_locks():
            found.extend(_lock_problems(store.hashes(), lock, "an earlier commit's lock"))
    for event in EVENT_TYPES.values():
        found.extend(_event_problems(store, event))
        found.extend(lifting_problems(store, event, UPCASTERS))
    return sorted(set(found))


def _lock_problems(hashes: Lock, lock: Lock, origin: str) -> Iterator[str]:
    for name, digest in lock.items():
        if name not in hashes:
            yield f"{name}: is in {origin} but gone; a committed revision or example stays"
        elif hashes[name] != digest:
            yield f"{name}: differs from {origin}; a committed revision or example never changes"
    if origin == "the lock":
        for name in hashes.keys() - lock.keys():
            yield f"{name}: is not locked; run `make schemas`"


def _event_problems(store: SchemaStore, event: type[EventData]) -> Iterator[str]:
    revisions = store.revisions(event)
    if not revisions or revisions[-1].writer != writer_schema(event):
        yield f"{event.event_type}: its class differs from its newest revision; run `make schemas`"
    current = Revision(Path("r0.json"), writer_schema(event), reader_schema(event))
    yield from _compatibility_problems(event, [*revisions, current])
    examples = store.examples(event)
    if not examples:
        yield f"{event.event_type}: has no example"
    for name, example in examples.items():
        yield from _example_problems(event, name, example)


def _compatibility_problems(event: type[EventData], revisions: list[Revision]) -> Iterator[str]:
    for writer in revisions:
        for reader in revisions:
            for difference in incompatibilities(writer.writer, reader.reader):
                names = f"{_label(writer)} is not readable by {_label(reader)}"
                yield f"{event.event_type}: what {names}: {difference}"


def _label(revision: Revision) -> str:
    return f"r{revision.number}" if revision.number else "the class"


def _example_problems(event: type[EventData], name: str, example: Any) -> Iterator[str]:
    try:
        event.model_validate(example["data"], extra="ignore")
    except ValidationError as error:
        first = error.errors()[0]
        yield f"{event.event_type}: example {name} does not validate: {'.'.join(map(str, first['loc']))}: {first['msg']}"


def lifting_problems(store: SchemaStore, event: type[EventData], upcasters: Upcasters) -> Iterator[str]:
    """What keeps an event of a former version from being read as the newest, one sentence each."""
    for former, examples in store.former_examples(event).items():
        if not upcasters.reaches(former, event):
            yield f"{former}: no upcaster leads to {event.event_type}, so what the log holds of it could not be read"
            continue
        if not examples:
            yield f"{former}: has no example, so its upcaster is not tried"
        for name, example in examples.items():
            try:
                event.model_validate(upcasters.lifted(former, example["data"], event), extra="forbid")
            except (InvalidError, ValidationError) as error:
                yield f"{former}: example {name} is no {event.event_type} after its upcasters: {error}"


def _load_revision(path: Path) -> Revision:
    stored = json.loads(path.read_text(encoding="utf-8"))
    return Revision(path, stored["writer"], stored["reader"])


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(done.stderr.strip() or "git failed")
    return done.stdout


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    store = SchemaStore(Path(arguments[1]) if len(arguments) > 1 else Path("libs/contracts"))
    if arguments[:1] == ["write"]:
        for path in store.write():
            sys.stdout.write(f"new revision: {path}\n")
    found = problems(store)
    sys.stderr.writelines(f"{problem}\n" for problem in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
