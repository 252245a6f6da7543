"""Arrays as grammar rules: an automaton over the place in the array, and over what has been counted or used."""

from __future__ import annotations

from collections import deque
from itertools import product
from typing import TYPE_CHECKING

from plugmesh.errors import LimitExceeded

from .documents import refused
from .grammar import NEVER, SPACE, Part, Ref, Repeat, Text, alt, seq
from .values import FALSE, TRUE, Arrays, Expr, both, canonical, negation

if TYPE_CHECKING:
    from .lowering import Lowering

_MAX_PLACES = 2000
_MAX_STATES = 600
_MAX_UNIQUE = 8


def array_part(low: Lowering, record: Arrays, prefix: str) -> Part:
    """The text of one kind of array; NEVER when there is none."""
    n = low.normaliser
    if record.unique is False:
        raise refused("arrays of which two items are equal cannot be enforced", "uniqueItems", low.blame("uniqueItems"))
    boundary = max([0, *(behind if behind is not None else first for first, behind, _ in record.every), *(first for first, *_ in record.counts)])
    if boundary > _MAX_PLACES:
        raise LimitExceeded(f"an array of {boundary} places with schemas of their own; the limit is {_MAX_PLACES}")

    def item(place: int) -> Expr:
        return both(*(part for first, behind, part in record.every if first <= place and (behind is None or place < behind)))

    # 1. How long it can be: items that cannot exist end it.
    most = record.most
    for place in range(boundary + 1):
        if (most is None or place < most) and n.is_empty(item(place)):
            most = place
            break
    least = record.least
    if most is not None and most < least:
        return NEVER
    if record.unique and (most is None or most > 1):
        return _unique(low, record, prefix, item, boundary, least, most)
    if record.counts:
        return _counting(low, record, prefix, item, boundary, least, most)
    return _plain(low, prefix, item, boundary, least, most)


def _plain(low: Lowering, prefix: str, item, boundary: int, least: int, most: int | None) -> Part:  # type: ignore[no-untyped-def]
    # From the boundary on all items are alike, and their number is a repetition. Built from the back.
    comma = seq(Text(","), SPACE)
    close = seq(SPACE, Text("]"))
    if boundary == 0:
        if most == 0:
            return seq(Text("["), SPACE, Text("]"))
        rest = low.value(item(0))
        filled = seq(rest, Repeat(seq(comma, rest), max(least - 1, 0), most - 1 if most is not None else None), close)
        return seq(Text("["), SPACE, filled if least > 0 else alt(filled, Text("]")))
    last = boundary if most is None else min(boundary, most)
    after: Part = close
    if most is None or most > boundary:
        rest = low.value(item(boundary))
        after = seq(Repeat(seq(comma, rest), max(least - boundary, 0), most - boundary if most is not None else None), close)
    for place in range(last - 1, -1, -1):
        here = low.value(item(place))
        body = seq(*((comma,) if place else ()), here, low.grammar.add(f"{prefix}p{place}", after))
        after = body if least > place else alt(body, close if place else Text("]"))
    if last == 0:
        after = Text("]")
    return seq(Text("["), SPACE, after)


