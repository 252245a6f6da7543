"""Servicers and stubs of `grpc.aio`, over NATS and within a process.

    channel   what generated stubs are given
    server    what `add_XServicer_to_server` registers with
    client, pipe, peers, flow, frames   the call itself, from the top down
    nats_carrier, local                 what moves the packets
    interceptor                         the same errors on real gRPC
"""

from plugmesh.mesh.rpc.carrier import Carrier
from plugmesh.mesh.rpc.channel import CarrierChannel
from plugmesh.mesh.rpc.interceptor import ErrorInterceptor
from plugmesh.mesh.rpc.local import LocalCarrier, LocalHub
from plugmesh.mesh.rpc.nats_carrier import NatsCarrier
from plugmesh.mesh.rpc.peers import Patience, PeerWatch
from plugmesh.mesh.rpc.server import RpcServer

NatsChannel = CarrierChannel       # over a NatsCarrier
InProcessChannel = CarrierChannel  # over a LocalCarrier

__all__ = [
    "Carrier", "CarrierChannel", "ErrorInterceptor", "InProcessChannel", "LocalCarrier", "LocalHub", "NatsCarrier", "NatsChannel",
    "Patience", "PeerWatch", "RpcServer",
]
