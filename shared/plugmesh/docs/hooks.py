"""docs/hooks.md out of `plugmesh.hookspecs` and `plugmesh.records`.

    python -m plugmesh.docs.hooks            # prints the page
    python -m plugmesh.docs.hooks --write    # writes docs/hooks.md of this checkout
"""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from plugmesh import hookspecs, records

PAGE = pathlib.Path(__file__).resolve().parents[3] / "docs" / "hooks.md"
SLOTS = ("Runs in", "When", "How often", "Combines", "Arguments", "Returns", "Raising", "Example")
EVERY_SERVICE = ("gateway", "tokenizer", "grammar", "weightstore", "prefill", "decode", "kvstore")


@dataclass(frozen=True, slots=True)
class Hook:
    """One hook as its docstring tells it. `slots` has those of SLOTS that it fills, each one paragraph."""

    name: str
    summary: str
    prose: str
    slots: dict[str, str]
    signature: str
    record: type[Any] | None  # what its list holds
    is_first_result: bool

    @property
    def services(self) -> tuple[str, ...]:
        """Where it runs; "tools" are commands."""
        text = self.slots.get("Runs in", "")
        return EVERY_SERVICE if "every service" in text else tuple(w for w in re.findall(r"[a-z]+", text) if w in (*EVERY_SERVICE, "rollout", "tools"))


def hooks() -> list[Hook]:
    """All hooks in the order of the page that declares them."""
    return [_hook(name, f) for name, f in vars(hookspecs).items() if getattr(f, "plugmesh_spec", None) is not None]


def runs_in(hook: str) -> tuple[str, ...]:
    """Services that call a hook. Raises KeyError when there is no such hook."""
    return {h.name: h.services for h in hooks()}[hook]


def record_of(hook: str) -> type[Any] | None:
    """The record type that `register_<kind>` returns a list of; None of other hooks, or when there is no such hook."""
    return next((h.record for h in hooks() if h.name == hook), None)


def _hook(name: str, function: Any) -> Hook:
    lines = inspect.cleandoc(function.__doc__ or "").splitlines()
    slots: dict[str, str] = {}
    prose: list[str] = []
    current = ""
    for line in lines[1:]:
        heads = re.split(rf"(?:^|\s\s+)({'|'.join(SLOTS)}): ", line) if re.match(rf"({'|'.join(SLOTS)}): ", line) else []
        if heads:
            for head, text in zip(heads[1::2], heads[2::2], strict=True):
                current, slots[head] = head, text.strip()
        elif current and line.strip():
            slots[current] += " " + line.strip()
        elif not current:
            prose.append(line)
    returned = str(inspect.signature(function).return_annotation)
    match = re.fullmatch(r"list\[(\w+)\]", returned.strip("'"))
    signature = re.sub(r"'", "", str(inspect.signature(function)))
    spec = function.plugmesh_spec
    return Hook(name, lines[0], "\n".join(prose).strip(), slots, signature, getattr(records, match[1], None) if match else None, bool(spec["firstresult"]))


def render() -> str:
    """The whole page."""
    parts = [
        "# Hooks\n\nRendered from `shared/plugmesh/hookspecs.py` and `shared/plugmesh/records.py` by `python -m plugmesh.docs.hooks --write`; a test compares.\n"
        "How a plugin is written: [plugins/authoring.md](plugins/authoring.md).\n"
    ]
    doc = inspect.cleandoc(hookspecs.__doc__ or "")
    head, _, rest = doc.partition("\n\n")
    timeline, tail = _split_indented(rest)
    parts.append(f"{head}\n\n```text\n{textwrap.dedent(timeline)}\n```\n\n{tail}\n")
    parts.append("| hook | runs in | gives | combines |\n|---|---|---|---|\n" + "".join(_row(h) for h in hooks()))
    shown: set[str] = set()
    for h in hooks():
        parts.append(_section(h))
        if h.record is not None and h.record.__name__ not in shown:
            parts.extend(_type(t) for t in _types_of(h.record, shown))
    return "\n".join(p.rstrip("\n") + "\n" for p in parts)


def _split_indented(text: str) -> tuple[str, str]:
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
    return "\n".join(lines[:end]).rstrip(), "\n".join(lines[end:]).strip()


