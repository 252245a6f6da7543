"""What an answer is worth under its schema, and the counts per keyword and engine."""

from __future__ import annotations

import collections
import importlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any, Literal

from plugmesh.errors import FailedPrecondition

Verdict = Literal["valid", "invalid", "cut", "broken", "failed"]
"""valid, invalid: a finished output. cut: ended by max_tokens as a prefix that can be gone on from. broken: a prefix that cannot. failed: no output."""
_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Judgement:
    """One output. `reason` says what is wrong, without its text. `has_duplicates`: an object of it names a key twice, which validators do not see."""

    verdict: Verdict
    reason: str = ""
    has_duplicates: bool = False


class Judge:
    """`jsonschema` with its format checker, and numbers as they are written.

    A JSON number is a decimal; as binary floats 0.07 is no multiple of 0.01. So an instance that fails is looked at again with decimals.

    Raises:
        FailedPrecondition: The package is not installed.
    """

    def __init__(self) -> None:
        try:
            jsonschema = importlib.import_module("jsonschema")
        except ImportError as e:
            raise FailedPrecondition("judging outputs needs the package jsonschema: pip install 'plugmesh[dev]'") from e
        self._plain = jsonschema.Draft202012Validator
        checker = self._plain.TYPE_CHECKER.redefine("integer", lambda _, v: _is_whole(v))
        self._exact = jsonschema.validators.extend(self._plain, type_checker=checker)
        self._formats = self._plain.FORMAT_CHECKER
        self.checked_formats = frozenset(self._formats.checkers)

    def check_schema(self, schema: Mapping[str, Any]) -> None:
        """Raises jsonschema.SchemaError when the metaschema does not hold."""
        self._plain.check_schema(schema)

    def why_invalid(self, schema: Mapping[str, Any], text: str) -> str:
        """Keyword and path of the first error, or what is wrong with the JSON; empty when the text validates."""
        try:
            error = self._first_error(self._plain, schema, json.loads(text, parse_constant=_refuse))
            if error is None:
                return ""
            exact = json.loads(json.dumps(schema), parse_float=Decimal)
            error = self._first_error(self._exact, exact, json.loads(text, parse_float=Decimal, parse_constant=_refuse))
        except ValueError as e:
            return f"not JSON: {str(e).split(':')[0]}"
        return "" if error is None else f"{error.validator} at {error.json_path}"

    def _first_error(self, validator: Any, schema: Any, value: Any) -> Any:
        return next(iter(validator(schema, format_checker=self._formats).iter_errors(value)), None)

    def judge(self, schema: Mapping[str, Any], text: str) -> Judgement:
        """A finished output."""
        reason = self.why_invalid(schema, text)
        return Judgement("invalid", reason) if reason else Judgement("valid", has_duplicates=has_duplicate_keys(text))


def _is_whole(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float | Decimal) and value == value // 1)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def has_duplicate_keys(text: str) -> bool:
    """Of a JSON text."""
    found = False

    def look(pairs: list[tuple[str, Any]]) -> None:
        nonlocal found
        found = found or len({k for k, _ in pairs}) < len(pairs)

    json.loads(text, object_pairs_hook=look)
    return found


def only_object(text: str, *, lenient: bool = False) -> Any:
    """The JSON object that a text is; lenient: or that is in its first fenced block, or from the first brace to the last. None when there is none."""
    tries = [text.strip()]
    if lenient:
        fenced = _FENCED.search(text)
        tries += [fenced[1].strip()] if fenced else []
        tries += [text[text.find("{") : text.rfind("}") + 1]] if "{" in text else []
    for candidate in tries:
        try:
            value = json.loads(candidate, parse_constant=_refuse)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return None


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One schema on one engine setting.

    Attributes:
        engine: That compiled it; empty when it was refused.
        code, keyword, path: Of the refusal.
        example_accepted: Whether the schema's own example is in the grammar's language; None when refused.
        judgements: One per generated output.
        gateway_refused: Whether the gateway said 400 to a refused schema; None when accepted, or not asked.
    """

    name: str
    keywords: tuple[str, ...]
    engine: str = ""
    compile_ms: float = 0.0
    code: str = ""
    keyword: str = ""
    path: str = ""
    example_accepted: bool | None = None
    judgements: tuple[Judgement, ...] = ()
    gateway_refused: bool | None = None

    @property
    def is_accepted(self) -> bool:
        return bool(self.engine)


@dataclass(slots=True)
class Tally:
    """Counts; outputs below schemas."""

    num_schemas: int = 0
    num_accepted: int = 0
    num_refused: int = 0
    num_examples_rejected: int = 0
    valid: int = 0
    invalid: int = 0
    cut: int = 0
    broken: int = 0
    failed: int = 0
    num_duplicates: int = 0

    def add(self, result: CaseResult) -> None:
        self.num_schemas += 1
        self.num_accepted += result.is_accepted
        self.num_refused += not result.is_accepted
        self.num_examples_rejected += result.example_accepted is False
        for j in result.judgements:
            setattr(self, j.verdict, getattr(self, j.verdict) + 1)
            self.num_duplicates += j.has_duplicates

    @property
    def is_sound(self) -> bool:
        """Whatever was generated validates, or can be gone on from."""
        return not (self.invalid or self.broken or self.failed)


def per_keyword(results: Sequence[CaseResult]) -> dict[str, Tally]:
    """Every keyword's tally over the schemas that use it, sorted."""
    found: dict[str, Tally] = collections.defaultdict(Tally)
    for result in results:
        for keyword in result.keywords:
            found[keyword].add(result)
    return dict(sorted(found.items()))


def total(results: Iterable[CaseResult]) -> Tally:
    found = Tally()
    for result in results:
        found.add(result)
    return found


def refusals(results: Iterable[CaseResult]) -> dict[str, int]:
    """What was refused for, most frequent first."""
    counts = collections.Counter(f"{r.code}: {r.keyword}" if r.keyword else r.code for r in results if not r.is_accepted)
    return dict(counts.most_common())


def plain(results: Sequence[CaseResult]) -> dict[str, Any]:
    """Everything as data for JSON."""
    return {
        "total": asdict(total(results)), "keywords": {k: asdict(t) for k, t in per_keyword(results).items()}, "refusals": refusals(results),
        "engines": dict(collections.Counter(r.engine for r in results if r.is_accepted)), "cases": [asdict(r) for r in results],
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Extracted:
    """How an answer to an extraction task did."""

    is_json: bool
    is_json_leniently: bool
    is_valid: bool
    num_right: int
    num_fields: int
    was_cut: bool


def extraction_shares(answers: Sequence[Extracted]) -> dict[str, float]:
    """Shares of answers, and of fields."""
    num = len(answers) or 1
    return {
        "num": len(answers), "json": sum(a.is_json for a in answers) / num, "json_leniently": sum(a.is_json_leniently for a in answers) / num,
        "valid": sum(a.is_valid for a in answers) / num, "cut": sum(a.was_cut for a in answers) / num,
        "right_fields": sum(a.num_right for a in answers) / (sum(a.num_fields for a in answers) or 1),
    }  # fmt: skip
