"""Which pairs are tried how: by the cards, without loading anything; and what is asked of a mesh, of a small server that answers as told."""

from __future__ import annotations

import http.server
import itertools
import json
import pathlib
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh import cards
from plugmesh.ab.asks import asks_of
from plugmesh.ab.pairs import _Trial, groups, subject_of_cards, tier_of, why_not
from plugmesh.ab.sides import Subject
from plugmesh.bench.systems import Setting
from plugmesh.errors import FailedPrecondition, Unavailable
from plugmesh.quality.fidelity import combined

SETTING = Setting(pathlib.Path("model.gguf"), pathlib.Path("folder"))


def card(slug: str, services: tuple[str, ...] = ("decode",), **more: object) -> cards.Card:
    base = {"slug": slug, "version": "1", "summary": "s", "services": services, "hooks": (), "fidelity": "exact"}
    if more.get("fidelity") == "lossy":
        more["loss"] = {"metric": "m", "bound": 1, "setting": "s"}
    return cards.Card.model_validate({**base, **more})


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["exact", "lossy", "n/a"]), min_size=2, max_size=9), st.data())
def test_every_pair_is_in_a_group_that_can_judge_it_and_no_group_holds_two_that_conflict(kinds: list[str], data: st.DataObject) -> None:
    all_cards = [card(f"p{i}", fidelity=kind) for i, kind in enumerate(kinds)]
    pairs = list(itertools.combinations(all_cards, 2))
    conflicts = {frozenset((a.slug, b.slug)) for a, b in data.draw(st.lists(st.sampled_from(pairs), max_size=5))}
    wanted = [p for p in pairs if frozenset((p[0].slug, p[1].slug)) not in conflicts]
    found = groups(wanted, all_cards, conflicts)

    assert len(found) <= len(wanted)
    for group in found:
        assert not conflicts & {frozenset((a.slug, b.slug)) for a, b in itertools.combinations(group, 2)}
    for a, b in wanted:
        assert any(a in group and b in group and combined([c.fidelity for c in group]) == combined([a.fidelity, b.fidelity]) for group in found)


def test_those_that_all_go_together_are_one_group_and_a_lossy_one_does_not_hide_what_must_not_change() -> None:
    exact, lossy = [card(f"p{i}") for i in range(5)], card("zz", fidelity="lossy")
    every = [*exact, lossy]

    assert [tuple(exact), tuple(every)] == groups(list(itertools.combinations(every, 2)), every, ())


def test_plugins_of_the_tree_that_want_different_values_of_a_key_or_the_same_place_conflict() -> None:
    found = {slug: cards.read(slug, where="test") for slug in ("dfloat11", "qserve", "million", "splitwise", "aibrix_routing", "ngram_draft")}
    why = lambda a, b: why_not([found[a], found[b]], SETTING)  # noqa: E731

    assert why("dfloat11", "qserve") == "dfloat11 wants services.decode.weight_format = 'dfloat11', qserve wants 'qserve'"
    assert "kv-codec" in why("million", "qserve") and "router" in why("aibrix_routing", "splitwise")
    assert why("dfloat11", "million") == why("ngram_draft", "splitwise") == ""


@pytest.mark.parametrize(("services", "tier"), [
    (("decode",), "engine"), (("decode", "prefill", "weightstore", "tools"), "engine"), (("grammar", "decode"), "served"), (("gateway",), "served"), (("prefill",), "served"),
])  # fmt: skip
def test_what_an_engine_does_not_show_is_tried_in_a_mesh(services: tuple[str, ...], tier: str) -> None:
    assert tier_of([card("aa"), card("bb", services)]) == tier


def test_short_prompts_get_the_cards_settings_for_them_and_an_optional_service_is_started() -> None:
    tables = subject_of_cards([card("aa", ab={"short": {"min_tokens": 3}, "settings": {"min_tokens": 9, "x": 1}}), card("bb", ("rollout",))]).tables(SETTING, loaded=True)

    assert tables["plugins"] == {"aa": {"min_tokens": 3, "x": 1}}
    assert tables["services"]["rollout"] == {"plugins": ["bb"], "replicas": 1}


