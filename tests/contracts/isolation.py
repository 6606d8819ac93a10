"""Runs pytest, or imports modules, as if only some distributions were installed.

    python isolation.py DISTRIBUTION[,DISTRIBUTION…] pytest ARGUMENTS…
    python isolation.py DISTRIBUTION[,DISTRIBUTION…] import PORTION

Everything that belongs to a distribution outside the named ones and their declared dependencies raises ModuleNotFoundError, as it would
in an environment made from their lock files alone. `tessera.<portion>` belongs to the distribution `tessera-<portion>`.
"""

import importlib
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from types import ModuleType

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_NAMESPACE = "tessera"


def with_dependencies(roots: Sequence[str]) -> frozenset[str]:
    """The canonical names of `roots` and of everything they declare, however deep, for this machine."""
    found: set[str] = set()
    waiting = [(canonicalize_name(root), frozenset[str]()) for root in roots]
    done = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in done:
            continue
        done.add((name, extras))
        found.add(name)
        waiting += [(canonicalize_name(wanted.name), frozenset(wanted.extras)) for wanted in _needed(name, extras)]
    return frozenset(found)


def _needed(name: str, extras: frozenset[str]) -> list[Requirement]:
    try:
        declared = [Requirement(line) for line in requires(name) or ()]
    except PackageNotFoundError:
        return []
    return [
        wanted for wanted in declared if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]


class OnlyInstalled:
    """A finder in front of all others that hides what is not installed."""

    def __init__(self, installed: frozenset[str], owners: Mapping[str, Sequence[str]]) -> None:
        self._installed = installed
        self._owners = owners

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """None where the module may be looked for. Raises ModuleNotFoundError where it would not be there."""
        owners = self._owners_of(name)
        if owners and self._installed.isdisjoint(owners):
            raise ModuleNotFoundError(f"No module named {name!r} (it belongs to {', '.join(sorted(owners))})", name=name)
        return None

    def _owners_of(self, name: str) -> set[str]:
        top, _, rest = name.partition(".")
        if top == _NAMESPACE:
            return {f"{_NAMESPACE}-{rest.partition('.')[0]}"} if rest else set()
        return {canonicalize_name(owner) for owner in self._owners.get(top, ())}


def import_all(portion: str) -> None:
    """Import every module of `tessera.<portion>`."""
    package = importlib.import_module(f"{_NAMESPACE}.{portion}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def main(distributions: str, task: str, *arguments: str) -> int:
    """The exit code of pytest, or 0."""
    sys.meta_path.insert(0, OnlyInstalled(with_dependencies(distributions.split(",")), packages_distributions()))
    if task == "import":
        import_all(arguments[0])
        return 0
    import pytest  # noqa: PLC0415 - only once the finder stands

    return int(pytest.main(list(arguments)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
