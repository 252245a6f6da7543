"""The plugin host of one process: loads what the configuration names, collects records, isolates observers.

Built-in behaviour comes through the same door: a service registers its own defaults with `register_builtin` and
then asks for records like everybody else's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pluggy
import pydantic
import structlog

from plugmesh import cards as card_files
from plugmesh import hookspecs
from plugmesh.config import MeshConfig
from plugmesh.errors import ConfigError, PluginError, PlugmeshError

log = structlog.get_logger()

S = TypeVar("S", bound=pydantic.BaseModel)


@dataclass(frozen=True, slots=True)
class PluginContext:
    """What a `register_*` hook learns; narrow on purpose.

    `settings(Model)` gives `[plugins.<slug>]` as the plugin's own settings model and is the only way to it.
    """

    service: str
    mesh_name: str
    settings: Callable[[type[Any]], Any]


class PluginHost:
    """The plugins of one process.

    `slugs` holds them in the order of the configuration; `versions` slug to version for the lease.
    """

    def __init__(self, service: str, config: MeshConfig) -> None:
        self.service = service
        self.config = config
        self.slugs: list[str] = []
        self.versions: dict[str, str] = {}
        self.num_observer_errors = 0
        self._manager = pluggy.PluginManager("plugmesh")
        self._manager.add_hookspecs(hookspecs)

    @classmethod
    def load(cls, slugs: Sequence[str], config: MeshConfig, *, service: str) -> PluginHost:
        """Imports and registers the named plugins.

        Raises:
            ConfigError: Unknown plugin, conflict, missing requirement, failing import, or an implementation of a hook
                that does not exist; the message holds the plugin and the config line.
        """
        host = cls(service, config)
        where = f"[services.{service}] plugins"
        cards = {slug: card_files.read(slug, where=where) for slug in slugs}
        card_files.check_service(service, list(slugs), cards)
        for slug in slugs:
            name = f"{card_files.package_of(slug)}.plugin"
            try:
                module = importlib.import_module(name)
            except Exception as e:
                raise ConfigError(f"{where}: plugin {slug!r} failed to import: {type(e).__name__}: {e}", plugin=slug) from e
            host.register(slug, module, version=cards[slug].version)
        return host

    def register(self, slug: str, plugin: object, *, version: str = "") -> None:
        """Adds one plugin object. Raises ConfigError when it implements a hook that does not exist."""
        try:
            self._manager.register(plugin, name=slug)
            self._manager.check_pending()
        except pluggy.PluginValidationError as e:
            raise ConfigError(f"[services.{self.service}] plugins: plugin {slug!r}: {e}", plugin=slug) from e
        self.slugs.append(slug)
        self.versions[slug] = version

    def register_builtin(self, plugin: object) -> None:
        """Adds the service's own defaults; they come first in every list of records."""
        self._manager.register(plugin, name=f"core:{id(plugin)}")

    def records(self, kind: str) -> list[Any]:
        """Records of `register_<kind>`, built-in ones first, then in the order of the configuration.

        Raises:
            ConfigError: A plugin raised, or two records have one name.
        """
        hook = getattr(self._manager.hook, f"register_{kind}")
        found: list[Any] = []
        impls = {impl.plugin_name: impl for impl in hook.get_hookimpls()}
        names = [n for n in impls if n.startswith("core:")] + [s for s in self.slugs if s in impls]
        for name in names:
            context = PluginContext(self.service, self.config.mesh.name, self._settings_reader(name))
            impl = impls[name]
            try:
                records = impl.function(*[{"context": context}[a] for a in impl.argnames])
            except PlugmeshError:
                raise
            except Exception as e:
                raise ConfigError(f"plugin {name!r}: register_{kind} raised {type(e).__name__}: {e}", plugin=name) from e
            found.extend(records or [])
        seen: set[str] = set()
        for record in found:
            if record.name in seen:
                raise ConfigError(f"[services.{self.service}] plugins: two {kind} are named {record.name!r}")
            seen.add(record.name)
        return found

    def last(self, kind: str) -> Any | None:
        """The record registered last, or None: what "a plugin replaces the default" means."""
        records = self.records(kind)
        return records[-1] if records else None

    def select(self, choice: str, names: list[str]) -> str:
        """`select_<choice>`: the first plugin's answer, else the last name. Raises ConfigError on an unknown answer."""
        answer = getattr(self._manager.hook, f"select_{choice}")(names=names)
        if answer is None:
            return names[-1]
        if answer not in names:
            raise ConfigError(f"select_{choice} chose {answer!r}, which is not one of {', '.join(names)}")
        return answer

    def observe(self, hook: str, **kwargs: Any) -> None:
        """Calls every implementation of an `on_*` hook; one that raises is logged and counted, the others still run."""
        for impl in getattr(self._manager.hook, hook).get_hookimpls():
            try:
                impl.function(*[kwargs[a] for a in impl.argnames])
            except Exception as e:
                self.num_observer_errors += 1
                log.warning("plugin.observer_failed", plugin=impl.plugin_name, hook=hook, error=type(e).__name__)

    def guard(self, plugin: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a record's method for one request; anything but a PlugmeshError becomes a PluginError with the plugin's name."""
        try:
            return call(*args, **kwargs)
        except PlugmeshError:
            raise
        except Exception as e:
            log.warning("plugin.failed", plugin=plugin, error=type(e).__name__)
            raise PluginError(f"plugin {plugin!r} failed on this request", plugin=plugin) from e

    def _settings_reader(self, slug: str) -> Callable[[type[Any]], Any]:
        return lambda model: self.config.plugin_settings(slug, model)
