"""One instance with real processes, and an engine that does on command what hostile grammars do."""

import asyncio
import os
import signal
import time

import grpc
import pytest
import pytest_asyncio

from plugmesh import wire
from plugmesh.errors import (
    FailedPrecondition,
    GrammarTimeout,
    InternalError,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    Overloaded,
    Unavailable,
    UnsupportedGrammar,
)
from plugmesh.grammar.client import Grammars
from plugmesh.grammar.spec import GrammarSpec
from plugmesh.host import PluginHost
from plugmesh_grammar.tests import literal_engine
from plugmesh_grammar.tests.conftest import running
from plugmesh_proto.v1 import grammar_pb2 as pb
from plugmesh_proto.v1 import grammar_pb2_grpc

HELLO = GrammarSpec("regex", "hello")
EOS = 2


@pytest_asyncio.fixture
async def literal(tmp_path, monkeypatch):
    """A rig whose instances have the literal engine; `rig.add()` starts one."""
    monkeypatch.syspath_prepend(str(tmp_path))
    literal_engine.write(tmp_path)
    async with running(tmp_path) as rig:
        plain = rig.add
        rig.add = lambda **settings: plain(**{"plugins": ["t_literal"], **settings})
        yield rig


def stub_of(rig):
    return grammar_pb2_grpc.GrammarStub(rig.mesh.channel("grammar"))


def request(spec, model=""):
    return pb.CompileGrammarRequest(spec=wire.spec_to_pb(spec), model=model)


async def test_a_grammar_is_compiled_once_and_then_known(literal):
    instance = await literal.add()
    first = await literal.client.compile(HELLO, "", timeout_s=10)
    again = await literal.client.compile(HELLO, "tiny", timeout_s=10)

    assert (first.engine, first.engine_version, first.was_cached, again.was_cached) == ("literal", "1", False, True)
    assert (first.key, first.num_bytes, first.tokenizer_hash) == (again.key, again.num_bytes, again.tokenizer_hash)
    assert instance.service.compiler.num_compiled == 1


@pytest.mark.slow
async def test_many_who_ask_at_once_have_it_compiled_once(literal, tmp_path):
    instance = await literal.add()
    go = tmp_path / "go"
    asked = [asyncio.create_task(literal.client.compile(GrammarSpec("regex", f"!wait:{go}!"), "", timeout_s=10)) for _ in range(20)]
    await asyncio.sleep(0.2)
    asked[0].cancel()  # the others' is not lost with it
    go.touch()
    keys = {(await task).key for task in asked[1:]}

    assert len(keys) == 1
    assert instance.service.compiler.num_compiled == 1


async def test_the_exported_form_matches_in_another_process_what_masks_serve(literal, vocabulary):
    await literal.add()
    host = PluginHost.load(["t_literal"], literal.mesh.config, service="decode")
    grammars = Grammars(literal.mesh, host.records("grammar_engines"), vocabulary, max_bytes=1 << 20)
    info = await literal.client.compile(HELLO, "", timeout_s=10)
    compiled = await grammars.get(info.key, HELLO, "")
    matcher = compiled.matcher()
    for byte in b"hello":
        assert matcher.accept(3 + byte)

    assert matcher.is_completed
    assert await grammars.get(info.key, HELLO, "") is compiled
    assert len(grammars) == 1
    await grammars.stop()


@pytest.mark.slow
async def test_grammars_of_another_engine_or_tokenizer_are_refused(literal, vocabulary):
    import dataclasses

    await literal.add()
    with pytest.raises(FailedPrecondition, match="'literal'"):
        await Grammars(literal.mesh, [], vocabulary, max_bytes=1).get("", HELLO, "")
    host = PluginHost.load(["t_literal"], literal.mesh.config, service="decode")
    other = dataclasses.replace(vocabulary, tokenizer_hash="x")
    with pytest.raises(FailedPrecondition, match="tokenizer"):
        await Grammars(literal.mesh, host.records("grammar_engines"), other, max_bytes=1).get("", HELLO, "")


@pytest.mark.slow
async def test_the_cache_of_a_user_has_a_cap(literal, vocabulary):
    await literal.add()
    host = PluginHost.load(["t_literal"], literal.mesh.config, service="decode")
    grammars = Grammars(literal.mesh, host.records("grammar_engines"), vocabulary, max_bytes=25)
    for i in range(5):
        spec = GrammarSpec("regex", f"{'x' * 9}{i}")
        await grammars.get((await literal.client.compile(spec, "", timeout_s=10)).key, spec, "")

    assert len(grammars) <= 2
    assert grammars.cached_bytes <= 25


async def test_what_an_engine_refuses_keeps_keyword_and_path_and_is_remembered_briefly(literal):
    instance = await literal.add(refused_ttl_s=0.3)
    for _ in range(2):
        with pytest.raises(UnsupportedGrammar) as caught:
            await literal.client.compile(GrammarSpec("regex", "!no!"), "", timeout_s=10)
        assert {"keyword": "pattern", "path": "/x"} == caught.value.fields
    assert len(instance.service.compiler._refused) == 1


