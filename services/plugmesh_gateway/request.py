"""Records of one request on its way through the gateway; no protobuf."""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plugmesh.detokenize import TokenTable
from plugmesh.errors import InvalidRequest
from plugmesh.grammar.spec import GrammarSpec, Whitespace
from plugmesh.types import SamplingParams

from .tools import ToolsWanted

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
    tools_json: str = ""     # for the template; empty without tools, and where the messages show them


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
class GrammarWanted:
    """A grammar and where in the body it stands.

    Attributes:
        where: Places of the source (JSON Pointers) that the body has elsewhere, each with that place.
    """

    spec: GrammarSpec
    param: str
    where: tuple[tuple[str, str], ...] = ()

    def changed(self, *, whitespace: Whitespace | None, engine: str) -> GrammarWanted:
        """With other whitespace than the usual, or an engine of the client's choice."""
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, whitespace=whitespace or self.spec.whitespace, engine=engine))

    def locate(self, path: str) -> str:
        """The body's name for a place in the grammar: `response_format.json_schema.schema/properties/a/pattern`."""
        for pointer, param in self.where:
            if path == pointer or path.startswith(pointer + "/"):
                return param + path[len(pointer) :]
        return self.param + (path if path.startswith("/") else "")


@dataclass(frozen=True, slots=True)
class GrammarUse:
    """A compiled grammar by its name, and what it was made of, for a decode instance that has not got it."""

    key: str
    spec: GrammarSpec


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a client asked for, checked except for what needs the model.

    Attributes:
        prompts: One, or several for `/v1/completions`; each is generated `sampling.num_sequences` times.
        max_tokens: None takes what the context leaves; `sampling.max_tokens` is then not meant.
        echo: The prompt's text comes first in every choice.
        client: Whom limits count against: the name of the API key, without keys the `user` that the body names.
        timeout_s: From arrival to the terminal state; 0 takes the gateway's own.
        grammar: What every choice must obey; with `tools`, what stands in place of free text.
        tools: What the model may call; None where it may not.
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
    grammar: GrammarWanted | None = None
    tools: ToolsWanted | None = None


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
    grammar: GrammarUse | None = None


def new_request_id() -> str:
    """Unique across gateways."""
    return uuid.uuid4().hex


def check_request_id(request_id: str) -> str:
    """Refuses ids that are too long or could break subjects and logs. Raises InvalidRequest."""
    if not _ID.fullmatch(request_id):
        raise InvalidRequest("request_id must be 1 to 96 letters, digits, '.', '_', ':' or '-'", param="request_id")
    return request_id
