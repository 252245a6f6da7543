"""A tokenizer from its files: `tokenizer.gguf.json` (GGUF metadata) or `tokenizer.json` (Hugging Face).

GGUF metadata is turned into the parts of a tokenizer.json first, so that both take one path and the same tokenizer
gets the same hash from either file. Only byte-level BPE is supported; anything else is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # our own threads share the cores; no second pool

import tokenizers

from plugmesh.errors import CorruptModelFile
from plugmesh.tokenization.pretokenize import PRE_TOKENIZERS

GGUF_ASSET = "tokenizer.gguf.json"
HF_ASSET = "tokenizer.json"
_MAX_VOCABULARY = 4_000_000
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # tokenizer.ggml.token_type
# As in Llama 3, an end of turn or of message ends a generation like the end of text.
_GGUF_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token found in the text before it is cut up.

    `is_special`: a control token, which user text must not be able to write. `strip_left`, `strip_right`: white space
    beside it belongs to it.
    """

    token_id: int
    content: str
    is_special: bool
    strip_left: bool = False
    strip_right: bool = False


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A loaded tokenizer: immutable, safe to use from several threads.

    `bpe` encodes text and never yields a control token. `token_bytes[i]` are the exact bytes of token i, None for
    an id that no token has. `prefix_ids`, `suffix_ids` surround a text when special tokens are asked for.
    `chat_templates` maps "" to the model's template, "tool_use" to one for calls with tools, where there is one.
    """

    bpe: tokenizers.Tokenizer
    hash: str
    vocab_size: int
    token_bytes: tuple[bytes | None, ...]
    added_tokens: tuple[AddedToken, ...]
    special_ids: frozenset[int]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    chat_templates: Mapping[str, str]
    template_variables: Mapping[str, str]  # bos_token, eos_token, ... as a template sees them

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text to id of the control tokens."""
        return {t.content: t.token_id for t in self.added_tokens if t.is_special}


def load_vocabulary(assets: Mapping[str, bytes], *, config: Mapping[str, Any] | None = None) -> Vocabulary:
    """Builds a tokenizer. Takes a few tenths of a second of CPU; call it off the event loop.

    Args:
        assets: File name to content. Needs `tokenizer.gguf.json` or `tokenizer.json`; looks also at
            `tokenizer_config.json`, `generation_config.json` and `chat_template.jinja`.
        config: The model's configuration (`bos_token_id`, `eos_token_ids`), for what the files leave open.

    Raises:
        CorruptModelFile: Missing, malformed or unsupported; `field` names the key.
    """
    config = dict(config or {})
    generation = _json_object(assets, "generation_config.json")
    if HF_ASSET in assets:
        settings = _json_object(assets, "tokenizer_config.json")
        return _from_hf(_json_object(assets, HF_ASSET), settings, generation, config, _template_file(assets))
    if GGUF_ASSET in assets:
        return _from_gguf(_json_object(assets, GGUF_ASSET), generation, config, _template_file(assets))
    raise CorruptModelFile(f"the model has neither {GGUF_ASSET} nor {HF_ASSET}", file=GGUF_ASSET, field="(file)")


# GGUF


