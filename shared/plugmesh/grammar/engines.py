"""Which grammar engines a deployment uses: one list, `services.grammar.plugins`, for the grammar service and for decode."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plugmesh.config import MeshConfig

DEFAULT_ENGINES = ("xgrammar", "llguidance")  # in the order in which they are tried


def engine_slugs(config: MeshConfig) -> list[str]:
    """Plugins of the grammar service: those that it names, else of DEFAULT_ENGINES the ones that are installed."""
    table = config.services.get("grammar", {})
    return list(table["plugins"]) if "plugins" in table else [slug for slug in DEFAULT_ENGINES if not left_out(slug)]


def left_out(slug: str) -> str:
    """Why an engine of DEFAULT_ENGINES is not used: what is not installed here; empty when it can be."""
    from plugmesh import cards

    if cards.folder_of(slug) is None:
        return f"plugmesh_{slug}"
    return next((module for module in cards.read(slug).requirements if importlib.util.find_spec(module) is None), "")


def slugs_for_decode(config: MeshConfig) -> list[str]:
    """Of `engine_slugs` those whose card says that they run in decode, where the exported forms are matched; none where no grammar service is wanted."""
    from plugmesh import cards

    if config.services.get("grammar", {}).get("replicas", 1) == 0:
        return []
    named = config.services.get("decode", {}).get("plugins", [])
    return [slug for slug in engine_slugs(config) if slug not in named and cards.folder_of(slug) is not None and "decode" in cards.read(slug).services]
