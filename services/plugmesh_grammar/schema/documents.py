"""A schema document: its subschemas by JSON Pointer, and what references inside it mean. Nothing is ever fetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from plugmesh.errors import UnsupportedGrammar

DRAFT_2020 = "https://json-schema.org/draft/2020-12/schema"
_OTHER_DRAFTS = ("json-schema.org/draft/2019-09/schema", "json-schema.org/draft-07/schema", "json-schema.org/draft-06/schema")
_ONE = ("additionalProperties", "propertyNames", "items", "additionalItems", "contains", "not", "if", "then", "else", "unevaluatedItems", "unevaluatedProperties", "contentSchema")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")


def refused(message: str, keyword: str, path: str) -> UnsupportedGrammar:
    """The error for a keyword; `path` is the pointer of the schema that holds it."""
    where = f"{path}/{escape(keyword)}" if keyword else path
    return UnsupportedGrammar(f"{keyword or 'schema'} at {where or '/'}: {message}", param="grammar", keyword=keyword, path=where)


def escape(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")


@dataclass(frozen=True, slots=True)
class Node:
    """A subschema.

    Attributes:
        path: JSON Pointer from the document's root.
        base: URI that its references start from, without fragment.
        resource: Path of the schema resource that it belongs to.
        ref_hides: An older draft, in which $ref makes its neighbours mean nothing.
    """

    schema: Any
    path: str
    base: str
    resource: str
    ref_hides: bool


class Document:
    """Reads a parsed schema. Raises UnsupportedGrammar for a malformed one, or one of a dialect that is not known."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self.nodes: dict[str, Node] = {}
        self.resources: dict[str, str] = {}  # URI to path
        self.anchors: dict[tuple[str, str], str] = {}  # resource's path and anchor to path
        self.dynamic: dict[str, dict[str, str]] = {}  # resource's path to its dynamic anchors
        self.order: dict[str, int] = {}  # property names as they are first written
        self.resources[""] = ""
        self._visit(root, "", "", "", False)

    def _visit(self, schema: Any, path: str, base: str, resource: str, ref_hides: bool) -> None:
        if isinstance(schema, bool):
            self.nodes[path] = Node(schema, path, base, resource, ref_hides)
            return
        if not isinstance(schema, dict):
            raise refused("a schema is an object or a boolean", path.rpartition("/")[2], path.rpartition("/")[0])
        if "$schema" in schema:
            dialect = str(schema["$schema"]).removesuffix("#").removeprefix("https://").removeprefix("http://")
            if dialect in _OTHER_DRAFTS:
                ref_hides = not dialect.startswith("json-schema.org/draft/2019")
            elif dialect == DRAFT_2020.removeprefix("https://"):
                ref_hides = False
            else:
                raise refused("the dialect is not known", "$schema", path)
        hidden = ref_hides and "$ref" in schema
        if isinstance(schema.get("$id"), str) and not hidden:
            uri, fragment = urldefrag(urljoin(base, schema["$id"]) if not schema["$id"].startswith("urn:") else schema["$id"])
            if fragment:  # draft-07's spelling of an anchor
                self.anchors[resource, fragment] = path
            if uri != base or not fragment:
                base, resource = uri, path
                self.resources.setdefault(uri, path)
        elif "$id" in schema and not hidden:
            raise refused("must be a string", "$id", path)
        self.nodes[path] = Node(schema, path, base, resource, ref_hides)
        for keyword in ("$anchor", "$dynamicAnchor"):
            if isinstance(schema.get(keyword), str):
                self.anchors[resource, schema[keyword]] = path
                if keyword == "$dynamicAnchor":
                    self.dynamic.setdefault(resource, {})[schema[keyword]] = path
        for name in schema.get("properties", ()) if isinstance(schema.get("properties"), dict) else ():
            self.order.setdefault(name, len(self.order))
        for keyword, value in schema.items():
            here = f"{path}/{escape(keyword)}"
            if keyword in _LISTS and isinstance(value, list):
                for i, part in enumerate(value):
                    self._visit(part, f"{here}/{i}", base, resource, ref_hides)
            elif keyword in _ONE:
                self._visit(value, here, base, resource, ref_hides)
            elif keyword in _MAPS and isinstance(value, dict):
                for name, part in value.items():
                    if keyword != "dependencies" or not isinstance(part, list):
                        self._visit(part, f"{here}/{escape(name)}", base, resource, ref_hides)

    def node(self, path: str) -> Node:
        return self.nodes[path]

    def resolve(self, reference: str, origin: Node, keyword: str) -> Node:
        """The subschema that a reference names. Raises UnsupportedGrammar when it lies outside of the document or nowhere."""
        uri = origin.base + reference if reference.startswith("#") else urljoin(origin.base, reference) if not reference.startswith("urn:") else reference
        uri, fragment = urldefrag(uri)
        fragment = unquote(fragment)
        if uri not in self.resources:
            raise refused(f"{reference!r} is outside of the schema, and nothing is fetched", keyword, origin.path)
        resource = self.resources[uri]
        if fragment and not fragment.startswith("/"):
            if (resource, fragment) not in self.anchors:
                raise refused(f"there is no anchor {fragment!r}", keyword, origin.path)
            return self.nodes[self.anchors[resource, fragment]]
        path = resource + fragment
        if path not in self.nodes:
            self._adopt(resource, fragment, origin, keyword, reference)
        return self.nodes[path]

    def _adopt(self, resource: str, fragment: str, origin: Node, keyword: str, reference: str) -> None:
        """Makes a subschema of a place that no known keyword calls one."""
        value, path, nearest = self.root, "", self.nodes[""]
        try:
            for part in (resource + fragment).split("/")[1:]:
                name = part.replace("~1", "/").replace("~0", "~")
                value = value[int(name)] if isinstance(value, list) else value[name]
                path = f"{path}/{part}"
                nearest = self.nodes.get(path, nearest)
        except (KeyError, IndexError, ValueError, TypeError):
            raise refused(f"{reference!r} names nothing", keyword, origin.path) from None
        self._visit(value, path, nearest.base, nearest.resource, nearest.ref_hides)
