"""The compose stack from outside: `stack.py up | down | smoke | secrets | base-image | permissions | wheels | model`.

Standard library only, so that it runs on a clean checkout. docs/compose.md explains what it builds.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys

import prepare
import smoke
from prepare import HERE, StackError, say


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="compose/stack.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="prepare, build and start everything; returns when all containers are healthy")
    up.add_argument("--port", type=int, default=8000, help="the gateway's port on 127.0.0.1")
    up.add_argument("--host-wheels", action=argparse.BooleanOptionalAction, default=True, help="download wheels with the host's pip first")
    down = commands.add_parser("down", help="stop and remove the containers and networks")
    down.add_argument("--volumes", action="store_true", help="and all data")
    test = commands.add_parser("smoke", help="build, start under a name of its own, check, print figures, remove")
    test.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    test.add_argument("--keep", action="store_true", help="leave it running (stop it with: stack.py down --volumes --project NAME)")
    test.add_argument("--host-wheels", action=argparse.BooleanOptionalAction, default=True)
    for sub in (down, test):
        sub.add_argument("--project", default="plugmesh" if sub is down else f"plugmesh-smoke-{os.getpid()}")
    secrets = commands.add_parser("secrets", help="make the passwords and the API key that do not exist yet")
    secrets.add_argument("folder", nargs="?", type=pathlib.Path, default=HERE / "secrets")
    base = commands.add_parser("base-image", help="import a minimal Debian with Python as an image")
    base.add_argument("tag", nargs="?", default=prepare.IMPORTED_BASE)
    commands.add_parser("permissions", help="generate compose/nats/authorization.conf")
    commands.add_parser("wheels", help="fill compose/wheelhouse")
    commands.add_parser("model", help="put the default model into compose/models")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the smoke's clean-up runs
    try:
        return COMMANDS[options.command](options)
    except StackError as e:
        print(f"compose: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def bring_up(options: argparse.Namespace) -> int:
    secrets_folder = HERE / "secrets"
    prepare.make_secrets(secrets_folder)
    if options.host_wheels:
        prepare.fill_wheelhouse()
    prepare.fetch_model()
    # Compose reads this file by itself, so that plain `docker compose` commands see the same settings afterwards.
    prepare.ENV_FILE.write_text(
        f"BASE_IMAGE={prepare.base_image()}\nPLUGMESH_UID={prepare.container_uid()}\nPLUGMESH_PORT={options.port}\nCOMPOSE_PARALLEL_LIMIT=1\n"
    )
    compose: list[str | pathlib.Path] = [*prepare.compose_command(), "--file", HERE / "compose.yaml"]
    prepare.run([*compose, "build"], stdout=sys.stderr, timeout_s=3600)
    prepare.run([*compose, "up", "--detach", "--wait", "--wait-timeout", "300"], stdout=sys.stderr, timeout_s=600)
    say(f"http://127.0.0.1:{options.port}/v1 answers; the API key is in {secrets_folder / 'api_key'}")
    return 0


def take_down(options: argparse.Namespace) -> int:
    compose: list[str | pathlib.Path] = [*prepare.compose_command(), "--file", HERE / "compose.yaml", "--project-name", options.project]
    prepare.run([*compose, "down", "--remove-orphans", *(["--volumes"] if options.volumes else [])], stdout=sys.stderr, timeout_s=300)
    return 0


def run_smoke(options: argparse.Namespace) -> int:
    result = smoke.run(options.project, host_wheels=options.host_wheels, keep=options.keep)
    text = json.dumps(result.figures, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    for check, problem in result.checks.items():
        print(f"{'FAILED' if problem else 'ok    '} {check}{': ' + problem if problem else ''}")
    return 1 if any(result.checks.values()) else 0


def write_permissions(options: argparse.Namespace) -> int:
    try:
        prepare.AUTHORIZATION.write_text(prepare.render_permissions())
    except ImportError as e:
        raise StackError(f"needs plugmesh's core dependencies ({e}); run it with the project's environment and PYTHONPATH=shared") from e
    return 0


def make_secrets(options: argparse.Namespace) -> int:
    prepare.make_secrets(options.folder)
    return 0


def import_base(options: argparse.Namespace) -> int:
    prepare.import_base(options.tag)
    return 0


def fill_wheelhouse(options: argparse.Namespace) -> int:
    prepare.fill_wheelhouse()
    return 0


def fetch_model(options: argparse.Namespace) -> int:
    prepare.fetch_model()
    return 0


COMMANDS = {
    "up": bring_up,
    "down": take_down,
    "smoke": run_smoke,
    "secrets": make_secrets,
    "base-image": import_base,
    "permissions": write_permissions,
    "wheels": fill_wheelhouse,
    "model": fetch_model,
}

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except subprocess.SubprocessError as e:
        sys.exit(f"compose: {e}")
