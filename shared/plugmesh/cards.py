"""A plugin's card: the facts in its `plugin.toml`, checked, and checked together over a whole mesh."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
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
    # Keys of the side without it, which then loads the plugin, too: for a plugin that brings the plain form it is compared with, as a lossless format does.
    instead: Mapping[str, Mapping[str, Any]] = {}
    # For `--pairs`, where prompts are short and requests plain: settings, and keys of a request, with which they make use of the plugin.
    short: Mapping[str, Any] = {}
    request: Mapping[str, Any] = {}


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
    value = _entry_points(tuple(sys.path)).get(slug)
    return value.split(":")[0].rsplit(".plugin", 1)[0] if value else f"plugmesh_{slug}"


@functools.lru_cache(maxsize=4)
def _entry_points(path: tuple[str, ...]) -> dict[str, str]:
    """Slug to value of the group "plugmesh"; reading the metadata of all that is installed takes tens of milliseconds."""
    from importlib.metadata import entry_points

    return {p.name: p.value for p in entry_points(group="plugmesh")}


def read(slug: str, *, where: str = "") -> Card:
    """The card of one plugin, without importing its code.

    Raises:
        ConfigError: No such plugin, no card, or a card that does not fit the schema; names `where` (the config line).
    """
    package = package_of(slug)
    folder = folder_of(slug)
    if folder is None:
        known = ", ".join(sorted(installed())) or "none"
        raise ConfigError(f"{where or 'plugins'}: there is no plugin {slug!r}; installed: {known}", plugin=slug)
    try:
        card = Card.model_validate(tomllib.loads((folder / "plugin.toml").read_text()))
    except OSError as e:
        raise ConfigError(f"{where or slug}: plugin {slug!r} has no plugin.toml", plugin=slug) from e
    except (tomllib.TOMLDecodeError, pydantic.ValidationError) as e:
        raise ConfigError(f"{where or slug}: the card of plugin {slug!r} is not valid: {e}", plugin=slug) from e
    if card.slug != slug:
        raise ConfigError(f"{where or slug}: the card in {package} is for {card.slug!r}, not {slug!r}", plugin=slug)
    return card


def folder_of(slug: str) -> pathlib.Path | None:
    """Where a plugin's package lies; None when it cannot be imported."""
    _checkout()
    try:
        spec = importlib.util.find_spec(package_of(slug))
    except (ImportError, ValueError):
        return None
    return pathlib.Path(next(iter(spec.submodule_search_locations))) if spec is not None and spec.submodule_search_locations else None


def _checkout() -> pathlib.Path | None:
    """`plugins/` of the checkout that this package lies in, if it does, importable from now on: an editable install knows only the
    plugins that there were when it was made."""
    plugins = pathlib.Path(__file__).resolve().parents[2] / "plugins"
    if not plugins.is_dir():
        return None
    if str(plugins) not in sys.path:
        sys.path.append(str(plugins))
    return plugins


def installed() -> dict[str, Card]:
    """Every plugin that can be named in a configuration here, slug to card; broken cards are left out."""
    _checkout()
    slugs = set(_entry_points(tuple(sys.path)))
    for root in sys.path:
        folder = pathlib.Path(root or ".")
        if folder.is_dir():
            slugs.update(p.parent.name.removeprefix("plugmesh_") for p in folder.glob("plugmesh_*/plugin.toml"))
    found: dict[str, Card] = {}
    for slug in sorted(slugs):
        if folder_of(slug) is None:
            continue
        try:
            found[slug] = read(slug)
        except ConfigError:
            continue
    return found


# Blocks of KV travel from prefill to decode, so both must hold them in the same form; the last plugin of each that implements the hook decides.
AGREEING_HOOKS = {"register_kv_codecs": ("prefill", "decode")}
WEIGHT_FORMAT_USERS = ("prefill", "decode")


DEFAULT_ENGINES = ("xgrammar", "llguidance")  # of the grammar service, in the order in which they are tried


def loaded_slugs(config: MeshConfig, service: str) -> list[str]:
    """Plugins that a process of this service loads: those that the configuration names for it, and the grammar engines.

    `services.grammar.plugins` names the engines for the grammar service and, as far as their cards allow, for decode, where exported grammars are
    matched. Without that key they are DEFAULT_ENGINES, as far as they are installed.
    """
    named = config.plugin_slugs(service)
    table = config.services.get("grammar", {})
    if service not in ("grammar", "decode") or (service == "decode" and table.get("replicas", 1) == 0):
        return named
    engines = list(table["plugins"]) if "plugins" in table else [slug for slug in DEFAULT_ENGINES if not left_out(slug)]
    if service == "grammar":
        return engines
    return named + [slug for slug in engines if slug not in named and folder_of(slug) is not None and "decode" in read(slug).services]


def left_out(slug: str) -> str:
    """Which module of a plugin is not installed here: its own package, or one that it requires; empty when it can be loaded."""
    if folder_of(slug) is None:
        return package_of(slug)
    return next((module for module in read(slug).requirements if not _can_import(module)), "")


