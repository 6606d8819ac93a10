"""`.env.example`: every setting of every service, generated from the settings classes.

    python deploy/tools/settings_example.py write
    python deploy/tools/settings_example.py check    exit 1 where the committed file differs

Settings that all services have are named once, with the common prefix `TESSERA__`; `TESSERA_<SERVICE>__…` overrides one for one service.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from tessera.bus.reloading import is_within
from tessera.bus.settings import ServiceSettings
from tessera.contracts.catalogue import SERVICES
from tessera.local.settings import LocalSettings

EXAMPLE = Path(__file__).parents[2] / ".env.example"
_HEAD = """\
# Every setting of Tessera, generated from the settings classes by `make schemas`; `make check` compares.
# Common settings have the prefix TESSERA__; TESSERA_<SERVICE>__<NAME> overrides one for one service.
# The same lines may stand in the file that TESSERA_SETTINGS_FILE names; secrets in files named like the variables, in the folder
# that TESSERA_SECRETS names. What says "Reloads." is taken up by a running service (docs/settings.md).
"""


def settings_class(service: str) -> type[ServiceSettings]:
    """The settings class of a service."""
    module = importlib.import_module(f"tessera.{service}.settings")
    found = [
        item for item in vars(module).values() if inspect.isclass(item) and issubclass(item, ServiceSettings) and item.service == service
    ]
    return found[0]


def example() -> str:
    """The whole file."""
    lines = [_HEAD, "# --- every service", *_lines(ServiceSettings, "TESSERA__", skip=set(), reloadable=ServiceSettings.reloadable)]
    for service in SERVICES:
        found, common = settings_class(service), set(ServiceSettings.model_fields)
        own = list(_lines(found, f"TESSERA_{service.upper()}__", skip=common, reloadable=found.reloadable))
        lines += [f"\n# --- {service}", *(own or ["# (no settings of its own)"])]
    lines += ["\n# --- the stack of `make run`", *_lines(LocalSettings, "TESSERA_LOCAL__", skip=set())]
    return "\n".join(lines) + "\n"


def _lines(model: type[BaseModel], prefix: str, *, skip: set[str], reloadable: Collection[str] = (), path: str = "") -> Iterator[str]:
    documentation = _documentation(model)
    for name, info in model.model_fields.items():
        if name in skip:
            continue
        nested = _nested(info)
        if nested:
            yield from _lines(nested, f"{prefix}{name.upper()}__", skip=set(), reloadable=reloadable, path=f"{path}{name}.")
            continue
        told = info.description or documentation.get(name, "")
        if is_within(path + name, reloadable):
            told += " Reloads."
        if told:
            yield from (f"# {line}" for line in textwrap.wrap(" ".join(told.split()), 130))
        yield f"# {prefix}{name.upper()}={_default(info)}"


def _nested(info: FieldInfo) -> type[BaseModel] | None:
    annotation = info.annotation
    return annotation if inspect.isclass(annotation) and issubclass(annotation, BaseModel) else None


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "<required>"
    if info.default_factory is not None:
        return ""
    value: Any = info.default
    if isinstance(value, SecretStr):
        return ""
    if isinstance(value, tuple | frozenset):
        return json.dumps(list(value))
    return "" if value is None else str(value.value if hasattr(value, "value") else value)


def _documentation(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field, also of the classes it inherits from."""
    told: dict[str, str] = {}
    for each in reversed(model.__mro__):
        if issubclass(each, BaseModel) and each.__module__.startswith("tessera."):
            body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
            told |= dict(_field_strings(body)) if isinstance(body, ast.ClassDef) else {}
    return told


def _field_strings(body: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            yield field.target.id, str(below.value.value)


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    text = example()
    if arguments[:1] == ["write"]:
        EXAMPLE.write_text(text, encoding="utf-8")
    if not EXAMPLE.exists() or EXAMPLE.read_text(encoding="utf-8") != text:
        sys.stderr.write(".env.example is stale: run `make schemas`\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