async def test_errors_are_typed(literal):
    await literal.add()
    expected = {
        GrammarSpec("regex", "a", engine="xyz"): InvalidRequest, GrammarSpec("json_schema", "{"): UnsupportedGrammar,
        GrammarSpec("regex", "a" * 5000): LimitExceeded, GrammarSpec("regex", "!raise!"): InternalError,
    }
    for spec, error in expected.items():
        with pytest.raises(error):
            await literal.client.compile(spec, "", timeout_s=10)


@pytest.mark.slow
async def test_an_unknown_kind_and_an_unknown_model_are_refused(literal):
    await literal.add()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub_of(literal).Compile(pb.CompileGrammarRequest(spec=pb.GrammarSpec(kind="xml")))
    assert isinstance(wire.error_from_rpc(caught.value), InvalidRequest)
    with pytest.raises(NotFound):
        await literal.client.compile(HELLO, "nobody", timeout_s=5)


async def test_without_an_instance_or_an_engine_it_is_unavailable(rig):
    with pytest.raises(Unavailable) as caught:
        await rig.client.compile(HELLO, "", timeout_s=5)
    assert caught.value.retry_after_s > 0
    await rig.add(plugins=[])
    with pytest.raises(Unavailable, match="no grammar engine"):
        await rig.client.compile(HELLO, "", timeout_s=5)


@pytest.mark.parametrize(("command", "error"), [pytest.param("hang", GrammarTimeout, marks=pytest.mark.slow), ("eat", LimitExceeded), pytest.param("abort", LimitExceeded, marks=pytest.mark.slow), pytest.param("quit", LimitExceeded, marks=pytest.mark.slow)])
async def test_a_hostile_grammar_costs_its_own_request_only(literal, command, error):
    instance = await literal.add(compile_workers=2, compile_timeout_s=2.0, compile_memory_bytes=256 << 20)
    bad = asyncio.create_task(literal.client.compile(GrammarSpec("regex", f"!{command}!"), "", timeout_s=10))
    longest = 0.0
    for i in range(20):
        begin = time.monotonic()
        await literal.client.compile(GrammarSpec("regex", f"good{i}"), "", timeout_s=10)
        if i:  # the first waits for the second process to start
            longest = max(longest, time.monotonic() - begin)
    with pytest.raises(error):
        await bad

    assert longest < 1.5  # none waited for it
    # Nothing of it is remembered as invalid: it would be tried again.
    assert not instance.service.compiler._refused


@pytest.mark.parametrize("command", ["eat", "big", "abort", "no", pytest.param("quit", marks=pytest.mark.slow)])
async def test_what_breaks_one_engine_is_left_to_the_next(literal, tmp_path, command):
    literal_engine.write(tmp_path, "t_second", name="second")
    instance = await literal.add(plugins=["t_literal", "t_second"], compile_memory_bytes=256 << 20, max_compiled_bytes=1 << 20)

    found = await literal.client.compile(GrammarSpec("regex", f"!literal-{command}!"), "", timeout_s=10)
    assert found.engine == "second"
    assert instance.service.num_killed == (command in ("abort", "quit"))
    with pytest.raises(UnsupportedGrammar if command == "no" else LimitExceeded):
        await literal.client.compile(GrammarSpec("regex", f"!{command}!"), "", timeout_s=10)
    assert (await literal.client.compile(HELLO, "", timeout_s=10)).engine == "literal"


@pytest.mark.parametrize("num_broken", [2, 3])
async def test_what_breaks_two_engines_is_left_to_the_third_and_three_are_enough(literal, tmp_path, num_broken):
    slugs = ["t_literal"]
    for name in [*["lit2", "lit3"][: num_broken - 1], "last"]:
        literal_engine.write(tmp_path, f"t_{name}", name=name)
        slugs.append(f"t_{name}")
    instance = await literal.add(plugins=slugs)

    task = literal.client.compile(GrammarSpec("regex", "!lit-abort!"), "", timeout_s=20)
    if num_broken == 2:
        assert (await task).engine == "last"
    else:
        with pytest.raises(LimitExceeded):
            await task
    assert instance.service.num_killed == num_broken


async def test_a_killed_process_is_replaced_and_its_grammar_tried_again(literal, tmp_path):
    instance = await literal.add()
    go = tmp_path / "go"
    task = asyncio.create_task(literal.client.compile(GrammarSpec("regex", f"!wait:{go}!"), "", timeout_s=10))
    await asyncio.sleep(0.2)
    [pid] = instance.service.pool.pids
    os.kill(pid, signal.SIGKILL)
    go.touch()

    assert (await task).num_bytes == len(b"LITwaited")
    assert instance.service.pool.pids != [pid]
    assert instance.service.num_killed == 1


