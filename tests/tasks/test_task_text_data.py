import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.tasks.data import ALPHABET_SIZE, decode, docs_text, encode
from weightlab.tasks.docs_gpt import split_text

PRINTABLE = "".join(map(chr, range(32, 127)))


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=PRINTABLE + "\n"))
def test_printable_text_survives(text):
    assert decode(encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters()))
def test_any_text_gives_one_symbol_a_character(text):
    symbols = encode(text)
    assert symbols.dtype == torch.uint8
    assert len(symbols) == len(text)
    expected = [c if c in PRINTABLE + "\n" else " " if c == "\t" else "\ufffd" for c in text]
    assert decode(symbols) == "".join(expected)


def test_alphabet_has_no_gaps():
    assert sorted(encode("…\n" + PRINTABLE).tolist()) == list(range(ALPHABET_SIZE))


def test_docs_text_is_english_and_repeats_no_paragraph():
    text = docs_text()
    assert len(text) > 200_000
    words = text.lower().split()
    assert sum(word in {"the", "a", "of", "is", "to", "and"} for word in words) > 0.1 * len(words)
    paragraphs = [part for part in text.strip().split("\n\n") if part.strip()]
    assert len(paragraphs) == len(set(paragraphs))


def test_docs_splits_partition_the_text():
    text = docs_text()
    parts = {split: decode(split_text(split)) for split in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == len(text)
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert len(parts[split]) == pytest.approx(share * len(text), rel=1e-3)


def test_docs_splits_share_no_long_passage():
    length = 200
    train, validation, test = (decode(split_text(split)) for split in ("train", "validation", "test"))
    for part, others in ((validation, (train, test)), (test, (train, validation))):
        pieces = [part[i : i + length] for i in range(0, len(part) - length, length)]
        assert len(pieces) > 100
        assert not [piece for piece in pieces if any(piece in other for other in others)]
