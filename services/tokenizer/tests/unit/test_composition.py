"""Compositions: determinism, sharing, exact reconstruction, and that damage is noticed."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.contracts.errors import InvalidError
from tessera.encodings import ENCODING_NAMES, encoding
from tessera.tokenizer.domain.composition import Composed, compose, composition_id, rebuild, token_id

pytestmark = pytest.mark.unit

HARD_TEXTS = ["", "👩‍👩‍👧‍👦", "\u200d", "机器学习。它很有用！你好", "A. B.\nC\r\n\n D!", "one", "e.g. this"]
texts = st.one_of(st.text(max_size=300), st.text(alphabet=" \n.!a中。👍\u200d", max_size=100), st.sampled_from(HARD_TEXTS))
names = st.sampled_from(ENCODING_NAMES)


def token_bytes(text: str, name: str) -> list[bytes]:
    return [encoding(name).token_bytes(token) for token in encoding(name).encode(text)]


def composed(text: str, name: str = "o200k_base") -> Composed:
    return compose(token_bytes(text, name))


def rebuilt(text: str, name: str) -> str:
    made = composed(text, name)
    children = {key: each.children for key, each in made.compositions.items()}
    return rebuild(made.root, children, {token_id(token): token for token in token_bytes(text, name)}).decode()


@given(text=texts, name=names)
@settings(deadline=None)
def test_a_text_is_rebuilt_exactly(text: str, name: str) -> None:
    assert rebuilt(text, name) == text


@given(text=texts, name=names)
@settings(deadline=None)
def test_the_same_text_has_the_same_id(text: str, name: str) -> None:
    assert composed(text, name) == composed(text, name)


@given(one=texts, other=texts)
@settings(deadline=None)
def test_different_texts_have_different_ids(one: str, other: str) -> None:
    assert (composed(one).root == composed(other).root) == (one == other)


@given(text=texts)
@settings(deadline=None)
def test_every_composition_has_the_id_and_size_of_its_content(text: str) -> None:
    made = composed(text)
    sizes = {token_id(token): len(token) for token in token_bytes(text, "o200k_base")}
    sizes |= {key: each.size for key, each in made.compositions.items()}
    for key, each in made.compositions.items():
        assert key == composition_id(each.children)
        assert each.size == sum(sizes[child] for child in each.children)
    assert sizes.get(made.root, 0) == len(text.encode())


def test_ids_are_the_documented_hashes() -> None:
    first, second = hashlib.sha256(b"\x00a").digest(), hashlib.sha256(b"\x00b").digest()
    assert token_id(b"a") == first
    expected = hashlib.sha256(b"\x01" + b"\x00\x00\x00\x00" + first + b"\x01\x00\x00\x00" + second).digest()
    assert composition_id([first, second]) == expected


def test_the_order_of_children_counts() -> None:
    assert composition_id([token_id(b"a"), token_id(b"b")]) != composition_id([token_id(b"b"), token_id(b"a")])


def test_a_single_token_is_its_own_composition() -> None:
    assert composed("hello") == Composed(token_id(b"hello"), {})


def test_a_sentence_is_shared_between_texts() -> None:
    sentence = "It rained all day."
    inside = composed(sentence + " Nobody went out.").compositions[composed(sentence + " Nobody went out.").root]
    assert inside.children[0] == composed(sentence).root


def test_chinese_sentences_are_shared() -> None:
    whole = composed("你好世界。今天下雨。")
    assert whole.compositions[whole.root].children == (composed("你好世界。").root, composed("今天下雨。").root)


@pytest.mark.parametrize("damage", ["missing", "changed", "token"])
def test_damage_is_noticed(damage: str) -> None:
    text = "Two words. And more words."
    made = composed(text)
    children = {key: list(each.children) for key, each in made.compositions.items()}
    tokens = {token_id(token): token for token in token_bytes(text, "o200k_base")}
    victim = next(iter(tokens))
    if damage == "missing":
        del tokens[victim]
    elif damage == "token":
        tokens[victim] += b"!"
    else:
        children[made.root].reverse()
    with pytest.raises(InvalidError, match="not what its id says") as caught:
        rebuild(made.root, children, tokens)
    assert caught.value.code == "composition_corrupt"
