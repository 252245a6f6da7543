"""Hooks and settings of plugmesh_dfloat11; light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from plugmesh.config import StrictModel
from plugmesh.hookspecs import hookimpl
from plugmesh.records import WeightFormatRecord

if TYPE_CHECKING:
    from plugmesh.host import PluginContext


class Settings(StrictModel):
    """`[plugins.dfloat11]`."""

    decode: Literal["auto", "tiles", "layers"] = "auto"
    round_to_bfloat16: bool = True


@hookimpl
def register_weight_formats(context: PluginContext) -> list[WeightFormatRecord]:
    """ "dfloat11", and "dfloat11-plain" to compare it with."""
    settings: Settings = context.settings(Settings)
    from plugmesh_dfloat11.weights import compressed, plain  # needs numpy and the kernels

    return [plain(settings), compressed(settings)]
