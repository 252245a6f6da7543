"""Vocabularies for the tests: a tiny one made here, and the default model's own."""

import json

import pytest

from plugmesh import models
from plugmesh.tokenization.load import GGUF_ASSET, load_vocabulary

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_alphabet():
    """Byte to character, written out another way than in the code: GPT-2 gives unprintable bytes U+0100 onwards."""
    out, extra = {}, 0
    for b in range(256):
        if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255:
            out[b] = chr(b)
        else:
            out[b] = chr(256 + extra)
            extra += 1
    return out


@pytest.fixture(scope="session")
def tiny_meta():
    """GGUF metadata: 3 control tokens, 256 bytes, some joined pieces (halves of characters, too), one user token."""
    of = byte_alphabet()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(of[b] for b in range(256))]
    merges = []
    for left, right in [(b"a", b"b"), (b"ab", b"c"), (b"\xe6", b"\x97"), (b"\xf0", b"\x9f"), (b"\xf0\x9f", b"\x98"), (b"<", b"|"),
                        (b"e", b"n"), (b"en", b"d"), (b"\n", b"\n"), (b" ", b" "), (b"X", b"\xe6"), (b"\n", b"a")]:
        parts = ["".join(of[b] for b in side) for side in (left, right)]
        tokens.append("".join(parts))
        merges.append(" ".join(parts))
    tokens.append("<think>")
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 4) + [4], "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


@pytest.fixture(scope="session")
def tiny(tiny_meta):
    return load_vocabulary({GGUF_ASSET: json.dumps(tiny_meta).encode()})


@pytest.fixture(scope="session")
def smollm2_meta():
    path = models.find("smollm2")
    if path is None:
        pytest.skip("the default model is not there; `plugmesh pull smollm2` fetches it")
    import gguf

    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def smollm2(smollm2_meta):
    return load_vocabulary({GGUF_ASSET: json.dumps(smollm2_meta).encode()})
