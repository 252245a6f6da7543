"""Grammars that are hard on engines, and random ones, as trees for `grammar_oracle`."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import strategies as st

from plugmesh.grammar.syntax import Alt, Chars, Grammar, Node, Ref, Repeat, Seq, Text, complement, ranges_of


def _g(**rules: Node) -> Grammar:
    return Grammar("root", rules)


def _class(*pairs: str) -> Chars:
    """"az" is a to z, "a" just that."""
    return Chars(ranges_of((ord(p[0]), ord(p[-1])) for p in pairs))


def _many(node: Node) -> Repeat:
    return Repeat(node, 0, None)


def _some(node: Node) -> Repeat:
    return Repeat(node, 1, None)


def _maybe(node: Node) -> Repeat:
    return Repeat(node, 0, 1)


_DIGIT = _class("09")
_ANY = Chars(complement(()))
_STRING_CHAR = Alt((Chars(complement(ranges_of([(0, 31), (34, 34), (92, 92)]))), Seq((Text("\\"), _class('"', "\\", "n", "u")))))
_JSON: Mapping[str, Node] = {
    "root": Ref("value"),
    "ws": _maybe(Alt((Text(" "), Seq((Text("\n"), Repeat(Text(" "), 0, 4)))))),
    "value": Alt((Ref("object"), Ref("array"), Ref("text"), Ref("number"), Text("true"), Text("false"), Text("null"))),
    "object": Seq((Text("{"), Ref("ws"), _maybe(Seq((Ref("pair"), _many(Seq((Text(","), Ref("ws"), Ref("pair"))))))), Ref("ws"), Text("}"))),
    "pair": Seq((Ref("text"), Text(":"), Ref("ws"), Ref("value"))),
    "array": Seq((Text("["), Ref("ws"), _maybe(Seq((Ref("value"), _many(Seq((Text(","), Ref("ws"), Ref("value"))))))), Ref("ws"), Text("]"))),
    "text": Seq((Text('"'), _many(_STRING_CHAR), Text('"'))),
    "number": Seq((_maybe(Text("-")), Alt((Text("0"), Seq((_class("19"), _many(_DIGIT))))), _maybe(Seq((Text("."), _some(_DIGIT)))))),
}

CASES: dict[str, Grammar] = {
    "one text": _g(root=Text("abcab")),
    "nothing": _g(root=Text("")),
    "texts that begin alike": _g(root=Alt((Text("a"), Text("ab"), Text("abc"), Text("abcabc"), Text("b")))),
    "a class": _g(root=_class("ac", "x", "09")),
    "any characters": _g(root=_many(_ANY)),
    "any characters but": _g(root=Seq((_some(Chars(complement(ranges_of([(10, 10), (34, 34), (97, 98)])))), Text('"')))),
    "a greedy beginning": _g(root=Seq((_many(Text("a")), Text("a"), Repeat(Text("aa"), 0, 2), Text("b")))),
    "counts": _g(root=Seq((Repeat(_class("ab"), 2, 4), Repeat(Text("01"), 3, 3), Repeat(Text("x"), 0, 2)))),
    "counts of nothing": _g(root=Alt((Seq((Text("a"), Repeat(Text("b"), 0, 0), Repeat(Ref("root"), 0, 0), Text("c"))), Repeat(Text("d"), 0, 0)))),
    "counts of nothing, no recursion": _g(root=Seq((Text("a"), Repeat(_class("be"), 0, 0), Text("c")))),
    "counts of counts": _g(root=Seq((Repeat(Repeat(Text("a"), 2, 3), 2, 2), Text("b")))),
    "nullable in a row": _g(root=Seq((Ref("x"), Ref("y"), Ref("x"), Ref("z"))), x=_maybe(Text("a")), y=Alt((Text(""), Text("ab"), Ref("x"))), z=Repeat(Ref("y"), 0, 2)),
    "nullable many times": _g(root=Seq((_many(_many(_maybe(Text("ab")))), Text("c")))),
    "left recursion": _g(root=Alt((Seq((Ref("root"), Text("+1"))), Text("1"), Seq((Ref("root"), Text("*"), _DIGIT))))),
    "hidden left recursion": _g(root=Alt((Seq((Ref("e"), Ref("root"), Text("b"))), Text("a"))), e=_maybe(Text("x"))),
    "mutual recursion": _g(root=Alt((Seq((Ref("p"), Text("x"))), Text("a"))), p=Alt((Seq((Ref("root"), Text("y"))), Text("b")))),
    "right recursion": _g(root=Alt((Seq((_class("ab"), Ref("root"))), Text("z")))),
    "brackets": _g(root=_many(Seq((Text("("), Ref("root"), Text(")"))))),
    "brackets of two kinds": _g(root=Alt((Text(""), Seq((Text("("), Ref("root"), Text(")"), Ref("root"))), Seq((Text("["), Ref("root"), Text("]")))))),
    "as many of one as of the other": _g(root=Alt((Text("ab"), Seq((Text("a"), Ref("root"), Text("b")))))),
    "palindromes": _g(root=Alt((Text(""), Text("a"), Text("b"), Seq((Text("a"), Ref("root"), Text("a"))), Seq((Text("b"), Ref("root"), Text("b")))))),
    "ambiguity": _g(root=Alt((Seq((Ref("root"), Ref("root"))), Text("a"), Text("aa"), Seq((Text("("), Ref("root"), Text(")")))))),
    "dangling else": _g(root=Alt((Seq((Text("a"), Ref("root"))), Seq((Text("a"), Ref("root"), Text("b"), Ref("root"))), Text("x")))),
    "tokens over three rules": _g(root=Seq((Ref("a"), Ref("b"), Ref("c"))), a=_some(Text("a")), b=Alt((Text("a"), Text("b"))), c=Seq((Text("b"), _maybe(Text("a")), Text("\"}")))),
    "split characters": _g(root=_some(Alt((Text("é"), Text("€"), Text("中"), Text("😀"), Text("ñ"))))),
    "classes of long characters": _g(root=Seq((Repeat(_class("à" + "ÿ", "一" + "鿿"), 1, 3), Repeat(_class("😀" + "🙏"), 1, 2)))),
    "characters at the ends of lengths": _g(root=Seq((Repeat(_class("\x7e\x81", "\u07fe\u0801", "\ud7fe\ue001", "\uffff\U00010000", "\U0010fffe\U0010ffff"), 1, 2), Text("a")))),
    "control characters": _g(root=Seq((_class("\0\x08", "\x7f"), Text("\t\r\n\0"), _class("-", "]", "\\", "^")))),
    "signs of every notation": _g(root=Seq((Text("\"\\/[]()|*+?{}.^$-#<>%:;,'`~!@&=_ "), _class('"', "\\", "/", "]", "[", "^", "-"), _many(_class("|*", "+", "?"))))),
    "numbers": _g(root=_JSON["number"]),
    "json": Grammar("root", _JSON),
    "an object": _g(
        root=Seq((Text('{"name": '), Ref("s"), Text(', "age": '), Repeat(_DIGIT, 1, 3), _maybe(Seq((Text(', "city": "'), _class("AZ"), Text('"')))), Text("}"))),
        s=Seq((Text('"'), Repeat(_STRING_CHAR, 0, 5), Text('"'))),
    ),
    "many texts": _g(root=Alt(tuple(Text(f"{w}{i}") for i in range(40) for w in ("item", "the", "99")))),
}  # fmt: skip


@st.composite
def grammars(draw: st.DrawFn, *, is_recursive: bool) -> Grammar:
    """Small random grammars in which every rule can end. Without recursion there is one rule."""
    texts = st.sampled_from(["", "a", "b", "aa", "ab", "abc", "é", "€", "(", ")", "1", '"', "{\""])
    classes = st.sampled_from([_class("ab"), _class("az"), _class("09", "-"), _class("à" + "ÿ"), _ANY, _class("😀" + "🙏", "x")])
    leaves: st.SearchStrategy[Node] = st.one_of(texts.map(Text), classes)

    def more(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
        several = st.lists(inner, min_size=1, max_size=3).map(tuple)
        counts = st.sampled_from([(0, 1), (0, None), (1, None), (2, 2), (1, 3), (2, None), (0, 2)])
        return st.one_of(several.map(Seq), several.map(Alt), st.builds(lambda item, count: Repeat(item, *count), inner, counts))

    if not is_recursive:
        return _g(root=draw(st.recursive(leaves, more, max_leaves=7)))
    names = ["root", "p", "q"]
    nodes = st.recursive(st.one_of(leaves, st.sampled_from(names).map(Ref)), more, max_leaves=5)
    return Grammar("root", {name: Alt((draw(nodes), draw(leaves))) for name in names})
