"""Hooks and settings of plugmesh_xgrammar; light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pydantic

from plugmesh.config import StrictModel
from plugmesh.hookspecs import hookimpl
from plugmesh.records import GrammarEngineRecord

if TYPE_CHECKING:
    from plugmesh.grammar.seams import GrammarEngine, GrammarVocabulary
    from plugmesh.host import PluginContext

LIBRARY = "0.2.8"  # the only version whose binding and behaviour the tests have compared
FORM = 1           # of the compiled form's header


class Settings(StrictModel):
    """`[plugins.xgrammar]`."""

    compile_threads: int = pydantic.Field(2, ge=1, le=64)


@hookimpl
def register_grammar_engines(context: PluginContext) -> list[GrammarEngineRecord]:
    """One engine, named "xgrammar"."""
    settings: Settings = context.settings(Settings)

    def build(vocabulary: GrammarVocabulary) -> GrammarEngine:
        from plugmesh_xgrammar.engine import XgrammarEngine  # loads the library

        return XgrammarEngine(vocabulary, compile_threads=settings.compile_threads)

    return [GrammarEngineRecord("xgrammar", f"{LIBRARY}-{FORM}", frozenset({"ebnf", "regex", "structural_tag"}), build)]
