"""The library against tiktoken itself, and the promises of its docstrings."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public  # type: ignore[import-untyped]

from tessera.encodings import (
    ENCODING_NAMES,
    CorruptRanksError,
    IncompleteTextError,
    PromptMessage,
    PromptShapeError,
    UnencodableTextError,
    UnknownEncodingError,
    UnknownTemplateError,
    UnknownTokenError,
    chunking,
    count_prompt,
    encoding,
    ranks,
)

pytestmark = pytest.mark.unit

HARD_TEXTS = [
    "",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, \u200d alone, ❤️",
    "机器学习是人工智能的一个分支。它很有用！",
    "\ufeff\x00\r\n\t \u2028 <|endoftext|> <|im_start|>",
    "e\u0301 vs é, नमस्ते, שָׁלוֹם, ไทย",
    "   leading and trailing   \n\n\n",
    "^" * 5_000,
]
texts = st.one_of(st.text(max_size=400), st.sampled_from(HARD_TEXTS), st.text(alphabet=" \n.a1中👍\u200d", max_size=200))
names = st.sampled_from(ENCODING_NAMES)


def urls() -> dict[str, str]:
    """Where tiktoken would download each file from, as its own functions say."""
    return {name: next(c for c in getattr(openai_public, name).__code__.co_consts if "://" in str(c)) for name in ENCODING_NAMES}


@pytest.fixture(scope="module", autouse=True)
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tiktoken.Encoding]]:
    """tiktoken loaded by its own loader from its own cache folder."""
    folder = tmp_path_factory.mktemp("tiktoken")
    for name, url in urls().items():
        packed = resources.files("tessera.encodings").joinpath("data", f"{name}.tiktoken.gz").read_bytes()
        (folder / hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()).write_bytes(gzip.decompress(packed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        ORACLE.update({name: tiktoken.Encoding(**getattr(openai_public, name)()) for name in ENCODING_NAMES})
    yield ORACLE
    ORACLE.clear()


ORACLE: dict[str, tiktoken.Encoding] = {}


@given(name=names, text=texts)
@settings(deadline=None)
def test_tokens_equal_tiktokens(name: str, text: str) -> None:
    assert encoding(name).encode(text) == ORACLE[name].encode_ordinary(text)


@given(name=names, text=texts)
@settings(deadline=None)
def test_decode_gives_the_text_back(name: str, text: str) -> None:
    assert encoding(name).decode(encoding(name).encode(text)) == text


@given(name=names, tokens=st.lists(st.integers(0, 100_255), max_size=50))
@settings(deadline=None)
def test_bytes_equal_tiktokens_for_any_tokens(name: str, tokens: list[int]) -> None:
    assert encoding(name).decode_bytes(tokens) == ORACLE[name].decode_bytes(tokens)


@given(name=names, text=texts, limit=st.integers(-1, 60))
@settings(deadline=None)
def test_cut_is_a_prefix_within_the_limit(name: str, text: str, limit: int) -> None:
    cut = encoding(name).cut(text, limit)
    assert text.startswith(cut)
    assert encoding(name).count(cut) <= max(limit, 0)


@given(name=names, text=texts)
@settings(deadline=None)
def test_cut_leaves_a_text_that_fits(name: str, text: str) -> None:
    assert encoding(name).cut(text, encoding(name).count(text)) == text


@given(name=names, text=texts, size=st.integers(4, 60), share=st.integers(0, 50))
@settings(deadline=None)
def test_chunks_cover_the_text_within_their_size(name: str, text: str, size: int, share: int) -> None:
    chunks = encoding(name).chunks(text, size, size * share // 100)
    covered = 0
    for chunk in chunks:
        assert chunk.text == text[chunk.start : chunk.end] != ""
        assert chunk.tokens == encoding(name).count(chunk.text) <= size
        assert chunk.start <= covered <= chunk.end
        covered = chunk.end
    assert covered == len(text)


def test_no_word_is_lost_where_a_natural_end_is_inside_a_token() -> None:
    text = "The observatory opened in spring. " * 40

    chunks = encoding("o200k_base").chunks(text, 50)

    assert "".join(chunk.text for chunk in chunks) == text


def test_chunks_share_about_the_overlap() -> None:
    text = " ".join(f"word{n}" for n in range(500))
    chunks = encoding("o200k_base").chunks(text, 100, 20)
    shared = [encoding("o200k_base").count(text[b.start : a.end]) for a, b in pairwise(chunks)]
    assert shared
    assert all(15 <= count <= 25 for count in shared)


def test_a_chunk_ends_with_a_sentence() -> None:
    text = "One sentence stands here, of some length, for the test. " * 20
    chunks = encoding("cl100k_base").chunks(text, 60)
    assert len(chunks) > 3
    assert all(chunk.text.rstrip().endswith(".") for chunk in chunks)


@pytest.mark.parametrize(("size", "overlap"), [(3, 0), (10, 6), (10, -1)])
def test_impossible_chunk_sizes_are_refused(size: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="at least 4 tokens"):
        encoding("cl100k_base").chunks("text", size, overlap)


def test_cut_never_splits_an_emoji() -> None:
    assert encoding("cl100k_base").cut("👩‍👩‍👧‍👦", 1) == ""


def test_cut_reads_on_where_tokens_are_long() -> None:
    text = " " * 10_000
    assert len(encoding("o200k_base").cut(text, 20)) > 20 * 16


def test_special_tokens_are_plain_text() -> None:
    tokens = encoding("cl100k_base").encode("<|endoftext|>")
    assert len(tokens) > 1
    assert encoding("cl100k_base").decode([100257]) == "<|endoftext|>"


def test_unknown_encoding() -> None:
    with pytest.raises(UnknownEncodingError, match="gpt2"):
        encoding("gpt2")


@pytest.mark.parametrize("token", [-1, 100_256, 10**6, 2**40])
def test_unknown_token_is_named(token: int) -> None:
    with pytest.raises(UnknownTokenError, match=str(token)):
        encoding("cl100k_base").decode([1, token])


def test_half_a_character() -> None:
    token = encoding("cl100k_base").encode("🤗")[0]
    with pytest.raises(IncompleteTextError):
        encoding("cl100k_base").decode([token])
    assert "\ufffd" in encoding("cl100k_base").decode([token], errors="replace")


def test_lone_surrogate_is_refused_not_replaced() -> None:
    with pytest.raises(UnencodableTextError, match="character 1"):
        encoding("cl100k_base").encode("a\ud800")


def test_ordinary_tokens_are_all_of_them() -> None:
    tokens = dict(encoding("cl100k_base").ordinary_tokens())
    assert len(tokens) == 100_256
    assert encoding("cl100k_base").token_bytes(1000) == tokens[1000]


def test_changed_ranks_are_refused() -> None:
    with pytest.raises(CorruptRanksError):
        ranks.published_ranks("cl100k_base.tiktoken", "0" * 64)


def test_a_file_without_a_published_hash_is_refused() -> None:
    with pytest.raises(CorruptRanksError):
        ranks._load_vendored("https://example.org/cl100k_base.tiktoken")


def test_encoding_is_loaded_once_for_all_threads() -> None:
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(encoding("cl100k_base"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 8
    assert len({id(each) for each in found}) == 1


def test_loading_needs_no_network_and_no_environment(tmp_path: Path) -> None:
    program = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import os; before = dict(os.environ)\n"
        "from tessera.encodings import encoding\n"
        "assert encoding('o200k_base').count('hello world') == 2\n"
        "assert before == dict(os.environ)\n"
    )
    environment = {"PATH": "/nonexistent", "HOME": str(tmp_path), "TIKTOKEN_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30, env=environment)
    assert list(tmp_path.iterdir()) == []


def test_the_cookbooks_example_counts_as_published() -> None:
    """The six messages of OpenAI's cookbook, which its API counted as 129 (cl100k) and 124 (o200k) prompt tokens."""
    example = (
        ("system", None, "You are a helpful, pattern-following assistant that translates corporate jargon into plain English."),
        ("system", "example_user", "New synergies will help drive top-line growth."),
        ("system", "example_assistant", "Things working well together will increase revenue."),
        ("system", "example_user", "Let's circle back when we have more bandwidth to touch base on opportunities for increased leverage."),
        ("system", "example_assistant", "Let's talk later when we're less busy about how to do better."),
        ("user", None, "This late pivot means we don't have time to boil the ocean for the client deliverable."),
    )
    messages = [PromptMessage(role, content, name) for role, name, content in example]
    assert count_prompt(messages, encoding("cl100k_base"), "openai-chat") == 129
    assert count_prompt(messages, encoding("o200k_base"), "openai-chat") == 124


def test_plain_counts_the_contents_joined_by_newlines() -> None:
    messages = [PromptMessage("user", "one two"), PromptMessage("assistant", "three")]
    assert count_prompt(messages, encoding("cl100k_base"), "plain") == encoding("cl100k_base").count("one two\nthree")


@pytest.mark.parametrize("template", ["openai-chat", "plain", "text"])
def test_a_text_prompt_counts_as_itself(template: str) -> None:
    assert count_prompt("hello world", encoding("cl100k_base"), template) == 2


def test_text_template_refuses_messages() -> None:
    with pytest.raises(PromptShapeError):
        count_prompt([PromptMessage("user", "hi")], encoding("cl100k_base"), "text")


def test_unknown_template() -> None:
    with pytest.raises(UnknownTemplateError):
        count_prompt("hi", encoding("cl100k_base"), "chatml")


def test_a_natural_end_that_costs_more_tokens_is_not_taken() -> None:
    """A shorter piece may merge less well than a longer one; the size still holds."""
    window = chunking.Window("abcdefg hij", range(11), lambda piece: 99 if piece == "abcdefg " else len(piece))
    assert [chunk.text for chunk in chunking.split(window, 9, 0)] == ["abcdefg h", "ij"]
