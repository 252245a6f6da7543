"""The facts of a card as Markdown, and their place in a plugin's README: between two markers, rendered, the prose around them untouched."""

from __future__ import annotations

import re

from plugmesh.cards import Card

BEGIN, END = "<!-- card -->", "<!-- /card -->"
FIDELITY = {
    "exact": "exact: the same tokens as without it",
    "dist": "dist: other tokens, from the same distribution",
    "lossy": "lossy",
    "n/a": "n/a: it does not touch what the model says",
}


def rows(card: Card) -> list[tuple[str, str]]:
    """What the card states, but for its settings: (fact, value), empty ones left out."""
    fidelity = FIDELITY[card.fidelity]
    if card.loss is not None:
        fidelity += f": {card.loss.metric} up to {card.loss.bound:g} ({card.loss.setting})"
    claim = f"{card.claim.metric} {card.claim.value:g} ({card.claim.setting})" if card.claim else ""
    facts = [
        ("plugin", f"{card.slug} {card.version}"),
        ("output", fidelity),
        ("source", card.paper),
        ("claim of the source", claim),
        ("services", ", ".join(card.services)),
        ("all of them together", ", ".join(card.all_of)),
        ("hooks", ", ".join(card.hooks)),
        ("devices", ", ".join(card.device)),
        ("needs", ", ".join(card.requirements)),
        ("provides", ", ".join(card.provides)),
        ("requires", ", ".join(card.requires)),
        ("conflicts with", ", ".join(card.conflicts)),
    ]
    return [(name, value) for name, value in facts if value]


def markdown(card: Card) -> str:
    """The block between the markers, without them."""
    lines = ["| card | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows(card))]
    if card.settings:
        lines += ["", "| setting | what it does |", "|---|---|", *(f"| `{name}` | {_cell(text)} |" for name, text in card.settings.items())]
    return "\n".join(lines)


def updated(page: str, card: Card) -> str:
    """A README with the facts of this card; they come behind the first paragraph when there is no place for them yet."""
    block = f"{BEGIN}\n{markdown(card)}\n{END}"
    if BEGIN in page and END in page:
        return re.sub(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, page, count=1, flags=re.S)
    parts = page.rstrip("\n").split("\n\n")
    at = 2 if parts[0].startswith("#") and "\n" not in parts[0].strip() else 1
    return "\n\n".join([*parts[:at], block, *parts[at:]]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
