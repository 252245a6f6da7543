"""Chat messages to a prompt and its ids, through the model's own template."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from plugmesh.errors import FailedPrecondition, InvalidRequest, LimitExceeded
from plugmesh.tokenization.load import Vocabulary
from plugmesh_tokenizer.provenance import Marker, clean_value, map_strings, strings_of, unused_mark
from plugmesh_tokenizer.render import pack_request

# A template may build a control token out of these ('<|' + role + '|>'), so they are never marked.
KNOWN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython", "model", "documents", "context"})
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token"})


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message; `extra` holds further keys (tool_calls, tool_call_id)."""

    role: str
    content: str
    name: str = ""
    extra: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """The rendered text, still with marks; `marker` tells the caller's control tokens from the template's."""

    marked: str
    marker: Marker

    @property
    def text(self) -> str:
        """As the model's template makes it."""
        return self.marker.restore(self.marked)


def parse_json(text: str, kind: type, param: str, *, max_depth: int) -> Any:
    """JSON of the wanted kind, or None for an empty string.

    Raises:
        InvalidRequest: Not JSON, or of another kind.
        LimitExceeded: Nested deeper than `max_depth`.
    """
    if not text:
        return None
    try:
        value = json.loads(text)
    except RecursionError:
        raise LimitExceeded(f"{param} is nested deeper than {max_depth}", param=param) from None
    except ValueError as e:
        raise InvalidRequest(f"{param} is not valid JSON: {e}", param=param) from e
    if not isinstance(value, kind):
        raise InvalidRequest(f"{param} must be a JSON {'array' if kind is list else 'object'}", param=param)
    return clean_value(value, max_depth=max_depth)


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat ready to be rendered: `request` for `Renderer.render`, whose texts `finish` turns into the prompt."""

    request: bytes
    marker: Marker
    end_mark: str  # empty unless the final message is to be continued
    is_plain_safe: bool  # the weakest marking changes nothing, so the text without marks will do as well

    def finish(self, texts: Sequence[str]) -> Prompt:
        """The first text is the one without marks, the others come strongest marking first.

        Raises:
            InvalidRequest: The final message, which is to be continued, is not in the text.
        """
        plain, *marked = [self._cut(text) for text in texts]
        for text in marked:
            if self.marker.restore(text) == plain:
                return Prompt(text, self.marker)
        # The template looks at what was marked. If those are control tokens, it must not see them.
        return Prompt(plain if self.is_plain_safe else marked[-1], self.marker)

    def _cut(self, text: str) -> str:
        if not self.end_mark:
            return text
        at = text.rfind(self.end_mark)
        if at < 0:
            raise InvalidRequest("the chat template does not show the last message's content", param="continue_final_message")
        # The blank after the mark is gone where the template trims the content.
        return text[:at] if text.startswith(self.end_mark + " ", at) else text[:at].rstrip()


def prepare_chat(
    vocabulary: Vocabulary,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    tools: list[Any] | None = None,
    template_kwargs: dict[str, Any] | None = None,
    max_depth: int = 64,
    max_template_chars: int = 1 << 18,
    max_rendered_chars: int = 1 << 23,
) -> Chat:
    """Checks a chat and marks it as `provenance` describes. Takes time in proportion to the text.

    Args:
        continue_final_message: The prompt ends with the content of the last message, which is open to go on.
        tools: Passed to the template as they are.
        template_kwargs: Further variables of the template.

    Raises:
        InvalidRequest: No messages, contradictory options, or the template refuses the messages.
        FailedPrecondition: The model has no chat template.
        LimitExceeded: Nested too deeply, or the template itself is too long.
    """
    # 1. What is asked for.
    if not messages:
        raise InvalidRequest("there must be at least one message", param="messages")
    if continue_final_message and add_generation_prompt:
        raise InvalidRequest("add_generation_prompt and continue_final_message exclude each other", param="continue_final_message")
    if continue_final_message and messages[-1].role != "assistant":
        raise InvalidRequest("continue_final_message needs a last message of the assistant", param="continue_final_message")
    templates = vocabulary.chat_templates
    source = templates.get("tool_use", templates.get("")) if tools else templates.get("")
    if source is None:
        raise FailedPrecondition("this model has no chat template; send a prompt instead of messages")
    if len(source) > max_template_chars:
        raise LimitExceeded(f"the model's chat template has {len(source)} characters, at most {max_template_chars} are allowed")
    reserved = _RESERVED.intersection(template_kwargs or ())
    if reserved:
        raise InvalidRequest(f"template_kwargs must not set {', '.join(sorted(reserved))}", param="template_kwargs_json")

    # 2. The untrusted part of the variables, and two marks that occur nowhere in it.
    untrusted: dict[str, Any] = {
        "messages": [_message_variables(m) for m in messages], "tools": tools, "kwargs": dict(template_kwargs or {}),
    }
    untrusted = clean_value(untrusted, max_depth=max_depth + 4)
    everything = [source, *vocabulary.template_variables.values(), *strings_of(untrusted)]
    mark = unused_mark(everything)
    end_mark = unused_mark([*everything, mark])
    marker = _marker(tuple(vocabulary.special_tokens), mark)

    def variables(change: Callable[[str], str], change_key: Callable[[str], str]) -> dict[str, Any]:
        data = map_strings(untrusted, lambda s: s if s in KNOWN_ROLES else change(s), change_key, max_depth=max_depth + 4)
        if continue_final_message:
            data["messages"][-1]["content"] += end_mark + " "
        return {
            **data["kwargs"], **vocabulary.template_variables,
            "messages": data["messages"], "tools": data["tools"], "add_generation_prompt": add_generation_prompt,
        }

    # 3. Without marks, and with them where they make a difference: most chats hold nothing like a control token.
    plain = variables(_unchanged, _unchanged)
    marked = [variables(marker.strong, marker.complete), variables(marker.whole, marker.complete)]
    renders = [plain, *(v for v in marked if v != plain)]
    return Chat(
        pack_request(source, renders, max_rendered_chars), marker, end_mark if continue_final_message else "",
        is_plain_safe=marked[-1] == plain,
    )


_marker = functools.lru_cache(maxsize=64)(Marker)


def _message_variables(message: Message) -> dict[str, Any]:
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        out["name"] = message.name
    for key, value in (message.extra or {}).items():
        if key in ("role", "content", "name"):
            raise InvalidRequest(f"extra_json must not set {key!r}", param="messages")
        out[key] = value
    return out


def _unchanged(text: str) -> str:
    return text
