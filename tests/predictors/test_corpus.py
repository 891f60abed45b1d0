"""Windows of texts, parts of texts, and what is said of those that cannot be used."""

import hashlib
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dejavu.predictors.corpus import read_corpus
from dejavu.predictors.files import Source

FIRST = 2


def letters(text, verbose=True):
    """A tokenizer: a token that begins every text, then one a character."""
    return SimpleNamespace(input_ids=[FIRST, *map(ord, text)])


@pytest.fixture
def write(tmp_path):
    def write(text, name="text.txt"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_windows_follow_one_another(write):
    path = write("abcdefghij\n")
    corpus = read_corpus(path, letters, window=4)
    stream = [FIRST, *map(ord, "abcdefghij")]
    assert corpus.windows.tolist() == [[FIRST, *stream[:4]], [FIRST, *stream[4:8]]]  # the rest is too short
    assert corpus.windows.dtype == torch.int64 and corpus.tokens == 8
    assert (corpus.file, corpus.start, corpus.stop) == ("text.txt", 0, 11)
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_document_begins_like_a_prompt(write):
    text = "ab\n<|endoftext|>\n\n<|endoftext|>\r\n cde\r\n<|endoftext|>\nf\n<|endoftext|>"
    corpus = read_corpus(write(text), letters, window=1)
    expected = [FIRST, *map(ord, "ab"), FIRST, *map(ord, "cde"), FIRST, ord("f")]
    assert corpus.windows[:, 1].tolist() == expected
    assert (corpus.windows[:, 0] == FIRST).all()


def test_the_demos_tokenizer(write, demo_tokenizer):
    text = "It was a dark and stormy night. " * 20
    corpus = read_corpus(write(text), demo_tokenizer, window=16)
    ids = demo_tokenizer(text.strip()).input_ids
    assert corpus.windows[:, 1:].flatten().tolist() == ids[: corpus.tokens]
    assert (corpus.windows[:, 0] == ids[0]).all() and corpus.windows.shape[1] == 17


def test_a_byte_order_mark_is_no_text(write):
    corpus = read_corpus(write(b"\xef\xbb\xbfabc"), letters, window=4)
    assert corpus.windows.tolist() == [[FIRST, FIRST, *map(ord, "abc")]]
    assert corpus.stop == 3


@pytest.mark.parametrize("max_tokens, windows", [(None, 3), (1000, 3), (14, 3), (11, 2), (5, 1), (4, 1)])
def test_no_more_tokens_than_asked_for(write, max_tokens, windows):
    path = write("abcdefghijklmn")
    corpus = read_corpus(path, letters, window=4, max_tokens=max_tokens)
    assert len(corpus.windows) == windows and corpus.tokens == 4 * windows
    everything = read_corpus(path, letters, window=4).windows
    spread = [i * 3 // windows for i in range(windows)]  # over all of the text
    assert torch.equal(corpus.windows, everything[spread])


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(7, 60), n=st.integers(1, 7))
def test_parts_are_disjoint_and_complete(write, length, n):
    text = "".join(chr(ord("a") + i % 26) for i in range(length))
    path = write(text)
    parts = [read_corpus(path, letters, window=1, part=f"{i}/{n}") for i in range(1, n + 1)]
    assert parts[0].start == 0 and parts[-1].stop == length
    assert all(a.stop == b.start for a, b in pairwise(parts))
    found = [token for part in parts for token in part.windows[1:, 1].tolist()]  # without the first token
    assert found == list(map(ord, text))
    assert max(p.stop - p.start for p in parts) - min(p.stop - p.start for p in parts) <= 1
    assert len({part.sha256 for part in parts}) == 1


def test_parts_count_characters_and_not_bytes(write):
    corpus = read_corpus(write("ääääbbbb"), letters, window=4, part="2/2")
    assert (corpus.start, corpus.stop) == (4, 8)
    assert corpus.windows[0].tolist() == [FIRST, FIRST, *map(ord, "bbb")]


@pytest.mark.parametrize("part", ["", "1", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "½", "1.0/2", " 1/2"])
def test_what_is_no_part(write, part):
    with pytest.raises(ValueError, match="is not of the form i/n, as 1/2 for the first half") as error:
        read_corpus(write("abcdefgh"), letters, window=4, part=part)
    assert f"part={part!r}" in str(error.value)


@pytest.mark.parametrize(
    "content, part, message",
    [
        (b"abc\xff", "1/1", "cannot read .*text.txt: not UTF-8 text"),
        (b"", "1/1", "text.txt is empty"),
        (b" \n\t\n", "1/1", "text.txt is empty"),
        (b"abcd    ", "2/2", "part 2/2 of .*text.txt is empty"),
        (b"abc", "1/9", "part 1/9 of .*text.txt is empty"),
        (b"abcdef", "1/1", "text.txt is too short: 7 tokens, and a window has 8"),
        (b"<|endoftext|>\n", "1/1", "text.txt is too short: 0 tokens"),
        (b"abcdefghijkl", "2/2", "text.txt is too short: 7 tokens, and a window has 8"),
    ],
)
def test_texts_that_cannot_be_used(write, content, part, message):
    with pytest.raises(ValueError, match=message):
        read_corpus(write(content), letters, window=8, part=part)


def test_texts_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*none.txt: No such file or directory"):
        read_corpus(tmp_path / "none.txt", letters, window=8)
    with pytest.raises(ValueError, match=r"cannot read .*: Is a directory"):
        read_corpus(tmp_path, letters, window=8)


def test_fewer_tokens_than_a_window_holds_are_no_window(write):
    with pytest.raises(ValueError, match="tokens=7 is less than the 8 of a window"):
        read_corpus(write("abcdefghijkl"), letters, window=8, max_tokens=7)
    with pytest.raises(ValueError, match="tokens=-5 is less"):
        read_corpus(write("abcdefghijkl"), letters, window=8, max_tokens=-5)


def test_a_source_is_what_a_manifest_keeps(write):
    corpus = read_corpus(write("abcdefghijkl"), letters, window=3, part="2/2")
    assert corpus.source("train") == Source(
        use="train", file="text.txt", sha256=corpus.sha256, start=6, stop=12, tokens=6
    )


def test_a_text_is_not_used_twice(write):
    path = write("abcdefghijklmnopqrstuvwx")
    first, second, middle, whole = (
        read_corpus(path, letters, window=2, part=part) for part in ("1/2", "2/2", "2/3", "1/1")
    )
    sources = [first.source("train")]
    second.check_unused(sources, "here")
    second.check_unused([], "here")
    other = read_corpus(write("abcdefghijklmnopqrstuvwy", "other.txt"), letters, window=2)
    other.check_unused(sources, "here")
    for corpus in (first, middle, whole):
        with pytest.raises(
            ValueError, match="here has used characters 0 to 12 of this text to train"
        ) as error:
            corpus.check_unused(
                [second.source("calibrate"), *sources][:: 1 if corpus is first else -1], "here"
            )
        assert f"text.txt, characters {corpus.start} to {corpus.stop}: " in str(error.value)
        assert str(error.value).endswith("take another text or --part")


def test_a_copy_under_another_name_is_the_same_text(write):
    text = "abcdefghijkl"
    source = read_corpus(write(text), letters, window=2).source("calibrate")
    copy = read_corpus(write(text, "copy.txt"), letters, window=2, part="1/2")
    with pytest.raises(ValueError, match=r"copy.txt, .*to calibrate"):
        copy.check_unused([source], "here")
