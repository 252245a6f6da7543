"""Ids equal those of llama.cpp (fixture) and of a slow byte-level BPE written here."""

import itertools
import json
import pathlib
import unicodedata

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from plugmesh.tokenization.encode import Encoder
from plugmesh.tokenization.load import GGUF_ASSET, load_vocabulary
from plugmesh.tokenization.pretokenize import PRE_TOKENIZERS

FIXTURE = json.loads(pathlib.Path(__file__).with_name("reference_ids.json").read_text())
ALPHABET = {b: c for b, c in zip(
    range(256),
    [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b else None for b in range(256)], strict=True)}
for _n, _b in enumerate(b for b in range(256) if ALPHABET[b] is None):
    ALPHABET[_b] = chr(256 + _n)
WHITE_SPACE = set("\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000")


def kind(char):
    if char in WHITE_SPACE:
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(char)[0], "other")


def split_gpt2(text):
    """GPT-2's regex by hand: contractions, then runs of one kind with at most one blank before, then white space."""
    pieces, i = [], 0
    while i < len(text):
        for contraction in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"):
            if text.startswith(contraction, i):
                end = i + len(contraction)
                break
        else:
            start = i + 1 if text[i] == " " and i + 1 < len(text) and kind(text[i + 1]) != "space" else i
            end = start + 1
            while end < len(text) and kind(text[end]) == kind(text[start]):
                end += 1
            if kind(text[start]) == "space" and end < len(text) and end - start > 1:
                end -= 1  # the last white space before something stays with it
        pieces.append(text[i:end])
        i = end
    return pieces


@pytest.fixture(scope="session")
def tables(smollm2_meta):
    """Vocabulary and ranks of the merges, for `slow_encode`."""
    return (
        {t: i for i, t in enumerate(smollm2_meta["tokenizer.ggml.tokens"])},
        {tuple(m.split(" ")): r for r, m in enumerate(smollm2_meta["tokenizer.ggml.merges"])},
    )


def slow_encode(tables, text):
    """Digits one by one, GPT-2 pieces, then merge the best-ranked neighbours until none is left. Plain text only."""
    vocab, ranks = tables
    stretches, run = [], ""
    for char in text:
        if kind(char) == "number":
            stretches += [run, char]
            run = ""
        else:
            run += char
    ids = []
    for piece in (p for stretch in [*stretches, run] if stretch for p in split_gpt2(stretch)):
        # Bytes without a token are left out, as in the reference.
        parts = [c for c in (ALPHABET[b] for b in piece.encode()) if c in vocab]
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, 1 << 30), at) for at, pair in enumerate(itertools.pairwise(parts)))
            if rank == 1 << 30:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [vocab[p] for p in parts]
    return ids


@pytest.mark.model
@pytest.mark.parametrize("pre", FIXTURE["ids"])
def test_ids_equal_llama_cpp_on_the_corpus(smollm2_meta, pre):
    vocabulary = load_vocabulary({GGUF_ASSET: json.dumps(smollm2_meta | {"tokenizer.ggml.pre": pre}).encode()})
    encoder = Encoder(vocabulary)
    for number, text in enumerate(FIXTURE["texts"]):
        if pre == "qwen2" and not unicodedata.is_normalized("NFC", text):
            continue  # Qwen2's own tokenizer.json composes characters first, llama.cpp does not

        assert FIXTURE["ids"][pre]["plain"][number] == encoder.encode(text, allow_special=False), text
        assert FIXTURE["ids"][pre]["special"][number] == encoder.encode(text, allow_special=True), text


@pytest.mark.model
def test_slow_reference_agrees_with_llama_cpp(tables):
    """So that the reference of the next test is itself checked."""
    for text, want in zip(FIXTURE["texts"], FIXTURE["ids"]["smollm"]["plain"], strict=True):
        assert want == slow_encode(tables, text), text


# Characters that every Unicode version at hand knows; later ones change kind between libraries.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cn"), max_codepoint=0x1FFFF), max_size=60)
MIXED = st.lists(st.one_of(TEXT, st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "<|", "|>", "im_end", "  ", "\n\n", "'s", "'ll", "123", " 7", "日本", "👍🏽", "\x00", "\t x", "def f():\n    "])), max_size=8).map("".join)


@pytest.mark.model
@settings(max_examples=300, deadline=None)
@given(text=MIXED)
@example("a \n b  c\u3000\u3000d\x85\x1ce")
def test_plain_text_equals_the_slow_reference(smollm2, tables, text):
    ids = Encoder(smollm2).encode(text, allow_special=False)

    assert slow_encode(tables, text) == ids
    assert smollm2.special_ids.isdisjoint(ids)


@settings(max_examples=200, deadline=None)
@given(text=MIXED)
def test_plain_ids_give_the_text_back(tiny, text):
    """Every byte has a token here, so nothing may be lost."""
    ids = Encoder(tiny).encode(text, allow_special=False)

    assert text.encode() == b"".join(tiny.token_bytes[i] for i in ids)
    assert tiny.special_ids.isdisjoint(ids)


@pytest.fixture(scope="session")
def awkward(tiny_meta):
    """A tokenizer.json whose control tokens overlap and take white space along: the library's reading, and ours."""
    vocab = {t: i for i, t in enumerate(tiny_meta["tokenizer.ggml.tokens"][3:-1])}

    def entry(token_id, content, special=True, **flags):
        return {"id": token_id, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": special} | flags

    n = len(vocab)
    parts = {
        "version": "1.0", "normalizer": None, "pre_tokenizer": PRE_TOKENIZERS["smollm"].pre_tokenizer,
        "added_tokens": [entry(n, "<s>"), entry(n + 1, "<mask>", lstrip=True), entry(n + 2, "</s>", rstrip=True),
                         entry(n + 3, "<tool>", special=False), entry(n + 4, "<s><s>")],
        "model": {"type": "BPE", "vocab": vocab, "merges": tiny_meta["tokenizer.ggml.merges"]},
    }
    return tokenizers.Tokenizer.from_str(json.dumps(parts)), Encoder(load_vocabulary({"tokenizer.json": json.dumps(parts).encode()}))


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from(["<s>", "<s><s>", "<mask>", "</s>", " ", "  ", "\n", "a", "<", "word", "<tool>", "ab"]), max_size=10).map("".join))
def test_control_tokens_are_cut_as_the_library_does(awkward, text):
    reference, encoder = awkward

    reference.encode_special_tokens = False
    assert reference.encode(text).ids == encoder.encode(text, allow_special=True)
    reference.encode_special_tokens = True
    assert reference.encode(text).ids == encoder.encode(text, allow_special=False)


def test_begin_token_is_added_only_when_asked_for(tiny):
    encoder = Encoder(tiny)

    assert [1, *encoder.encode("abc", allow_special=False)] == encoder.encode("abc", allow_special=False, add_special_tokens=True)


def test_lone_surrogates_become_the_replacement_character(tiny):
    encoder = Encoder(tiny)

    assert encoder.encode("a\ufffdb", allow_special=False) == encoder.encode("a\ud800b", allow_special=False)
    assert encoder.encode("😀", allow_special=False) == encoder.encode("\ud83d\ude00", allow_special=False)
