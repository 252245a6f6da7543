"""Generated extraction tasks: a text with facts, a schema, and the object that a right answer is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NUM_TASKS = 100

_FIRST = ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Irene", "Jonas", "Karin", "Louis", "Maria", "Nils", "Olga", "Peter")
_LAST = ("Baker", "Carter", "Dixon", "Fisher", "Gruber", "Hansen", "Keller", "Lopez", "Miller", "Novak", "Olsen", "Parker", "Rossi", "Silva", "Turner", "Weber")
_CITIES = ("Paris", "London", "Madrid", "Vienna", "Lisbon", "Dublin", "Athens", "Warsaw", "Prague", "Berlin", "Oslo", "Rome")
_JOBS = ("nurse", "teacher", "pilot", "baker", "plumber", "lawyer", "chemist", "painter")
_GOODS = ("lamp", "kettle", "backpack", "notebook", "blanket", "helmet", "teapot", "umbrella")
_COLORS = ("red", "green", "blue", "black", "white", "yellow")
_TOPICS = ("music festival", "book fair", "science night", "flea market", "chess tournament", "film evening")
_CURRENCIES = ("EUR", "USD", "GBP")


@dataclass(frozen=True, slots=True)
class Task:
    """`right` validates against `schema`; every value of it stands in `text`, or follows from it as a choice of an enumeration."""

    name: str
    text: str
    schema: dict[str, Any]
    right: dict[str, Any]

    @property
    def prompt(self) -> str:
        """What the model is asked, with and without a schema that is enforced."""
        return f"{self.text}\n\nGive the facts of this text as one JSON object of this JSON schema, and nothing else:\n{json.dumps(self.schema)}"


def _closed(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": list(properties), "additionalProperties": False}


_TEXT = {"type": "string", "minLength": 1, "maxLength": 60}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 100_000}


def _person(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, Any]]:
    name, city, job, age = f"{rng.choice(_FIRST)} {rng.choice(_LAST)}", rng.choice(_CITIES), rng.choice(_JOBS), rng.randint(19, 79)
    married = rng.random() < 0.5
    text = f"{name} is {age} years old, lives in {city} and works as a {job}. {name.split()[0]} is {'married' if married else 'not married'}."
    schema = _closed({"name": _TEXT, "age": _COUNT, "city": _TEXT, "job": {"enum": list(_JOBS)}, "married": {"type": "boolean"}})
    return text, schema, {"name": name, "age": age, "city": city, "job": job, "married": married}


def _order(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, Any]]:
    goods, color, count, currency = rng.choice(_GOODS), rng.choice(_COLORS), rng.randint(2, 40), rng.choice(_CURRENCIES)
    price, number = rng.randint(3, 90), rng.randint(1000, 9999)
    text = f"Order {number}: {rng.choice(_FIRST)} wants {count} pieces of the {color} {goods}. One piece costs {price} {currency}."
    schema = _closed({
        "order": {"type": "integer", "minimum": 1000, "maximum": 9999}, "item": {"enum": list(_GOODS)}, "color": {"enum": list(_COLORS)}, "quantity": _COUNT,
        "price": {"type": "number", "minimum": 0}, "currency": {"enum": list(_CURRENCIES)},
    })  # fmt: skip
    return text, schema, {"order": number, "item": goods, "color": color, "quantity": count, "price": price, "currency": currency}


def _event(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, Any]]:
    topic, city = rng.choice(_TOPICS), rng.choice(_CITIES)
    date, time = f"2025-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}", f"{rng.randint(8, 21):02}:{rng.choice((0, 15, 30)):02}"
    text = f"The next {topic} takes place in {city} on {date} and begins at {time}. Tickets are {'free' if (free := rng.random() < 0.5) else 'sold at the door'}."
    schema = _closed({
        "event": {"enum": list(_TOPICS)}, "city": _TEXT, "date": {"type": "string", "format": "date"}, "time": {"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$"},
        "free": {"type": "boolean"},
    })  # fmt: skip
    return text, schema, {"event": topic, "city": city, "date": date, "time": time, "free": free}


def _flight(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, Any]]:
    start, end = rng.sample(_CITIES, 2)
    flight, gate, late = f"{rng.choice('ABKLO')}{rng.choice('SXZ')}{rng.randint(100, 999)}", f"{rng.choice('ABCD')}{rng.randint(1, 40)}", rng.randint(5, 90)
    text = f"Flight {flight} from {start} to {end} leaves from gate {gate}. It is {late} minutes late."
    route = _closed({"from": _TEXT, "to": _TEXT})
    schema = _closed({"flight": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}, "gate": {"type": "string", "pattern": "^[A-D][0-9]{1,2}$"}, "route": route, "delay_minutes": _COUNT})
    return text, schema, {"flight": flight, "gate": gate, "route": {"from": start, "to": end}, "delay_minutes": late}


def _team(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, Any]]:
    names, city = rng.sample(_FIRST, rng.randint(2, 4)), rng.choice(_CITIES)
    founded = rng.randint(1950, 2015)
    text = f"The club of {city} was founded in {founded}. Its members are {', '.join(names[:-1])} and {names[-1]}."
    schema = _closed({"city": _TEXT, "founded": {"type": "integer", "minimum": 1900, "maximum": 2100}, "members": {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 6}})
    return text, schema, {"city": city, "founded": founded, "members": names}


KINDS: dict[str, Callable[[random.Random], tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "person": _person, "order": _order, "event": _event, "flight": _flight, "team": _team,
}  # fmt: skip


def make_tasks(seed: int = 0, num: int = NUM_TASKS) -> list[Task]:
    """Kinds in turns; the same tasks for the same arguments."""
    kinds = list(KINDS.items())
    found = []
    for i in range(num):
        name, make = kinds[i % len(kinds)]
        found.append(Task(f"{name}-{i}", *make(random.Random(f"{name} {i} {seed}"))))
    return found


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """JSON Pointer to scalar."""
    if isinstance(value, dict):
        return {p: leaf for k, v in value.items() for p, leaf in leaves(v, f"{path}/{k}").items()}
    if isinstance(value, list):
        return {p: leaf for i, v in enumerate(value) for p, leaf in leaves(v, f"{path}/{i}").items()}
    return {path: value}


def num_right(answer: Any, right: dict[str, Any]) -> int:
    """Fields of `right` that the answer has: same place, same value; case and white space around a string do not count."""
    given = leaves(answer)
    return sum(path in given and _plain(given[path]) == _plain(value) for path, value in leaves(right).items())


def _plain(value: Any) -> tuple[str, Any]:
    """Comparable across types without 1 being True."""
    if isinstance(value, bool) or value is None:
        return str(value), None
    return ("number", value) if isinstance(value, int | float) else ("text", str(value).strip().casefold())
