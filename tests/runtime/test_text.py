"""Streamed text: whole characters, cut before stop strings, and in sum the text of all tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.runtime.text import TextStream


@pytest.fixture(scope="module")
def tokenizer(demo_tokenizer):
    return demo_tokenizer


def stream(tokenizer, ids, stop=()):
    """The pieces as they come, and the stream after them."""
    text = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return [*pieces, text.finish()], text


def test_a_character_of_several_tokens_comes_when_it_is_whole(tokenizer):
    ids = tokenizer("x🙂é", add_special_tokens=False).input_ids
    assert len(ids) > 4  # the smile is several byte tokens
    pieces, text = stream(tokenizer, ids)
    assert [piece for piece in pieces if piece] == ["x", "🙂", "é"]
    assert text.text == "x🙂é"


def test_half_a_character_at_the_end_is_shown_as_what_it_is(tokenizer):
    ids = tokenizer("a🙂", add_special_tokens=False).input_ids[:-1]
    pieces, text = stream(tokenizer, ids)
    assert pieces[-1] and set(pieces[-1]) == {"\N{REPLACEMENT CHARACTER}"}
    assert text.text == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 4095), max_size=30))
def test_pieces_add_up_to_the_decoded_text(tokenizer, ids):
    pieces, text = stream(tokenizer, ids)
    assert "".join(pieces) == text.text == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(
    words=st.text("ab \n", max_size=40), stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)
)
def test_text_ends_before_the_first_stop_string(tokenizer, words, stop):
    ids = tokenizer(words, add_special_tokens=False).input_ids
    pieces, text = stream(tokenizer, ids, stop)
    assert "".join(pieces) == text.text
    assert words.startswith(text.text)
    assert not any(s in text.text for s in stop)
    assert text.stopped == any(s in words for s in stop)
    if not text.stopped:
        assert text.text == words


def test_what_may_begin_a_stop_string_is_held_back(tokenizer):
    text = TextStream(tokenizer, ["zz!"])
    (z,) = tokenizer("z", add_special_tokens=False).input_ids
    (a,) = tokenizer("a", add_special_tokens=False).input_ids
    assert [text.push(t) for t in (a, z, z, z, a)] == ["a", "", "", "z", "zza"]


def test_special_tokens_are_no_text(tokenizer):
    pieces, text = stream(tokenizer, [tokenizer.bos_token_id, tokenizer.eos_token_id])
    assert text.text == "" and not any(pieces)
