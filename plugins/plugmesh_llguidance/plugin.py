"""Hooks and settings of plugmesh_llguidance; light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pydantic

from plugmesh.config import StrictModel
from plugmesh.hookspecs import hookimpl
from plugmesh.records import GrammarEngineRecord

if TYPE_CHECKING:
    from plugmesh.grammar.seams import GrammarEngine, GrammarVocabulary
    from plugmesh.host import PluginContext

LIBRARY = "1.9.1"  # the only version that the tests have seen
FORM = 1           # of the compiled form, and of the way in which other languages are written as Lark


class Settings(StrictModel):
    """`[plugins.llguidance]`: the library's limits, all of them, so that none changes with its version."""

    max_items_in_row: int = pydantic.Field(2_000, ge=1)
    initial_lexer_fuel: int = pydantic.Field(10_000_000, ge=1)
    step_lexer_fuel: int = pydantic.Field(1_000_000, ge=1)
    step_max_items: int = pydantic.Field(5_000_000, ge=1)
    max_lexer_states: int = pydantic.Field(250_000, ge=1)
    max_grammar_size: int = pydantic.Field(1_000_000, ge=1)


@hookimpl
def register_grammar_engines(context: PluginContext) -> list[GrammarEngineRecord]:
    """One engine, named "llguidance"."""
    settings: Settings = context.settings(Settings)

    def build(vocabulary: GrammarVocabulary) -> GrammarEngine:
        from plugmesh_llguidance.engine import LlguidanceEngine  # loads the library

        return LlguidanceEngine(vocabulary, settings)

    return [GrammarEngineRecord("llguidance", f"{LIBRARY}-{FORM}", frozenset({"lark", "regex", "json_schema", "ebnf"}), build)]