def _from_gguf(meta: dict[str, Any], generation: dict[str, Any], config: dict[str, Any], template: str | None) -> Vocabulary:
    def corrupt(key: str, problem: str) -> CorruptModelFile:
        return CorruptModelFile(f"{GGUF_ASSET}: {key} {problem}", file=GGUF_ASSET, field=key)

    def typed(key: str, kind: type, default: Any = None) -> Any:
        value = meta.get(f"tokenizer.ggml.{key}")
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise corrupt(f"tokenizer.ggml.{key}", f"must be {kind.__name__}, not {type(value).__name__}")
        return value

    model = typed("model", str, "")
    if model != "gpt2":
        raise corrupt("tokenizer.ggml.model", f"is {model!r}; only byte-level BPE (\"gpt2\") is supported")
    pre = typed("pre", str, "default")
    if pre not in PRE_TOKENIZERS:
        raise corrupt("tokenizer.ggml.pre", f"is {pre!r}; known are {', '.join(sorted(PRE_TOKENIZERS))}")
    family = PRE_TOKENIZERS[pre]

    tokens = typed("tokens", list, [])
    if not tokens or len(tokens) > _MAX_VOCABULARY or not all(isinstance(t, str) for t in tokens):
        raise corrupt("tokenizer.ggml.tokens", f"must be 1 to {_MAX_VOCABULARY} strings")
    kinds = typed("token_type", list, [_NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise corrupt("tokenizer.ggml.token_type", f"has {len(kinds)} entries for {len(tokens)} tokens")
    vocab: dict[str, int] = {}
    added: list[dict[str, Any]] = []
    for token_id, (text, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if text in vocab:
            raise corrupt("tokenizer.ggml.tokens", f"holds one text twice, as {vocab[text]} and {token_id}")
        vocab[text] = token_id
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED) and text:
            added.append(_added_entry(token_id, text, special=kind != _USER_DEFINED))
    merges = []
    for position, merge in enumerate(typed("merges", list, [])):
        parts = merge.split(" ") if isinstance(merge, str) else []
        if len(parts) != 2 or parts[0] not in vocab or parts[1] not in vocab or "".join(parts) not in vocab:
            raise corrupt("tokenizer.ggml.merges", f"entry {position} does not join two tokens into a third")
        merges.append(parts)

    def token_id_of(key: str) -> int | None:
        value = typed(key, int)
        if value is None or value == 0xFFFFFFFF:  # a GGUF writes uint32 -1 for "none"
            return None
        if not 0 <= value < len(tokens):
            raise corrupt(f"tokenizer.ggml.{key}", f"is {value}, outside 0 to {len(tokens) - 1}")
        return int(value)

    bos = token_id_of("bos_token_id")
    ends = [token_id_of(key) for key in _GGUF_END_KEYS]
    add_bos = typed("add_bos_token", bool, family.add_bos)
    add_eos = typed("add_eos_token", bool, False)
    variables = {}
    for name, key in (("bos_token", "bos_token_id"), ("eos_token", "eos_token_id"), ("unk_token", "unknown_token_id"), ("pad_token", "padding_token_id")):
        named = token_id_of(key)
        if named is not None:
            variables[name] = tokens[named]
    templates = {}
    for key, value in meta.items():
        if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template."):
            if not isinstance(value, str):
                raise corrupt(key, "must be a string")
            templates[key.removeprefix("tokenizer.chat_template").lstrip(".")] = value
    if template is not None:
        templates[""] = template
    whole: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": family.normalizer,
        "pre_tokenizer": family.pre_tokenizer,
        "model": {"type": "BPE", "ignore_merges": family.ignore_merges, "vocab": vocab, "merges": merges},
    }
    return _build(
        whole,
        file=GGUF_ASSET,
        bos=bos,
        ends=[*ends, *_end_ids(generation, config)],
        prefix=(bos,) if add_bos and bos is not None else (),
        suffix=(ends[0],) if add_eos and ends[0] is not None else (),
        templates=templates,
        variables=variables,
    )


def _added_entry(token_id: int, text: str, *, special: bool) -> dict[str, Any]:
    return {
        "id": token_id, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": special,
    }


# tokenizer.json


def _from_hf(
    parts: dict[str, Any], settings: dict[str, Any], generation: dict[str, Any], config: dict[str, Any], template: str | None
) -> Vocabulary:
    for key, want in (("model", dict), ("added_tokens", list)):
        if not isinstance(parts.get(key), want):
            raise CorruptModelFile(f"{HF_ASSET}: {key} is missing", file=HF_ASSET, field=key)
    vocab = parts["model"].get("vocab")
    if not isinstance(vocab, dict) or not vocab or not all(isinstance(i, int) and 0 <= i < _MAX_VOCABULARY for i in vocab.values()):
        raise CorruptModelFile(f"{HF_ASSET}: model.vocab is not a map from text to id", file=HF_ASSET, field="model.vocab")
    if parts["model"].get("type", "BPE") != "BPE" or not _is_byte_level(parts.get("pre_tokenizer")):
        raise CorruptModelFile(f"{HF_ASSET}: only byte-level BPE is supported", file=HF_ASSET, field="model.type")
    if not all(isinstance(token, dict) for token in parts["added_tokens"]):
        raise CorruptModelFile(f"{HF_ASSET}: an added token is not an object", file=HF_ASSET, field="added_tokens")
    by_text = {token.get("content"): token.get("id") for token in parts["added_tokens"]}

    variables = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            variables[name] = text
    bos = by_text.get(variables.get("bos_token"), generation.get("bos_token_id", config.get("bos_token_id")))
    ends = [by_text.get(variables.get("eos_token")), *_end_ids(generation, config)]
    templates: dict[str, str] = {}
    given = settings.get("chat_template")
    if isinstance(given, str):
        templates[""] = given
    elif isinstance(given, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
        for entry in given:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                name = str(entry.get("name", ""))
                templates["" if name == "default" else name] = entry["template"]
    if template is not None:
        templates[""] = template
    prefix, suffix = _surroundings(parts)
    if not prefix and settings.get("add_bos_token") is True and isinstance(bos, int):
        prefix = (bos,)
    parts = {key: parts.get(key) for key in ("version", "added_tokens", "normalizer", "pre_tokenizer", "model")}
    by_id = {token.get("id"): token.get("content") for token in parts["added_tokens"]}
    for name, token_id in (("bos_token", bos), ("eos_token", next((e for e in ends if e is not None), None))):
        if name not in variables and isinstance(by_id.get(token_id), str):
            variables[name] = by_id[token_id]
    return _build(parts, file=HF_ASSET, bos=bos, ends=ends, prefix=prefix, suffix=suffix, templates=templates, variables=variables)


def _is_byte_level(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    return part.get("type") == "ByteLevel" or any(_is_byte_level(step) for step in part.get("pretokenizers") or ())


def _surroundings(parts: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the file's post-processor puts before and after a single text, found by trying it on one."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(parts))
        bare = tokenizer.encode("a", add_special_tokens=False).ids
        full = tokenizer.encode("a", add_special_tokens=True).ids
    except Exception as e:  # the library raises bare Exception
        raise CorruptModelFile(f"{HF_ASSET}: {e}", file=HF_ASSET, field="(file)") from e
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


# Both


def _build(
    parts: dict[str, Any], *, file: str, bos: Any, ends: list[Any], prefix: tuple[int, ...], suffix: tuple[int, ...],
    templates: dict[str, str], variables: dict[str, str],
) -> Vocabulary:
    # Control tokens stay out of the BPE altogether, so that no text can yield one; the others move into its vocabulary.
    vocab = dict(parts["model"]["vocab"])
    by_id = {token_id: text for text, token_id in vocab.items()}
    added = []
    for position, token in enumerate(parts["added_tokens"]):
        content, token_id = token.get("content"), token.get("id")
        if (
            not isinstance(content, str) or not content or not isinstance(token_id, int) or token_id < 0
            or vocab.get(content, token_id) != token_id or by_id.get(token_id, content) != content
        ):
            raise CorruptModelFile(f"{file}: added token {position} has no valid text and id", file=file, field=f"added_tokens[{position}]")
        special = bool(token.get("special"))
        if special and token.get("single_word"):
            raise CorruptModelFile(f"{file}: single_word is not supported", file=file, field=f"added_tokens[{position}].single_word")
        added.append(AddedToken(token_id, content, special, bool(token.get("lstrip")), bool(token.get("rstrip"))))
        vocab[content] = token_id
        by_id[token_id] = content
    specials = {token.content for token in added if token.is_special}
    plain = parts | {
        "model": parts["model"] | {"vocab": {text: token_id for text, token_id in vocab.items() if text not in specials}},
        "added_tokens": [token for token in parts["added_tokens"] if token["content"] not in specials],
    }
    try:
        bpe = tokenizers.Tokenizer.from_str(json.dumps(plain))
    except Exception as e:  # the library raises bare Exception
        raise CorruptModelFile(f"{file}: {e}", file=file, field="(file)") from e
    vocab_size = max(vocab.values()) + 1
    if vocab_size > _MAX_VOCABULARY:
        raise CorruptModelFile(f"{file}: token id {vocab_size - 1} is too large", file=file, field="model.vocab")
    token_bytes: list[bytes | None] = [None] * vocab_size
    for text, token_id in vocab.items():
        token_bytes[token_id] = bytes_of(text)
    for token in added:
        token_bytes[token.token_id] = token.content.encode()

    def valid(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size

    hashed = {key: parts[key] for key in ("added_tokens", "normalizer", "pre_tokenizer")} | {
        "vocab": parts["model"]["vocab"],
        "merges": [" ".join(m) if isinstance(m, list) else m for m in parts["model"].get("merges", [])],
        "ignore_merges": bool(parts["model"].get("ignore_merges")),
    }
    return Vocabulary(
        bpe=bpe,
        hash=hashlib.sha256(json.dumps(hashed, sort_keys=True, separators=(",", ":")).encode()).hexdigest(),
        vocab_size=vocab_size,
        token_bytes=tuple(token_bytes),
        added_tokens=tuple(added),
        special_ids=frozenset(t.token_id for t in added if t.is_special),
        bos_token_id=bos if valid(bos) else None,
        eos_token_ids=tuple(dict.fromkeys(e for e in ends if valid(e))),
        prefix_ids=prefix,
        suffix_ids=suffix,
        chat_templates=templates,
        template_variables=variables,
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte map, reversed: printable Latin-1 stands for itself, the other bytes for U+0100 and up, in order."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in set(shown)]
    return {chr(b): b for b in shown} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


def bytes_of(text: str) -> bytes:
    """The bytes that a vocabulary entry stands for; an entry outside the byte alphabet stands for its own UTF-8."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, text))
    except KeyError:
        return text.encode()


def _end_ids(generation: dict[str, Any], config: dict[str, Any]) -> list[Any]:
    given = generation.get("eos_token_id")
    return [*(given if isinstance(given, list) else [given]), *(config.get("eos_token_ids") or ())]


def _json_object(assets: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in assets:
        return {}
    try:
        value = json.loads(assets[name])
    except (ValueError, RecursionError) as e:
        raise CorruptModelFile(f"{name} is not valid JSON", file=name, field="(file)") from e
    if not isinstance(value, dict):
        raise CorruptModelFile(f"{name} is not a JSON object", file=name, field="(file)")
    return value


def _template_file(assets: Mapping[str, bytes]) -> str | None:
    data = assets.get("chat_template.jinja")
    if data is None:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise CorruptModelFile("chat_template.jinja is not UTF-8", file="chat_template.jinja", field="(file)") from e