def check_service(service: str, slugs: Sequence[str], cards: Mapping[str, Card], *, at: Callable[[str], str] | None = None, device: str = "") -> None:
    """Conflicts among the plugins that one process loads.

    Args:
        at: Slug to the configuration's line; the service's table when left out.
        device: "cpu" or "cuda"; empty when it is not known.

    Raises:
        ConfigError: With both names and the line.
    """
    where = at or (lambda _: f"[services.{service}] plugins")
    for slug in slugs:
        card = cards[slug]
        if list(slugs).count(slug) > 1:
            raise ConfigError(f"{where(slug)}: plugin {slug!r} is named twice", plugin=slug)
        if service not in card.services:
            raise ConfigError(f"{where(slug)}: plugin {slug!r} is for {', '.join(card.services)}, not for {service}", plugin=slug)
        if device and device not in card.device:
            raise ConfigError(f"{where(slug)}: plugin {slug!r} runs on {' or '.join(card.device)}, but services.{service}.device is {device}", plugin=slug)
        for module in card.requirements:
            if not _can_import(module):
                raise ConfigError(f"{where(slug)}: plugin {slug!r} needs the module {module!r}, which is not installed", plugin=slug)
        for other in slugs:
            if other == slug:
                continue
            clash = [c for c in card.conflicts if c == other or (c.startswith("provides:") and c[9:] in cards[other].provides)]
            if clash:
                raise ConfigError(f"{where(slug)}: plugins {slug!r} and {other!r} conflict ({clash[0]})", plugin=slug)


def check_mesh(config: MeshConfig) -> dict[str, Card]:
    """Reads and checks the cards of all plugins that a configuration names, over all its services.

    Returns:
        Slug to card.

    Raises:
        ConfigError: Unknown plugin, conflict, missing requirement, a service that lacks a plugin it must share, services that
            would not understand each other's KV or weights, or a `[plugins.<slug>]` table of a plugin that no service loads.
    """
    cards: dict[str, Card] = {}
    users: dict[str, list[str]] = {}
    for service in dict.fromkeys([*config.services, "grammar", "decode"]):  # the two have grammar engines without being told
        slugs = loaded_slugs(config, service)
        for slug in slugs:
            if slug not in cards:
                cards[slug] = read(slug, where=config.at(f"services.{service}.plugins", slug))
            users.setdefault(slug, []).append(service)
        device = str(config.services.get(service, {}).get("device", "")).split(":")[0]
        check_service(service, slugs, cards, at=lambda s, service=service: config.at(f"services.{service}.plugins", s), device=device)  # type: ignore[misc]
    provided = {capability for card in cards.values() for capability in card.provides}
    for slug, card in cards.items():
        where = config.at(f"services.{users[slug][0]}.plugins", slug)
        missing = [r for r in card.requires if r not in provided]
        if missing:
            raise ConfigError(f"{where}: plugin {slug!r} requires {missing[0]!r}, which no loaded plugin provides", plugin=slug)
        absent = [s for s in card.all_of if s not in users[slug] and _runs(config, s)]
        if absent:
            raise ConfigError(
                f"{where}: plugin {slug!r} is loaded in {', '.join(users[slug])} but must also be in [services.{absent[0]}] plugins", plugin=slug
            )
    _check_agreement(config, cards)
    _check_weight_formats(config, cards)
    for slug in config.plugins:
        if slug not in cards:
            raise ConfigError(f"{config.at(f'plugins.{slug}')} configures a plugin that no service loads", plugin=slug)
    named = {slug for service in config.services for slug in config.plugin_slugs(service)}
    return {slug: card for slug, card in cards.items() if slug in named}


def _can_import(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of "a.b" where there is no a
        return False


def _runs(config: MeshConfig, service: str) -> bool:
    return config.services.get(service, {}).get("replicas", 1) != 0


def _check_agreement(config: MeshConfig, cards: Mapping[str, Card]) -> None:
    """The plugin that decides how KV is held is the same wherever KV goes."""
    for hook, services in AGREEING_HOOKS.items():
        chosen = {s: next((p for p in reversed(config.plugin_slugs(s)) if hook in cards[p].hooks), "") for s in services if _runs(config, s)}
        if len(set(chosen.values())) < 2:
            continue
        owner, slug = next((s, p) for s, p in chosen.items() if p)
        other = next(s for s, p in chosen.items() if p != slug)
        has = f"has plugin {chosen[other]!r} for it" if chosen[other] else "knows no such plugin"
        raise ConfigError(
            f"{config.at(f'services.{owner}.plugins', slug)}: {owner} holds KV in the form of plugin {slug!r}, but {other} {has}; "
            f"both need the same one, as the last that implements {hook}", plugin=slug,
        )  # fmt: skip


def _check_weight_formats(config: MeshConfig, cards: Mapping[str, Card]) -> None:
    """Who asks for a plugin's weight format has the plugin, and so has the weightstore that packs it. A format is named like
    the plugin, or the card provides "weight-format:<name>"."""
    wanted = {s: str(config.services.get(s, {}).get("weight_format", "")) for s in WEIGHT_FORMAT_USERS if _runs(config, s)}
    for service, name in wanted.items():
        if not name:
            continue
        where = config.at(f"services.{service}.weight_format")
        for place in (service, "weightstore"):
            having = [p for p in config.plugin_slugs(place) if "register_weight_formats" in cards[p].hooks]
            if not any(name == p or f"weight-format:{name}" in cards[p].provides for p in having):
                raise ConfigError(f"{where} is {name!r}, but no plugin in [services.{place}] plugins provides that format", key=f"services.{service}.weight_format")
    if len(set(wanted.values())) > 1:
        lossy = [c for c in cards.values() if c.fidelity != "exact" and any(n in (c.slug, *(p.removeprefix("weight-format:") for p in c.provides)) for n in wanted.values() if n)]
        if lossy:
            service = next(s for s, n in wanted.items() if n)
            raise ConfigError(
                f"{config.at(f'services.{service}.weight_format')} differs between {' and '.join(f'{s} ({n!r})' for s, n in wanted.items())}: "
                f"the weights of plugin {lossy[0].slug!r} are not those of the model, so KV of one would be wrong for the other", plugin=lossy[0].slug,
            )  # fmt: skip


def as_row(card: Card) -> dict[str, Any]:
    """A card as plain data, for --json and tables."""
    return card.model_dump(mode="json")
