"""`plugmesh plugins`: the cards of what is installed, where the configuration switches it on, and one card in full."""

from __future__ import annotations

import pathlib

from rich.markup import escape

from plugmesh import card_facts, cards
from plugmesh import config as configuration
from plugmesh.cli import output

FIDELITY = {"exact": "[green]exact[/]", "dist": "[green]same distr.[/]", "lossy": "[yellow]approximate[/]", "n/a": "[dim]n/a[/]"}


def run_plugins(slug: str = "", *, as_json: bool, config: pathlib.Path | None) -> None:
    """Raises ConfigError when the configuration names plugins that do not fit together, or there is no plugin `slug`."""
    settings = configuration.load(config)
    cards.check_mesh(settings)
    services = list(dict.fromkeys([*settings.services, "grammar", "decode"]))  # the two have grammar engines without being told
    if slug:
        card = cards.read(slug, where="plugmesh plugins")
        users = [s for s in services if slug in cards.loaded_slugs(settings, s)]
        _print_one(card, users, as_json=as_json)
        return
    installed = cards.installed()
    loaded: dict[str, list[str]] = {s: [] for s in installed}
    for service in services:
        for name in cards.loaded_slugs(settings, service):
            loaded.setdefault(name, []).append(service)
    if as_json:
        output.print_json([{**cards.as_row(card), "loaded_in": loaded[name]} for name, card in installed.items()])
        return
    if not installed:
        output.out.print("no plugins are installed; each is a folder plugins/plugmesh_<slug>, and plugmesh new-plugin makes one")
        return
    _print_table(installed, loaded)


def run_render(*, check: bool = False) -> list[pathlib.Path]:
    """Writes the facts of every card into the README beside it; the pages that were not up to date.

    Args:
        check: Write nothing.
    """
    stale = []
    for slug, card in cards.installed().items():
        folder = cards.folder_of(slug)
        page = folder / "README.md" if folder is not None else None
        if page is None or not page.is_file():
            continue
        text = page.read_text()
        new = card_facts.updated(text, card)
        if new != text:
            stale.append(page)
            if not check:
                page.write_text(new)
    return stale


def _print_table(installed: dict[str, cards.Card], loaded: dict[str, list[str]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("plugin", "output", "services", "switched on", "what it does"):
        table.add_column(title, overflow="fold", no_wrap=title == "plugin", ratio=1 if title == "what it does" else None)
    for slug, card in installed.items():
        users = ", ".join(loaded[slug])
        table.add_row(
            f"[bold]{slug}[/]", FIDELITY[card.fidelity], ", ".join(card.services), f"[green]{users}[/]" if users else "[dim]nowhere[/]",
            escape(card.summary),
        )  # fmt: skip
    output.out.print(table)
    output.out.print("[dim]one in full: plugmesh plugins PLUGIN; figures with and without it: plugmesh ab PLUGIN[/]")
    example = '[services.<service>] plugins = ["<plugin>"]'
    output.out.print(f"[dim]switch one on in mesh.toml: {escape(example)}; its settings go below {escape('[plugins.<plugin>]')}[/]")


def _print_one(card: cards.Card, users: list[str], *, as_json: bool) -> None:
    folder = cards.folder_of(card.slug)
    assert folder is not None  # its card was read from there
    if as_json:
        output.print_json({**cards.as_row(card), "loaded_in": users, "folder": str(folder)})
        return
    from rich.table import Table

    out = output.out
    out.print(f"[bold]{card.slug}[/] {card.version}   {FIDELITY[card.fidelity]}\n{escape(card.summary)}\n")
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in card_facts.rows(card)[1:]:
        facts.add_row(name, escape(value))
    facts.add_row("switched on in", ", ".join(users) or "nowhere")
    facts.add_row("page", str(folder / "README.md"))
    out.print(facts)
    if card.settings:
        out.print(f"\n[plugins.{card.slug}]", markup=False, style="bold")
        settings = Table(box=None, show_header=False, pad_edge=False)
        settings.add_column(no_wrap=True)
        settings.add_column(overflow="fold", style="dim")
        for name, text in card.settings.items():
            settings.add_row(name, escape(text))
        out.print(settings)
    tables = "\n".join(f'[services.{s}]\nplugins = ["{card.slug}"]' for s in (card.all_of or card.services) if s != "tools")
    if tables:
        out.print(f"\n[dim]switch it on in mesh.toml:[/]\n{escape(tables)}")
