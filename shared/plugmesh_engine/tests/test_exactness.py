"""However a sequence is computed, it gets the tokens that the slow reference gives it. All KV memory is NaN before it is written."""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from plugmesh.types import BLOCK_TOKENS, SamplingParams, block_chain
from plugmesh_engine import Engine, EngineRequest, KvSource
from plugmesh_engine.executors.torch import TorchModel
from plugmesh_engine.reference import ReferenceLlama
from plugmesh_engine.scheduler import FcfsScheduler
from plugmesh_engine.testing import (
    events_of,
    random_weights,
    run_to_end,
    steps,
    tiny_config,
    tiny_model,
    tokens_of,
)

Build = Callable[..., Engine]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, top_p=0.95, frequency_penalty=0.3, repetition_penalty=1.1, seed=5, max_tokens=12, ignore_eos=True)


def prompts(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(3, 211, n).tolist()) for n in lengths]


def requests(ps: list[tuple[int, ...]], sampling: SamplingParams = GREEDY, **fields: object) -> list[EngineRequest]:
    return [EngineRequest(f"r{i}", p, sampling, **fields) for i, p in enumerate(ps)]  # type: ignore[arg-type]


def alone(build: Build, request: EngineRequest, **settings: object) -> list[list[int]]:
    """The request by itself, prompt in one piece, without a prefix cache."""
    return run_to_end(build(prefix_cache=False, **settings), request)[request.request_id]


@pytest.fixture(scope="module")
def reference() -> ReferenceLlama:
    return ReferenceLlama(tiny_config(), random_weights(tiny_config()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 1, "rope_style": "half"},
        {"num_kv_heads": 2, "num_layers": 3, "tie_word_embeddings": False},
        {"num_kv_heads": 6, "num_heads": 6, "attention_bias": True, "head_dim": 6},
        {"num_heads": 3, "num_kv_heads": 3, "hidden_size": 21, "rope_theta": 500.0},
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "base",
)
def test_a_ragged_batch_equals_the_reference(build: Build, models: pathlib.Path, changes: dict[str, object]) -> None:
    config = tiny_config(**changes)
    slow = ReferenceLlama(config, random_weights(config))
    ps = prompts(1, 2, 15, 16, 17, 33, 60)
    out = run_to_end(build(tiny_model(models, **changes), max_tokens_per_step=40), *requests(ps))

    assert [out[f"r{i}"][0] for i in range(len(ps))] == [slow.greedy(p, 12) for p in ps]


def test_logits_are_within_1e_4_of_the_reference(build: Build, reference: ReferenceLlama) -> None:
    [p] = prompts(50)
    engine = build()
    engine.add(EngineRequest("r", p, dataclasses.replace(GREEDY, max_tokens=1, logprobs=True, top_logprobs=100)))
    [event] = events_of(steps(engine))
    logits = reference.next_logits(p).astype(np.float64)
    logp = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())

    for token, value in event.tokens[0].top:
        assert value == pytest.approx(logp[token], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, -1])
def test_chunks_of_any_size_change_nothing(build: Build, chunk: int) -> None:
    ps = prompts(70, 33, 16, 5)
    for p in ps:
        r = EngineRequest("r", p, GREEDY)
        size = chunk if chunk > 0 else len(p) - 1

        assert run_to_end(build(max_tokens_per_step=size), r)["r"] == alone(build, r)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("mix", [True, False])
def test_company_in_the_batch_changes_nothing(build: Build, sampling: SamplingParams, mix: bool) -> None:
    """Requests come in at different steps, run chunked, and leave at different steps."""
    ps = prompts(40, 3, 17, 64, 90, 31)
    rs = [dataclasses.replace(r, sampling=dataclasses.replace(sampling, max_tokens=4 + 3 * i)) for i, r in enumerate(requests(ps, sampling))]
    engine = build(max_tokens_per_step=24, scheduler=FcfsScheduler(24, 64, mix=mix))
    outputs = []
    for r in rs:
        engine.add(r)
        outputs += [engine.step(), engine.step()]
    found = tokens_of(engine, outputs + steps(engine))

    assert found == {r.request_id: alone(build, r) for r in rs}


