"""What the two sides of a comparison load: the tables of a mesh.toml, made from the cards."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plugmesh import cards
from plugmesh.bench.systems import Setting
from plugmesh.cards import Card
from plugmesh.config import ALL_SERVICES, OPTIONAL_SERVICES, MeshConfig
from plugmesh.errors import InvalidRequest
from plugmesh.host import PluginHost
from plugmesh.quality.core import CoreQualityMetrics
from plugmesh.quality.fidelity import Fidelity, combined

Tables = dict[str, Any]
ENGINE_SERVICES = ("prefill", "decode", "weightstore")


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: one plugin, or several together.

    Attributes:
        settings: Per plugin, over what its card sets for `plugmesh ab`.
    """

    cards: tuple[Card, ...]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def slugs(self) -> tuple[str, ...]:
        return tuple(c.slug for c in self.cards)

    @property
    def name(self) -> str:
        return "+".join(self.slugs)

    @property
    def fidelity(self) -> Fidelity:
        return combined([c.fidelity for c in self.cards])

    @property
    def has_engine_side(self) -> bool:
        """Whether decode loads any of it; what only gateways and prefill instances load shows in a mesh alone."""
        return any("decode" in c.services for c in self.cards)

    def tables(self, setting: Setting, *, loaded: bool) -> Tables:
        """`services` and `plugins` of a mesh.toml; both sides get what cards name as base; not `loaded` they give nothing else but what they name instead."""
        engine = {"executor": setting.executor, "kv_dtype": setting.kv_dtype, "num_threads": setting.threads}
        services: dict[str, dict[str, Any]] = {"decode": dict(engine), "prefill": dict(engine)}
        plugins: dict[str, Any] = {}
        for card in self.cards:
            _merge(services, card.ab.base)
        for card in self.cards:
            if not loaded and not card.ab.instead:
                continue
            _merge(services, card.ab.services if loaded else card.ab.instead)
            for name in card.services:
                if name in ALL_SERVICES:
                    services.setdefault(name, {}).setdefault("plugins", []).append(card.slug)
                if name in OPTIONAL_SERVICES:
                    services[name].setdefault("replicas", 1)
            settings = {**copy.deepcopy(dict(card.ab.settings)), **self.settings.get(card.slug, {})}
            if settings:
                plugins[card.slug] = settings
        return {"services": services, "plugins": plugins}

    def check(self, setting: Setting) -> None:
        """Raises ConfigError when the plugins cannot be loaded together."""
        config = MeshConfig.model_validate({**self.tables(setting, loaded=True)}).model_copy(update={"source": "plugmesh ab"})
        cards.check_mesh(config)


def _merge(services: dict[str, dict[str, Any]], more: Mapping[str, Mapping[str, Any]]) -> None:
    for name, keys in more.items():
        services.setdefault(name, {}).update(copy.deepcopy(dict(keys)))


def subject_of(slugs: Sequence[str], settings: Sequence[str] = ()) -> Subject:
    """From names, and settings as `slug.key=value` with a TOML value.

    Raises:
        ConfigError: No such plugin.
        InvalidRequest: A setting of another form.
    """
    import tomllib

    found: dict[str, dict[str, Any]] = {}
    for text in settings:
        path, _, value = text.partition("=")
        slug, _, key = path.partition(".")
        if slug not in slugs or not key or not value:
            raise InvalidRequest(f"{text!r} is no setting of a measured plugin; it looks like {slugs[0]}.key=value", param="set")
        try:
            found.setdefault(slug, {})[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found.setdefault(slug, {})[key] = value
    return Subject(tuple(cards.read(slug, where="plugmesh ab") for slug in slugs), found)


def tools_host(slugs: Sequence[str], tables: Mapping[str, Any]) -> PluginHost:
    """What measures: the core's metrics and workloads, and those of the plugins that have some. The same on both sides."""
    from plugmesh.ab.workloads import CoreWorkloads

    config = MeshConfig.model_validate({"plugins": tables.get("plugins", {})})
    host = PluginHost.load([s for s in slugs if "tools" in cards.read(s).services], config, service="tools")
    host.register_builtin(CoreQualityMetrics())
    host.register_builtin(CoreWorkloads())
    return host


def folder_of(slug: str) -> pathlib.Path:
    """Where a plugin's card lies. Raises ConfigError as `cards.read` does."""
    import importlib.util

    cards.read(slug)
    spec = importlib.util.find_spec(cards.package_of(slug))
    assert spec is not None and spec.submodule_search_locations, "its card was found there"
    return pathlib.Path(next(iter(spec.submodule_search_locations)))
