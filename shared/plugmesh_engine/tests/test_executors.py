"""Which executor runs a model, and that the native one is reached without torch."""

import pathlib
import subprocess
import sys

import pytest

import plugmesh_kernels
from plugmesh.errors import ConfigError
from plugmesh_engine import EngineConfig, build_engine, load_model, resolve_executor, weight_format
from plugmesh_engine.executors.torch import TorchModel
from plugmesh_engine.testing import random_weights, tiny_config, write_manifest

CPU = [str(pathlib.Path(p)) for p in sys.path if p]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As on a machine with kernels."""
    monkeypatch.setattr(plugmesh_kernels, "why_not", lambda: "")
    monkeypatch.setattr(plugmesh_kernels, "available", lambda: True)
    return monkeypatch


def test_auto_takes_the_kernels_where_they_can_run(kernels: pytest.MonkeyPatch) -> None:
    assert resolve_executor(EngineConfig()) == "native"
    assert resolve_executor(EngineConfig(device="cuda")) == "torch"
    assert resolve_executor(EngineConfig(), "mamba") == "torch"
    assert resolve_executor(EngineConfig(executor="torch")) == "torch"
    assert weight_format(EngineConfig()) == "native"
    assert weight_format(EngineConfig(executor="torch", dtype="float32")) == "float32"


def test_without_kernels_auto_is_torch_and_native_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugmesh_kernels, "why_not", lambda: "no compiler was found")
    monkeypatch.setattr(plugmesh_kernels, "available", lambda: False)

    assert resolve_executor(EngineConfig()) == "torch"
    assert weight_format(EngineConfig()) == "bfloat16"
    with pytest.raises(ConfigError, match="no compiler was found"):
        resolve_executor(EngineConfig(executor="native"))


@pytest.mark.parametrize("config", [EngineConfig(executor="jax"), EngineConfig(executor="native", device="cuda")])
def test_what_cannot_be_is_refused(config: EngineConfig, kernels: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError):
        resolve_executor(config)


def test_a_manifest_of_floats_is_left_to_torch(tmp_path: pathlib.Path, kernels: pytest.MonkeyPatch) -> None:
    manifest = write_manifest(tmp_path, tiny_config(), random_weights(tiny_config()), "bfloat16")

    assert isinstance(load_model(manifest, EngineConfig()), TorchModel)
    assert build_engine(manifest, EngineConfig(num_blocks=8)).layout.codec == "raw"


WITHOUT_TORCH = """
import pathlib, sys
sys.path[:0] = {path!r}
from plugmesh.types import SamplingParams
from plugmesh_engine import EngineConfig, EngineRequest, build_engine
from plugmesh_engine.driver import EngineDriver
from plugmesh_engine.fetch import fetch_manifest
from plugmesh_engine.testing import FileManifest, FileTensor, random_weights, run_to_end, tiny_config
from plugmesh_kernels.pack import pack
config = tiny_config()
path = pathlib.Path({folder!r}) / "model.native"
entries = []
with path.open("wb") as f:
    for name, w in random_weights(config).items():
        raw = w.tobytes() if w.ndim == 1 else pack("float32", w, *w.shape).tobytes()
        f.write(bytes(-f.tell() % 64))
        entries.append(FileTensor(name, "float32" if w.ndim == 1 else "f32x16", w.shape, str(path), f.tell(), len(raw)))
        f.write(raw)
manifest = FileManifest("tiny", "v", "llama", config.to_json(), tuple(entries), "native")
engine = build_engine(manifest, EngineConfig(executor="native", num_blocks=32, num_threads=1))
for temperature in (0.0, 1.0):
    params = SamplingParams(temperature=temperature, top_p=0.9, seed=1, max_tokens=8, ignore_eos=True, logprobs=True, top_logprobs=2, repetition_penalty=1.1)
    [tokens] = run_to_end(engine, EngineRequest("r", (5, 6, 7) * 9, params))["r"]
    assert len(tokens) == 8
engine.close()
assert "torch" not in sys.modules, "torch was imported"
print("done")
"""


@pytest.mark.skipif(not plugmesh_kernels.available(), reason="the kernels are not compiled")
def test_the_native_path_does_without_torch(tmp_path: pathlib.Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH.format(path=CPU, folder=str(tmp_path))], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert "done" in done.stdout