@pytest.mark.parametrize("chunk", [5, 64])
def test_a_cached_prefix_changes_nothing_and_is_counted(build: Build, chunk: int) -> None:
    """Hits of 0, 1, 2 and 3 blocks, some ending in the middle of a chunk; a prompt of full blocks recomputes its last one."""
    [p] = prompts(64)
    cases = [p, p[:48], (*p[:40], 7, 8, 9), p[:17], (9, *p), (*p, 1, 2, 3)]
    engine = build(max_tokens_per_step=chunk)
    for i, c in enumerate(cases):
        hit = engine.cached_prefix(c)
        engine.add(EngineRequest(f"r{i}", c, GREEDY))
        outputs = steps(engine)
        [done] = [e for e in events_of(outputs) if e.request_done]

        assert tokens_of(engine, outputs)[f"r{i}"] == alone(build, EngineRequest("x", c, GREEDY))
        assert done.usage is not None and done.usage.cached_tokens == min(hit, (len(c) - 1) // 16 * 16)
        assert hit == [0, 48, 32, 16, 0, 64][i]
    assert engine.stats().prefix_hit_tokens == 32 + 32 + 16 + 64
    assert engine.stats().kv_blocks_leaked == 0


def test_generated_tokens_are_found_by_the_next_turn(build: Build) -> None:
    [p] = prompts(20)
    engine = build()
    [first] = run_to_end(engine, EngineRequest("a", p, GREEDY))["a"]

    assert engine.cached_prefix([*p, *first]) == 16
    assert engine.cached_prefix([*p, *first[:11], 1]) == 16
    [longer] = run_to_end(engine, EngineRequest("b", p, dataclasses.replace(GREEDY, max_tokens=40)))["b"]
    assert engine.cached_prefix([*p, *longer]) == 48


def test_a_request_can_stay_out_of_the_cache(build: Build) -> None:
    [p] = prompts(40)
    engine = build()
    run_to_end(engine, EngineRequest("a", p, GREEDY, use_prefix_cache=False))

    assert engine.cached_prefix(p) == 0
    assert engine.stats().kv_blocks_cached == 0


def export(engine: Engine, r: EngineRequest) -> tuple[list[KvSource], list[int]]:
    """Blocks of the prompt as a prefill service would send them, copied step by step, and the first tokens."""
    engine.add(dataclasses.replace(r, prefill_only=True))
    sources, first, parent = [], [], engine.layout.key()
    while engine.has_work():
        out = engine.step()
        for b in out.blocks_ready:
            assert b.block_index == len(sources) and b.parent_id == parent
            sources.append(KvSource(b.block_id, b.num_tokens, bytes(engine.export_block(r.request_id, b.block_index))))
            parent = b.block_id
        first += [t.token_id for e in out.tokens for t in e.tokens]
    assert [s.block_id for s in sources] == block_chain(engine.layout.key(), r.token_ids, tail=True)
    assert engine.stats().kv_blocks_used == len(sources) and engine.stats().kv_blocks_leaked == 0
    assert engine.release(r.request_id) and not engine.release(r.request_id)
    assert engine.stats().kv_blocks_used == 0
    return sources, first


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 45])
def test_imported_kv_changes_nothing(build: Build, length: int, sampling: SamplingParams) -> None:
    [p] = prompts(length)
    r = EngineRequest("r", p, sampling)
    sources, first = export(build(max_tokens_per_step=20), r)
    wanted = alone(build, r)
    assert first == wanted[0][:1]

    engine = build()
    engine.add(dataclasses.replace(r, kv=tuple(sources), resume=(tuple(first),)))
    outputs = steps(engine)

    assert tokens_of(engine, outputs)["r"] == [wanted[0][1:]]
    assert outputs[0].kv_imported == ["r"]
    assert engine.stats().num_imported_tokens == length
    assert sum(len(e.tokens) for o in outputs for e in o.tokens) == 11
    assert engine.stats().num_steps == 11  # not one token of the prompt was computed again


@pytest.mark.parametrize("length", [16, 32, 45])
def test_imported_kv_without_a_first_token_computes_the_last_row_only(build: Build, length: int) -> None:
    [p] = prompts(length)
    r = EngineRequest("r", p, GREEDY)
    sources, _ = export(build(), r)
    engine = build(max_tokens_per_step=1)

    assert run_to_end(engine, dataclasses.replace(r, kv=tuple(sources)))["r"] == alone(build, r)
    assert engine.stats().num_imported_tokens == length - 1
    assert engine.stats().num_steps == 12


def test_a_part_of_the_kv_is_enough(build: Build) -> None:
    [p] = prompts(60)
    r = EngineRequest("r", p, GREEDY)
    sources, _ = export(build(), r)
    warm = build()
    run_to_end(warm, EngineRequest("other", p[:20], GREEDY))

    for engine in (build(), warm):
        assert run_to_end(engine, dataclasses.replace(r, kv=tuple(sources[:2])))["r"] == alone(build, r)
        assert engine.stats().kv_blocks_leaked == 0
    assert warm.stats().num_imported_tokens == 16  # the other block was in its own cache


