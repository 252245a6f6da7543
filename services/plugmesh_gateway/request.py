"""Records of one request on its way through the gateway; no protobuf."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plugmesh.detokenize import TokenTable
from plugmesh.errors import InvalidRequest
from plugmesh.types import SamplingParams

_ID = re.compile(r"[A-Za-z0-9._:-]{1,96}")


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message; `extra_json` holds its further keys as a JSON object, or is empty."""

    role: str
    content: str
    name: str = ""
    extra_json: str = ""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages, to be put into the model's template."""

    messages: tuple[Message, ...]
    template_kwargs_json: str = ""
    add_generation_prompt: bool = True
    continue_final_message: bool = False


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text; what looks like a control token in it stays text."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, taken as they are."""

    token_ids: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class StrategyChoice:
    """The strategy that a client asked for; "none" for none. Budgets of 0 take the gateway's own, which are also their upper limits."""

    name: str
    options: Mapping[str, Any]
    budget_tokens: int = 0
    budget_calls: int = 0

    @classmethod
    def read(cls, value: Any) -> StrategyChoice:
        """From `{"name": ..., "budget_tokens": ..., "budget_calls": ..., option: ...}`; options are the strategy's own to check. Raises InvalidRequest."""
        if not isinstance(value, dict):
            raise InvalidRequest("strategy must be an object with a name", param="strategy")
        options = dict(value)
        name = options.pop("name", None)
        if not isinstance(name, str) or not name:
            raise InvalidRequest("strategy.name must be a string", param="strategy.name")
        budgets = {}
        for key in ("budget_tokens", "budget_calls"):
            budget = options.pop(key, None)
            if budget is not None and (type(budget) is not int or budget < 1):
                raise InvalidRequest(f"strategy.{key} must be a whole number above 0", param=f"strategy.{key}")
            budgets[key] = budget or 0
        return cls(name, options, **budgets)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a client asked for, checked except for what needs the model.

    Attributes:
        prompts: One, or several for `/v1/completions`; each is generated `sampling.num_sequences` times.
        max_tokens: None takes what the context leaves; `sampling.max_tokens` is then not meant.
        echo: The prompt's text comes first in every choice.
        client: Whom limits count against: the name of the API key, without keys the `user` that the body names.
        timeout_s: From arrival to the terminal state; 0 takes the gateway's own.
    """

    request_id: str
    route: str
    model: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    priority: int = 0
    echo: bool = False
    timeout_s: float = 0.0
    trace: dict[str, str] = field(default_factory=dict)
    client: str = ""
    strategy: StrategyChoice | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """One prompt as the decode instance gets it."""

    request_id: str
    model: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    end_token_ids: frozenset[int]
    stop: tuple[str, ...]
    priority: int
    base_index: int          # of its first choice among all choices of the request
    trace: dict[str, str]
    client: str = ""
    block_ids: tuple[bytes, ...] = ()  # of the prompt's full blocks, for a router that needs them
    table: TokenTable | None = None   # to turn its tokens into text here; None leaves that to a tokenizer instance


def new_request_id() -> str:
    """Unique across gateways."""
    return uuid.uuid4().hex


def check_request_id(request_id: str) -> str:
    """Refuses ids that are too long or could break subjects and logs. Raises InvalidRequest."""
    if not _ID.fullmatch(request_id):
        raise InvalidRequest("request_id must be 1 to 96 letters, digits, '.', '_', ':' or '-'", param="request_id")
    return request_id
