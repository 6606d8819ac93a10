"""The embedding model: the committed graph, the pinned weights, and vectors compared with an independent forward pass in numpy."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from math import erf
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tessera.contracts.errors import FatalError
from tessera.memory.adapters import minilm
from tessera.memory.adapters.minilm import BATCH_SIZE, BATCH_TOKENS, GRAPH_PATH, MiniLmEmbedder, batches, load_tokenizer, package_folder

pytestmark = pytest.mark.unit

Array = NDArray[np.float64]
SCRIPT = Path(__file__).parents[2] / "scripts" / "build_minilm_graph.py"
TEXTS = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "",
    "日本語のテキスト 🐙",
    "word " * 400,
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_minilm_graph", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_graph_is_what_the_script_builds(script: ModuleType) -> None:
    built = script.build(package_folder() / minilm.WEIGHTS_NAME).SerializeToString(deterministic=True)

    assert built == GRAPH_PATH.read_bytes()
    assert len(built) < 30_000


async def test_vectors_equal_an_independent_forward_pass(embedder: MiniLmEmbedder) -> None:
    vectors = np.array([embedded.vector for embedded in await embedder.embed(TEXTS)])

    expected = np.array([reference(text) for text in TEXTS])
    assert np.abs(vectors - expected).max() < 5e-6


async def test_vectors_have_unit_length_and_do_not_depend_on_the_batch(embedder: MiniLmEmbedder) -> None:
    together = np.array([embedded.vector for embedded in await embedder.embed(TEXTS)])
    alone = np.array([(await embedder.embed([text]))[0].vector for text in TEXTS])

    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert np.abs(together - alone).max() < 1e-6


async def test_meaning_orders_likeness(embedder: MiniLmEmbedder) -> None:
    food, bread, baby, *_ = (np.array(embedded.vector) for embedded in await embedder.embed(TEXTS))

    assert food @ bread > 0.7
    assert food @ baby < 0.1


async def test_tokens_are_counted_and_long_texts_cut(embedder: MiniLmEmbedder) -> None:
    assert [embedded.tokens for embedded in await embedder.embed(["two words", "word " * 400])] == [4, minilm.MAX_TOKENS]


async def test_nothing_is_embedded_into_nothing(embedder: MiniLmEmbedder) -> None:
    assert await embedder.embed([]) == []


def test_other_weights_are_refused(tmp_path: Path) -> None:
    shutil.copytree(package_folder(), tmp_path / "model")
    weights = tmp_path / "model" / minilm.WEIGHTS_NAME
    with weights.open("r+b") as file:
        file.seek(50_000_000)
        file.write(b"\x00\x01")

    with pytest.raises(FatalError, match="not the pinned ones"):
        MiniLmEmbedder(tmp_path / "model")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FatalError, match="missing"):
        MiniLmEmbedder(tmp_path)


@given(st.lists(st.integers(2, 256).map(lambda length: [0] * length), max_size=60))
def test_batches_hold_every_text_once_and_stay_small(encodings: list[list[int]]) -> None:
    found = batches(encodings)

    assert sorted(index for batch in found for index in batch) == list(range(len(encodings)))
    for batch in found:
        padded = len(batch) * max(len(encodings[index]) for index in batch)
        assert len(batch) <= BATCH_SIZE
        assert len(batch) == 1 or padded <= BATCH_TOKENS


def reference(text: str) -> Array:
    """BERT's encoder written out in numpy in double precision, from the same weights: embeddings, six layers, mean, unit length."""
    weights = _weights()
    ids = load_tokenizer(package_folder() / "tokenizer.json").encode(text).ids
    hidden = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.position_embeddings.weight"][: len(ids)]
    hidden = _normalised(hidden + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(6):
        hidden = _layer(hidden, f"encoder.layer.{layer}")
    mean: Array = hidden.mean(axis=0)
    return mean / np.linalg.norm(mean)


def _layer(hidden: Array, part: str) -> Array:
    query, key, value = (_heads(_dense(hidden, f"{part}.attention.self.{name}")) for name in ("query", "key", "value"))
    scores = query @ key.transpose(0, 2, 1) / np.sqrt(32)
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    attended = (exponents / exponents.sum(axis=-1, keepdims=True)) @ value
    joined = attended.transpose(1, 0, 2).reshape(hidden.shape)
    after = _normalised(hidden + _dense(joined, f"{part}.attention.output.dense"), f"{part}.attention.output.LayerNorm")
    wide = _dense(after, f"{part}.intermediate.dense")
    return _normalised(after + _dense(_gelu(wide), f"{part}.output.dense"), f"{part}.output.LayerNorm")


def _heads(projected: Array) -> Array:
    return projected.reshape(len(projected), 12, 32).transpose(1, 0, 2)


def _dense(source: Array, part: str) -> Array:
    weights = _weights()
    return source @ weights[f"{part}.weight"].T + weights[f"{part}.bias"]


def _normalised(source: Array, part: str) -> Array:
    weights = _weights()
    centred = source - source.mean(axis=-1, keepdims=True)
    scaled: Array = (
        centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-12) * weights[f"{part}.weight"] + weights[f"{part}.bias"]
    )
    return scaled


def _gelu(source: Array) -> Array:
    activated: Array = source * 0.5 * (1 + np.vectorize(erf)(source / np.sqrt(2)))
    return activated


_CACHE: dict[str, Array] = {}


def _weights() -> dict[str, Array]:
    if not _CACHE:
        data = (package_folder() / minilm.WEIGHTS_NAME).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header: dict[str, Any] = json.loads(data[8 : 8 + length])
        for name, entry in header.items():
            if entry.get("dtype") == "F32":
                start, end = entry["data_offsets"]
                raw = np.frombuffer(data[8 + length + start : 8 + length + end], dtype="<f4")
                _CACHE[name] = raw.reshape(entry["shape"]).astype(np.float64)
    return _CACHE
