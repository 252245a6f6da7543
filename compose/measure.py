"""Talks to a running stack: a chat over HTTP with times, and the facts that the engine knows about its containers."""

from __future__ import annotations

import datetime
import http.client
import json
import re
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Any

SIZES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 1000, "MB": 1000**2, "GB": 1000**3}


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed chat. Times are seconds from sending the request; `ttft_s` is the first piece of text."""

    status: int
    text: str
    finish_reason: str
    usage: dict[str, Any]
    ttft_s: float
    total_s: float
    num_events: int


def chat(port: int, key: str, prompt: str, *, max_tokens: int = 32, timeout_s: float = 120.0) -> Answer:
    """Streams one greedy chat completion from the gateway on loopback. A refusal is an Answer with its status and body."""
    body = {
        "model": "smollm2", "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    start = time.monotonic()
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            return Answer(response.status, response.read(65536).decode(errors="replace"), "", {}, 0.0, time.monotonic() - start, 0)
        usage: dict[str, Any] = {}
        text, finish_reason, ttft_s, num_events, ended = "", "", 0.0, 0, False
        for line in response:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                ended = True
                break
            event = json.loads(data)
            num_events += 1
            if "error" in event:
                return Answer(500, json.dumps(event["error"]), "", {}, 0.0, time.monotonic() - start, num_events)
            usage = event.get("usage") or usage
            for choice in event.get("choices", []):
                piece = choice.get("delta", {}).get("content") or ""
                if piece and not text:
                    ttft_s = time.monotonic() - start
                text += piece
                finish_reason = choice.get("finish_reason") or finish_reason
        return Answer(200 if ended else 0, text, finish_reason, usage, ttft_s, time.monotonic() - start, num_events)
    finally:
        connection.close()


def post(port: int, key: str, body: dict[str, Any], timeout_s: float = 120.0) -> tuple[int, dict[str, Any]]:
    """A chat completion that is not streamed: status and JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": "smollm2", **body}), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read(1 << 20))
    finally:
        connection.close()


def get(port: int, path: str, key: str = "", timeout_s: float = 10.0) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        return response.status, response.read(1 << 20).decode(errors="replace")
    finally:
        connection.close()


def docker_json(*arguments: str) -> list[Any]:
    """The output of a docker command that prints JSON, as a list whichever of its shapes it has."""
    out = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    if not out:
        return []
    return list(json.loads(out)) if out.startswith("[") else [json.loads(line) for line in out.splitlines()]


def containers(project: str) -> dict[str, dict[str, Any]]:
    """`docker inspect` of every container of the project, by service; replicas get a suffix."""
    ids = subprocess.run(
        ["docker", "ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={project}"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout.split()  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for item in docker_json("inspect", *ids) if ids else []:
        labels = item["Config"]["Labels"]
        number = labels["com.docker.compose.container-number"]
        found[labels["com.docker.compose.service"] + ("" if number == "1" else f"-{number}")] = item
    return found


class HealthWatch:
    """Notes when containers of a project become healthy, from the engine's events while the context is open.

    The engine keeps only the last 256 events, and health checks make many, so asking afterwards is too late.
    """

    def __init__(self, project: str) -> None:
        self._project = project
        self._lines: list[str] = []

    def __enter__(self) -> HealthWatch:
        self._child = subprocess.Popen(
            ["docker", "events", "--filter", f"label=com.docker.compose.project={self._project}", "--filter", "event=health_status",
             "--format", "{{json .}}"], stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._child.terminate()
        self._child.wait(10)
        self._reader.join(10)

    def _read(self) -> None:
        assert self._child.stdout is not None
        self._lines.extend(self._child.stdout)

    def seconds(self) -> dict[str, float]:
        """From each container's start to its first "healthy", by service."""
        started = {item["Id"]: (service, when(item["State"]["StartedAt"]).timestamp()) for service, item in containers(self._project).items()}
        found: dict[str, float] = {}
        for event in map(json.loads, self._lines):
            if event["status"].endswith(": healthy") and event["id"] in started:
                service, start = started[event["id"]]
                found.setdefault(service, round(event["timeNano"] / 1e9 - start, 1))
        return found


def when(text: str) -> datetime.datetime:
    """RFC 3339 with nanoseconds, which datetime does not read."""
    return datetime.datetime.fromisoformat(re.sub(r"(\.\d{1,6})\d*", r"\1", text).replace("Z", "+00:00"))


def memory_bytes(project: str) -> dict[str, int]:
    """Memory of each container as `docker stats` counts it (without the page cache that can be dropped)."""
    names = {item["Name"].lstrip("/"): service for service, item in containers(project).items()}
    usage = {}
    for line in docker_json("stats", "--no-stream", "--format", "{{json .}}", *names):
        usage[names[line["Name"]]] = size_bytes(line["MemUsage"].split("/")[0])
    return usage


def size_bytes(text: str) -> int:
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]+)", text.strip())
    if match is None:
        raise ValueError(f"not a size: {text!r}")
    return int(float(match.group(1)) * SIZES[match.group(2)])
