"""A small client for the gateway's gRPC `Inference` service; needs grpcio and nothing else of the mesh.

    with Client("127.0.0.1:9000", api_key="pm-...") as client:
        for event in client.generate(messages=[{"role": "user", "content": "Hello"}], max_tokens=64):
            print(event.text, end="")

`AsyncClient` has the same methods, to be awaited or iterated asynchronously. `DecodeClient` speaks to a decode instance in token ids and adds fork,
score and tap. Every failure is a `plugmesh.errors` class.
"""

from plugmesh.client.aio import AsyncClient
from plugmesh.client.decode import DecodeClient, Generated, HiddenStates, Origin
from plugmesh.client.messages import Choice, Completion, Event, Score, ServedModel
from plugmesh.client.sync import Client

__all__ = ["AsyncClient", "Choice", "Client", "Completion", "DecodeClient", "Event", "Generated", "HiddenStates", "Origin", "Score", "ServedModel"]
