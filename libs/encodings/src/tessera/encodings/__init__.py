"""tiktoken ranks, counting and cutting by tokens, offline.

    from tessera.encodings import encoding
    encoding("o200k_base").count("Hello")

The ranks are part of the package, checked against tiktoken's own hashes when loaded; nothing is ever fetched. All functions are pure
and thread-safe. They use the CPU (about 0.6 ms for 4 kB), so async code runs long texts in a thread.
"""

from tessera.encodings.chunking import Chunk
from tessera.encodings.encoding import ENCODING_NAMES, Encoding, encoding
from tessera.encodings.errors import (
    CorruptRanksError,
    EncodingsError,
    IncompleteTextError,
    PromptShapeError,
    UnencodableTextError,
    UnknownEncodingError,
    UnknownTemplateError,
    UnknownTokenError,
)
from tessera.encodings.templates import TEMPLATE_NAMES, PromptMessage, count_prompt, plain_prompt

__all__ = [
    "ENCODING_NAMES",
    "TEMPLATE_NAMES",
    "Chunk",
    "CorruptRanksError",
    "Encoding",
    "EncodingsError",
    "IncompleteTextError",
    "PromptMessage",
    "PromptShapeError",
    "UnencodableTextError",
    "UnknownEncodingError",
    "UnknownTemplateError",
    "UnknownTokenError",
    "count_prompt",
    "encoding",
    "plain_prompt",
]
