"""Content-addressed text: ids, the tree that a text becomes, and the way back.

    token        SHA-256(0x00 ‖ bytes of the token)
    composition  SHA-256(0x01 ‖ for each child: its ordinal as little-endian uint32 ‖ its 32-byte id)

The leading byte keeps the two apart: no token's bytes can be read as a list of children. Tokens become words, words become sentences,
sentences the text. A composition of one child is that child, so a word of one token has the token's id, and a sentence has the same id
alone and within any text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain

from tessera.contracts.errors import InvalidError

ID_BYTES = 32
_TOKEN_TAG = b"\x00"
_COMPOSITION_TAG = b"\x01"

_WHITE_SPACE = b" \t\r\n"
_LINE_END = b"\n"
# Full stops of Chinese and Japanese are not followed by white space.
_UNSPACED_ENDS = tuple(mark.encode() for mark in "。！？")
_WORD_ENDS = (_LINE_END, *_UNSPACED_ENDS)
_SENTENCE_ENDS = (b".", b"!", b"?", *_WORD_ENDS)


@lru_cache(maxsize=65_536)
def token_id(token: bytes) -> bytes:
    """The 32-byte id of a single token."""
    return hashlib.sha256(_TOKEN_TAG + token).digest()


def composition_id(children: Iterable[bytes]) -> bytes:
    """The 32-byte id of an ordered list of children, themselves ids."""
    digest = hashlib.sha256(_COMPOSITION_TAG)
    for ordinal, child in enumerate(children):
        digest.update(ordinal.to_bytes(4, "little") + child)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class Node:
    """A token or a composition: its id and the length of its text in bytes."""

    id: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Composition:
    """An ordered list of children's ids, and the length of the whole text in bytes."""

    children: tuple[bytes, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Composed:
    """A text as compositions: the id of the whole, and every composition in it (tokens are not among them)."""

    root: bytes
    compositions: Mapping[bytes, Composition]


@dataclass(slots=True)
class _Composer:
    compositions: dict[bytes, Composition] = field(default_factory=dict)

    def join(self, nodes: Sequence[Node]) -> Node:
        """The node of an ordered list of nodes; a single one stays itself."""
        if len(nodes) == 1:
            return nodes[0]
        children = tuple(node.id for node in nodes)
        joined = Node(composition_id(children), sum(node.size for node in nodes))
        self.compositions[joined.id] = Composition(children, joined.size)
        return joined

    def word(self, tokens: Sequence[bytes]) -> Node:
        return self.join([Node(token_id(token), len(token)) for token in tokens])


def compose(tokens: Sequence[bytes]) -> Composed:
    """The composition of a text given as the bytes of its tokens. The same tokens give the same ids, everywhere and always."""
    composer = _Composer()
    sentences = [composer.join([composer.word(word) for word in sentence]) for sentence in _sentences(_words(tokens))]
    return Composed(composer.join(sentences).id, composer.compositions)


def _words(tokens: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Runs of tokens: one begins with white space, or after the end of a line or of an unspaced sentence."""
    word: list[bytes] = []
    for token in tokens:
        if word and (token[:1] in _WHITE_SPACE or word[-1].endswith(_WORD_ENDS)):
            yield word
            word = []
        word.append(token)
    if word:
        yield word


def _sentences(words: Iterable[list[bytes]]) -> Iterator[list[list[bytes]]]:
    """Runs of words: one ends with a word whose last token ends a sentence or a line."""
    sentence: list[list[bytes]] = []
    for word in words:
        sentence.append(word)
        if word[-1].endswith(_SENTENCE_ENDS):
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def rebuild(root: bytes, children: Mapping[bytes, Sequence[bytes]], tokens: Mapping[bytes, bytes]) -> bytes:
    """The exact bytes of a composition, from the stored children of its compositions and the bytes of its tokens.

    Every part is checked against its id first. Raises InvalidError `composition_corrupt` where one is missing or is not what its id says.
    """
    damaged = next(_damaged(root, children, tokens), None)
    if damaged is not None:
        raise InvalidError("composition_corrupt", f"What is stored as {damaged.hex()} is not what its id says.")
    return b"".join(_leaves(root, children, tokens))


def _damaged(root: bytes, children: Mapping[bytes, Sequence[bytes]], tokens: Mapping[bytes, bytes]) -> Iterator[bytes]:
    yield from (identity for identity, parts in children.items() if composition_id(parts) != identity)
    yield from (identity for identity, token in tokens.items() if token_id(token) != identity)
    yield from {root, *chain.from_iterable(children.values())} - children.keys() - tokens.keys()


def _leaves(root: bytes, children: Mapping[bytes, Sequence[bytes]], tokens: Mapping[bytes, bytes]) -> Iterator[bytes]:
    """Depth first, by a stack of its own. Verified ids cannot form a cycle."""
    stack = [root]
    while stack:
        identity = stack.pop()
        if identity in children:
            stack.extend(reversed(children[identity]))
        else:
            yield tokens[identity]
