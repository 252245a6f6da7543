"""Structural tags as GBNF, for engines that know none: the formats whose language needs no more than a grammar.

Free text is what leads from one state to another of an automaton that looks for all triggers and excluded texts at once (Aho and Corasick, 1975). Its rules are
left-recursive: an Earley parser goes on from where it stands then, and does not return through all that it has read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from plugmesh.errors import UnsupportedGrammar
from plugmesh.grammar import gbnf, regex
from plugmesh.grammar.syntax import Alt, Chars, Grammar, Node, Ref, Repeat, Seq, Text, complement, ranges_of, to_gbnf

_ANY = complement(())
MAX_WORDS_CHARS = 512
"""Of the triggers, ends and excluded texts that are looked for at once: each makes a state of the automaton."""
_OPTIONS = {
    "const_string": {"value"}, "any_text": {"excludes", "max_chars"}, "grammar": {"grammar"}, "regex": {"pattern"}, "sequence": {"elements"}, "or": {"elements"},
    "optional": {"content"}, "plus": {"content"}, "star": {"content"}, "repeat": {"content", "min", "max"}, "tag": {"begin", "content", "end"},
    "triggered_tags": {"triggers", "tags", "at_least_one", "stop_after_first", "excludes"}, "tags_with_separator": {"tags", "separator", "at_least_one", "stop_after_first"},
}  # fmt: skip
_TIMES: dict[str, tuple[int, int | None]] = {"optional": (0, 1), "star": (0, None), "plus": (1, None)}


class _Other(Exception):
    """It needs an engine that knows structural tags, or is none."""


def tag_gbnf(tag: Any) -> str | None:
    """GBNF of the same language, None where there is none.

    Args:
        tag: JSON as Python values, schemas in it replaced by grammars.
    """
    if not isinstance(tag, dict) or set(tag) != {"type", "format"} or tag["type"] != "structural_tag":
        return None
    writer = _Writer()
    try:
        root = writer.whole(tag["format"])
    except (_Other, UnsupportedGrammar):
        return None
    return to_gbnf(Grammar("root", {**writer.rules, "root": root}))


class _Writer:
    def __init__(self) -> None:
        self.rules: dict[str, Node] = {}

    def add(self, body: Node) -> Ref:
        name = f"t{len(self.rules)}"
        self.rules[name] = body
        return Ref(name)

    def whole(self, node: Any) -> Node:
        """A format that nothing follows, so that free text in it ends where the output does."""
        kind = _kind(node)
        if kind == "any_text":
            return self._any_text(node)
        if kind == "triggered_tags":
            return self._triggered(node)
        if kind == "sequence":
            elements = _list(node.get("elements"))
            return Seq((*(self.part(e) for e in elements[:-1]), self.whole(elements[-1])))
        if kind == "or":
            return Alt(tuple(self.whole(e) for e in _list(node.get("elements"))))
        return self.part(node)

    def part(self, node: Any) -> Node:
        """A format that something may follow."""
        kind = _kind(node)
        if kind == "const_string":
            return Text(_text(node.get("value")))
        if kind == "grammar":
            return self._grammar(gbnf.parse(_text(node.get("grammar"))))
        if kind == "regex":
            return regex.parse(_text(node.get("pattern")))
        if kind == "sequence":
            return Seq(tuple(self.part(e) for e in _list(node.get("elements"))))
        if kind == "or":
            return Alt(tuple(self.part(e) for e in _list(node.get("elements"))))
        if kind in _TIMES or kind == "repeat":
            least, most = _TIMES[kind] if kind in _TIMES else _bounds(node)
            return Repeat(self.add(self.part(node.get("content"))), least, most)
        if kind == "tag":
            return Seq((Text(_text(node.get("begin"))), self._behind_begin(node)))
        if kind == "tags_with_separator":
            return self._separated(node)
        raise _Other

    def _grammar(self, grammar: Grammar) -> Ref:
        names = {name: f"t{len(self.rules)}x{i}" for i, name in enumerate(grammar.rules)}
        for name, body in grammar.rules.items():
            self.rules[names[name]] = _renamed(body, names)
        return Ref(names[grammar.root])

    def _behind_begin(self, tag: Any) -> Node:
        ends = tag.get("end") if isinstance(tag.get("end"), list) else [tag.get("end")]
        ends = [_text(end) for end in _list(ends)]
        content = tag.get("content")
        if _kind(content) != "any_text":
            return Seq((self.part(content), Alt(tuple(Text(end) for end in ends))))
        if content.get("max_chars") is not None or content.get("excludes") or not all(ends):
            raise _Other
        scan = _Scan(self, ends)
        rules = scan.rules(Text(""))
        return self.add(Alt(tuple(scan.completing(rules, end) for end in ends)))

    def _any_text(self, node: Any) -> Node:
        excludes, most = _texts(node.get("excludes")), node.get("max_chars")
        if most is not None:
            if excludes or not isinstance(most, int) or isinstance(most, bool) or most < 0:
                raise _Other
            return Repeat(Chars(_ANY), 0, most)
        scan = _Scan(self, excludes)
        return Alt(tuple(scan.rules(Text("")).values()))

    def _triggered(self, node: Any) -> Node:
        triggers, tags = _texts(node.get("triggers")), _list(node.get("tags"))
        at_least_one, stops = _flag(node, "at_least_one"), _flag(node, "stop_after_first")
        rests: dict[str, list[Node]] = {trigger: [] for trigger in triggers}
        whole: list[Node] = []
        for tag in tags:
            begin = _text(tag.get("begin")) if _kind(tag) == "tag" else None
            mine = [t for t in triggers if begin is not None and begin.startswith(t)]
            if begin is None or len(mine) != 1:
                raise _Other
            rest = self._behind_begin(tag)
            rests[mine[0]].append(Seq((Text(begin[len(mine[0]) :]), rest)))
            whole.append(Seq((Text(begin), rest)))
        if not triggers or not all(rests.values()):
            raise _Other
        first = self.add(Alt(tuple(whole)))
        if at_least_one and stops:
            return first
        scan = _Scan(self, [*triggers, *_texts(node.get("excludes"))])
        start: Node = first if at_least_one else Text("")
        if stops:
            rules = scan.rules(start)
            ended = [Seq((scan.completing(rules, t), Alt(tuple(rests[t])))) for t in triggers]
            return Alt((*rules.values(), *ended))
        rules = scan.rules(start, again=lambda rules: [Seq((scan.completing(rules, t), Alt(tuple(rests[t])))) for t in triggers])
        return Alt(tuple(rules.values()))

    def _separated(self, node: Any) -> Node:
        tags = _list(node.get("tags"))
        if any(_kind(tag) != "tag" for tag in tags):
            raise _Other
        tag, separator = self.add(Alt(tuple(self.part(t) for t in tags))), Text(_text(node.get("separator")))
        some = tag if _flag(node, "stop_after_first") else self.add(Seq((tag, Repeat(Seq((separator, tag)), 0, None))))
        return Repeat(some, int(_flag(node, "at_least_one")), 1)


class _Scan:
    """Text that is read in search of words, none of which lies in another."""

    def __init__(self, writer: _Writer, words: Sequence[str]) -> None:
        if sum(map(len, words)) > MAX_WORDS_CHARS or any(not w or (a != b and w in v) for a, w in enumerate(words) for b, v in enumerate(words)):
            raise _Other
        self.writer = writer
        self.words = words
        self.states = sorted({word[:n] for word in words for n in range(len(word))} | {""}, key=lambda s: (len(s), s))
        self.chars = sorted({c for word in words for c in word})

    def rules(self, start: Node, *, again: Callable[[Mapping[str, Ref]], Iterable[Node]] | None = None) -> dict[str, Ref]:
        """Per state a rule of the texts that lead there, with no word in them.

        Args:
            start: What comes before.
            again: What leads to the first state besides.
        """
        rules = {state: self.writer.add(Text("")) for state in self.states}
        bodies: dict[str, list[Node]] = {state: [] for state in self.states}
        bodies[""].append(start)
        for state in self.states:
            targets: dict[str, list[str]] = {}
            for char in self.chars:
                if state + char not in self.words and not any((state + char).endswith(word) for word in self.words):
                    targets.setdefault(self._next(state + char), []).append(char)
            others = complement(ranges_of((ord(c), ord(c)) for c in self.chars))
            bodies[""].append(Seq((rules[state], Chars(others))))
            for target, chars in targets.items():
                bodies[target].append(Seq((rules[state], Chars(ranges_of((ord(c), ord(c)) for c in chars)))))
        bodies[""] += again(rules) if again is not None else ()
        for state, ref in rules.items():
            self.writer.rules[ref.name] = Alt(tuple(bodies[state]))
        return rules

    def completing(self, rules: Mapping[str, Ref], word: str) -> Node:
        """Texts that end with the word, their only one."""
        found = [Seq((rules[state], Text(word[-1]))) for state in self.states if (state + word[-1]).endswith(word)]
        return Alt(tuple(found))

    def _next(self, text: str) -> str:
        return next(text[i:] for i in range(len(text) + 1) if text[i:] in self.states)


def _kind(node: Any) -> str:
    kind = node.get("type") if isinstance(node, dict) else None
    if not isinstance(kind, str) or not set(node) - {"type"} <= _OPTIONS.get(kind, set()) or kind not in _OPTIONS:
        raise _Other
    return kind


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise _Other
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or any(0xD800 <= ord(c) <= 0xDFFF for c in value):
        raise _Other
    return value


def _texts(value: Any) -> list[str]:
    return [_text(v) for v in _list(value)] if value not in (None, []) else []


def _flag(node: Any, name: str) -> bool:
    value = node.get(name, False)
    if not isinstance(value, bool):
        raise _Other
    return value


def _bounds(node: Any) -> tuple[int, int | None]:
    least, most = node.get("min"), node.get("max")
    if type(least) is not int or type(most) is not int or least < 0 or (most != -1 and most < least):
        raise _Other
    return least, None if most == -1 else most


def _renamed(node: Node, names: Mapping[str, str]) -> Node:
    if isinstance(node, Ref):
        return Ref(names[node.name])
    if isinstance(node, Seq | Alt):
        return type(node)(tuple(_renamed(item, names) for item in node.items))
    return Repeat(_renamed(node.item, names), node.least, node.most) if isinstance(node, Repeat) else node
