"""What a request wants its output to obey; no protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

GrammarKind = Literal["json_object", "json_schema", "regex", "ebnf", "choice", "structural_tag"]
KINDS: tuple[str, ...] = get_args(GrammarKind)
Whitespace = Literal["flexible", "compact"]


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A grammar as the user wrote it.

    Attributes:
        source: json_object: empty. json_schema: the schema as JSON. regex: of the whole output. ebnf: GBNF, its first rule or `root`. choice: a JSON array
            of strings. structural_tag: JSON (docs/grammar.md).
        relaxed: Leave out what cannot be enforced, and tell it, instead of refusing the grammar.
        whitespace: Of JSON: "flexible" lets the model break and indent lines, "compact" allows none.
        engine: Name of the only engine that may be used; empty for the first that can enforce it.
    """

    kind: GrammarKind
    source: str = ""
    relaxed: bool = False
    whitespace: Whitespace = "flexible"
    engine: str = ""
