"""Between text and tokens: how a prompt is put to a model, and what its answer says."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from plugmesh.errors import ConfigError, InvalidRequest
from plugmesh.tokenization.encode import Encoder
from plugmesh.tokenization.load import Vocabulary, load_vocabulary
from plugmesh.types import ModelConfig

TokenIds = Sequence[int] | np.ndarray


class Text(Protocol):
    """A model's way with text."""

    def prompt_ids(self, prompt: str) -> list[int]:
        """Never empty. Raises InvalidRequest for a text that the model cannot be asked."""

    def answer_ids(self, answer: str) -> list[int]:
        """As the model should answer, with the end token."""

    def decode(self, token_ids: TokenIds) -> str:
        """What an answer says, up to the first end token."""


class ChatText:
    """A chat model's: the prompt is one message of the user, rendered by the model's own template. Safe in threads.

    Args:
        system: The chat's system message; "" leaves that to the template, which may put one of its own.

    Raises:
        ConfigError: The model has no chat template, or none that can be rendered.
    """

    def __init__(self, vocabulary: Vocabulary, *, system: str = "") -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if "" not in vocabulary.chat_templates:
            raise ConfigError("the base model has no chat template")
        self._vocabulary = vocabulary
        self._encoder = Encoder(vocabulary)
        self._system = [{"role": "system", "content": system}] if system else []
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        try:
            self._template = environment.from_string(vocabulary.chat_templates[""])
            self.prompt_ids("a")
        except TemplateError as e:
            raise ConfigError(f"the base model's chat template cannot be rendered: {e}") from e

    def prompt_ids(self, prompt: str) -> list[int]:
        if any(token in prompt for token in self._vocabulary.special_tokens):
            raise InvalidRequest("a prompt of a task has a control token of the model in it", param="task")
        messages = [*self._system, {"role": "user", "content": prompt}]
        text = self._template.render(messages=messages, add_generation_prompt=True, **self._vocabulary.template_variables)
        return self._encoder.encode(text, allow_special=True)

    def answer_ids(self, answer: str) -> list[int]:
        return [*self._encoder.encode(answer, allow_special=False), self._end]

    @property
    def _end(self) -> int:
        # Of several, the one that closes a message stands in the template.
        names = {i: t for t, i in self._vocabulary.special_tokens.items()}
        ends = self._vocabulary.eos_token_ids
        return next((i for i in ends if names.get(i, "\0") in self._vocabulary.chat_templates[""]), ends[0])

    def decode(self, token_ids: TokenIds) -> str:
        """Bytes that are no UTF-8 become U+FFFD, and so do control tokens, which no answer has."""
        pieces = []
        for t in token_ids:
            if t in self._vocabulary.eos_token_ids:
                break
            known = self._vocabulary.token_bytes[t] if 0 <= t < self._vocabulary.vocab_size and t not in self._vocabulary.special_ids else None
            pieces.append(b"\xff" if known is None else known)
        return b"".join(pieces).decode("utf-8", "replace")


@functools.lru_cache(maxsize=2)
def vocabulary_of(folder: pathlib.Path, config_json: str) -> Vocabulary:
    """Out of the tokenizer's files in a folder. Raises CorruptModelFile."""
    import json

    return load_vocabulary({f.name: f.read_bytes() for f in sorted(folder.iterdir())}, config=json.loads(config_json))


def chat_text(folder: pathlib.Path, config: ModelConfig, system: str) -> ChatText:
    """Raises CorruptModelFile for files that are no tokenizer, ConfigError for one without chats."""
    return ChatText(vocabulary_of(folder, config.to_json()), system=system)
