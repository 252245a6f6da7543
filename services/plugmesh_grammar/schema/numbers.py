"""Sets of JSON numbers as automata over their decimal texts.

Texts have no exponent, and at most 15 digits where they have a fraction: a double keeps those apart, so that whoever parses them into doubles sees
the same order and the same integers as the automaton. Texts of whole numbers may have any length, since JSON parsers keep them exact or must say so.
"""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache

from .automata import Dfa, explore

MAX_DIGITS = 15
MAX_MODULUS = 1500
MAX_BOUND_DIGITS = 400
_D = tuple((48 + d, 48 + d, d) for d in range(10))


def digits_of(value: Decimal | int) -> tuple[bool, str, str]:
    """Sign, integer digits ("" for 0) and fraction digits without trailing zeros. Raises ValueError when that takes too many digits."""
    number = Decimal(value)
    if not number.is_finite() or abs(number.adjusted()) > MAX_BOUND_DIGITS or len(number.as_tuple().digits) > MAX_BOUND_DIGITS:
        raise ValueError("a number of too many digits")
    text = format(abs(number), "f")
    whole, _, fraction = text.partition(".")
    whole, fraction = whole.lstrip("0"), fraction.rstrip("0")
    if fraction and len(whole) + len(fraction) > MAX_DIGITS:
        raise ValueError(f"a fraction of more than {MAX_DIGITS} digits")  # doubles would take other numbers for it
    return number < 0, whole, fraction


def _syntax() -> Dfa:
    # (phase, digits): phases: "" sign possible, "-" digits needed, 0 a lone zero, i integer digits, "." fraction digits needed, f fraction
    def step(state):  # type: ignore[no-untyped-def]
        phase, n = state
        if phase == "":
            yield 45, 45, ("-", 0)
        if phase in ("", "-"):
            yield 48, 48, ("0", 1)
            yield 49, 57, ("i", 1)
        if phase == "i":
            yield 48, 57, ("i", min(n + 1, MAX_DIGITS))
        if phase in ("0", "i") and n < MAX_DIGITS:
            yield 46, 46, (".", n)
        if phase in (".", "f") and n < MAX_DIGITS:
            yield 48, 57, ("f", n + 1)

    return explore(("", 0), step, lambda state: state[0] in ("0", "i", "f"))


NUMBERS = _syntax()
NONE = NUMBERS - NUMBERS


@lru_cache(maxsize=512)
def compared(value: Decimal | int, relations: str) -> Dfa:
    """Numbers that are less ("<"), equal ("="), greater (">") than a value; `relations` holds one or more of these."""
    negative, whole, fraction = digits_of(value)

    def compare(order: str, is_negative: bool, is_zero: bool) -> str:
        if is_zero:
            return "=" if not whole and not fraction else ">" if negative else "<"
        if is_negative != negative:
            return "<" if is_negative else ">"
        return order if not negative else {"<": ">", ">": "<", "=": "="}[order]

    # (phase, sign, zero so far, integer digits so far, order of the magnitudes so far, fraction digits so far)
    def step(state):  # type: ignore[no-untyped-def]
        phase, sign, zero, n, order, k = state
        if phase == "":
            yield 45, 45, ("-", True, zero, n, order, k)
        if phase in ("", "-"):
            for lo, hi, d in _D:
                if d == 0:
                    yield lo, hi, ("0", sign, True, 0, "=" if not whole else "<", 0)
                else:
                    yield lo, hi, ("i", sign, False, 1, _order(d, whole, 0, "=") if whole else ">", 0)
        if phase == "i":
            for lo, hi, d in _D:
                yield lo, hi, ("i", sign, False, min(n + 1, len(whole) + 1), _order(d, whole, n, order), 0)
        if phase in ("0", "i"):
            settled = order if n == len(whole) else "<" if n < len(whole) else ">"
            yield 46, 46, (".", sign, zero, 0, settled, 0)
        if phase in (".", "f"):
            for lo, hi, d in _D:
                yield lo, hi, ("f", sign, zero and d == 0, 0, _order(d, fraction, k, order) if k < len(fraction) else (">" if order == "=" and d else order), min(k + 1, len(fraction)))

    def accepts(state):  # type: ignore[no-untyped-def]
        phase, sign, zero, n, order, k = state
        if phase not in ("0", "i", "f"):
            return False
        if phase != "f":
            order = order if n == len(whole) else "<" if n < len(whole) else ">"
            k = 0
        if order == "=" and k < len(fraction):
            order = "<"
        return compare(order, sign, zero) in relations

    return explore(("", False, True, 0, "=", 0), step, accepts) & NUMBERS


def _order(digit: int, wanted: str, at: int, before: str) -> str:
    if before != "=" or at >= len(wanted):
        return before
    want = int(wanted[at])
    return "=" if digit == want else "<" if digit < want else ">"


@lru_cache(maxsize=128)
def multiples(value: Decimal | int) -> Dfa:
    """Numbers that are a whole multiple of a positive value. Raises ValueError when its digits make too large an automaton."""
    _, whole, fraction = digits_of(value)
    places = len(fraction)
    modulus = int(whole + fraction or "0")
    if modulus <= 0 or places > MAX_DIGITS:
        raise ValueError("must be above 0")
    # Trailing zeros of a whole number only ask for zeros, but remainders count them one by one; the cap is on the remainders.
    if modulus > MAX_MODULUS:
        raise ValueError(f"needs more than {MAX_MODULUS} remainders")

    def step(state):  # type: ignore[no-untyped-def]
        phase, rest, k = state
        if phase == "":
            yield 45, 45, ("-", 0, 0)
        if phase in ("", "-"):
            for lo, hi, d in _D:
                yield lo, hi, ("0" if d == 0 else "i", d % modulus, 0)
        if phase == "i":
            for lo, hi, d in _D:
                yield lo, hi, ("i", (rest * 10 + d) % modulus, 0)
        if phase in ("0", "i"):
            yield 46, 46, (".", rest, 0)
        if phase in (".", "f"):
            if k < places:
                for lo, hi, d in _D:
                    yield lo, hi, ("f", (rest * 10 + d) % modulus, k + 1)
            else:
                yield 48, 48, ("f", rest, k)

    def accepts(state):  # type: ignore[no-untyped-def]
        phase, rest, k = state
        return phase in ("0", "i", "f") and rest * 10 ** (places - k) % modulus == 0

    return explore(("", 0, 0), step, accepts, max_states=8 * MAX_MODULUS) & NUMBERS


INTEGERS = multiples(1)
