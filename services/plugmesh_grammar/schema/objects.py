"""Objects as grammar rules: an automaton over which members have been written."""

from __future__ import annotations

import json
from collections import deque
from itertools import combinations
from typing import TYPE_CHECKING, Any

from plugmesh.errors import LimitExceeded

from .automata import ANY, Dfa, words
from .documents import refused
from .grammar import NEVER, SPACE, FreeString, Part, Ref, Regular, Text, alt, seq
from .values import FALSE, Expr, Objects, both

if TYPE_CHECKING:
    from .lowering import Lowering

_MAX_NAMES = 2000
_MAX_CLASSES = 64
_MAX_STATES = 600
# (next declared name or set of written ones, members counted, free members seen, conditions met)
_State = tuple[Any, int, bool, frozenset[int]]


def object_part(low: Lowering, record: Objects, prefix: str) -> Part:
    """The text of one kind of object; NEVER when there is none."""
    n = low.normaliser
    # 1. Names that are spoken of one by one, and classes of all the others that are treated alike.
    singles: dict[Dfa, str] = {}
    for names, _ in (*record.every, *record.some):
        if names not in singles and len(names.arcs) <= 300 and (single := names.finite(1)):
            singles[names] = single[0]
    declared = sorted(set(singles.values()), key=lambda name: (n.document.order.get(name, 10**9), name))
    if len(declared) > _MAX_NAMES:
        raise LimitExceeded(f"an object of {len(declared)} declared properties; the limit is {_MAX_NAMES}")
    sets = [names for names in dict.fromkeys(names for names, _ in sorted(record.every | record.some, key=repr)) if names not in singles]
    rest = ANY - words(declared)
    classes = [rest]
    for names in sets:
        classes = [part for whole in classes for part in (whole & names, whole - names) if not part.is_empty]
        if len(classes) > _MAX_CLASSES:
            raise LimitExceeded(f"the patterns of an object's names make more than {_MAX_CLASSES} classes")

    def covers(names: Dfa, chosen: Dfa) -> bool:
        return (chosen - names).is_empty

    # 2. Values per name and class; names that must be there; further conditions of the kind "some member".
    def general(names: Dfa) -> list[Expr]:
        return [part for over, part in record.every if over is names]

    required: dict[str, list[Expr]] = {}
    conditions: list[tuple[Dfa, Expr]] = []
    for names, part in sorted(record.some, key=repr):
        if names in singles:
            required.setdefault(singles[names], []).append(part)
        elif names.is_empty:
            return NEVER
        else:
            conditions.append((names, part))
    named: dict[str, Expr] = {}
    for name in declared:
        named[name] = both(*(part for names, part in record.every if names.accepts(name)), *required.get(name, ()))
    free: list[tuple[Dfa, Expr]] = []
    for names in classes:
        part = both(*(part for over in sets if covers(over, names) for part in general(over)))
        if part != FALSE and not n.is_empty(part):
            free.append((names, part))
    possible = [name for name in declared if named[name] != FALSE and not n.is_empty(named[name])]
    if any(name not in possible for name in required):
        return NEVER
    # 3. Counting. A free name may be written twice and is then one member: all free ones together count as one towards the least.
    least, most = record.least, record.most
    if least <= len(required):
        least = 0
    if most is not None and most >= len(possible) and not free:
        most = None
    if most is not None and most < len(required):
        return NEVER
    if least > len(possible) + bool(free):
        if free and record.least > 1:
            raise refused("more than one member of an undeclared name cannot be counted, since a name may come twice", "minProperties", low.blame("minProperties"))
        return NEVER
    cap = max(least, most or 0)
    any_order = len(possible) <= low.limits.any_order_properties
    every = frozenset(range(len(conditions)))

    # 4. States and their members.
    def members(state: _State) -> list[tuple[Part, Part, _State]]:
        place, count, seen_free, met = state
        out: list[tuple[Part, Part, _State]] = []
        after = count + 1 if cap else 0
        if most is not None and count >= most:
            return out
        for index, name in enumerate(possible):
            if any_order:
                if name in place:
                    continue
                following: Any = place | {name}
            else:
                if index < place:
                    continue
                if any(other in required for other in possible[place:index]):
                    break
                following = index + 1
            for extra, now in _meeting(conditions, met, lambda names, name=name: names.accepts(name)):
                value = low.value(both(named[name], *extra))
                out.append((Text(quoted(name)), value, (following, min(after, cap + 1), seen_free, now)))
        if any_order or not any(name in required for name in possible[place:]):
            following = place if any_order else len(possible)
            # Towards the most every free member counts, towards the least only the first.
            step = min(after, cap + 1) if most is not None or not seen_free else count
            for names, part in free:
                for extra, now in _meeting(conditions, met, lambda over, names=names: covers(over, names)):
                    # A later member of the same name would replace the one that met a condition; so it has to meet it too.
                    again = [wanted for i, (over, wanted) in enumerate(conditions) if i in met and not (over & names).is_empty]
                    value = low.value(both(part, *extra, *again))
                    out.append((Regular(names, True) if names is not ANY else FreeString(), value, (following, step, True, now)))
        return out

    if most is not None and least > 1 and free:
        raise refused("together with maxProperties on undeclared names", "minProperties", low.blame("minProperties"))

    def ends(state: _State) -> bool:
        place, count, _, met = state
        if met != every or count < least:
            return False
        if any_order:
            return all(name in place for name in required)
        return not any(name in required for name in possible[place:])

    start: _State = (frozenset() if any_order else 0, 0, False, frozenset())
    tails: dict[_State, str] = {}
    todo: deque[_State] = deque()

    def tail(state: _State) -> Ref:
        if not free:
            state = (state[0], state[1], False, state[3])
        if most is not None or not least:
            state = (state[0], state[1], False, state[3])
        if state not in tails:
            if len(tails) >= _MAX_STATES:
                raise LimitExceeded(f"an object's members need more than {_MAX_STATES} states")
            tails[state] = f"{prefix}t{len(tails)}"
            todo.append(state)
        return Ref(tails[state])

    first = [seq(key, Text(":"), SPACE, value, tail(state)) for key, value, state in members(start)]
    while todo:
        state = todo.popleft()
        rows = [seq(Text(","), SPACE, key, Text(":"), SPACE, value, tail(after)) for key, value, after in members(state)]
        if ends(state):
            rows.append(seq(SPACE, Text("}")))
        low.grammar.add(tails[state], alt(*rows) if rows else NEVER)
    if ends(start):
        first.append(Text("}"))
    return seq(Text("{"), SPACE, alt(*first)) if first else NEVER


def _meeting(conditions, met, applies):  # type: ignore[no-untyped-def]
    """For one member: which open conditions it is made to meet, and which are met then. The first choice is none."""
    open_ones = [i for i, (names, _) in enumerate(conditions) if i not in met and applies(names)]
    for size in range(len(open_ones) + 1):
        for chosen in combinations(open_ones, size):
            yield [conditions[i][1] for i in chosen], met | frozenset(chosen)


def quoted(text: str) -> str:
    """A JSON string with only the escapes that JSON asks for."""
    return json.dumps(text, ensure_ascii=False)
