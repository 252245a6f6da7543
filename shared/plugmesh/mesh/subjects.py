"""Every NATS subject of a mesh, and the permissions that follow from them.

    pm.<mesh>.rpc.<role>.any             calls to any instance of a role (queue group)
    pm.<mesh>.rpc.<role>.i.<instance>    calls to one instance
    pm.<mesh>.in.<role>.<connection>.*   frames of running calls, pings and replies to one process
    pm.<mesh>.bus.<topic>                events, fire and forget
    pm.<mesh>.q.<queue>                  jobs of a work queue (stream pm_<mesh>_q_<queue>)
    $KV.pm_<mesh>_instances.<role>.<id>  the lease of an instance
    $SRV.PING|INFO|STATS[.<name>[.<id>]] NATS micro-service monitoring

Nothing else in plugmesh spells a subject. A process is known to the broker as a user named like its role.
"""

from __future__ import annotations

from dataclasses import dataclass

from plugmesh.config import OPTIONAL_SERVICES, SERVICE_NAMES

ROOT = "pm"
OPERATOR = "plugmesh"  # the user of command line tools and of a mesh with one shared credential


def rpc_any(mesh: str, role: str) -> str:
    return f"{ROOT}.{mesh}.rpc.{role}.any"


def rpc_instance(mesh: str, role: str, instance_id: str) -> str:
    return f"{ROOT}.{mesh}.rpc.{role}.i.{instance_id}"


def inbox(mesh: str, role: str, connection: str) -> str:
    """Root of what one connection hears; frames go to `<inbox>.<token>`."""
    return f"{ROOT}.{mesh}.in.{role}.{connection}"


def client_inbox_prefix(mesh: str, role: str) -> str:
    """Prefix for the inboxes that the NATS client itself makes (JetStream answers, pull consumers)."""
    return f"{ROOT}.{mesh}.in.{role}.js"


def bus(mesh: str, topic: str) -> str:
    return f"{ROOT}.{mesh}.bus.{topic}"


def queue_subject(mesh: str, name: str) -> str:
    return f"{ROOT}.{mesh}.q.{name}"


def queue_stream(mesh: str, name: str) -> str:
    return f"{ROOT}_{mesh}_q_{name}"


def queue_consumer(name: str) -> str:
    return f"workers_{name}"


def lease_bucket(mesh: str) -> str:
    return f"{ROOT}_{mesh}_instances"


def lease_key(role: str, instance_id: str) -> str:
    return f"{role}.{instance_id}"


def lease_subject(mesh: str, key: str = ">") -> str:
    return f"$KV.{lease_bucket(mesh)}.{key}"


def srv_name(mesh: str, role: str) -> str:
    """Name under which a role answers `$SRV` requests."""
    return f"{ROOT}-{mesh}-{role}"


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """A work queue. Full means that `put` is refused (discard-new), never that an old job is dropped.

    `storage`: "file" survives a restart of the broker, "memory" is for jobs that are worthless by then.
    """

    name: str
    max_jobs: int
    max_bytes: int
    max_age_s: float            # a job nobody took by then is worthless
    dedup_window_s: float
    max_deliver: int            # then the job is given up
    storage: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


QUEUES: dict[str, QueueSpec] = {
    spec.name: spec
    for spec in (
        # File storage: a broker that restarts within seconds must not lose prompts that decode still waits for.
        QueueSpec(
            "prefill", max_jobs=4096, max_bytes=256 << 20, max_age_s=300.0, dedup_window_s=120.0, max_deliver=4,
            storage="file", producers=("decode", "gateway"), consumers=("prefill",),
        ),
    )
}

# Who publishes what on the bus; every role may listen to everything.
TOPICS: dict[str, tuple[str, ...]] = {
    "kv.events": ("kvstore",),
    "decode.kv_events": ("decode",),
    "weights.events": ("weightstore",),
    "weights.published": ("weightstore",),
    "rollout.events": ("rollout",),
}

# Who may call whom.
CALLS: dict[str, tuple[str, ...]] = {
    "gateway": SERVICE_NAMES,
    "tokenizer": ("weightstore",),
    "grammar": ("weightstore",),
    "weightstore": ("weightstore",),
    "prefill": ("decode", "kvstore", "weightstore", "tokenizer"),
    "decode": ("prefill", "kvstore", "weightstore", "tokenizer", "grammar"),
    "kvstore": ("kvstore",),
    "rollout": ("rollout", "gateway", "decode", "tokenizer", "weightstore"),
}


