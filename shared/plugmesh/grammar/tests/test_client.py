"""`Grammars`: forms are loaded beside the event loop, each once however many ask, and big ones one after another."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from typing import Any

import pytest

from plugmesh.errors import DataLoss
from plugmesh.grammar.client import BIG_FORM_BYTES, GrammarInfo, Grammars, info_to_pb
from plugmesh.grammar.seams import GrammarVocabulary
from plugmesh.grammar.spec import GrammarSpec
from plugmesh.mesh.api import Binding
from plugmesh.records import GrammarEngineRecord
from plugmesh.testing.local_mesh import LocalMesh
from plugmesh_proto.v1 import grammar_pb2 as pb
from plugmesh_proto.v1 import grammar_pb2_grpc

VOCABULARY = GrammarVocabulary([b"a", b"b", b""], 3, frozenset([2]), (2,), "tokens")


class Exports(grammar_pb2_grpc.GrammarServicer):
    """A grammar instance whose forms are the sources, in two parts."""

    def __init__(self) -> None:
        self.num_exports = 0

    async def Export(self, request: pb.CompileGrammarRequest, context: Any):
        self.num_exports += 1
        data = request.spec.source.encode()
        yield pb.GrammarPart(info=info_to_pb(GrammarInfo(request.spec.source[:8], "slow", "1", "tokens", len(data), True, 1.0)), data=data[:100_000])
        for at in range(100_000, len(data), 100_000):
            yield pb.GrammarPart(data=data[at : at + 100_000])

    def bindings(self):
        return [Binding(grammar_pb2_grpc.add_GrammarServicer_to_server, self, "plugmesh_proto.v1.Grammar", grpc_only=frozenset({"Export"}))]

    async def start(self): ...
    async def drain(self, deadline_s): ...
    async def stop(self): ...
    def describe(self):
        return {}


@dataclasses.dataclass
class Loaded:
    num_bytes: int


class SlowEngine:
    """Loads for a while without the interpreter's lock."""

    def __init__(self, load_s: float = 0.15) -> None:
        self.load_s = load_s
        self.lock = threading.Lock()
        self.running = {"big": 0, "small": 0}
        self.most = {"big": 0, "small": 0}
        self.ends: list[str] = []
        self.threads: set[int] = set()

    def load(self, compiled: bytes) -> Loaded:
        kind = "big" if len(compiled) >= BIG_FORM_BYTES else "small"
        with self.lock:
            self.threads.add(threading.get_ident())
            self.running[kind] += 1
            self.most[kind] = max(self.most[kind], self.running[kind])
        time.sleep(self.load_s if kind == "big" else self.load_s / 3)
        with self.lock:
            self.running[kind] -= 1
            self.ends.append(kind)
        if compiled.startswith(b"damaged"):
            raise DataLoss("damaged")
        return Loaded(len(compiled))


@pytest.fixture
async def rig():
    engine, exports = SlowEngine(), Exports()
    async with LocalMesh() as mesh:
        await mesh.host("grammar", lambda context: exports)
        grammars = Grammars(mesh, [GrammarEngineRecord("slow", "1", frozenset({"regex"}), lambda vocabulary: engine)], VOCABULARY, max_bytes=1 << 30)
        yield grammars, engine, exports
        await grammars.stop()


def get(grammars: Grammars, name: str, num_bytes: int = 100):
    spec = GrammarSpec("regex", name.ljust(num_bytes, "_"))
    return grammars.get(spec.source[:8], spec, "")


async def test_a_form_is_loaded_once_and_not_in_the_event_loops_thread(rig):
    grammars, engine, exports = rig
    asked = asyncio.gather(*(get(grammars, "one", BIG_FORM_BYTES) for _ in range(20)))
    turns = 0  # of the loop, while the form is being loaded
    while not asked.done():
        await asyncio.sleep(0.001)
        turns += engine.running["big"]
    found = await asked

    assert len({id(f) for f in found}) == 1
    assert exports.num_exports == len(engine.ends) == 1
    assert threading.get_ident() not in engine.threads
    assert turns > 3


async def test_big_forms_come_one_after_another_and_a_small_one_does_not_wait_for_them(rig):
    grammars, engine, _ = rig
    wanted = [get(grammars, f"big{i}", BIG_FORM_BYTES) for i in range(3)]
    wanted += [get(grammars, f"small{i}") for i in range(3)]
    await asyncio.gather(*wanted)

    assert engine.most["big"] == 1
    assert engine.most["small"] > 1
    assert engine.ends[-1] == "big"


async def test_who_goes_away_takes_it_from_nobody_and_a_failure_is_not_kept(rig):
    grammars, engine, exports = rig
    tasks = [asyncio.create_task(get(grammars, "one")) for _ in range(3)]
    await asyncio.sleep(0.01)
    tasks[0].cancel()
    assert (await tasks[1]) is (await tasks[2])
    for _ in range(2):
        with pytest.raises(DataLoss):
            await get(grammars, "damaged", BIG_FORM_BYTES)
    await get(grammars, "fine", BIG_FORM_BYTES)

    assert exports.num_exports == 4
    assert len(engine.ends) == 4
    assert (len(grammars), grammars.cached_bytes) == (2, 100 + BIG_FORM_BYTES)
