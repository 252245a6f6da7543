"""The kernels run on the GPU when there is one, else in Triton's interpreter."""

import os
import pathlib
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is first imported
# The interpreter of triton 3.6 turns arrays into integers in a way that numpy 2.4 refuses.
pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.7")


@pytest.hookimpl(tryfirst=True)  # before the selection by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU these are tests of the GPU: `pytest -m gpu` runs them together with those below tests/gpu."""
    here = pathlib.Path(__file__).parent
    for item in items:
        if torch.cuda.is_available() and here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
