"""A small vocabulary in a weightstore that serves nothing else, and the real service beside it, with its real processes and engines."""

import contextlib
import hashlib
import json

import pytest
import pytest_asyncio

from plugmesh import wire
from plugmesh.config import MeshConfig
from plugmesh.errors import NotFound
from plugmesh.grammar.client import GrammarClient
from plugmesh.grammar.vocabulary import vocabulary_of
from plugmesh.mesh.api import Binding
from plugmesh.testing.databases import database_url, postgres_server, postgres_url  # noqa: F401 - fixtures
from plugmesh.testing.local_mesh import LocalMesh
from plugmesh.tokenization.load import GGUF_ASSET, load_vocabulary
from plugmesh_grammar.config import Settings
from plugmesh_grammar.service import create
from plugmesh_proto.v1 import weightstore_pb2, weightstore_pb2_grpc

PIECES = [b"ab", b"abc", b'{"', b'":', b'", "', b"true", b"false", b"null", b"12", b"  ", b"\xe6\x97", b"yes", b"no"]


def byte_alphabet():
    """Byte to character as GPT-2 has it."""
    out, extra = {}, 0
    for b in range(256):
        if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255:
            out[b] = chr(b)
        else:
            out[b] = chr(256 + extra)
            extra += 1
    return out


def tiny_meta():
    """GGUF metadata: 3 control tokens, 256 bytes, some joined pieces."""
    of = byte_alphabet()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(of[b] for b in range(256))]
    merges = []
    for piece in PIECES:
        for cut in range(2, len(piece) + 1):
            text = "".join(of[b] for b in piece[:cut])
            if text not in tokens:
                tokens.append(text)
                merges.append("".join(of[b] for b in piece[: cut - 1]) + " " + of[piece[cut - 1]])
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3), "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    }


class WeightStore(weightstore_pb2_grpc.WeightStoreServicer):
    """Knows one tokenizer, under the name "tiny" and as the default."""

    def __init__(self, vocab_size=0):
        self.data = json.dumps(tiny_meta()).encode()
        self.config = json.dumps({"vocab_size": vocab_size} if vocab_size else {})

    def bindings(self):
        return [Binding(weightstore_pb2_grpc.add_WeightStoreServicer_to_server, self, "plugmesh_proto.v1.WeightStore")]

    async def start(self): ...
    async def drain(self, deadline_s): ...
    async def stop(self): ...
    def describe(self):
        return {}

    async def Resolve(self, request, context):
        if request.model not in ("", "tiny", "v1"):
            await wire.abort(context, NotFound(f"no model {request.model!r}"))
        asset = weightstore_pb2.AssetEntry(
            name=GGUF_ASSET, sha256=hashlib.sha256(self.data).hexdigest(), num_bytes=len(self.data), data=self.data)
        return weightstore_pb2.ModelManifest(model="tiny", version="v1", assets=[asset], config_json=self.config)


@pytest.fixture(scope="session")
def vocabulary():
    return vocabulary_of(load_vocabulary({GGUF_ASSET: json.dumps(tiny_meta()).encode()}), 0)


class Rig:
    def __init__(self, mesh, folder):
        self.mesh = mesh
        self.folder = folder
        self.client = GrammarClient(mesh)

    async def add(self, *, plugins=None, plugin_settings=None, **settings):
        """A grammar instance, as the runtime makes it; `plugin_settings` by slug."""
        table = {} if plugins is None else {"plugins": list(plugins)}
        config = MeshConfig.model_validate({"mesh": {"model": "tiny", "data_dir": str(self.folder)}, "services": {"grammar": table}, "plugins": plugin_settings or {}})
        return await self.mesh.host("grammar", create, settings=Settings(**{"compile_workers": 1, **settings, **table}), config=config)


@contextlib.asynccontextmanager
async def running(folder):
    async with LocalMesh() as mesh:
        store = WeightStore()
        await mesh.host("weightstore", lambda context: store)
        yield Rig(mesh, folder)


@pytest_asyncio.fixture
async def rig(tmp_path):
    async with running(tmp_path) as rig:
        yield rig