def _row(h: Hook) -> str:
    kind = f"`{h.record.__name__}`" if h.record else ("one answer" if h.is_first_result else "nothing")
    how = h.slots.get("Combines", "").split(";")[0].rstrip(".")
    return f"| [`{h.name}`](#{h.name}) | {', '.join(h.services) if len(h.services) < len(EVERY_SERVICE) else 'every service'} | {kind} | {how} |\n"


def _section(h: Hook) -> str:
    text = f"## {h.name}\n\n```python\ndef {h.name}{h.signature}\n```\n\n{h.summary}\n"
    if h.prose:
        text += f"\n{h.prose}\n"
    return text + "\n" + "".join(f"- **{slot}:** {_code(h.slots[slot])}\n" for slot in SLOTS if slot in h.slots)


def _code(text: str) -> str:
    return f"`{text}`" if re.fullmatch(r"[\w/]+\.py", text) else text


def _types_of(record: type[Any], shown: set[str]) -> Iterator[type[Any]]:
    """The record, and every type of `plugmesh.records` that its fields, methods and docstring name, each once, in that order."""
    if record.__name__ in shown:
        return
    shown.add(record.__name__)
    yield record
    text = " ".join(str(f.type) for f in dataclasses.fields(record)) if dataclasses.is_dataclass(record) else ""
    text += " ".join(str(inspect.signature(m)) for m in _methods(record)) + (record.__doc__ or "")
    for name in re.findall(r"\w+", text):
        other = getattr(records, name, None)
        if isinstance(other, type) and other.__module__ == records.__name__:
            yield from _types_of(other, shown)


def _methods(cls: type[Any]) -> list[Any]:
    return [m for n, m in vars(cls).items() if inspect.isfunction(m) and not n.startswith("_") and getattr(cls, "_is_protocol", False)]


def _type(cls: type[Any]) -> str:
    doc = inspect.cleandoc(cls.__doc__ or "")
    text = f"### {cls.__name__}\n\n{_prose(doc)}\n"
    if dataclasses.is_dataclass(cls):
        lines = [f"{f.name}: {f.type}{_default(f)}" for f in dataclasses.fields(cls)]
        text += "\n```python\n" + "\n".join(lines) + "\n```\n"
    elif getattr(cls, "_is_protocol", False):
        fields = [f"{n}: {t}" for n, t in getattr(cls, "__annotations__", {}).items()]
        if fields:
            text += "\n```python\n" + "\n".join(fields) + "\n```\n"
        for m in _methods(cls):
            prefix = "async def" if inspect.iscoroutinefunction(m) else "def"
            method = inspect.cleandoc(m.__doc__ or "")
            text += f"\n`{prefix} {m.__name__}{_plain(inspect.signature(m))}`\n" + (f"\n{textwrap.indent(_prose(method), '> ', lambda _: True)}\n" if method else "")
    return text


def _plain(signature: inspect.Signature) -> str:
    return re.sub(r"'", "", str(signature)).replace("(self, ", "(").replace("(self)", "()")


def _default(f: dataclasses.Field[Any]) -> str:
    return f" = {f.default!r}" if f.default is not dataclasses.MISSING else " = ..." if f.default_factory is not dataclasses.MISSING else ""


def _prose(doc: str) -> str:
    """Docstring sections as Markdown: `Attributes:` and the like become lists."""
    lines: list[str] = []
    in_list = False
    for line in doc.splitlines():
        if re.fullmatch(r"(Attributes|Args|Returns|Raises|Yields):", line):
            in_list = line.startswith(("Attributes", "Args", "Raises"))
            lines.append(line if not in_list else line + "\n")
        elif in_list and (match := re.fullmatch(r"    ((?:[\w\[\]]+, )*[\w\[\]]+): (.*)", line)):
            lines.append(f"- `{match[1]}`: {match[2]}")
        elif in_list and line.startswith("        "):
            lines.append("  " + line.strip())
        else:
            in_list = in_list and not line.strip()
            lines.append(line.strip() if line.startswith("    ") else line)
    return "\n".join(lines).strip()


def main(arguments: typing.Sequence[str]) -> int:
    """Exit status 1 when `--check` finds another page."""
    text = render()
    if "--write" in arguments:
        PAGE.write_text(text)
    elif "--check" in arguments:
        return int(not PAGE.exists() or PAGE.read_text() != text)
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
