"""The card against the code: hooks, settings and version are those that the package has, and loading it stays cheap."""

from __future__ import annotations

import importlib
import pathlib
import subprocess
import sys
from typing import Any, ClassVar

import pydantic
import pytest

from plugmesh import cards, hookspecs
from plugmesh.docs.hooks import runs_in

LIGHT = ("torch", "triton", "transformers", "scipy", "pandas")  # what importing `plugin.py` must not cost a process that only reads hooks


class CardConformance:
    """Bound to a plugin by `slug`, like the suites of records."""

    slug: ClassVar[str] = ""

    @pytest.fixture
    def card(self) -> cards.Card:
        return cards.read(self.slug)

    @pytest.fixture
    def module(self) -> Any:
        return importlib.import_module(f"{cards.package_of(self.slug)}.plugin")

    def test_the_card_names_the_hooks_that_the_plugin_implements(self, card: cards.Card, module: Any) -> None:
        specs = {n for n, f in vars(hookspecs).items() if getattr(f, "plugmesh_spec", None) is not None}
        implemented = {n for n, f in vars(module).items() if getattr(f, "plugmesh_impl", None) is not None}

        assert implemented <= specs
        assert sorted(implemented) == sorted(card.hooks)

    def test_every_hook_runs_in_a_service_of_the_card_and_every_service_runs_a_hook(self, card: cards.Card) -> None:
        calls = {hook: set(runs_in(hook)) for hook in card.hooks}

        assert [h for h, services in calls.items() if not services & set(card.services)] == []
        assert [s for s in card.services if not any(s in services for services in calls.values())] == []

    def test_the_card_explains_every_setting(self, card: cards.Card, module: Any) -> None:
        model = getattr(module, "Settings", None)
        fields = set(model.model_fields) if isinstance(model, type) and issubclass(model, pydantic.BaseModel) else set()

        assert fields == set(card.settings)
        assert all(text.strip() for text in card.settings.values())

    def test_the_defaults_are_valid_settings(self, module: Any) -> None:
        model = getattr(module, "Settings", None)
        if model is not None:
            assert model.model_validate(model().model_dump()) == model()

    def test_the_package_has_the_version_of_the_card(self, card: cards.Card) -> None:
        assert importlib.import_module(cards.package_of(self.slug)).__version__ == card.version

    def test_a_lossy_plugin_says_what_it_loses(self, card: cards.Card) -> None:
        assert (card.loss is not None) == (card.fidelity == "lossy")

    def test_the_readme_shows_the_facts_of_the_card(self, card: cards.Card) -> None:
        from plugmesh import card_facts

        page = pathlib.Path(next(iter(importlib.import_module(cards.package_of(self.slug)).__path__))) / "README.md"

        assert card_facts.updated(page.read_text(), card) == page.read_text(), "plugmesh plugins --render writes the facts"

    def test_reading_the_hooks_imports_nothing_heavy(self) -> None:
        name = f"{cards.package_of(self.slug)}.plugin"
        code = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}; import {name}; print(*set({LIGHT!r}) & sys.modules.keys())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)

        assert (done.returncode, done.stdout.split(), done.stderr[-1000:]) == (0, [], "")
