"""A plugin's KV codec as an executor uses it: built, checked, and with the weight format in its layout's name."""

from __future__ import annotations

import dataclasses

from plugmesh.errors import PluginError, PlugmeshError
from plugmesh.records import KvCodecContext, KvCodecRecord
from plugmesh.types import BLOCK_TOKENS, KvLayout
from plugmesh_engine.seams import KvCodec

_MAX_NAME = 32  # the kvstore takes 64, and the weight format follows


def build_codec(record: KvCodecRecord, context: KvCodecContext, kv_tag: str) -> tuple[KvCodec, KvLayout]:
    """The codec of an engine, and the layout under which its blocks travel.

    Raises:
        PluginError: `build` raised, or the layout is not one that blocks can travel under; names the codec.
    """
    try:
        codec: KvCodec = record.build(context)
    except PlugmeshError:
        raise
    except Exception as e:
        raise PluginError(f"KV codec {record.name!r} could not be built: {type(e).__name__}: {e}", plugin=record.name) from e
    try:
        layout = codec.layout
        for is_right, problem in (
            (0 < len(layout.codec) <= _MAX_NAME, f"its layout's codec must have 1 to {_MAX_NAME} characters, not {layout.codec!r}"),
            (layout.model == context.model_version, "its layout must name the context's model_version"),
            (layout.block_tokens == BLOCK_TOKENS, f"its blocks must hold {BLOCK_TOKENS} tokens"),
            (len(codec.memory.read(0)) == layout.block_bytes, "block_bytes is not the size of a block of its memory"),
        ):
            if not is_right:
                raise PluginError(f"KV codec {record.name!r}: {problem}", plugin=record.name)
    except BaseException:
        codec.close()
        raise
    return codec, tagged(layout, kv_tag)


def tagged(layout: KvLayout, kv_tag: str) -> KvLayout:
    """The layout of KV that weights of another format computed: such blocks are never mixed up with others of the model."""
    return dataclasses.replace(layout, codec=f"{layout.codec}@{kv_tag}") if kv_tag else layout
