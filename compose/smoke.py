"""The smoke test: the whole stack built, started, used and removed, with every figure that docs/compose.md promises."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import measure
import prepare
import structured
from prepare import HERE, StackError, say

PLUGMESH_SERVICES = ("gateway", "tokenizer", "grammar", "weightstore", "prefill", "decode", "kvstore")
ALL_SERVICES = (*PLUGMESH_SERVICES, "nats", "postgres", "prometheus")
WITH_TORCH = ("prefill", "decode")
PROMPT = "What is the capital of France?"

# The tokenizer may not put prefill jobs; the broker tells the client so, asynchronously.
INTRUDER = """
import asyncio, pathlib, nats
async def main():
    refused = asyncio.Event()
    async def on_error(e):
        if "permissions violation" in str(e).lower(): refused.set()
    password = pathlib.Path("/run/secrets/nats_password").read_text().strip()
    nc = await nats.connect("nats://nats:4222", user="tokenizer", password=password, error_cb=on_error)
    await nc.publish("pm.compose.q.prefill", b"x")
    await nc.flush()
    async with asyncio.timeout(5):
        await refused.wait()
    await nc.close()
asyncio.run(main())
"""


@dataclass(slots=True)
class Result:
    """`checks` maps a sentence to what was wrong with it, empty when it holds."""

    figures: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)


class Stack:
    """One Compose project with its own secrets and port."""

    def __init__(self, project: str, environment: dict[str, str]) -> None:
        self.project = project
        self.environment = environment
        self.port = int(environment["PLUGMESH_PORT"])
        self.key = ""

    def compose(self, *arguments: str, timeout_s: float = 600.0, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        command: list[str | pathlib.Path] = [*prepare.compose_command(), "--file", HERE / "compose.yaml", "--project-name", self.project, *arguments]
        return prepare.run(command, env=self.environment, timeout_s=timeout_s, **kwargs)

    def inside(self, service: str, *command: str) -> str:
        """Runs a program in a running container and returns its output. Raises StackError."""
        return self.compose("exec", "-T", service, *command, capture_output=True, timeout_s=180).stdout


def run(project: str, *, host_wheels: bool, keep: bool) -> Result:
    """Raises StackError when it cannot even be built or started; what is wrong afterwards stands in `checks`."""
    result = Result()
    figures = result.figures
    secrets_folder = prepare.BUILD / f"secrets-{secrets.token_hex(4)}"
    figures["machine"] = {"cpus": os.cpu_count(), "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)}
    try:
        prepare.BUILD.mkdir(exist_ok=True)
        prepare.make_secrets(secrets_folder)
        base = timed(figures, "base_image_s", prepare.base_image)
        if host_wheels:
            timed(figures, "wheels_s", prepare.fill_wheelhouse)
        timed(figures, "model_s", prepare.fetch_model)
        stack = Stack(project, {
            **os.environ, "BASE_IMAGE": base, "PLUGMESH_UID": str(prepare.container_uid()), "PLUGMESH_PORT": str(free_port()),
            "PLUGMESH_SECRETS": str(secrets_folder), "COMPOSE_PARALLEL_LIMIT": "1",
        })  # fmt: skip
        stack.key = (secrets_folder / "api_key").read_text()
        timed(figures, "build_s", lambda: stack.compose("build", stdout=sys.stderr, timeout_s=3600))
        try:
            with measure.HealthWatch(project) as watch:
                timed(figures, "up_to_all_healthy_s", lambda: start(stack))
            figures["start_to_healthy_s"] = watch.seconds()
            use(stack, result)
        except BaseException:
            stack.compose("logs", "--tail", "40", stdout=sys.stderr)
            raise
        finally:
            if not keep:
                timed(figures, "stop_s", lambda: stack.compose("stop", "--timeout", "30", stdout=sys.stderr))
                result.checks["every service ends by itself when asked to"] = problems(
                    f"{name} ended with status {item['State']['ExitCode']}"
                    for name, item in measure.containers(project).items()
                    if name in PLUGMESH_SERVICES and item["State"]["ExitCode"] != 0
                )
                timed(figures, "down_s", lambda: stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "20", stdout=sys.stderr))
        if not keep:
            result.checks["nothing is left behind"] = left_over(project)
    finally:
        if not keep:
            shutil.rmtree(secrets_folder, ignore_errors=True)
    return result


def start(stack: Stack) -> None:
    stack.compose("up", "--detach", "--wait", "--wait-timeout", "300", stdout=sys.stderr)


def use(stack: Stack, result: Result) -> None:
    """Everything that is asked of the running stack."""
    figures, checks = result.figures, result.checks
    found = measure.containers(stack.project)
    checks["every service has a healthy container"] = problems(
        f"{name} is {found[name]['State'].get('Health', {}).get('Status', 'without a check') if name in found else 'missing'}"
        for name in ALL_SERVICES
        if name not in found or found[name]["State"].get("Health", {}).get("Status") != "healthy"
    )
    first = measure.chat(stack.port, stack.key, PROMPT)
    checks["a chat through the gateway answers with Paris"] = "" if "Paris" in first.text else f"status {first.status}: {first.text[:300]!r}"
    checks["the stream ends with a reason and usage"] = (
        "" if first.finish_reason in ("stop", "length") and first.usage.get("completion_tokens", 0) > 0 else f"{first.finish_reason!r}, {first.usage}"
    )
    warm = [measure.chat(stack.port, stack.key, f"Write a story about {what}.", max_tokens=64) for what in ("a dog", "the sea", "two friends")]
    figures["first_chat"] = {"ttft_s": round(first.ttft_s, 3), "total_s": round(first.total_s, 3), "usage": first.usage}
    figures["later_chats"] = [
        {"ttft_s": round(a.ttft_s, 3), "tokens_per_s": round((a.usage.get("completion_tokens", 1) - 1) / max(a.total_s - a.ttft_s, 1e-9), 1)} for a in warm
    ]
    long = measure.chat(stack.port, stack.key, "Count the letters. " * 150 + PROMPT, max_tokens=8)
    figures["long_prompt"] = {"ttft_s": round(long.ttft_s, 3), "prompt_tokens": long.usage.get("prompt_tokens")}
    checks["a long prompt is answered"] = "" if long.status == 200 and long.text else f"status {long.status}: {long.text[:300]!r}"
    figures["prefills"] = prefills(stack)
    checks["prompts were computed in the prefill container"] = "" if figures["prefills"].get("remote") else str(figures["prefills"])
    begin = time.monotonic()
    ask = functools.partial(patiently, stack)
    checks["a strict schema is kept at temperature 1"] = structured.strict_schema(ask)
    figures["three_strict_schemas_s"] = round(time.monotonic() - begin, 3)
    checks["a required tool call has the declared arguments"] = structured.tool_call(ask)
    checks["a schema that cannot be enforced is refused by name"] = structured.refusal(ask)
    figures["grammars"] = grammars(stack)
    checks["the grammar container compiled each form once"] = "" if figures["grammars"].get("compiled") == 2 else str(figures["grammars"])
    status, body = measure.get(stack.port, "/v1/models", stack.key)
    checks["the model is listed"] = "" if status == 200 and json.loads(body).get("data") else f"status {status}: {body[:200]}"
    checks["a chat without a key is refused with 401"] = expect(401, measure.chat(stack.port, "", PROMPT).status)
    checks["a chat with a wrong key is refused with 401"] = expect(401, measure.chat(stack.port, "pm-wrong", PROMPT).status)
    checks["only the gateway publishes a port, on loopback"] = published(found)
    checks["containers run unprivileged on a read-only root"] = problems(
        name for name, item in found.items() if item["Config"]["User"].split(":")[0] in ("", "0", "root") or not item["HostConfig"]["ReadonlyRootfs"]
    )
    checks["torch is in prefill and decode only"] = problems(
        service for service in PLUGMESH_SERVICES if has_module(stack, service, "torch") != (service in WITH_TORCH)
    )
    checks["the broker refuses a subject outside a role's permissions"] = attempt(lambda: stack.inside("tokenizer", "python", "-c", INTRUDER))
    checks["Prometheus scrapes every service"] = eventually(lambda: unscraped(stack), timeout_s=40)
    figures["memory_mib"] = {name: round(size / 2**20) for name, size in sorted(measure.memory_bytes(stack.project).items())}
    figures["memory_mib"]["total"] = sum(figures["memory_mib"].values())
    figures["image_mb"] = {}
    for name in ALL_SERVICES:
        if name in found:
            figures["image_mb"][name] = round(measure.docker_json("image", "inspect", found[name]["Image"])[0]["Size"] / 1e6)


def patiently(stack: Stack, body: dict[str, Any], timeout_s: float = 120.0) -> tuple[int, dict[str, Any]]:
    """Asks again, as clients do, while the machine is too busy to compile a grammar in its time."""
    deadline = time.monotonic() + timeout_s
    while True:
        status, reply = measure.post(stack.port, stack.key, body)
        if status not in (503, 504) or time.monotonic() > deadline:
            return status, reply
        time.sleep(2.0)


def has_module(stack: Stack, service: str, module: str) -> bool:
    out = stack.inside(service, "python", "-c", f"import importlib.util; print(importlib.util.find_spec({module!r}) is not None)")
    return out.strip() == "True"


def prefills(stack: Stack) -> dict[str, int]:
    """Prompts by where they were computed, as the decode container counts them."""
    return counters(stack, "decode", "plugmesh_decode_prefills_total", "mode")


def grammars(stack: Stack) -> dict[str, int]:
    """Grammars by where the service had them from."""
    return counters(stack, "grammar", "plugmesh_grammar_lookups_total", "source")


def counters(stack: Stack, service: str, name: str, label: str) -> dict[str, int]:
    """A counter of a container's metrics page by its only label."""
    script = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9100/metrics', timeout=5).read().decode())"
    found = re.findall(rf'(?m)^{name}\{{{label}="(\w+)"\}} (\S+)$', stack.inside(service, "python", "-c", script))
    return {value: int(float(count)) for value, count in found}


