"""Records of one request on its way through the gateway; no protobuf."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, field

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
