"""What is refused at load, and that both file formats mean the same."""

import json

import pytest

from plugmesh.errors import CorruptModelFile
from plugmesh.tokenization.encode import Encoder
from plugmesh.tokenization.load import GGUF_ASSET, load_vocabulary
from plugmesh.tokenization.pretokenize import PRE_TOKENIZERS


def load(meta, **more):
    return load_vocabulary({GGUF_ASSET: json.dumps(meta).encode(), **more})


@pytest.mark.parametrize(("change", "field"), [
    ({"tokenizer.ggml.pre": "made-up"}, "tokenizer.ggml.pre"),
    ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model"),
    ({"tokenizer.ggml.tokens": []}, "tokenizer.ggml.tokens"),
    ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "tokenizer.ggml.tokens"),
    ({"tokenizer.ggml.tokens": "abc"}, "tokenizer.ggml.tokens"),
    ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type"),
    ({"tokenizer.ggml.merges": ["a q"]}, "tokenizer.ggml.merges"),
    ({"tokenizer.ggml.merges": ["a"]}, "tokenizer.ggml.merges"),
    ({"tokenizer.ggml.eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id"),
    ({"tokenizer.ggml.add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token"),
    ({"tokenizer.chat_template": 7}, "tokenizer.chat_template"),
])
def test_a_bad_key_is_named(tiny_meta, change, field):
    with pytest.raises(CorruptModelFile) as caught:
        load(tiny_meta | change)

    assert field == caught.value.field


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"[" * 100_000, b'{"model": 1}', b'{"model": {"type": "Unigram"}, "added_tokens": []}'])
def test_a_malformed_tokenizer_json_is_a_typed_error(data):
    with pytest.raises(CorruptModelFile):
        load_vocabulary({"tokenizer.json": data})


def test_a_model_without_tokenizer_is_a_typed_error():
    with pytest.raises(CorruptModelFile):
        load_vocabulary({})


def as_hf(meta):
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    return {
        "version": "1.0", "normalizer": None, "pre_tokenizer": PRE_TOKENIZERS["smollm"].pre_tokenizer,
        "added_tokens": [
            {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": k == 3}
            for i, (t, k) in enumerate(zip(tokens, kinds, strict=True)) if k != 1
        ],
        "post_processor": {
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
        },
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [m.split(" ") for m in meta["tokenizer.ggml.merges"]]},
    }


def test_both_formats_give_one_tokenizer(tiny_meta, tiny):
    settings = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}, "chat_template": tiny_meta["tokenizer.chat_template"]}
    other = load_vocabulary({"tokenizer.json": json.dumps(as_hf(tiny_meta)).encode(), "tokenizer_config.json": json.dumps(settings).encode()})

    assert tiny.hash == other.hash
    assert tiny.token_bytes == other.token_bytes
    assert (tiny.special_tokens, tiny.bos_token_id, tiny.eos_token_ids) == (other.special_tokens, other.bos_token_id, other.eos_token_ids)
    assert tiny.chat_templates == other.chat_templates
    text = "abc <|im_end|><think> 日本 12"
    for allow in (False, True):
        assert Encoder(tiny).encode(text, allow_special=allow, add_special_tokens=True) == Encoder(other).encode(
            text, allow_special=allow, add_special_tokens=True)


def test_the_hash_tells_tokenizers_apart(tiny_meta, tiny):
    assert tiny.hash != load(tiny_meta | {"tokenizer.ggml.pre": "gpt-2"}).hash
    assert tiny.hash != load(tiny_meta | {"tokenizer.ggml.merges": tiny_meta["tokenizer.ggml.merges"][:-1]}).hash


def test_end_tokens_come_from_all_files(tiny_meta):
    vocabulary = load(tiny_meta | {"tokenizer.ggml.eot_token_id": 0}, **{"generation_config.json": b'{"eos_token_id": [2, 5]}'})

    assert (2, 0, 5) == vocabulary.eos_token_ids


@pytest.mark.model
def test_the_default_model_has_what_its_file_says(smollm2):
    assert 49152 == smollm2.vocab_size
    assert (1, (2,)) == (smollm2.bos_token_id, smollm2.eos_token_ids)
    assert 17 == len(smollm2.special_tokens)
    assert () == smollm2.prefix_ids
    assert None not in smollm2.token_bytes
