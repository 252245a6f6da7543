"""Agreement with the official JSON-Schema-Test-Suite: `python -m plugmesh_grammar.schema.conformance [--json] [--write]`.

The suite comes from `scripts/fetch_json_schema_suite`. An instance is accepted when the bytes of its JSON text are in the language of the grammar, as the
engine's own library matches them; `format` is an annotation, as the suite wants it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugmesh.errors import InvalidRequest
from plugmesh.grammar.spec import GrammarSpec

from .limits import SchemaLimits
from .lower import lower

OUTCOMES = ("agree", "over-accept", "over-reject", "refused")
ENGINES = {"xgrammar": "ebnf", "llguidance": "lark"}
NUM_CASES = 1257
Accepts = Callable[[bytes], bool]


def suite_folder() -> Path:
    """Where the suite is, if it was fetched."""
    return Path(os.environ.get("PLUGMESH_JSON_SCHEMA_SUITE", "~/.cache/plugmesh/json-schema-suite")).expanduser() / "draft2020-12"


@dataclass(frozen=True, slots=True)
class Group:
    """One schema of the suite with its instances: (description, instance, whether it is valid)."""

    file: str
    description: str
    schema: Any
    cases: tuple[tuple[str, Any, bool], ...]


def groups(folder: Path | None = None) -> Iterator[Group]:
    """In the suite's order. Raises FileNotFoundError without the suite."""
    folder = folder or suite_folder()
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder} is empty; scripts/fetch_json_schema_suite fills it")
    for file in files:
        for group in json.loads(file.read_text(encoding="utf-8")):
            yield Group(file.stem, group["description"], group["schema"], tuple((t["description"], t["data"], t["valid"]) for t in group["tests"]))


def spellings(instance: Any) -> list[bytes]:
    """JSON texts of an instance: compact, with spaces, indented, and with the members the other way round."""
    texts = [
        json.dumps(instance, ensure_ascii=False, separators=(",", ":")),
        json.dumps(instance, ensure_ascii=False),
        json.dumps(instance, ensure_ascii=False, indent=2),
        json.dumps(_reversed(instance), ensure_ascii=False),
    ]
    return [text.encode("utf-8", "surrogatepass") for text in texts]


def _reversed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _reversed(item) for name, item in reversed(value.items())}
    return [_reversed(item) for item in value] if isinstance(value, list) else value


def matcher_of(engine: str) -> Callable[[str], Accepts]:
    """A function from a grammar's source to membership of bytes, over a vocabulary of one token per byte. Raises ImportError, ValueError."""
    if engine == "xgrammar":
        import xgrammar

        tokens = [bytes([i]) for i in range(256)] + [b"</s>"]
        info = xgrammar.TokenizerInfo(tokens, vocab_type=xgrammar.VocabType.RAW, vocab_size=257, stop_token_ids=[256])  # type: ignore[arg-type]
        compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

        def compile_ebnf(source: str) -> Accepts:
            compiled = compiler.compile_grammar(xgrammar.Grammar.from_ebnf(source))

            def accepts(text: bytes) -> bool:
                matcher = xgrammar.GrammarMatcher(compiled)
                return matcher.accept_string(text) and matcher.is_completed()

            return accepts

        return compile_ebnf
    import llguidance

    class Bytes:
        eos_token_id = 256
        bos_token_id = None
        tokens = [bytes([i]) for i in range(256)] + [b"</s>"]
        special_token_ids = [256]

        def __call__(self, text: bytes | str) -> list[int]:
            return list(text if isinstance(text, bytes) else text.encode())

    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), n_vocab=257)

    def compile_lark(source: str) -> Accepts:
        first = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(source), log_level=0)
        if first.is_error():
            raise ValueError(first.get_error())

        def accepts(text: bytes) -> bool:
            matcher = first.deep_copy()
            return matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting()

        return accepts

    return compile_lark


def measure(engine: str, *, folder: Path | None = None, files: set[str] | None = None) -> tuple[dict[str, Counter[str]], list[str]]:
    """Outcomes per file, and a line for every instance that was accepted wrongly in any spelling.

    A case counts by its instance's usual text (`json.dumps`); other spellings only have to stay out when it is invalid.
    """
    compiled = matcher_of(engine)
    found: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    limits = SchemaLimits(enforce_format=False)
    for group in groups(folder):
        if files is not None and group.file not in files:
            continue
        counts = found.setdefault(group.file, Counter())
        try:
            lowered = lower(GrammarSpec("json_schema", json.dumps(group.schema)), limits=limits)
            accepts = compiled(next(c.source for c in lowered.candidates if c.language == ENGINES[engine]))
        except (InvalidRequest, StopIteration):
            counts["refused"] += len(group.cases)
            continue
        for description, instance, valid in group.cases:
            results = [accepts(text) for text in spellings(instance)]
            accepted = any(results) if not valid else results[1]
            counts["agree" if accepted == valid else "over-accept" if accepted else "over-reject"] += 1
            if accepted and not valid:
                wrong.append(f"{group.file}: {group.description}: {description}")
    return found, wrong


def total(found: dict[str, Counter[str]]) -> dict[str, int]:
    """Sums over files."""
    return {outcome: sum(counts[outcome] for counts in found.values()) for outcome in OUTCOMES}


def table(results: dict[str, dict[str, Counter[str]]]) -> str:
    """Per file and engine, as Markdown: agreements / over-accepted / over-rejected / refused."""
    engines = list(results)
    lines = ["| file | cases | " + " | ".join(engines) + " |", "|---|---:|" + "---:|" * len(engines)]
    files = list(next(iter(results.values())))

    def cell(counts: dict[str, int] | Counter[str]) -> str:
        return " / ".join(str(counts[outcome]) for outcome in OUTCOMES)

    for file in files:
        cases = sum(results[engines[0]][file].values())
        lines.append(f"| {file} | {cases} | " + " | ".join(cell(results[engine][file]) for engine in engines) + " |")
    sums = {engine: total(results[engine]) for engine in engines}
    lines.append(f"| **all** | {sum(sums[engines[0]].values())} | " + " | ".join(f"**{cell(sums[engine])}**" for engine in engines) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 1 when an invalid instance was accepted."""
    parser = argparse.ArgumentParser(prog="python -m plugmesh_grammar.schema.conformance", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--write", action="store_true", help="write docs/grammar-keywords.md")
    parser.add_argument("--engine", action="append", choices=list(ENGINES), help="only these")
    options = parser.parse_args(argv)
    results: dict[str, dict[str, Counter[str]]] = {}
    wrong: dict[str, list[str]] = {}
    for engine in options.engine or list(ENGINES):
        results[engine], wrong[engine] = measure(engine)
    if options.json:
        document = {engine: {"total": total(found), "files": found, "over_accepted": wrong[engine]} for engine, found in results.items()}
        print(json.dumps(document, indent=1, sort_keys=True))
    else:
        print(table(results))
        for engine, lines in wrong.items():
            for line in lines:
                print(f"accepted by {engine}: {line}")
    if options.write:
        from .document import page

        target = Path(__file__).parents[3] / "docs" / "grammar-keywords.md"
        target.write_text(page(table(results)), encoding="utf-8")
        print(f"wrote {target.name}", file=sys.stderr)
    return int(any(wrong.values()))


if __name__ == "__main__":
    raise SystemExit(main())
