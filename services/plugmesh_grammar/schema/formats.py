"""The formats of JSON Schema as automata, each a subset of what its RFC and Python's `jsonschema` accept."""

from __future__ import annotations

from functools import lru_cache

from .automata import Dfa
from .patterns import search, whole

_LEAP = r"(?:(?:[0-9][0-9](?:0[48]|[2468][048]|[13579][26]))|(?:(?:0[48]|[2468][048]|[13579][26])00))"
_YEAR = r"(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_DAY = r"(?:(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01]))|(?:(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30))|(?:02-(?:0[1-9]|1[0-9]|2[0-8])))"
_DATE = rf"(?:{_YEAR}-{_DAY}|{_LEAP}-02-29)"
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
_OFFSET = r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_OCTET}(?:\.{_OCTET}){{3}}"
_H = r"[0-9a-fA-F]{1,4}"
_ATOM = r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]+"
_PCT = r"%[0-9a-fA-F]{2}"
_PCHAR = rf"(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|{_PCT})"
_TAIL = rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
_HOST = r"[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?"
_AUTHORITY = rf"(?:(?:[a-zA-Z0-9._~!$&'()*+,;=:-]|{_PCT})*@)?{_HOST}(?::[0-9]{{1,5}})?"
_SCHEME = r"[a-zA-Z][a-zA-Z0-9+.-]*"
_URI = rf"{_SCHEME}:(?://{_AUTHORITY}(?:/{_PCHAR}*)*|/(?:{_PCHAR}+(?:/{_PCHAR}*)*)?|{_PCHAR}+(?:/{_PCHAR}*)*){_TAIL}"
_SEGMENT_WITHOUT_COLON = rf"(?:[a-zA-Z0-9._~!$&'()*+,;=@-]|{_PCT})+"
_RELATIVE = rf"(?:/(?:{_PCHAR}+(?:/{_PCHAR}*)*)?|{_SEGMENT_WITHOUT_COLON}(?:/{_PCHAR}*)*|//{_AUTHORITY}(?:/{_PCHAR}*)*)?{_TAIL}"
_JSON_POINTER = r"(?:/(?:[^/~]|~[01])*)*"


def _ipv6() -> str:
    forms = [rf"(?:{_H}:){{7}}{_H}"]
    for left in range(8):
        head = rf"{_H}(?::{_H}){{{left - 1}}}" if left else ""
        right = 7 - left  # groups behind "::", one less than what it may stand for
        tail = rf"(?:{_H}(?::{_H}){{0,{right - 1}}})?" if right else ""
        forms.append(rf"{head}::{tail}")
    return "(?:" + "|".join(forms) + ")"


_PATTERNS = {
    "date": _DATE,
    "time": _CLOCK + _OFFSET,
    "date-time": rf"{_DATE}T{_CLOCK}{_OFFSET}",
    # jsonschema's checker wants every duration in the order of ISO 8601's alternative without years in weeks.
    "duration": r"P(?:[0-9]{1,4}W|(?:[0-9]{1,4}Y(?:[0-9]{1,4}M(?:[0-9]{1,4}D)?)?|[0-9]{1,4}M(?:[0-9]{1,4}D)?|[0-9]{1,4}D)(?:T(?:[0-9]{1,4}H(?:[0-9]{1,4}M(?:[0-9]{1,4}S)?)?|[0-9]{1,4}M(?:[0-9]{1,4}S)?|[0-9]{1,4}S))?|T(?:[0-9]{1,4}H(?:[0-9]{1,4}M(?:[0-9]{1,4}S)?)?|[0-9]{1,4}M(?:[0-9]{1,4}S)?|[0-9]{1,4}S))",
    "uuid": r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
    "ipv4": _IPV4,
    "ipv6": _ipv6(),
    "email": rf"{_ATOM}(?:\.{_ATOM})*@[a-zA-Z0-9]+(?:[.-][a-zA-Z0-9]+)*",
    # A label may have 63 characters and a name 253. Only their sum is counted here, and kept below 63: every state more costs an engine time.
    "hostname": r"[a-zA-Z0-9](?:[.-]?[a-zA-Z0-9]){0,30}",
    "uri": _URI,
    "uri-reference": rf"(?:{_URI}|{_RELATIVE})",
    "iri": _URI,
    "iri-reference": rf"(?:{_URI}|{_RELATIVE})",
    "json-pointer": _JSON_POINTER,
    # jsonschema takes no digit behind a 0.
    "relative-json-pointer": rf"(?:0|[1-9]{{1,8}}0?)(?:#|{_JSON_POINTER})",
}
KNOWN = tuple(_PATTERNS)


@lru_cache(maxsize=32)
def automaton(name: str) -> Dfa | None:
    """Strings of a format; None when it is not known."""
    if name not in _PATTERNS:
        return None
    found = whole(_PATTERNS[name])
    if name == "hostname":
        found = found - search(r"(?:^|\.)[0-9]+$")  # a top label of digits only would read as an address
    return found

