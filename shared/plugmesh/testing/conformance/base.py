"""What the suites have in common: the plugin loaded by the real host, its record, and how much memory hangs on an object."""

from __future__ import annotations

import gc
import types
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from plugmesh import cards
from plugmesh.config import MeshConfig
from plugmesh.docs.hooks import runs_in
from plugmesh.errors import ConfigError
from plugmesh.host import PluginHost


class RecordConformance:
    """Base of every suite; a suite sets `kind`, a plugin's test sets the rest.

    Attributes:
        kind: Of the hook: "schedulers" for `register_schedulers`.
        slug: The plugin.
        settings: Its table `[plugins.<slug>]`.
        name: Which of its records is tested; empty for the one that is registered last.
    """

    kind: ClassVar[str]
    slug: ClassVar[str] = ""
    settings: ClassVar[Mapping[str, Any]] = {}
    name: ClassVar[str] = ""

    @pytest.fixture
    def card(self) -> cards.Card:
        return cards.read(self.slug)

    @pytest.fixture
    def host(self, card: cards.Card) -> PluginHost:
        """The plugin alone, loaded as a service loads it."""
        return self.load(card, self.settings)

    @pytest.fixture
    def record(self, host: PluginHost) -> Any:
        """A record fresh from its hook."""
        return self.pick(host)

    @classmethod
    def load(cls, card: cards.Card, settings: Mapping[str, Any]) -> PluginHost:
        """A new host, for tests that need two of them."""
        config = MeshConfig(plugins={cls.slug: dict(settings)} if settings else {})
        return PluginHost.load([cls.slug], config, service=cls.service_of(card))

    @classmethod
    def service_of(cls, card: cards.Card) -> str:
        """The first service of the card in which this suite's hook runs."""
        services = runs_in(f"register_{cls.kind}")
        found = [s for s in card.services if s in services]
        assert found, f"register_{cls.kind} runs in {', '.join(services)}, but the card of {card.slug!r} names {', '.join(card.services)}"
        return found[0]

    @classmethod
    def pick(cls, host: PluginHost) -> Any:
        records = host.records(cls.kind)
        assert records, f"plugin {cls.slug!r} registers no {cls.kind}"
        return next(r for r in records if r.name == cls.name) if cls.name else records[-1]

    # -- what holds for records of every kind -------------------------------------------------------------------------

    def test_the_records_name_stays_the_same_from_load_to_load(self, card: cards.Card, record: Any) -> None:
        again = self.pick(self.load(card, self.settings))

        assert record.name == again.name
        assert record.name

    def test_a_setting_that_does_not_exist_is_refused_with_its_name(self, card: cards.Card) -> None:
        with pytest.raises(ConfigError, match=f"plugins.{self.slug}.no_such_setting"):
            self.load(card, {**self.settings, "no_such_setting": 1}).records(self.kind)


def num_reachable(root: object) -> int:
    """Objects that hang on `root`, without code, classes and modules: grows when something is kept that should not be."""
    skipped = (type, types.ModuleType, types.BuiltinFunctionType, types.CodeType, types.FrameType)
    seen: set[int] = set()
    num_keys = 0  # strings as keys are no referents of their dictionary
    todo: list[object] = [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, skipped):
            continue
        seen.add(id(item))
        num_keys += len(item) if isinstance(item, dict) else 0
        if isinstance(item, types.MethodType):
            todo.append(item.__self__)
        elif isinstance(item, types.FunctionType):  # what it closes over, not the globals of its module
            todo.extend(item.__closure__ or ())
        else:
            todo.extend(gc.get_referents(item))
    return len(seen) + num_keys
