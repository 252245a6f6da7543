"""Weights are mapped, checked and rotated as the configuration says."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import torch

from plugmesh.errors import ConfigError, DataLoss, FailedPrecondition
from plugmesh.types import ModelConfig
from plugmesh_engine.executors.torch import load as load_model
from plugmesh_engine.model.linear import FloatFormat
from plugmesh_engine.model.llama import rope_tables, rotate
from plugmesh_engine.testing import FileManifest, random_weights, tiny_config, write_manifest


@pytest.fixture
def manifest(tmp_path: pathlib.Path) -> FileManifest:
    return write_manifest(tmp_path, tiny_config(), random_weights(tiny_config()))


def test_stored_floats_are_mapped_not_copied(manifest: FileManifest) -> None:
    model = load_model(manifest, "float32")
    path = manifest.tensors[0].path
    with open("/proc/self/maps") as f:
        regions = [line.split()[0].split("-") for line in f if line.rstrip().endswith(path)]
    inside = [int(a, 16) <= model.graph.layers[1].down.data_ptr() < int(b, 16) for a, b in regions]

    assert any(inside)
    assert model.num_copied_bytes == 0
    assert model.num_mapped_bytes == sum(t.num_bytes for t in manifest.tensors)


def test_another_float_type_is_converted(manifest: FileManifest) -> None:
    model = load_model(manifest, "bfloat16")

    assert model.graph.layers[0].q.dtype is torch.bfloat16
    assert model.num_mapped_bytes == 0 < model.num_copied_bytes


def with_tensor(manifest: FileManifest, index: int, **changes: object) -> FileManifest:
    tensors = list(manifest.tensors)
    tensors[index] = dataclasses.replace(tensors[index], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(manifest, tensors=tuple(tensors))


def test_a_manifest_that_does_not_fit_its_file_is_refused(manifest: FileManifest) -> None:
    last = manifest.tensors[-1]
    with pytest.raises(DataLoss, match="ends at byte"):
        load_model(with_tensor(manifest, -1, offset=last.offset + 64), "float32")
    with pytest.raises(DataLoss, match="do not hold"):
        load_model(with_tensor(manifest, 0, num_bytes=8), "float32")
    with pytest.raises(DataLoss, match="lacks tensor"):
        load_model(with_tensor(manifest, 3, name="other"), "float32")
    with pytest.raises(DataLoss, match="expected"):
        load_model(with_tensor(manifest, 0, shape=tuple(reversed(manifest.tensors[0].shape))), "float32")
    with pytest.raises(FailedPrecondition, match="Q4_1"):
        load_model(with_tensor(manifest, 0, dtype="Q4_1"), "float32")


@pytest.mark.parametrize(
    ("change", "match"),
    [({"architecture": "mamba"}, "mamba"), ({"rope_style": "twisted"}, "twisted"), ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
     ({"rope_scaling": {"type": "linear"}}, "factor")],
)  # fmt: skip
def test_what_the_engine_does_not_know_is_a_configuration_error(manifest: FileManifest, change: dict[str, object], match: str) -> None:
    text = json.dumps({**json.loads(manifest.config_json), **change})
    with pytest.raises(ConfigError, match=match):
        load_model(dataclasses.replace(manifest, config_json=text), "float32")


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rotation_is_multiplication_by_complex_numbers(style: str) -> None:
    config = tiny_config(rope_style=style)
    cos, sin = rope_tables(config, torch.device("cpu"))
    x = torch.randn(7, 4, 10, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([0, 1, 2, 100, 511, 5, 3])
    turned = rotate(x, cos[at][:, None], sin[at][:, None], style).numpy()
    a, b = (slice(0, None, 2), slice(1, None, 2)) if style == "interleaved" else (slice(0, 5), slice(5, 10))
    angle = at.numpy()[:, None] * 10000.0 ** (-2 * np.arange(5) / 10)
    wanted = (x[..., a].numpy() + 1j * x[..., b].numpy()) * np.exp(1j * angle)[:, None]

    assert np.allclose(turned[..., a], wanted.real, atol=1e-5)
    assert np.allclose(turned[..., b], wanted.imag, atol=1e-5)


def llama3(config: ModelConfig) -> np.ndarray:
    """Meta's published rule, one frequency at a time."""
    s, out = config.rope_scaling or {}, []
    for i in range(0, config.head_dim, 2):
        freq = config.rope_theta ** (-i / config.head_dim)
        length = 2 * np.pi / freq
        trained, low, high, factor = (float(s[k]) for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "factor"))  # type: ignore[arg-type]
        if length > trained / low:
            freq /= factor
        elif length > trained / high:
            smooth = (trained / length - low) / (high - low)
            freq = (1 - smooth) * freq / factor + smooth * freq
        out.append(freq)
    return np.array(out)


def test_scaled_frequencies_follow_their_rules() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = tiny_config(head_dim=32, rope_scaling=scaling)
    cos, sin = rope_tables(config, torch.device("cpu"))
    assert np.allclose(np.arctan2(sin[1].numpy(), cos[1].numpy()), llama3(config), atol=1e-6)

    plain, _ = rope_tables(tiny_config(), torch.device("cpu"))
    slowed, _ = rope_tables(tiny_config(rope_scaling={"type": "linear", "factor": 2.0}), torch.device("cpu"))
    assert torch.allclose(plain[:200], slowed[0:400:2], atol=1e-6)


def test_a_lone_bfloat16_row_equals_the_same_row_in_company() -> None:
    g = torch.Generator().manual_seed(1)
    w, x = torch.randn(40, 64, generator=g).bfloat16(), torch.randn(5, 64, generator=g).bfloat16()
    f = FloatFormat()
    alone = torch.cat([f.linear(f.prepare_input(x[i : i + 1]), w) for i in range(5)])

    assert alone.shape == (5, 40)
    assert torch.allclose(alone.float(), x.float() @ w.float().T, rtol=0.01, atol=0.05)
