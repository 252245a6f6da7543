"""The suites for weight formats and KV codecs, on the small real ones, and on broken ones that they must find."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest

from plugmesh.records import KvCodecRecord
from plugmesh.testing.conformance.kv_codec import KvCodecConformance
from plugmesh.testing.conformance.weight_format import WeightFormatConformance
from plugmesh_engine.testing import random_weights
from plugmesh_engine.testing_plugins import HalfRows, Int8Weights, int8_rows, write_plugin


@pytest.fixture(autouse=True)
def rows_plugin(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(write_plugin(tmp_path_factory.mktemp("path"))))


class TestHalfRows(KvCodecConformance):
    slug = "rows"
    max_error = 0.002


class TestInt8Rows(WeightFormatConformance):
    slug = "rows"
    max_logit_error = 0.2


class Forgetful(HalfRows):
    """Does not make the rows beyond an import zero."""

    def write(self, block, data, num_tokens):
        super().write(block, data, 16)


class Greedy(HalfRows):
    """Lets a row see what comes after it in the step."""

    def _attend_row(self, layer, q, blocks, length):
        return super()._attend_row(layer, q, blocks, max(r.num_computed + len(r.token_ids) for r in self._rows))


class Coarse(HalfRows):
    def attend(self, layer, q, k, v, out):
        super().attend(layer, q, np.round(k * 2) / 2, v, out)


@pytest.mark.parametrize(
    ("codec", "test"),
    [
        (Forgetful, "test_rows_beyond_the_imported_ones_are_as_if_never_written"),
        (Greedy, "test_chunks_and_company_do_not_change_a_row"),
    ],
)
def test_the_suite_finds_a_broken_codec(codec: type[HalfRows], test: str) -> None:
    suite = TestHalfRows()
    getattr(suite, test)(HalfRows(suite.context()))
    with pytest.raises(AssertionError):
        getattr(suite, test)(codec(suite.context()))


def test_the_suite_finds_a_codec_that_is_coarser_than_it_says() -> None:
    suite = TestHalfRows()
    suite.test_the_output_is_as_close_to_the_textbook_as_the_codec_says(HalfRows(suite.context()), 70)
    with pytest.raises(AssertionError):
        suite.test_the_output_is_as_close_to_the_textbook_as_the_codec_says(Coarse(suite.context()), 70)


def test_the_suite_finds_a_codec_that_needs_more_than_the_bytes_of_a_block() -> None:
    class Elsewhere(HalfRows):
        """Leaves values out of what it exports."""

        def read(self, block: int) -> memoryview:
            half = self.blocks[block].copy()
            half[:, 1] = 0
            return memoryview(half.reshape(-1).view(np.uint8))

    suite = TestHalfRows()
    with pytest.raises(AssertionError):
        suite.test_a_block_means_the_same_wherever_its_bytes_are_written(KvCodecRecord("elsewhere", Elsewhere), Elsewhere(suite.context()))


def test_the_suite_finds_a_format_whose_rows_depend_on_one_another(tmp_path: pathlib.Path) -> None:
    def load(loaded):
        good = int8_rows().load(loaded)
        name = "model.layers.0.mlp.down_proj.weight"

        def mixing(x, y):
            good.linears[name](x, y)
            y += 1e-3 * np.abs(x).max()  # as a scale for the whole step would

        return Int8Weights({**good.linears, name: mixing}, 1)

    suite = TestInt8Rows()
    weights = random_weights(suite.config, seed=11)
    with pytest.raises(AssertionError):
        suite.test_a_rows_result_depends_neither_on_company_nor_on_chunks(dataclasses.replace(int8_rows(), load=load), weights, tmp_path, "torch")
