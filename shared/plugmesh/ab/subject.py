"""What quality metrics see of a side: an engine with its plugins, the float32 reference, or a mesh over HTTP. All implement `records.QualitySubject`."""

from __future__ import annotations

import json
import pathlib
import urllib.request
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from plugmesh.errors import FailedPrecondition, Unavailable
from plugmesh.types import SamplingParams

if TYPE_CHECKING:
    import numpy as np

    from plugmesh_engine import Engine


def english() -> str:
    """CPython's documentation of keywords and topics."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


class Text:
    """A vocabulary, and a chat of one message in it. Raises FailedPrecondition where the model's file has no vocabulary that is known here."""

    def __init__(self, model: pathlib.Path) -> None:
        from plugmesh.bench.hf_folder import tokenizer_of

        self._tokenizer: Any = tokenizer_of(model)
        if self._tokenizer is None:
            raise FailedPrecondition(f"the vocabulary of {model.name} cannot be read here, so quality cannot be measured")
        self._begin = self._tokenizer.token_to_id("<|im_start|>")
        self._end = self._tokenizer.token_to_id("<|im_end|>")

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids)))

    def chat(self, question: str) -> list[int]:
        """One message of the user and the beginning of the answer; a plain text for models without ChatML."""
        if self._begin is None or self._end is None:
            return self.encode(f"Question: {question}\nAnswer:")
        return [self._begin, *self.encode(f"user\n{question}"), self._end, *self.encode("\n"), self._begin, *self.encode("assistant\n")]


class _Base:
    kinds: frozenset[str] = frozenset()

    def __init__(self, text: Text, *, seed: int, is_quick: bool, context_tokens: int) -> None:
        self._text = text
        self.seed, self.is_quick, self.context_tokens = seed, is_quick, context_tokens

    def encode(self, text: str) -> list[int]:
        return self._text.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._text.decode(token_ids)

    def english(self) -> str:
        return english()

    def logits(self, token_ids: Sequence[int], *, chunk_tokens: int = 32) -> Iterator[Any]:
        raise FailedPrecondition(f"{type(self).__name__} has no logits")

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, *, temperature: float = 0.0, seed: int = 0) -> list[list[int]]:
        raise FailedPrecondition(f"{type(self).__name__} generates no tokens")

    def answer(self, questions: Sequence[str], max_tokens: int) -> list[str]:
        raise FailedPrecondition(f"{type(self).__name__} answers nothing")

    def complete(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        raise FailedPrecondition(f"{type(self).__name__} completes nothing")


class EngineSubject(_Base):
    """An engine in this process."""

    kinds = frozenset({"logits", "tokens", "answers"})

    def __init__(self, engine: Engine, text: Text, *, seed: int = 0, is_quick: bool = False) -> None:
        super().__init__(text, seed=seed, is_quick=is_quick, context_tokens=engine.max_model_len)
        self._engine = engine

    def logits(self, token_ids: Sequence[int], *, chunk_tokens: int = 32) -> Iterator[np.ndarray]:
        return self._engine.logits(token_ids, chunk_tokens=chunk_tokens)

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, *, temperature: float = 0.0, seed: int = 0) -> list[list[int]]:
        from plugmesh_engine import EngineRequest

        engine = self._engine
        found: list[list[int]] = [[] for _ in prompts]
        for i, prompt in enumerate(prompts):
            sampling = SamplingParams(temperature=temperature, seed=seed + i, max_tokens=max_tokens)
            # Without the cache: what one prompt computed must not stand in for another's own work.
            engine.add(EngineRequest(f"quality-{i}", tuple(prompt), sampling, use_prefix_cache=False))
        try:
            while engine.has_work():
                for event in engine.step().tokens:
                    if event.error is not None:
                        raise event.error
                    found[int(event.request_id.removeprefix("quality-"))].extend(t.token_id for t in event.tokens)
        finally:
            for i in range(len(prompts)):  # only after an error is anything left
                engine.cancel(f"quality-{i}")
        return found

    def answer(self, questions: Sequence[str], max_tokens: int) -> list[str]:
        return [self.decode(ids) for ids in self.generate([self._text.chat(q) for q in questions], max_tokens)]

    def complete(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        return [self.decode(ids) for ids in self.generate([self.encode(t) for t in texts], max_tokens)]


class ReferenceSubject(_Base):
    """The slow float32 model over the file's own weights; `chunk_tokens` makes no difference to it."""

    kinds = frozenset({"logits"})

    def __init__(self, model: pathlib.Path, text: Text, *, seed: int = 0, is_quick: bool = False) -> None:
        from plugmesh_engine.reference import ReferenceLlama
        from plugmesh_engine.testing import read_gguf

        config, weights = read_gguf(model)
        super().__init__(text, seed=seed, is_quick=is_quick, context_tokens=config.max_position)
        self._model = ReferenceLlama(config, weights)

    def logits(self, token_ids: Sequence[int], *, chunk_tokens: int = 32) -> Iterator[np.ndarray]:
        yield self._model.logits(token_ids)


class ServedSubject(_Base):
    """A mesh's OpenAI endpoint."""

    kinds = frozenset({"answers"})

    def __init__(self, base_url: str, model: str, text: Text, *, seed: int = 0, is_quick: bool = False, context_tokens: int = 8192) -> None:
        super().__init__(text, seed=seed, is_quick=is_quick, context_tokens=context_tokens)
        self._url, self._model = base_url.rstrip("/"), model

    def answer(self, questions: Sequence[str], max_tokens: int) -> list[str]:
        found = []
        for question in questions:
            body = {"messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, "temperature": 0}
            found.append(str(self._post("/chat/completions", body)["choices"][0]["message"]["content"] or ""))
        return found

    def complete(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        return self.continuations([self.encode(t) for t in texts], max_tokens, temperature=0.0, seed=0)

    def continuations(self, prompts: Sequence[Sequence[int]], max_tokens: int, *, temperature: float, seed: int) -> list[str]:
        """Text after each prompt; prompt i draws with `seed + i`."""
        found = []
        for i, prompt in enumerate(prompts):
            body = {"prompt": list(prompt), "max_tokens": max_tokens, "temperature": temperature, "seed": seed + i}
            found.append(str(self._post("/completions", body)["choices"][0]["text"]))
        return found

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        data = json.dumps({"model": self._model, **body}).encode()
        request = urllib.request.Request(self._url + path, data, {"content-type": "application/json"})  # noqa: S310 - a mesh of our own
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:  # noqa: S310 - as above
                return json.load(reply)
        except (OSError, ValueError) as e:
            raise Unavailable(f"the mesh does not answer: {type(e).__name__}") from e
