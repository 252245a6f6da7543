"""The front end for JSON Schema: from a schema to grammars whose every text is a valid instance.

A schema is read (`documents`), turned into a set of values by an algebra of unions, intersections and complements (`normal`, `values`, with `automata` for
strings and numbers), lowered to rules (`lowering`, `objects`, `arrays`) and written in a language that an engine compiles (`ebnf`).
"""

from .limits import SchemaLimits
from .lower import FRONT_END_VERSION, Candidate, Lowered, Unenforced, lower

__all__ = ["FRONT_END_VERSION", "Candidate", "Lowered", "SchemaLimits", "Unenforced", "lower"]
