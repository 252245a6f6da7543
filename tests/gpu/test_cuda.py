"""What only a real GPU can show: model sizes, tensor cores, captured graphs. `pytest -m gpu` runs these and the kernels' own tests."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"), pytest.mark.timeout(600)]

from plugmesh.types import SamplingParams  # noqa: E402 # after the skips, as what follows needs torch
from plugmesh_engine import Engine, EngineConfig, EngineRequest  # noqa: E402
from plugmesh_engine.batch import Rows  # noqa: E402
from plugmesh_engine.testing import run_to_end  # noqa: E402

CUDA = "cuda"


def close(actual: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-2) -> bool:
    wanted = wanted.float()
    return bool((actual.float() - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (32, 8, 128)])
def test_attention_at_model_sizes(heads: int, kv_heads: int, dim: int) -> None:
    from plugmesh_kernels.gpu import decode, prefill

    torch.manual_seed(0)
    lengths = [1, 100, 1000, 8192, 127, 0]
    pool = torch.randn(1100, 2, 2, 16, kv_heads, dim, dtype=torch.bfloat16, device=CUDA)
    table = torch.randint(1, 1100, (len(lengths), 512), dtype=torch.int32, device=CUDA)
    q = torch.randn(len(lengths), heads, dim, dtype=torch.bfloat16, device=CUDA)
    rows, sizes = torch.arange(len(lengths), dtype=torch.int32, device=CUDA), torch.tensor(lengths, dtype=torch.int32, device=CUDA)
    actual, wanted = torch.empty_like(q), torch.empty_like(q)
    scratch = decode.DecodeScratch(len(lengths), heads, dim, CUDA)
    decode.decode_attention(q, pool, 1, rows, table, sizes, decode.num_splits(8192), scratch, actual)
    decode.decode_attention_reference(q, pool, 1, rows, table, sizes, wanted)
    assert close(actual, wanted)
    again = torch.empty_like(q)
    decode.decode_attention(q, pool, 1, rows, table, sizes, 1, scratch, again)
    assert torch.equal(actual, again), "the grid changed the result"

    counts, before = np.array([700, 1, 64]), np.array([0, 1000, 333])
    q = torch.randn(int(counts.sum()), heads, dim, dtype=torch.bfloat16, device=CUDA)
    chunks = prefill.Chunks.build(np.cumsum(counts) - counts, counts, before, table[:3].cpu().numpy(), CUDA)
    actual, wanted = torch.empty_like(q), torch.empty_like(q)
    prefill.prefill_attention(q, pool, 1, chunks, actual)
    prefill.prefill_attention_reference(q, pool, 1, chunks, wanted)
    assert close(actual, wanted)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(576, 576), (3072, 576), (576, 1536), (4096, 14336), (28672, 4096)])
def test_products_at_model_sizes(bits: int, n: int, k: int) -> None:
    from plugmesh_kernels.gpu import linear, pack

    torch.manual_seed(0)
    w = pack.quantize(torch.randn(n, k), bits).to(CUDA)
    x = torch.randn(40, k, dtype=torch.bfloat16, device=CUDA)
    wanted = linear.linear_reference(x, w)
    together = linear.linear(x[:32], w)

    assert close(together, wanted[:32], 5e-3)
    assert close(linear.linear(x, w), wanted, 1e-2)
    for rows in (1, 16, 17):
        assert torch.equal(linear.linear(x[:rows], w), together[:rows]), "company changed a row"


def test_a_captured_step_gives_what_its_kernels_give_one_by_one() -> None:
    from plugmesh_engine.executors.cuda import CudaExecutor, CudaModel
    from plugmesh_engine.gpu_bench import random_model
    from plugmesh_kernels.gpu.compile import SMOLLM2

    graph = random_model(SMOLLM2, 4, 4, 2048, CUDA, torch.bfloat16)
    model = CudaModel(graph, graph.config, "random", "bfloat16", CUDA, 0, graph.nbytes)
    config = EngineConfig(executor="cuda", device=CUDA, num_blocks=600, max_num_sequences=8)
    captured, plain = CudaExecutor(model, config), CudaExecutor(model, config, graphs=False)
    rng = np.random.default_rng(0)
    blocks = [list(range(1 + 70 * i, 71 + 70 * i)) for i in range(8)]
    lengths = [1000, 3, 17, 500, 30, 31, 32, 33]
    for x in (captured, plain):
        x.memory.storage.zero_()
        for length, b in zip(lengths, blocks, strict=True):
            x.run([Rows([5] * length, 0, b)])
    for step in range(20):
        chosen = rng.permutation(8)[: int(rng.integers(1, 9))]
        rows = [Rows([int(t) for t in rng.integers(0, 49152, 1 + step % 3)], lengths[i], blocks[i], 1 + step % 3, i % 2 == 0) for i in chosen]
        for i in chosen:
            lengths[i] += 1 + step % 3
        a, b = captured.run(rows), plain.run(rows)
        assert a.best.tolist() == b.best.tolist() and np.array_equal(a.logits, b.logits)

    assert captured._use_graphs and captured._graphs, "nothing was captured"
    captured.close()


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_default_model_continues_a_text_as_on_the_cpu(tmp_path: pathlib.Path, dtype: str) -> None:
    from plugmesh import models
    from plugmesh_engine.executors import cuda
    from plugmesh_engine.executors import torch as torch_executor
    from plugmesh_engine.testing import english, gguf_tokenizer, read_gguf, write_manifest

    path = models.find("smollm2")
    config, weights = read_gguf(path)
    manifest = write_manifest(tmp_path, config, weights)
    ids = gguf_tokenizer(path).encode(english()[:6000]).ids
    requests = [EngineRequest(f"r{i}", tuple(ids[i * 150 : i * 150 + 100 + 30 * i]), SamplingParams(temperature=0, max_tokens=32)) for i in range(6)]
    on_cpu = Engine(torch_executor.load(manifest, "float32"), EngineConfig(executor="torch", dtype="float32", num_blocks=200))
    settings = EngineConfig(executor="cuda", dtype=dtype, device=CUDA, num_blocks=200)
    on_gpu = Engine(cuda.load(manifest, settings), settings)
    wanted, actual = run_to_end(on_cpu, *requests), run_to_end(on_gpu, *requests)
    first = sum(wanted[r][0][0] == actual[r][0][0] for r in wanted)

    if dtype == "float32":
        assert actual == wanted
    else:
        assert first >= 5, "bfloat16 changed first tokens"


def test_the_benchmark_gives_plausible_figures() -> None:
    from plugmesh_engine import gpu_bench as bench
    from plugmesh_kernels.gpu.compile import SMOLLM2

    timer = bench.cuda_timer(5)
    copy = bench.copy_gb_per_s(timer, CUDA)
    results = bench.run(SMOLLM2, bench.QUICK, timer, CUDA, 4)

    assert copy > 50
    # The caches were emptied, so nothing can be read faster than memory allows; small kernels are bounded by their launch instead.
    assert all(0 < r.gb_per_s < 1.5 * copy for r in results)
