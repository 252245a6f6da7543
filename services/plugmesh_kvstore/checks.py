"""What callers say about blocks and layouts, checked before it is believed."""

from __future__ import annotations

from plugmesh.errors import InvalidRequest
from plugmesh.kv.pieces import BLOCK_ID_BYTES
from plugmesh.types import KvLayout

MAX_BLOCK_BYTES = 1 << 30


def check_id(block_id: bytes) -> None:
    if len(block_id) != BLOCK_ID_BYTES:
        raise InvalidRequest(f"a block id has {BLOCK_ID_BYTES} bytes, got {len(block_id)}", param="block_ids")


def check_sizes(layout: KvLayout, parent_id: bytes, num_tokens: int, num_bytes: int) -> None:
    if len(parent_id) not in (0, BLOCK_ID_BYTES):
        raise InvalidRequest(f"a parent id has {BLOCK_ID_BYTES} bytes or none, got {len(parent_id)}", param="parent_id")
    if not 0 < num_tokens <= layout.block_tokens:
        raise InvalidRequest(f"a block has 1 to {layout.block_tokens} tokens, got {num_tokens}", param="num_tokens")
    if not 0 < num_bytes <= layout.block_bytes:
        raise InvalidRequest(f"a block has 1 to {layout.block_bytes} bytes, got {num_bytes}", param="num_bytes")


_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_layout(layout: KvLayout) -> None:
    """Raises InvalidRequest when the sizes cannot be, or contradict each other."""
    if not 0 < layout.block_bytes <= MAX_BLOCK_BYTES or not 0 < layout.block_tokens <= 4096:
        raise InvalidRequest(
            f"a block of {layout.block_bytes} bytes and {layout.block_tokens} tokens is out of range", param="layout"
        )
    if len(layout.model) > 256 or len(layout.codec) > 64 or len(layout.dtype) > 64:
        raise InvalidRequest("a name in the layout is too long", param="layout")
    if layout.codec == "raw" and layout.dtype in _ITEM_BYTES:
        want = 2 * layout.num_layers * layout.num_kv_heads * layout.head_dim * layout.block_tokens
        want *= _ITEM_BYTES[layout.dtype]
        if want != layout.block_bytes:
            raise InvalidRequest(f"the layout's axes make {want} bytes, not {layout.block_bytes}", param="block_bytes")