@dataclass(frozen=True, slots=True)
class Permissions:
    """Subjects one role may use; the broker refuses everything else."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def permissions(mesh: str, role: str) -> Permissions:
    """What the broker lets a process of this role do. `OPERATOR` may do everything within the mesh."""
    if role == OPERATOR:
        return Permissions(
            publish=(f"{ROOT}.{mesh}.>", lease_subject(mesh), "$JS.API.>", "$JS.ACK.>", "$SRV.>"),
            subscribe=(f"{ROOT}.{mesh}.>", lease_subject(mesh), "$SRV.>"),
        )
    bucket = f"KV_{lease_bucket(mesh)}"
    publish = [
        *(f"{ROOT}.{mesh}.rpc.{callee}.>" for callee in CALLS.get(role, ())),
        f"{ROOT}.{mesh}.in.>",
        *(bus(mesh, topic) for topic, roles in TOPICS.items() if role in roles),
        lease_subject(mesh, f"{role}.*"),
        "$JS.API.INFO",
        *_stream_api(bucket),
        f"$JS.API.DIRECT.GET.{bucket}.>",
        f"$JS.API.DIRECT.GET.{bucket}",
        f"$JS.API.STREAM.MSG.GET.{bucket}",
    ]
    for spec in QUEUES.values():
        stream = queue_stream(mesh, spec.name)
        if role in spec.producers:
            publish.append(queue_subject(mesh, spec.name))
        if role in spec.producers or role in spec.consumers:
            publish.extend(_stream_api(stream))
        if role in spec.consumers:
            consumer = queue_consumer(spec.name)
            publish += [
                f"$JS.API.CONSUMER.CREATE.{stream}.{consumer}",
                f"$JS.API.CONSUMER.CREATE.{stream}.{consumer}.>",
                f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.{consumer}",
                f"$JS.API.CONSUMER.INFO.{stream}.{consumer}",
                f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}",
                f"$JS.ACK.{stream}.{consumer}.>",
            ]
    subscribe = [
        f"{ROOT}.{mesh}.rpc.{role}.>",
        f"{ROOT}.{mesh}.in.{role}.>",
        f"{ROOT}.{mesh}.bus.>",
        lease_subject(mesh),
        *(f"$SRV.{verb}{tail}" for verb in ("PING", "INFO", "STATS") for tail in ("", f".{srv_name(mesh, role)}", f".{srv_name(mesh, role)}.*")),
    ]
    return Permissions(tuple(publish), tuple(subscribe))


def _stream_api(stream: str) -> tuple[str, ...]:
    return (f"$JS.API.STREAM.INFO.{stream}", f"$JS.API.STREAM.CREATE.{stream}", f"$JS.API.STREAM.UPDATE.{stream}")


def roles() -> tuple[str, ...]:
    """Every user a broker should know."""
    return (OPERATOR, *SERVICE_NAMES)


def all_roles() -> tuple[str, ...]:
    """`roles`, and those of services that a mesh can do without."""
    return (*roles(), *OPTIONAL_SERVICES)


def authorization_block(mesh: str, passwords: dict[str, str]) -> str:
    """The `authorization { ... }` part of a nats-server configuration.

    Args:
        passwords: Role to password, or to an expression that nats-server reads from its environment ("$NATS_PASSWORD_DECODE").
    """
    lines = ["authorization {", "  users = ["]
    for role, password in passwords.items():
        allowed = permissions(mesh, role)
        secret = password if password.startswith("$") else _quote(password)
        lines += [
            f"    {{ user: {_quote(role)}, password: {secret}",
            "      permissions: {",
            f"        publish: {{ allow: [{', '.join(map(_quote, allowed.publish))}] }}",
            f"        subscribe: {{ allow: [{', '.join(map(_quote, allowed.subscribe))}] }}",
            # Answers to $SRV requests go to the asker's own inbox, wherever that is.
            '        allow_responses: { max: 10, expires: "1m" }',
            "      }",
            "    }",
        ]
    lines += ["  ]", "}"]
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
