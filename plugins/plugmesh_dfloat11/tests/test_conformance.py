"""The suites of the kit, for both formats and both ways of decoding."""

from __future__ import annotations

import pytest

from plugmesh.testing.conformance import CardConformance, WeightFormatConformance
from plugmesh_dfloat11.plugin import Settings
from plugmesh_dfloat11.weights import uses_tiles


class TestCard(CardConformance):
    slug = "dfloat11"


@pytest.mark.skipif(not uses_tiles(Settings()), reason="no AVX512_BF16 or no compiler")
class TestTiles(WeightFormatConformance):
    slug = "dfloat11"
    name = "dfloat11"
    settings = {"decode": "tiles"}


class TestLayers(WeightFormatConformance):
    slug = "dfloat11"
    name = "dfloat11"
    settings = {"decode": "layers"}


class TestPlain(WeightFormatConformance):
    slug = "dfloat11"
    name = "dfloat11-plain"
