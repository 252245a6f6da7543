"""What every router must do: choose among what it is offered, whatever the instances say and whoever comes and goes, and forget what has ended."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh.errors import PlugmeshError
from plugmesh.records import KvEvent, Route, Router, RouteRequest, RouterRecord
from plugmesh.testing.conformance.base import RecordConformance, num_reachable
from plugmesh.types import InstanceInfo

SLOW_MS = 50.0  # in the gateway's event loop; a hundred times what a route over 64 instances should take


def instance(role: str, name: str, **load: float) -> InstanceInfo:
    """One row of the discovery table."""
    return InstanceInfo(role, name, f"life-{name}", "127.0.0.1:1", "host", 1, load=load)


def request(name: str, prompt: int = 20, max_tokens: int = 8, blocks: int = 0, **facts: Any) -> RouteRequest:
    """A request as the gateway describes it."""
    return RouteRequest(name, prompt, max_tokens, block_ids=tuple(i.to_bytes(32, "little") for i in range(blocks)), **facts)


LOAD = st.dictionaries(
    st.sampled_from(["num_pending_tokens", "num_running", "num_waiting", "kv_blocks_used", "kv_blocks_total", "unheard_of"]),
    st.floats(0, 1e12, allow_nan=False), max_size=6,
)  # fmt: skip


class RouterConformance(RecordConformance):
    kind = "routers"
    max_examples: ClassVar[int] = 30

    def check(self, answer: object, decode: Sequence[InstanceInfo], prefill: Sequence[InstanceInfo]) -> Route:
        """An answer that the gateway would accept."""
        assert isinstance(answer, Route)
        assert answer.decode_instance in {i.instance_id for i in decode}
        assert answer.prefill_instance in {"", *(i.instance_id for i in prefill)}
        assert answer.prefill_mode in ("auto", "local", "remote")
        return answer

    def test_whoever_lives_it_chooses_among_what_it_is_offered(self, record: RouterRecord) -> None:
        """Instances come, go and report anything; requests begin, go on, end, and are routed again."""

        @settings(max_examples=self.max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def check(data: st.DataObject) -> None:
            router: Router = record.build()
            for _ in range(data.draw(st.integers(1, 12))):
                decode = [instance("decode", f"d{i}", **data.draw(LOAD)) for i in data.draw(st.sets(st.integers(0, 4), min_size=1))]
                prefill = [instance("prefill", f"p{i}", **data.draw(LOAD)) for i in data.draw(st.sets(st.integers(0, 3)))]
                name = f"r{data.draw(st.integers(0, 5))}"
                match data.draw(st.sampled_from(["route", "route", "progress", "finish"])):
                    case "route":
                        prompt = data.draw(st.integers(1, 100_000))
                        asked = request(name, prompt, data.draw(st.integers(0, 100_000)), blocks=min(8, prompt // 16), priority=data.draw(st.integers(-9, 9)))
                        self.check(router.route(asked, decode, prefill), decode, prefill)
                    case "progress":
                        router.on_progress(name, data.draw(st.integers(0, 50)))
                    case _:
                        router.on_finished(name)

        check()

    def test_the_only_instance_is_always_the_answer(self, record: RouterRecord) -> None:
        router = record.build()
        decode = [instance("decode", "d0", num_pending_tokens=1e9)]
        for i in range(20):
            assert self.check(router.route(request(f"r{i}", 5000, 5000), decode, []), decode, []).decode_instance == "d0"

    def test_one_request_of_extreme_size_passes(self, record: RouterRecord) -> None:
        decode, prefill = [instance("decode", "d0"), instance("decode", "d1")], [instance("prefill", "p0")]
        router = record.build()
        for i, (prompt, wanted) in enumerate([(1, 0), (1, 1), (1 << 40, 1 << 40)]):
            self.check(router.route(request(f"r{i}", prompt, wanted), decode, prefill), decode, prefill)

    def test_what_it_never_heard_of_may_end_or_go_on(self, record: RouterRecord) -> None:
        router = record.build()
        router.on_progress("nobody", 3)
        router.on_finished("nobody")
        decode = [instance("decode", "d0")]
        router.route(request("r"), decode, [])
        for _ in range(2):
            router.on_finished("r")
        router.on_progress("r", 1)

        self.check(router.route(request("r"), decode, []), decode, [])

    def test_without_any_instance_it_raises_and_works_again_later(self, record: RouterRecord) -> None:
        """The gateway does not ask then; a router that is asked all the same must not answer with an instance it made up."""
        router = record.build()
        try:
            answer = router.route(request("r"), [], [])
        except (PlugmeshError, ValueError, LookupError, ZeroDivisionError):
            pass
        else:
            raise AssertionError(f"it chose {answer!r} among nobody")
        decode = [instance("decode", "d0")]

        self.check(router.route(request("r"), decode, []), decode, [])

    def test_ended_requests_are_forgotten(self, record: RouterRecord) -> None:
        router = record.build()
        decode, prefill = [instance("decode", f"d{i}") for i in range(3)], [instance("prefill", "p0")]
        sizes = []
        for round_ in range(3):
            for i in range(200):
                name = f"r{round_}-{i}"
                router.route(request(name, 40, 8), decode, prefill)
                if i % 3:
                    router.on_progress(name, 1)
                router.on_finished(name)
            gc.collect()
            sizes.append(num_reachable(router))

        assert sizes[2] <= sizes[1] + 20, "it grows by what it keeps of every request"

    def test_two_gateways_do_not_share_state(self, record: RouterRecord) -> None:
        decode = [instance("decode", "d0"), instance("decode", "d1")]
        first, fresh, used = record.build(), record.build(), record.build()
        for i in range(50):
            first.route(request(f"x{i}", 100, 100), decode, [])

        assert fresh is not first
        assert [fresh.route(request(f"r{i}"), decode, []) for i in range(8)] == [used.route(request(f"r{i}"), decode, []) for i in range(8)]

    def test_it_does_not_hold_up_the_event_loop(self, record: RouterRecord) -> None:
        router = record.build()
        decode = [instance("decode", f"d{i}", num_pending_tokens=i) for i in range(64)]
        prefill = [instance("prefill", f"p{i}") for i in range(32)]
        times = []
        for i in range(25):
            began = time.perf_counter()
            router.route(request(f"r{i}", 8192, 512, blocks=512), decode, prefill)
            times.append((time.perf_counter() - began) * 1e3)

        assert sorted(times)[12] < SLOW_MS

    def test_events_of_any_kind_and_order_are_harmless(self, record: RouterRecord) -> None:
        """Of a router that follows KV events: doubled, outdated, from an earlier life, from nobody, and removals of what was never stored."""
        router = record.build()
        hear = getattr(router, "on_kv_event", None)
        if hear is None:
            return
        decode = [instance("decode", "d0"), instance("decode", "d1")]
        blocks = tuple(i.to_bytes(32, "little") for i in range(6))

        @settings(max_examples=self.max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(
            st.lists(
                st.builds(
                    KvEvent, st.sampled_from(["d0", "d1", "gone"]), st.sampled_from(["life-d0", "life-d1", "old"]), st.integers(0, 5),
                    st.sampled_from(["stored", "removed", "cleared"]), st.lists(st.sampled_from(blocks), max_size=8).map(tuple),
                ),
                max_size=12,
            )
        )  # fmt: skip
        def check(events: list[KvEvent]) -> None:
            for e in events:
                hear(e)
            self.check(router.route(request("r", 100, 8, blocks=6), decode, []), decode, [])
            router.on_finished("r")

        check()
