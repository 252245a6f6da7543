"""`plugmesh plugins`: the cards of what is installed and where the configuration switches it on."""

from __future__ import annotations

import pathlib

from plugmesh import cards
from plugmesh import config as configuration
from plugmesh.cli import output


def run_plugins(*, as_json: bool, config: pathlib.Path | None) -> None:
    """Raises ConfigError when the configuration names plugins that do not fit together."""
    settings = configuration.load(config)
    cards.check_mesh(settings)
    installed = cards.installed()
    users: dict[str, list[str]] = {slug: [] for slug in installed}
    for service in settings.services:
        for slug in settings.plugin_slugs(service):
            users.setdefault(slug, []).append(service)
    if as_json:
        output.print_json([{**cards.as_row(card), "loaded_in": users[slug]} for slug, card in installed.items()])
        return
    if not installed:
        output.out.print("no plugins are installed; each is a folder plugins/plugmesh_<slug>")
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("plugin", "version", "output", "services", "switched on in", "what it does"):
        table.add_column(title, overflow="fold", no_wrap=title in ("plugin", "version"))
    fidelity = {"exact": "[green]exact[/]", "dist": "[green]same distribution[/]", "lossy": "[yellow]approximate[/]", "n/a": "[dim]n/a[/]"}
    for slug, card in installed.items():
        loaded = ", ".join(users[slug])
        table.add_row(
            f"[bold]{slug}[/]", card.version, fidelity[card.fidelity], ", ".join(card.services), f"[green]{loaded}[/]" if loaded else "[dim]nowhere[/]",
            card.summary + (f"\n[dim]{card.paper}[/]" if card.paper else ""),
        )  # fmt: skip
    output.out.print(table)
    output.out.print('[dim]switch one on with  [services.<service>] plugins = \\["<plugin>"]  in mesh.toml; its settings go below [plugins.<plugin>][/]')
