"""The plugin host of one process: loads what the configuration names, collects records, isolates observers.

Built-in behaviour comes through the same door: a service registers its own defaults with `register_builtin` and
then asks for records like everybody else's.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pluggy
import pydantic
import structlog

from plugmesh import cards as card_files
from plugmesh import hookspecs
from plugmesh.config import MeshConfig
from plugmesh.docs.hooks import record_of
from plugmesh.errors import ConfigError, PluginError, PlugmeshError
from plugmesh.records import HandOver
from plugmesh.watchdog import WATCHDOG, Hung

log = structlog.get_logger()

S = TypeVar("S", bound=pydantic.BaseModel)

SLOW_START_S = 10.0   # importing, registering and building are only watched: profiling and loading may take their time
REQUEST_LIMIT_S = 2.0 # for a call that holds up an event loop; below a lease's life
STEP_LIMIT_S = 10.0   # for a call that holds up an engine's step
STEP_METHODS: Mapping[str, tuple[str, ...]] = {"schedulers": ("schedule",), "drafts": ("propose", "observe"), "prompt_filters": ("layers", "select")}
ANSWERS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {  # methods of records themselves, and what they may return
    "kv_hand_overs": ("plan", lambda answer: isinstance(answer, HandOver)),
    "prefill_policies": ("choose", lambda answer: isinstance(answer, str) and answer in ("local", "remote")),
}
ORDER_METHODS = ("add", "discard", "touch", "left", "victim", "coldest")
NEEDED_METHODS: Mapping[str, tuple[str, ...]] = {**STEP_METHODS, "evictions": ORDER_METHODS}  # without them, what was built is of no use
BUILT_ONCE = ("schedulers", "drafts", "routers", "admission", "strategies", "kv_codecs", "prompt_filters", "evictions")  # when building fails, the process cannot start


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
        self._owners: dict[str, str] = {}  # record name to plugin
        self._manager = pluggy.PluginManager("plugmesh")
        self._manager.add_hookspecs(hookspecs)

    @classmethod
    def load(cls, slugs: Sequence[str], config: MeshConfig, *, service: str) -> PluginHost:
        """Imports and registers the named plugins.

        Raises:
            ConfigError: Unknown plugin, conflict, missing requirement, failing import, a bad setting (of the model that `plugin.py`
                calls Settings), or an implementation of a hook that does not exist; the message holds the plugin and the config line.
        """
        host = cls(service, config)
        cards = {slug: card_files.read(slug, where=host.where(slug)) for slug in slugs}
        card_files.check_service(service, list(slugs), cards, at=host.where)
        for slug in slugs:
            name = f"{card_files.package_of(slug)}.plugin"
            try:
                with WATCHDOG.tell(f"plugin {slug}: import", SLOW_START_S):
                    module = importlib.import_module(name)
            except (Exception, SystemExit) as e:
                raise ConfigError(f"{host.where(slug)}: plugin {slug!r} failed to import: {type(e).__name__}: {e}", plugin=slug) from e
            model = getattr(module, "Settings", None)
            if isinstance(model, type) and issubclass(model, pydantic.BaseModel):
                config.plugin_settings(slug, model)  # now, rather than when a hook asks for them: nothing has been started yet
            host.register(slug, module, version=cards[slug].version)
        return host

    def where(self, slug: str) -> str:
        """The line of the configuration that names a plugin for this service."""
        return self.config.at(f"services.{self.service}.plugins", slug)

    def register(self, slug: str, plugin: object, *, version: str = "") -> None:
        """Adds one plugin object. Raises ConfigError when it implements a hook that does not exist."""
        try:
            self._manager.register(plugin, name=slug)
            self._manager.check_pending()
        except pluggy.PluginValidationError as e:
            raise ConfigError(f"{self.where(slug)}: plugin {slug!r}: {e}", plugin=slug) from e
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
                with WATCHDOG.tell(f"plugin {name}: register_{kind}", SLOW_START_S):
                    records = impl.function(*[{"context": context}[a] for a in impl.argnames])
            except PlugmeshError:
                raise
            except Exception as e:
                raise ConfigError(f"{self._named(name)}: register_{kind} raised {type(e).__name__}: {e}", plugin=name) from e
            found.extend(self._checked(kind, name, records))
        seen: set[str] = set()
        for record in found:
            if record.name in seen:
                where = self.where(self._owners.get(record.name, ""))
                raise ConfigError(f"{where}: two {kind} are named {record.name!r}")
            seen.add(record.name)
        return found

    def _named(self, plugin: str) -> str:
        return f"the {self.service} service's own defaults" if plugin.startswith("core:") else f"{self.where(plugin)}: plugin {plugin!r}"

    def _checked(self, kind: str, plugin: str, records: Any) -> list[Any]:
        """A hook's answer as a list of records of the hook's type, their factories guarded. Raises ConfigError for anything else."""
        wanted = record_of(f"register_{kind}")
        if records is None:
            return []
        if not isinstance(records, list | tuple):
            raise ConfigError(f"{self._named(plugin)}: register_{kind} returned {type(records).__name__}, not a list of records", plugin=plugin)
        for record in records:
            if wanted is not None and not isinstance(record, wanted):
                raise ConfigError(f"{self._named(plugin)}: register_{kind} returned a {type(record).__name__} where a {wanted.__name__} belongs", plugin=plugin)
            if not isinstance(record.name, str) or not record.name:
                raise ConfigError(f"{self._named(plugin)}: register_{kind} returned a record without a name", plugin=plugin)
        if plugin.startswith("core:"):
            return list(records)
        self._owners.update({record.name: plugin for record in records})
        return [self._guarded(kind, plugin, record) for record in records]

    def _guarded(self, kind: str, plugin: str, record: Any) -> Any:
        """The record with a factory that names the plugin when it fails, whose objects cannot hold up a step for ever and whose answers make sense."""
        if kind in ANSWERS:
            method, is_answer = ANSWERS[kind]
            ask = getattr(record, method)

            def checked(*args: Any) -> Any:
                answer = ask(*args)
                if not is_answer(answer):
                    raise PluginError(f"plugin {plugin!r} failed on this request: its {method} gave a {type(answer).__name__} of no use", plugin=plugin)
                return answer

            return dataclasses.replace(record, **{method: checked})
        build = getattr(record, "build", None)
        if kind not in BUILT_ONCE or not callable(build):
            return record

        def guarded(*args: Any, **kwargs: Any) -> Any:
            what = f"{self._named(plugin)}: building {record.name!r}"
            try:
                with WATCHDOG.tell(what, SLOW_START_S):
                    built = build(*args, **kwargs)
            except PlugmeshError:
                raise
            except Exception as e:
                raise ConfigError(f"{what} raised {type(e).__name__}: {e}", plugin=plugin) from e
            if built is None:
                raise ConfigError(f"{what} gave nothing", plugin=plugin)
            methods = STEP_METHODS.get(kind, ())
            lacking = [m for m in NEEDED_METHODS.get(kind, ()) if not callable(getattr(built, m, None))]
            if lacking:
                raise ConfigError(f"{what} gave a {type(built).__name__} without a method {lacking[0]!r}", plugin=plugin)
            return _Watched(built, f"plugin {plugin}", methods) if methods else built

        return dataclasses.replace(record, build=guarded)

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
                WATCHDOG.call(f"plugin {impl.plugin_name}: {hook}", REQUEST_LIMIT_S, impl.function, *[kwargs[a] for a in impl.argnames])
            except Exception as e:
                self.num_observer_errors += 1
                log.warning("plugin.observer_failed", plugin=impl.plugin_name, hook=hook, error=type(e).__name__)

    def guard(self, plugin: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a record's method for one request, from an event loop.

        Args:
            plugin: The record's name, or the plugin's.

        Raises:
            PluginError: It raised anything but a PlugmeshError, or did not come back within REQUEST_LIMIT_S; names the plugin.
        """
        plugin = self._owners.get(plugin, plugin)
        try:
            return WATCHDOG.call(f"plugin {plugin}", REQUEST_LIMIT_S, call, *args, **kwargs)
        except PlugmeshError:
            raise
        except Hung as e:
            raise PluginError(f"plugin {plugin!r} took longer than {REQUEST_LIMIT_S:g} s on this request", plugin=plugin) from e
        except Exception as e:
            log.warning("plugin.failed", plugin=plugin, error=type(e).__name__)
            raise PluginError(f"plugin {plugin!r} failed on this request", plugin=plugin) from e

    def _settings_reader(self, slug: str) -> Callable[[type[Any]], Any]:
        return lambda model: self.config.plugin_settings(slug, model)


class _Watched:
    """An engine's plugin object whose step methods are ended when they do not come back; after that they are not called any more."""

    def __init__(self, inner: Any, plugin: str, methods: Sequence[str]) -> None:
        self._inner = inner
        self._hung = ""
        for name in methods:
            setattr(self, name, types.MethodType(self._watch(getattr(inner, name), f"{plugin}: {name}"), self))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @staticmethod
    def _watch(method: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(self: _Watched, *args: Any) -> Any:
            if self._hung:
                raise Hung(self._hung)
            try:
                return WATCHDOG.call(what, STEP_LIMIT_S, method, *args)
            except Hung as e:
                self._hung = str(e)
                raise

        return call