class Told(_Trial):
    """Outputs as told, in place of an engine's."""

    def __init__(self, with_: dict[str, Any]) -> None:
        super().__init__(SETTING, is_quick=False)
        self.with_ = with_

    async def _outputs(self, subject: Subject, tier: str, side: str) -> tuple[dict[str, Any], dict[frozenset[str], str]]:
        outputs = {"greedy": [[1, 2]], "seeded": [[3, 4]], "samples": samples(0)}
        return (outputs if side == "without" else {**outputs, **self.with_}), {}


def samples(seed: int, tilt: float = 0.0) -> list[list[int]]:
    dice = random.Random(seed)
    return [[0 if dice.random() < 0.5 + tilt else 1 for _ in range(4)] for _ in range(1000)]


@pytest.mark.parametrize(("fidelity", "with_", "state"), [
    ("dist", {"samples": samples(1), "seeded": [[3, 5]]}, "runs"), ("dist", {"samples": samples(1, 0.1)}, "differs"), ("dist", {"greedy": [[1, 3]]}, "differs"),
    ("exact", {"samples": samples(1, 0.1)}, "same"), ("exact", {"seeded": [[3, 5]]}, "differs"), ("exact", {"greedy": []}, "fails"),
    ("lossy", {"greedy": [[1, 3]]}, "runs"), ("lossy", {"greedy": [[]]}, "fails"),
])  # fmt: skip
async def test_outputs_are_held_against_the_weaker_promise(fidelity: str, with_: dict[str, Any], state: str) -> None:
    verdict = await Told(with_).of([card("aa"), card("bb", fidelity=fidelity)], "engine")

    assert verdict.state == state
    assert ("distribution" in verdict.reason) == (fidelity == "dist" and "samples" in with_ and state == "differs")


# -- requests --------------------------------------------------------------------------------------------------------------


class Gateway(http.server.BaseHTTPRequestHandler):
    answer: Any = None
    bodies: list[dict[str, Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append(body)
        status, text = type(self).answer(body)
        data = json.dumps({"choices": [{"message": {"content": text}}]} if status == 200 else {"error": {"message": text}}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Gateway.bodies = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()
        thread.join()


A, B, C = card("aa", ab={"request": {"x": 1}}), card("bb", ab={"request": {"y": 2}}), card("cc")


def test_each_is_asked_for_alone_and_both_at_once_and_a_refusal_of_both_is_told(url: str) -> None:
    Gateway.answer = staticmethod(lambda body: (400, "not both") if {"x", "y"} <= body.keys() else (200, "22"))

    assert asks_of([A, B, C], url, "m") == {frozenset(("aa", "bb")): "one request cannot use both: not both"}
    assert [[k for k in "xy" if k in body] for body in Gateway.bodies] == [["x"], ["y"], ["x", "y"]]


def test_requests_about_the_same_key_are_not_joined(url: str) -> None:
    Gateway.answer = staticmethod(lambda body: (200, "22"))

    assert asks_of([A, card("dd", ab={"request": {"x": 3}})], url, "m") == {}
    assert len(Gateway.bodies) == 2


@pytest.mark.parametrize("answer", [(400, "unknown key"), (200, ""), (500, "broken")])
def test_a_plugin_whose_own_request_fails_is_told(url: str, answer: tuple[int, str]) -> None:
    Gateway.answer = staticmethod(lambda body: answer)

    with pytest.raises(FailedPrecondition, match="the request of aa got status"):
        asks_of([A], url, "m")


def test_an_error_of_both_at_once_is_no_conflict_but_a_failure(url: str) -> None:
    Gateway.answer = staticmethod(lambda body: (500, "broken") if {"x", "y"} <= body.keys() else (200, "22"))

    with pytest.raises(FailedPrecondition, match="of aa and bb"):
        asks_of([A, B], url, "m")


def test_nobody_there_is_told() -> None:
    with pytest.raises(Unavailable):
        asks_of([A], "http://127.0.0.1:9/v1", "m")