def _counting(low: Lowering, record: Arrays, prefix: str, item, boundary: int, least: int, most: int | None) -> Part:  # type: ignore[no-untyped-def]
    counters = sorted(record.counts, key=repr)
    top = max(boundary, least, most or 0)

    def options(state: tuple[int, tuple[int, ...]]) -> list[tuple[Expr, tuple[int, tuple[int, ...]]]]:
        place, counts = state
        if most is not None and place >= most:
            return []
        choices: list[list[tuple[Expr, int]]] = []
        for (first, part, minimum, maximum), count in zip(counters, counts, strict=True):
            if place < first:
                choices.append([(TRUE, count)])
            elif maximum is None:
                # Only a least number: an item that matches may be counted or not, which saves the complement.
                choices.append([(TRUE, count)] if count >= minimum else [(part, count + 1), (TRUE, count)])
            elif count >= maximum:
                choices.append([(negation(part), count)])
            else:
                choices.append([(part, count + 1), (negation(part), count)])
        out = []
        for chosen in product(*choices):
            whole = both(item(min(place, boundary)), *(part for part, _ in chosen))
            if whole != FALSE and not low.normaliser.is_empty(whole):
                out.append((whole, (min(place + 1, top + 1) if most is not None or place < top else top, tuple(count for _, count in chosen))))
        return out

    def ends(state: tuple[int, tuple[int, ...]]) -> bool:
        place, counts = state
        return place >= least and all(count >= minimum for (_, _, minimum, _), count in zip(counters, counts, strict=True))

    return _automaton(low, prefix, (0, (0,) * len(counters)), options, ends)


def _automaton(low: Lowering, prefix: str, start, options, ends) -> Part:  # type: ignore[no-untyped-def]
    tails: dict[object, str] = {}
    todo: deque[object] = deque()

    def tail(state: object) -> Ref:
        if state not in tails:
            if len(tails) >= _MAX_STATES:
                raise LimitExceeded(f"an array's items need more than {_MAX_STATES} states")
            tails[state] = f"{prefix}t{len(tails)}"
            todo.append(state)
        return Ref(tails[state])

    first = [seq(low.value(part), tail(state)) for part, state in options(start)]
    while todo:
        state = todo.popleft()
        rows = [seq(Text(","), SPACE, low.value(part), tail(after)) for part, after in options(state)]
        if ends(state):
            rows.append(seq(SPACE, Text("]")))
        low.grammar.add(tails[state], alt(*rows) if rows else NEVER)
    if ends(start):
        first.append(Text("]"))
    return seq(Text("["), SPACE, alt(*first)) if first else NEVER


def _unique(low: Lowering, record: Arrays, prefix: str, item, boundary: int, least: int, most: int | None) -> Part:  # type: ignore[no-untyped-def]
    if record.counts:
        raise refused("together with contains", "uniqueItems", low.blame("uniqueItems"))
    # Only where the items' values can be listed: the states are the sets of used ones.
    known: dict[int, list[Expr]] = {}
    for place in range(boundary + 1):
        values = None if most is not None and place >= most else _listed(low, item(place))
        if values is None:
            if most is not None and place >= most:
                break
            raise refused(f"only over items of at most {_MAX_UNIQUE} listed scalar values", "uniqueItems", low.blame("uniqueItems"))
        known[place] = values
    last = max(known)

    def options(state):  # type: ignore[no-untyped-def]
        place, used = state
        if most is not None and place >= most:
            return []
        return [(("const", value), (place + 1, used | {value})) for value in known[min(place, last)] if value not in used]

    return _automaton(low, prefix, (0, frozenset()), options, lambda state: state[0] >= least)


def _listed(low: Lowering, expr: Expr) -> list[Expr] | None:
    values = low.normaliser.values(expr)
    if values.arrays or values.objects:
        return None
    found: list[Expr] = [canonical(None)] if values.null else []
    found += [canonical(value) for value in sorted(values.booleans)]
    if not values.strings.is_empty:
        texts = None if values.strings.dfa.accepts("") and not values.strings.dfa.arcs[0] else values.strings.settled().finite(_MAX_UNIQUE)
        if texts is None:
            return None
        found += [canonical(text) for text in texts]
    if not values.numbers.is_empty:
        from decimal import Decimal

        from .grammar import Regular
        from .lowering import number_part

        part = number_part(values.numbers)
        texts = part.dfa.finite(4 * _MAX_UNIQUE) if isinstance(part, Regular) else None
        if texts is None:
            return None
        found += sorted({canonical(Decimal(text)) for text in texts}, key=repr)
    return found if len(found) <= _MAX_UNIQUE else None
