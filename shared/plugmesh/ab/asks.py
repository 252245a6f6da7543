"""Requests that make use of plugins, as their cards name them: each must be answered, and what a request cannot use at once is told."""

from __future__ import annotations

import itertools
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from plugmesh.cards import Card
from plugmesh.errors import FailedPrecondition, Unavailable

QUESTION = "What is 17 + 5? Answer with the number."


def asks_of(cards: Sequence[Card], url: str, model: str) -> dict[frozenset[str], str]:
    """Asks for every plugin with a request of its own, alone and with every other.

    Returns: Slugs whose keys one request may not have together, with the gateway's own words.

    Raises:
        FailedPrecondition: The request of one alone is refused, or its answer is empty.
        Unavailable: No answer.
    """
    using = [c for c in cards if c.ab.request]
    for card in using:
        status, text = post(url, model, card.ab.request)
        if status != 200 or not text:
            raise FailedPrecondition(f"the request of {card.slug} got status {status}: {text[:300]}")
    refused = {}
    for a, b in itertools.combinations(using, 2):
        if not a.ab.request.keys() & b.ab.request.keys():
            status, text = post(url, model, {**a.ab.request, **b.ab.request})
            if status not in (200, 400) or not text:
                raise FailedPrecondition(f"a request of {a.slug} and {b.slug} got status {status}: {text[:300]}")
            if status == 400:
                refused[frozenset((a.slug, b.slug))] = f"one request cannot use both: {text}"
    return refused


def post(url: str, model: str, keys: Mapping[str, Any]) -> tuple[int, str]:
    """Status, and the answer's text or the error's message."""
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24, "temperature": 0, **keys}
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})  # noqa: S310 - a mesh of our own
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:  # noqa: S310 - as above
            return 200, str(json.load(reply)["choices"][0]["message"]["content"] or "")
    except urllib.error.HTTPError as e:
        try:
            return e.code, str(json.load(e)["error"]["message"])
        except (ValueError, LookupError, TypeError):
            return e.code, ""
    except (OSError, ValueError, LookupError) as e:
        raise Unavailable(f"the mesh does not answer: {type(e).__name__}") from e
