"""Splitwise's pools against the rules of the paper, and its records against the host."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh.config import MeshConfig
from plugmesh.errors import ConfigError, Unavailable
from plugmesh.host import PluginHost
from plugmesh.records import RouteRequest
from plugmesh.types import InstanceInfo, KvLayout
from plugmesh_splitwise.pools import SplitwiseRouter

LAYOUT = KvLayout("m", "raw", "float32", 1, 1, 8, 16, 1024)


def instance(role: str, name: str, pending: float = 0.0) -> InstanceInfo:
    return InstanceInfo(role, name, "inc", "127.0.0.1:1", "h", 1, load={"num_pending_tokens": pending})


def ask(request_id: str, prompt: int, max_tokens: int = 10) -> RouteRequest:
    return RouteRequest(request_id, prompt, max_tokens)


D = [instance("decode", "d0"), instance("decode", "d1")]
P = [instance("prefill", "p0"), instance("prefill", "p1")]


def test_both_instances_are_the_ones_with_the_fewest_pending_tokens_not_the_fewest_requests():
    router = SplitwiseRouter(10_000, 10_000)
    first = router.route(ask("big", 900, 500), D, P)
    second = router.route(ask("small-1", 10, 10), D, P)
    third = router.route(ask("small-2", 10, 10), D, P)

    assert ("d0", "p0", "remote") == (first.decode_instance, first.prefill_instance, first.prefill_mode)
    assert ("d1", "p1") == (second.decode_instance, second.prefill_instance)
    assert ("d1", "p1") == (third.decode_instance, third.prefill_instance)  # two requests, yet fewer tokens


def test_a_decode_instance_is_lent_to_prompts_when_every_prefill_queue_is_over_the_threshold_and_goes_home_afterwards():
    router = SplitwiseRouter(100, 10_000)
    assert "remote" == router.route(ask("a", 90), D, P).prefill_mode
    assert "remote" == router.route(ask("b", 90), D, P).prefill_mode
    lent = router.route(ask("c", 90), D, P)

    assert ("local", "") == (lent.prefill_mode, lent.prefill_instance)
    assert {lent.decode_instance} == router.mixed
    again = router.route(ask("d", 50), D, P)
    assert lent.decode_instance == again.decode_instance  # the mixed pool before another one is pulled in
    router.on_progress("c", 1)
    assert {lent.decode_instance} == router.mixed         # still has d's prompt
    router.on_progress("d", 1)
    assert set() == router.mixed


def test_a_decode_instance_over_its_own_threshold_is_not_lent():
    router = SplitwiseRouter(100, 50)
    router.route(ask("a", 90, 60), D, P)
    router.route(ask("b", 90, 60), D, P)

    assert "remote" == router.route(ask("c", 90, 60), D, P).prefill_mode


def test_without_a_prefill_instance_prompts_are_computed_where_the_tokens_are():
    router = SplitwiseRouter(100, 0)
    route = router.route(ask("a", 5000, 60), D, [])

    assert "local" == route.prefill_mode


def test_load_that_other_gateways_put_on_an_instance_counts():
    router = SplitwiseRouter(10_000, 10_000)
    busy = [instance("decode", "d0", 400.0), instance("decode", "d1", 0.0)]

    assert "d1" == router.route(ask("a", 10, 10), busy, P).decode_instance
    assert "d1" == router.route(ask("b", 10, 10), busy, P).decode_instance


def test_no_decode_instance_is_a_typed_error():
    with pytest.raises(Unavailable):
        SplitwiseRouter(1, 1).route(ask("a", 1), [], P)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("route"), st.integers(0, 9), st.integers(1, 300), st.integers(1, 50)),
            st.tuples(st.just("progress"), st.integers(0, 9), st.integers(0, 20), st.just(0)),
            st.tuples(st.just("finish"), st.integers(0, 9), st.just(0), st.just(0)),
        ),
        max_size=60,
    )
)
def test_pending_tokens_are_conserved_and_return_to_zero(actions):
    router = SplitwiseRouter(200, 200)
    expected: dict[int, list] = {}
    for kind, key, a, b in actions:
        if kind == "route":
            route = router.route(ask(str(key), a, b), D, P)
            expected[key] = [route.decode_instance, route.prefill_instance, a, b]
        elif key in expected and kind == "progress":
            router.on_progress(str(key), a)
            expected[key][2], expected[key][3] = 0, max(0, expected[key][3] - a)
        elif kind == "finish":
            router.on_finished(str(key))
            expected.pop(key, None)
        for name in ("d0", "d1", "p0", "p1"):
            want = sum(
                (left if d == name else 0) + (prompt if (p or d) == name else 0) for d, p, prompt, left in expected.values()
            )
            assert want == router.pending_tokens(name)
    for key in list(expected):
        router.on_finished(str(key))

    assert 0 == sum(router.pending_tokens(i.instance_id) for i in (*D, *P))
    assert set() == router.mixed


def test_short_prompts_hand_over_all_at_once_and_long_ones_chunk_by_chunk():
    config = MeshConfig(plugins={"splitwise": {"overlap_min_tokens": 100}})
    record = PluginHost.load(["splitwise"], config, service="prefill").last("kv_hand_overs")

    assert [False, True] == [record.plan(n, LAYOUT).overlap for n in (99, 100)]


def test_the_router_is_chosen_when_the_gateway_loads_the_plugin():
    host = PluginHost.load(["splitwise"], MeshConfig(), service="gateway")

    assert "splitwise" == host.select("router", ["least-pending", "splitwise"])
    assert isinstance(host.last("routers").build(), SplitwiseRouter)


def test_it_is_refused_in_a_service_it_is_not_for():
    with pytest.raises(ConfigError, match="not for decode"):
        PluginHost.load(["splitwise"], MeshConfig(), service="decode")
