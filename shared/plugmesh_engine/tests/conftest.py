"""Fixtures for the engine's tests."""

import pathlib
from collections.abc import Callable, Iterator

import pytest
import torch

from plugmesh_engine import Engine, EngineConfig
from plugmesh_engine.executors.torch import TorchModel
from plugmesh_engine.testing import tiny_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower on two threads, and other tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    """A random float32 Llama with 6 heads over 3 KV heads."""
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def build(tiny: TorchModel) -> Callable[..., Engine]:
    """An engine on the tiny model whose whole KV memory is NaN before anything is written."""

    def make(model: TorchModel = tiny, scheduler: object = None, drafts: object = None, **settings: object) -> Engine:
        config = EngineConfig(**{"executor": "torch", "dtype": "float32", "num_blocks": 64, **settings})  # type: ignore[arg-type]
        engine = Engine(model, config, scheduler=scheduler, drafts=drafts)
        engine._executor.memory.storage[1:].fill_(float("nan"))  # all but the null block
        return engine

    return make


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder for model files of this run."""
    return tmp_path_factory.mktemp("models")
