"""What a schema may cost before it is refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchemaLimits:
    """Caps on the input and on what is made from it; more raises LimitExceeded.

    Attributes:
        max_bytes: UTF-8 bytes of the source.
        max_depth: Nesting of the source's JSON.
        max_enum_values: Values of one enum or of a choice.
        max_regex_chars: Characters of one pattern.
        max_rules: Rules of the grammar that is made.
        max_alternatives: Alternatives (of objects, of arrays) that one schema may have after normalisation.
        any_order_properties: Up to so many declared properties may come in any order; more come in the schema's order.
        enforce_format: `format` is enforced, and an unknown one refused; otherwise it is an annotation, as by default in draft 2020-12.
    """

    max_bytes: int = 256 * 1024
    max_depth: int = 64
    max_enum_values: int = 2000
    max_regex_chars: int = 2000
    max_rules: int = 20_000
    max_alternatives: int = 400
    any_order_properties: int = 4
    enforce_format: bool = True