def published(found: dict[str, dict[str, Any]]) -> str:
    wrong = []
    for name, item in found.items():
        bindings = [b for ports in (item["NetworkSettings"]["Ports"] or {}).values() for b in ports or []]
        wrong += [f"{name} on {b['HostIp']}:{b['HostPort']}" for b in bindings if name != "gateway" or b["HostIp"] != "127.0.0.1"]
    return problems(wrong)


def unscraped(stack: Stack) -> str:
    """Services without a target that is up, as Prometheus itself tells it."""
    script = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9090/api/v1/targets?state=active', timeout=5).read().decode())"
    targets = json.loads(stack.inside("prometheus", "python3", "-c", script))["data"]["activeTargets"]
    up = {target["labels"].get("service") for target in targets if target["health"] == "up"}
    return problems(f"{service} is not scraped" for service in PLUGMESH_SERVICES if service not in up)


def left_over(project: str) -> str:
    wrong = []
    for kind, command in (("container", ["ps", "--all"]), ("volume", ["volume", "ls"]), ("network", ["network", "ls"])):
        out = prepare.run(["docker", *command, "--quiet", "--filter", f"label=com.docker.compose.project={project}"], capture_output=True).stdout
        wrong += [f"{kind} {name}" for name in out.split()]
    return problems(wrong)


def expect(wanted: int, got: int) -> str:
    return "" if got == wanted else f"status {got}"


def attempt(call: Callable[[], object]) -> str:
    try:
        call()
    except StackError as e:
        return str(e)
    return ""


def eventually(problem: Callable[[], str], timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while (found := problem()) and time.monotonic() < deadline:
        time.sleep(1.0)
    return found


def problems(items: Sequence[str] | Any) -> str:
    return "; ".join(items)


def timed(figures: dict[str, Any], name: str, call: Callable[[], Any]) -> Any:
    say(name.removesuffix("_s").replace("_", " "))
    begin = time.monotonic()
    try:
        return call()
    finally:
        figures[name] = round(time.monotonic() - begin, 1)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
