"""Health checks inside the containers: `probe.py grpc HOST:PORT [SERVICE]` or `probe.py http URL`.

Exit status 0 means serving. Only the standard library is imported and the gRPC health call is spelled out as HTTP/2
frames, because the check runs every few seconds in every container: this takes about 20 ms of CPU, importing grpcio
several hundred.
"""

from __future__ import annotations

import socket
import struct
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 2.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY = 0, 1, 3, 4, 7  # RFC 9113, section 6
END_STREAM, ACK, END_HEADERS = 1, 1, 4
SERVING = 1  # grpc.health.v1.HealthCheckResponse


def main(argv: list[str]) -> int:
    if len(argv) >= 2 and argv[0] == "grpc":
        problem = grpc_problem(argv[1], argv[2] if len(argv) > 2 else "")
    elif len(argv) == 2 and argv[0] == "http":
        problem = http_problem(argv[1])
    else:
        problem = "usage: probe.py grpc HOST:PORT [SERVICE] | probe.py http URL"
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


def http_problem(url: str) -> str:
    """Empty when the URL answers 2xx, else why not."""
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=TIMEOUT_S) as response:
            return "" if 200 <= response.status < 300 else f"{url}: status {response.status}"
    except (OSError, ValueError) as e:
        return f"{url}: {e}"


def grpc_problem(address: str, service: str = "") -> str:
    """Empty when grpc.health.v1.Health/Check says SERVING for `service`, else why not."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as sock:
            sock.sendall(PREFACE + frame(SETTINGS, 0, 0, b"") + request(address, service))
            message = first_message(sock)
    except (OSError, ValueError) as e:
        return f"{address}: {e}"
    return "" if status_of(message) == SERVING else f"{address}: {service or 'server'} is not serving ({message.hex() or 'no status'})"


def request(authority: str, service: str) -> bytes:
    """The HEADERS and DATA frames of one Check call on stream 1."""
    block = (
        b"\x83\x86"  # :method POST and :scheme http from the static table of RFC 7541
        + literal(4, b"/grpc.health.v1.Health/Check")
        + literal(1, authority.encode())
        + literal(31, b"application/grpc")
        + b"\x00" + text(b"te") + text(b"trailers")
    )  # fmt: skip
    name = service.encode()
    body = b"\x0a" + bytes([len(name)]) + name if name else b""
    return frame(HEADERS, END_HEADERS, 1, block) + frame(DATA, END_STREAM, 1, b"\x00" + struct.pack(">I", len(body)) + body)


def first_message(sock: socket.socket) -> bytes:
    """The payload of the answer's first gRPC message; empty when the call ends without one."""
    buffer = b""
    while True:
        head = exactly(sock, 9)
        length, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
        stream = int.from_bytes(head[5:], "big") & 0x7FFFFFFF
        payload = exactly(sock, length)
        if kind == SETTINGS and not flags & ACK:
            sock.sendall(frame(SETTINGS, ACK, 0, b""))
        elif kind == DATA and stream == 1:
            buffer += payload
            if len(buffer) >= 5 and len(buffer) >= 5 + int.from_bytes(buffer[1:5], "big"):
                return buffer[5:]
        if kind in (RST_STREAM, GOAWAY) or (kind in (DATA, HEADERS) and stream == 1 and flags & END_STREAM):
            return b""


def status_of(message: bytes) -> int:
    """Field 1 of HealthCheckResponse; 0 (UNKNOWN) when absent, as protobuf has it."""
    return message[1] if len(message) >= 2 and message[0] == 0x08 else 0


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(index: int, value: bytes) -> bytes:
    """A header with an indexed name, not added to the dynamic table (RFC 7541, 6.2.2); index below 127."""
    return (bytes([index]) if index < 15 else bytes([15, index - 15])) + text(value)


def text(value: bytes) -> bytes:
    if len(value) > 126:
        raise ValueError("header too long")
    return bytes([len(value)]) + value


def exactly(sock: socket.socket, length: int) -> bytes:
    if length > 1 << 20:
        raise ValueError(f"frame of {length} bytes")
    data = b""
    while len(data) < length:
        piece = sock.recv(length - len(data))
        if not piece:
            raise ValueError("connection closed before the answer")
        data += piece
    return data


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
