"""What the pages for authors of plugins say is what the code does."""

from __future__ import annotations

import pathlib
import re
import tomllib

import pytest

from plugmesh import card_facts, cards, hookspecs, records
from plugmesh.cli.plugins import run_render
from plugmesh.docs import hooks
from plugmesh.testing import conformance

ROOT = pathlib.Path(__file__).resolve().parents[2]
AUTHORING = ROOT / "docs" / "plugins" / "authoring.md"


def test_the_page_of_hooks_is_rendered_from_the_code() -> None:
    assert hooks.PAGE.read_text() == hooks.render(), "python -m plugmesh.docs.hooks --write"


@pytest.mark.parametrize("hook", hooks.hooks(), ids=lambda h: h.name)
def test_every_hook_fills_its_slots(hook: hooks.Hook) -> None:
    wanted = {"Runs in", "When", "How often", "Combines", "Returns", "Raising", "Example"} | ({"Arguments"} if hook.signature.startswith("(c") else set())

    assert wanted - set(hook.slots) == set()
    assert hook.services, hook.slots["Runs in"]
    assert hook.name.split("_")[0] in ("register", "select", "on")
    assert (hook.record is not None) == hook.name.startswith("register_")
    assert hook.name.startswith("select_") or hook.name in (hookspecs.__doc__ or ""), "the timeline on top lacks it"


@pytest.mark.parametrize("hook", hooks.hooks(), ids=lambda h: h.name)
def test_the_example_of_a_hook_implements_it(hook: hooks.Hook) -> None:
    path = ROOT / hook.slots["Example"]
    if path.parts[-3] == "plugins" and not (path.parent / "README.md").is_file():
        pytest.skip("the plugin that the hook came with is not in this tree, or not ready")

    assert re.search(rf"def {hook.name}\(", path.read_text())


def test_every_record_of_a_hook_is_on_the_page_with_all_its_fields() -> None:
    page = hooks.render()
    for h in hooks.hooks():
        if h.record is not None:
            section = page.split(f"### {h.record.__name__}\n")[1].split("\n### ")[0]
            assert all(f"\n{name}: " in section for name in h.record.__dataclass_fields__), h.record


def test_the_tutorial_names_what_there_is() -> None:
    text = AUTHORING.read_text()
    for name in re.findall(r"`(register_\w+)`", text):
        assert hasattr(hookspecs, name)
    for name in re.findall(r"\b(\w+Record)\(", text):
        assert hasattr(records, name)
    for name in re.findall(r"\b([A-Z]\w+Conformance)\b", text):
        assert name == "TestConformance" or hasattr(conformance, name)
    card = tomllib.loads(re.search(r"```toml\n(slug.*?)```", text, re.S)[1])  # type: ignore[index]
    assert set(cards.Card.model_validate(card).model_dump()) >= set(card)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links and all((AUTHORING.parent / link).exists() for link in links)


def test_the_facts_in_every_readme_are_those_of_the_card() -> None:
    assert run_render(check=True) == [], "plugmesh plugins --render"


def test_rendering_keeps_the_prose_and_is_done_once() -> None:
    facts = {"slug": "t_page", "version": "0.1", "summary": "made by a test", "services": ("decode",), "hooks": (), "fidelity": "exact"}
    card = cards.Card(**facts, settings={"weight": "with a | in it"})
    page = "# plugmesh_t_page\n\nWhat it is.\n\n**How.** Prose with | and \\1.\n"
    once = card_facts.updated(page, card)
    changed = card_facts.updated(once, card.model_copy(update={"version": "9.9"}))

    assert card_facts.updated(once, card) == once
    assert "t_page 9.9" in changed and "t_page 9.9" not in once
    assert re.sub(r"<!-- card -->.*<!-- /card -->\n\n", "", once, flags=re.S) == page