@pytest.mark.slow
async def test_a_process_that_died_while_idle_costs_nothing(literal):
    instance = await literal.add()
    for pid in instance.service.pool.pids:
        os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(0.1)

    assert (await literal.client.compile(HELLO, "", timeout_s=10)).engine == "literal"


@pytest.mark.slow
async def test_too_many_at_once_are_refused(literal, tmp_path):
    await literal.add(max_waiting=1)
    go = tmp_path / "go"
    tasks = [asyncio.create_task(literal.client.compile(GrammarSpec("regex", f"!wait:{go}!{i}"), "", timeout_s=10)) for i in range(3)]
    await asyncio.sleep(0.2)
    go.touch()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert 1 == sum(isinstance(o, Overloaded) for o in outcomes)


async def test_the_lease_says_how_many_compile_and_wait(literal, tmp_path):
    instance = await literal.add()
    go = tmp_path / "go"
    seen = lambda: {k: v for k, v in literal.mesh.instances("grammar")[0].load.items() if k.startswith("num_")}  # noqa: E731
    assert seen() == {"num_running": 0, "num_waiting": 0}
    asked = [asyncio.create_task(literal.client.compile(GrammarSpec("regex", f"!wait:{go}!{i}"), "", timeout_s=10)) for i in range(3)]
    async with asyncio.timeout(8):
        while instance.service.pool.num_waiting < 2:
            await asyncio.sleep(0.01)
    assert seen() == {"num_running": 1, "num_waiting": 2}
    go.touch()
    await asyncio.gather(*asked)

    assert seen() == {"num_running": 0, "num_waiting": 0}


async def test_a_restart_serves_from_the_catalogue_without_compiling(literal):
    first = await literal.add()
    info = await literal.client.compile(HELLO, "", timeout_s=10)
    await literal.mesh.kill(first.info.instance_id)
    second = await literal.add()
    again = await literal.client.compile(HELLO, "", timeout_s=10)
    _, data = await literal.client.export(HELLO, "", timeout_s=10)

    assert (info.key, True, 0) == (again.key, again.was_cached, second.service.compiler.num_compiled)
    assert b"LIThello" == data


async def test_a_form_that_was_compiled_under_other_settings_of_the_engines_plugin_is_not_used(literal):
    infos, compiled = [], []
    for limit in (1, 2, 1):
        instance = await literal.add(plugin_settings={"t_literal": {"limit": limit}})
        infos.append(await literal.client.compile(HELLO, "", timeout_s=10))
        compiled.append(instance.service.compiler.num_compiled)
        await literal.mesh.kill(instance.info.instance_id)

    assert [1, 1, 0] == compiled
    assert infos[0].key == infos[2].key != infos[1].key


@pytest.mark.slow
async def test_the_memory_cache_has_a_cap_and_what_left_it_is_in_the_catalogue(literal):
    instance = await literal.add(cache_bytes=30)
    for i in range(6):
        await literal.client.compile(GrammarSpec("regex", f"{'x' * 9}{i}"), "", timeout_s=10)
    assert instance.service.compiler.cached_bytes <= 30
    assert (await literal.client.compile(GrammarSpec("regex", f"{'x' * 9}0"), "", timeout_s=10)).was_cached
    assert instance.service.compiler.num_compiled == 6


@pytest.mark.slow
async def test_export_comes_in_parts(literal):
    await literal.add(max_schema_bytes=240 << 10, max_regex_chars=240 << 10)
    spec = GrammarSpec("regex", "y" * 220_000)
    info, data = await literal.client.export(spec, "", timeout_s=10)

    assert data == b"LIT" + b"y" * 220_000
    assert info.num_bytes == len(data)


@pytest.mark.slow
async def test_another_instance_is_tried(literal):
    first = await literal.add()
    await literal.add()
    await literal.mesh.kill(first.info.instance_id)

    assert (await literal.client.compile(HELLO, "", timeout_s=10)).engine == "literal"


async def test_validate(literal):
    await literal.add()
    expected = {"hello": (True, True, 5), "hel": (False, True, 3), "help": (False, False, 3), "": (False, True, 0), "hellos": (False, False, 5)}
    replies = {text: await stub_of(literal).Validate(pb.ValidateGrammarRequest(grammar=request(HELLO), text=text)) for text in expected}

    assert expected == {text: (r.is_valid, r.is_prefix, r.num_valid_bytes) for text, r in replies.items()}


async def test_describe(literal):
    await literal.add(compile_timeout_s=3)
    await literal.client.compile(HELLO, "", timeout_s=10)
    reply = await stub_of(literal).Describe(pb.DescribeGrammarsRequest())

    assert [("literal", "1", ["regex"])] == [(e.name, e.version, list(e.languages)) for e in reply.engines]
    assert (1, 8, 1, 0, 3.0) == (reply.num_cached, reply.cached_bytes, reply.num_compiled, reply.num_killed, reply.compile_timeout_s)
