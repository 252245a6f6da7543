"""Every measurement runs, and without a GPU there are no figures; every kernel compiles for GPUs that are not here."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from plugmesh_engine import gpu_bench as bench
from plugmesh_kernels.gpu.compile import Shape

TINY = Shape("tiny", 64, 96, 2, 1, 16, 200)
PLAN = bench.Plan(rows=(1,), decodes=((2, 20),), prompts=((5, 0), (5, 20)), steps=(2,), step_context=20)


def test_every_measurement_runs_and_is_in_the_table(device: str) -> None:
    calls = []

    def once(run: Callable[[], object]) -> float:
        calls.append(run())
        return 1e-3

    results = bench.run(TINY, PLAN, once, device, num_layers=1)
    text = bench.table(results, copy=100.0)

    assert len(calls) == sum(1 if r.torch_us is None else 2 for r in results)
    assert {r.kernel for r in results} == {
        "linear 4 bit", "linear 8 bit", "decode attention", "prefill attention", "add + norm", "rope + append", "decode step",
    }  # fmt: skip
    first = results[0]  # a product of 1 x 64 with 64 x 64 in 4 bits and two half-precision numbers per 32
    assert first.num_bytes == 64 * 64 // 2 + 64 * 2 * 4 + 64 * (4 if device == "cpu" else 2) * 2
    assert first.gb_per_s == pytest.approx(first.num_bytes / 1e-3 / 1e9)
    assert len(text.splitlines()) == len(results) + 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles_without_spilling_much(arch: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "plugmesh_kernels.gpu.compile", "--json", "--arch", str(arch)]
    reports = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300).stdout)
    products = {r["mma"] for r in reports if r["kernel"] in ("_small_linear", "_prefill", "_decode_split")}

    assert {r["kernel"] for r in reports} == {
        "_decode_split", "_decode_merge", "_prefill", "_rope_append", "_add_rms_norm", "_silu_mul", "_piece_max", "_merge_pieces", "_expand",
        "_small_linear", "_add_parts",
    }  # fmt: skip
    assert "" not in products, "a product does not use the tensor cores"
    assert max(r["num_spilled_bytes"] for r in reports) <= 64
    assert max(r["shared_bytes"] for r in reports) <= 99 * 1024, "what every GPU since 8.6 has"