def test_equal_prompts_give_equal_bytes_however_they_were_chunked(build: Build) -> None:
    [p] = prompts(45)
    whole, _ = export(build(), EngineRequest("r", p, GREEDY))
    pieces, _ = export(build(max_tokens_per_step=7), EngineRequest("r", p, GREEDY))

    for a, b in zip(whole, pieces, strict=True):
        x, y = np.frombuffer(a.data, np.float32), np.frombuffer(b.data, np.float32)
        assert np.allclose(x, y, rtol=1e-4, atol=1e-5) and np.isfinite(x).all()
    tail = np.frombuffer(whole[-1].data, np.float32).reshape(2, 2, BLOCK_TOKENS, -1)
    assert not tail[:, :, 45 % 16 :].any() and tail[:, :, : 45 % 16].any()


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_preemption_changes_nothing(build: Build, sampling: SamplingParams, prefix_cache: bool) -> None:
    """Six sequences that together need twice the pool."""
    sampling = dataclasses.replace(sampling, max_tokens=40)
    rs = requests(prompts(20, 25, 31, 16, 9, 14), sampling)
    engine = build(num_blocks=10, max_tokens_per_step=16, prefix_cache=prefix_cache)

    assert run_to_end(engine, *rs) == {r.request_id: alone(build, r) for r in rs}
    assert engine.stats().num_preemptions > 3
    assert engine.stats().kv_blocks_leaked == engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("num_delivered", [0, 1, 5, 11])
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_resumed_sequence_goes_on_as_if_undisturbed(build: Build, sampling: SamplingParams, num_delivered: int) -> None:
    [p] = prompts(30)
    r = EngineRequest("r", p, sampling)
    [whole] = alone(build, r)
    engine = build()
    engine.add(dataclasses.replace(r, resume=(tuple(whole[:num_delivered]),)))
    events = events_of(steps(engine))

    assert events[0].index == num_delivered
    assert [t.token_id for e in events for t in e.tokens] == whole[num_delivered:]
    assert events[-1].usage is not None and events[-1].usage.completion_tokens == 12


def test_siblings_compute_the_prompt_once_and_differ_repeatably(build: Build) -> None:
    [p] = prompts(37)
    r = EngineRequest("r", p, dataclasses.replace(SEEDED, num_sequences=4))
    engine = build()
    engine.add(r)
    computed = 0
    original = engine._executor.run
    engine._executor.run = lambda rows: (_ := original(rows), computed_add(rows))[0]  # type: ignore[method-assign]

    def computed_add(rows: list) -> None:  # type: ignore[type-arg]
        nonlocal computed
        computed += sum(len(x.token_ids) for x in rows)

    found = tokens_of(engine, steps(engine))["r"]

    assert computed == 37 + 4 * 11
    assert len({tuple(s) for s in found}) == 4
    assert found == run_to_end(build(max_tokens_per_step=6, num_blocks=9, prefix_cache=False), r)["r"]
    assert found[0] == alone(build, dataclasses.replace(r, sampling=SEEDED))[0]  # the first is what n = 1 gives


def test_siblings_share_the_prompt_blocks_and_copy_only_the_tail(build: Build) -> None:
    [p] = prompts(40)
    engine = build()
    engine.add(EngineRequest("r", p, dataclasses.replace(SEEDED, num_sequences=3)))
    engine.step()
    assert engine.stats().kv_blocks_used == 3
    engine.step()

    assert engine.stats().kv_blocks_used == 2 + 3
    assert engine.stats().kv_blocks_leaked == 0


@pytest.mark.parametrize("delivered", [(0, 0, 0), (3, 0, 1), (2, 5, 12), (1, 1, 1)])
def test_siblings_resume_where_each_of_them_was(build: Build, delivered: tuple[int, ...]) -> None:
    for length in (30, 32):
        [p] = prompts(length)
        r = EngineRequest("r", p, dataclasses.replace(SEEDED, num_sequences=3))
        whole = alone(build, r)
        sources, _ = export(build(), r)
        resume = tuple(tuple(s[:n]) for s, n in zip(whole, delivered, strict=True))
        for kv in ((), tuple(sources)):
            engine = build()
            found = run_to_end(engine, dataclasses.replace(r, resume=resume, kv=kv))["r"]

            assert found == [s[n:] for s, n in zip(whole, delivered, strict=True)]
            assert engine.stats().kv_blocks_leaked == engine.stats().kv_blocks_used == 0


def test_bfloat16_stays_close_to_float32(build: Build, models: pathlib.Path, tiny: TorchModel) -> None:
    """A lone bfloat16 row takes a path of its own (doubled rows); it must agree with the same row in company."""
    small = tiny_model(models, "bfloat16")
    [p] = prompts(30)
    sampling = dataclasses.replace(GREEDY, logprobs=True, top_logprobs=5, max_tokens=3)
    tops = []
    for model, company in ((tiny, 0), (small, 0), (small, 3)):
        engine = build(model, dtype=model.dtype)
        for i, q in enumerate([p, *prompts(*[9] * company)]):
            engine.add(EngineRequest(str(i), q, sampling))
        tops.append([dict(t.top) for e in events_of(steps(engine)) if e.request_id == "0" for t in e.tokens])

    for other in tops[1:]:
        for a, b in zip(tops[0], other, strict=True):
            common = set(a) & set(b)
            assert len(common) >= 4 and all(abs(a[t] - b[t]) < 0.8 for t in common)  # logits reach 17, bfloat16 keeps 8 bits
