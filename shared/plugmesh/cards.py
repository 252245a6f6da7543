"""A plugin's card: the facts in its `plugin.toml`, checked, and checked together over a whole mesh."""

from __future__ import annotations

import importlib.resources
import importlib.util
import pathlib
import sys
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydantic

from plugmesh.config import MeshConfig, StrictModel
from plugmesh.errors import ConfigError

Service = Literal["gateway", "tokenizer", "grammar", "prefill", "decode", "kvstore", "weightstore", "rollout", "tools"]


class Claim(StrictModel):
    """The paper's headline figure, and where it comes from."""

    metric: str                      # "p99_itl_ratio"
    value: float
    setting: str                     # "Mistral-7B, one A100, strict SLO"


class Loss(StrictModel):
    """`[loss]`, of a lossy plugin: what the harness measures, and how far it may be from a run without the plugin."""

    metric: str                      # name of a quality metric's figure: "perplexity_ratio"
    bound: float                     # the worst value that is still as promised
    setting: str                     # "default settings, SmolLM2-135M-Instruct"


class Trial(StrictModel):
    """`[ab]`: how `plugmesh ab` runs the plugin; by default it is loaded in all of its services with its default settings."""

    base: Mapping[str, Mapping[str, Any]] = {}      # service to keys that both sides get: {"decode": {"replicas": 2}}
    services: Mapping[str, Mapping[str, Any]] = {}  # service to keys that only the side with the plugin gets: {"decode": {"weight_format": "mine"}}
    settings: Mapping[str, Any] = {}                # [plugins.<slug>]


class Card(StrictModel):
    """`plugin.toml`. Names of settings and hooks are checked against the code by the conformance suite."""

    slug: str = pydantic.Field(pattern=r"^[a-z][a-z0-9_]{1,40}$")
    version: str
    summary: str = pydantic.Field(max_length=160)
    paper: str = ""                  # title, arXiv id
    services: tuple[Service, ...]
    hooks: tuple[str, ...]
    settings: Mapping[str, str] = {} # name to one line of explanation
    fidelity: Literal["exact", "dist", "lossy", "n/a"]
    device: tuple[Literal["cpu", "cuda"], ...] = ("cpu", "cuda")
    requirements: tuple[str, ...] = ()  # importable modules beyond the service's own
    provides: tuple[str, ...] = ()      # capabilities: "scheduler"
    requires: tuple[str, ...] = ()      # capabilities that some plugin in the mesh must provide
    conflicts: tuple[str, ...] = ()     # slugs, or "provides:<capability>" for any other provider in the same service
    all_of: tuple[Service, ...] = ()    # services that must all load it when one does
    claim: Claim | None = None
    loss: Loss | None = None            # of a lossy one, and only of that
    ab: Trial = Trial()

    @pydantic.model_validator(mode="after")
    def _only_a_lossy_one_loses(self) -> Card:
        if (self.fidelity == "lossy") != (self.loss is not None):
            raise ValueError("a plugin with fidelity = \"lossy\" has a table [loss] with metric, bound and setting, and no other one has")
        return self


def package_of(slug: str) -> str:
    """Import package of a plugin in this tree or installed beside it: entry point first, then `plugmesh_<slug>`."""
    from importlib.metadata import entry_points

    for point in entry_points(group="plugmesh", name=slug):
        return point.value.split(":")[0].rsplit(".plugin", 1)[0]
    return f"plugmesh_{slug}"


def read(slug: str, *, where: str = "") -> Card:
    """The card of one plugin, without importing its code.

    Raises:
        ConfigError: No such plugin, no card, or a card that does not fit the schema; names `where` (the config line).
    """
    package = package_of(slug)
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        known = ", ".join(sorted(installed())) or "none"
        raise ConfigError(f"{where or 'plugins'}: there is no plugin {slug!r}; installed: {known}", plugin=slug)
    path = pathlib.Path(next(iter(spec.submodule_search_locations))) / "plugin.toml"
    try:
        card = Card.model_validate(tomllib.loads(path.read_text()))
    except OSError as e:
        raise ConfigError(f"{where or slug}: plugin {slug!r} has no plugin.toml", plugin=slug) from e
    except (tomllib.TOMLDecodeError, pydantic.ValidationError) as e:
        raise ConfigError(f"{where or slug}: the card of plugin {slug!r} is not valid: {e}", plugin=slug) from e
    if card.slug != slug:
        raise ConfigError(f"{where or slug}: the card in {package} is for {card.slug!r}, not {slug!r}", plugin=slug)
    return card


