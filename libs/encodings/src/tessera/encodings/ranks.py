"""Loads the vendored ranks and builds tiktoken's encodings from them, without network or environment variables."""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Callable
from importlib import resources
from types import FunctionType
from typing import Any

import tiktoken
from tiktoken_ext import openai_public  # type: ignore[import-untyped]

from tessera.encodings.errors import CorruptRanksError


def published_ranks(name: str, expected_sha256: str) -> dict[bytes, int]:
    """Token bytes to id of the vendored file `name`.

    Raises CorruptRanksError where its SHA-256 is not the expected one. Blocks for some 0.2 s.
    """
    packed = resources.files("tessera.encodings").joinpath("data", f"{name}.gz").read_bytes()
    content = gzip.decompress(packed)
    if hashlib.sha256(content).hexdigest() != expected_sha256:
        raise CorruptRanksError(f"{name} is not the file that tiktoken expects")
    lines = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _load_vendored(url: str, expected_hash: str | None = None) -> dict[bytes, int]:
    """Stands in for tiktoken.load.load_tiktoken_bpe: same file, same hash, from this package."""
    if expected_hash is None:
        raise CorruptRanksError(f"tiktoken names no hash for {url}")
    return published_ranks(url.rsplit("/", 1)[-1], expected_hash)


def build(name: str) -> tiktoken.Encoding:
    """tiktoken's encoding `name` with its own pattern, special tokens and hash, over the vendored ranks."""
    return tiktoken.Encoding(**_offline(getattr(openai_public, name))())


def _offline(constructor: FunctionType) -> Callable[[], dict[str, Any]]:
    """tiktoken's constructor function with another loader in its globals.

    A copy with its own globals: patching the module, or TIKTOKEN_CACHE_DIR, would be seen by every other user of tiktoken in the process.
    """
    own_globals = {**constructor.__globals__, "load_tiktoken_bpe": _load_vendored}
    return FunctionType(constructor.__code__, own_globals, constructor.__name__)
