"""What every weight format must do: stand for all weights of a model, compute rows that depend on nothing else, and say how faithful it is."""

from __future__ import annotations

import dataclasses
import gc
import pathlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

import plugmesh_kernels
from plugmesh.records import WeightFormatRecord
from plugmesh.testing.conformance.base import RecordConformance
from plugmesh.types import ModelConfig
from plugmesh_engine import EngineConfig, load_model
from plugmesh_engine.batch import Rows
from plugmesh_engine.reference import ReferenceLlama
from plugmesh_engine.testing import random_weights, tiny_config
from plugmesh_engine.testing_plugins import MemorySource, half_rows, write_packed

EXECUTORS = [
    pytest.param("native", marks=pytest.mark.skipif(not plugmesh_kernels.available(), reason="no native kernels")),
    "torch",
]
NATIVE = EXECUTORS[:1]


class WeightFormatConformance(RecordConformance):
    """Packs small random models and runs them.

    Attributes:
        config: Of the model: widths that are multiples of 64. A format that wants others sets its own.
        max_logit_error: Largest difference to the float32 textbook, in standard deviations of its logits. Random weights are harder than trained ones: int8
            with a scale per row gives about 0.05. A format that says it is lossless is held to 0.02, which leaves room for another order of sums.
        max_company_error: As `max_logit_error`, for what the same row may differ when its prompt is cut otherwise or runs beside others. 0 asks for equal bits
            under the native executor; torch's own sums differ a little.
    """

    kind = "weight_formats"
    config: ClassVar[ModelConfig] = tiny_config(hidden_size=128, intermediate_size=192, num_heads=4, num_kv_heads=2, head_dim=32)
    max_logit_error: ClassVar[float] = 0.5
    max_company_error: ClassVar[float] = 0.0

    @pytest.fixture
    def weights(self) -> dict[str, np.ndarray]:
        """Values of bfloat16, as a file might hold them."""
        found = random_weights(self.config, seed=11)
        return {n: (w.view(np.uint32) >> 16 << 16).view(np.float32) if w.ndim == 2 else w for n, w in found.items()}

    def packed_model(self, folder: pathlib.Path, record: WeightFormatRecord, weights: Mapping[str, np.ndarray], executor: str) -> Any:
        """The model, packed and loaded."""
        return load_model(write_packed(folder, MemorySource(self.config, weights), record), self.engine_config(executor), record)

    @staticmethod
    def engine_config(executor: str, num_threads: int = 2) -> EngineConfig:
        return EngineConfig(executor=executor, dtype="float32", num_blocks=32, num_threads=num_threads)

    def ids(self, num_tokens: int, seed: int) -> list[int]:
        found: list[int] = np.random.default_rng(seed).integers(0, self.config.vocab_size, num_tokens).tolist()
        return found

    @staticmethod
    def logits(executor: Any, ids: Sequence[int], chunks: Sequence[int], company: Sequence[int] = ()) -> np.ndarray:
        """Of the last token; `company` are tokens of another sequence that starts in every step."""
        at, result = 0, None
        for n in chunks:
            rows = [Rows(ids[at : at + n], at, [1, 2, 3, 4, 5], 1, True)]
            rows[:0] = [Rows(company, 0, [6, 7], 1, True)] if company else []
            result = executor.run(rows)
            at += n
        assert result is not None
        last: np.ndarray = result.logits[-1].copy()
        return last

    def test_packing_twice_gives_the_same_bytes(self, record: WeightFormatRecord, weights: dict[str, np.ndarray], tmp_path: pathlib.Path) -> None:
        first = write_packed(tmp_path, MemorySource(self.config, weights), record)
        second = write_packed(tmp_path, MemorySource(self.config, weights), record)

        assert first == second
        assert len({t.name for t in first.tensors}) == len(first.tensors)
        for t in first.tensors:
            assert t.dtype in ("float32", "q4_1x16", "q8_0x16", "bf16x16", "f32x16") or t.dtype.startswith(f"{record.name}/")
            assert (len(t.dtype) <= 32, len(t.shape) >= 1) == (True, True)

    def test_the_record_has_a_name_that_the_catalogue_and_the_kv_layout_can_hold(self, record: WeightFormatRecord) -> None:
        assert 0 < len(record.name) <= 24
        assert record.name not in ("source", "native", "float32", "bfloat16")

    @pytest.mark.parametrize("executor", EXECUTORS)
    def test_logits_are_as_close_to_the_textbook_as_the_format_says(
        self, record: WeightFormatRecord, weights: dict[str, np.ndarray], tmp_path: pathlib.Path, executor: str
    ) -> None:
        model = self.packed_model(tmp_path, record, weights, executor)
        e = model.build_executor(self.engine_config(executor), half_rows())
        ids = self.ids(45, 1)
        got = self.logits(e, ids, [45])
        e.close()
        want = ReferenceLlama(self.config, weights).next_logits(ids)

        assert np.abs(got - want).max() <= (0.02 if record.is_lossless else self.max_logit_error) * want.std()
        assert model.plugin.weights.num_bytes > 0

    @pytest.mark.parametrize("executor", EXECUTORS)
    def test_a_rows_result_depends_neither_on_company_nor_on_chunks(
        self, record: WeightFormatRecord, weights: dict[str, np.ndarray], tmp_path: pathlib.Path, executor: str
    ) -> None:
        model = self.packed_model(tmp_path, record, weights, executor)
        e = model.build_executor(self.engine_config(executor), half_rows())
        ids = self.ids(45, 2)
        whole = self.logits(e, ids, [45])
        others = [self.logits(e, ids, [1, 17, 2, 24, 1]), self.logits(e, ids, [44, 1], company=self.ids(20, 3)), self.logits(e, ids, [45])]
        e.close()
        room = max(self.max_company_error, 0.002 if executor == "torch" else 0.0) * whole.std()

        for other in others:
            assert np.abs(whole - other).max() <= room

    @pytest.mark.parametrize("executor", NATIVE)
    def test_threads_change_no_bit(self, record: WeightFormatRecord, weights: dict[str, np.ndarray], tmp_path: pathlib.Path, executor: str) -> None:
        model = self.packed_model(tmp_path, record, weights, executor)
        found = []
        for num_threads in (1, 2, 3):
            e = model.build_executor(self.engine_config(executor, num_threads))
            found.append(np.stack([self.logits(e, self.ids(n, n), [n]) for n in (1, 2, 40)]))
            e.close()

        assert np.array_equal(found[0], found[1])
        assert np.array_equal(found[0], found[2])

    @pytest.mark.parametrize("case", ["zeros", "constants", "outliers", "tiny"])
    def test_matrices_out_of_the_ordinary_are_packed_and_give_finite_logits(
        self, record: WeightFormatRecord, weights: dict[str, np.ndarray], tmp_path: pathlib.Path, case: str
    ) -> None:
        odd = {n: w.copy() for n, w in weights.items()}
        for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
            w = odd[f"model.layers.0.{part}.weight"]
            if case == "zeros":
                w[:] = 0
            elif case == "constants":
                w[:] = 0.25
            elif case == "outliers":
                w[3, 5] = 64
            else:
                w *= 2.0**-60
        e = self.packed_model(tmp_path, record, odd, "torch").build_executor(self.engine_config("torch"))
        got = self.logits(e, self.ids(20, 4), [20])
        e.close()

        assert np.isfinite(got).all()
        if case in ("zeros", "constants", "tiny"):  # these a format must get right: nothing is lost by any scale
            want = ReferenceLlama(self.config, odd).next_logits(self.ids(20, 4))
            assert np.abs(got - want).max() <= max(0.02, self.max_logit_error) * want.std()

    def test_the_weights_are_let_go_of_with_their_model(
        self, record: WeightFormatRecord, weights: dict[str, np.ndarray], tmp_path: pathlib.Path
    ) -> None:
        """Of the tensors that a format has mapped nothing stays when executor and model are gone."""
        seen: list[weakref.ref[Any]] = []

        def load(loaded: Any) -> Any:
            class Watched:
                config = loaded.config

                def names(self) -> list[str]:
                    names: list[str] = loaded.names()
                    return names

                def entry(self, name: str) -> Any:
                    return loaded.entry(name)

            watched = Watched()
            seen.append(weakref.ref(watched))
            given = record.load(watched)
            for function in given.linears.values():
                if type(function).__name__ != "PyCapsule":
                    seen.append(weakref.ref(function))
            return given

        model = self.packed_model(tmp_path, dataclasses.replace(record, load=load), weights, "torch")
        e = model.build_executor(self.engine_config("torch"))
        self.logits(e, self.ids(5, 1), [5])
        e.close()
        del e, model
        gc.collect()

        assert [r for r in seen if r() is not None] == []