def installed() -> dict[str, Card]:
    """Every plugin that can be named in a configuration here, slug to card; broken cards are left out."""
    from importlib.metadata import entry_points

    slugs = {p.name for p in entry_points(group="plugmesh")}
    for root in sys.path:
        folder = pathlib.Path(root or ".")
        if folder.is_dir():
            slugs.update(p.parent.name.removeprefix("plugmesh_") for p in folder.glob("plugmesh_*/plugin.toml"))
    try:  # an editable install serves folders that are on no path of sys.path
        import plugmesh

        plugins = pathlib.Path(next(iter(plugmesh.__path__))).parent.parent / "plugins"
        slugs.update(p.parent.name.removeprefix("plugmesh_") for p in plugins.glob("plugmesh_*/plugin.toml"))
    except (StopIteration, OSError):
        pass
    found: dict[str, Card] = {}
    for slug in sorted(slugs):
        try:
            found[slug] = read(slug)
        except (ConfigError, RecursionError):
            continue
    return found


def check_service(service: str, slugs: Sequence[str], cards: Mapping[str, Card]) -> None:
    """Conflicts among the plugins that one process loads. Raises ConfigError with both names and the config line."""
    where = f"[services.{service}] plugins"
    for slug in slugs:
        card = cards[slug]
        if service not in card.services:
            raise ConfigError(f"{where}: plugin {slug!r} is for {', '.join(card.services)}, not for {service}", plugin=slug)
        for module in card.requirements:
            if importlib.util.find_spec(module) is None:
                raise ConfigError(f"{where}: plugin {slug!r} needs the module {module!r}, which is not installed", plugin=slug)
        for other in slugs:
            if other == slug:
                continue
            clash = [c for c in card.conflicts if c == other or (c.startswith("provides:") and c[9:] in cards[other].provides)]
            if clash:
                raise ConfigError(f"{where}: plugins {slug!r} and {other!r} conflict ({clash[0]})", plugin=slug)
    doubled = {s for s in slugs if list(slugs).count(s) > 1}
    if doubled:
        raise ConfigError(f"{where}: plugin {doubled.pop()!r} is named twice")


def check_mesh(config: MeshConfig) -> dict[str, Card]:
    """Reads and checks the cards of all plugins that a configuration names, over all its services.

    Returns:
        Slug to card.

    Raises:
        ConfigError: Unknown plugin, conflict, missing requirement, a service that lacks a plugin it must share, or a
            `[plugins.<slug>]` table of a plugin that no service loads.
    """
    cards: dict[str, Card] = {}
    users: dict[str, list[str]] = {}
    for service in config.services:
        for slug in config.plugin_slugs(service):
            if slug not in cards:
                cards[slug] = read(slug, where=f"{config.source}: [services.{service}] plugins")
            users.setdefault(slug, []).append(service)
    for service in config.services:
        check_service(service, config.plugin_slugs(service), cards)
    provided = {capability for card in cards.values() for capability in card.provides}
    for slug, card in cards.items():
        missing = [r for r in card.requires if r not in provided]
        if missing:
            raise ConfigError(f"{config.source}: plugin {slug!r} requires {missing[0]!r}, which no loaded plugin provides", plugin=slug)
        absent = [s for s in card.all_of if s not in users[slug]]
        if absent:
            raise ConfigError(
                f"{config.source}: plugin {slug!r} is loaded in {', '.join(users[slug])} but must also be in [services.{absent[0]}] plugins",
                plugin=slug,
            )
    for slug in config.plugins:
        if slug not in cards:
            raise ConfigError(f"{config.source}: [plugins.{slug}] configures a plugin that no service loads", plugin=slug)
    return cards


def as_row(card: Card) -> dict[str, Any]:
    """A card as plain data, for --json and tables."""
    return card.model_dump(mode="json")
