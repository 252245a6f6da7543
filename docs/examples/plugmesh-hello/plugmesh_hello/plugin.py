"""Hooks and settings of plugmesh_hello; light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pydantic
import structlog

from plugmesh.config import StrictModel
from plugmesh.hookspecs import hookimpl
from plugmesh.records import PrefillPolicyRecord
from plugmesh_hello.greeting import Greeter

if TYPE_CHECKING:
    from plugmesh.host import PluginContext

log = structlog.get_logger()
GREETER = Greeter()


class Settings(StrictModel):
    """`[plugins.hello]`."""

    name: str = pydantic.Field("world", min_length=1, max_length=64)
    every: int = pydantic.Field(100, ge=1)  # requests between two greetings


@hookimpl
def register_prefill_policies(context: PluginContext) -> list[PrefillPolicyRecord]:
    """Greets, and computes every prompt where it is decoded: the simplest policy there is."""
    settings: Settings = context.settings(Settings)
    GREETER.begin(settings.name, settings.every)
    log.info("hello.greeting", text=GREETER.text, service=context.service)
    return [PrefillPolicyRecord("hello-local", lambda uncached, running, instances: "local")]


@hookimpl
def on_request_finished(num_generated_tokens: int) -> None:
    """Names only the arguments that it wants."""
    if GREETER.count(num_generated_tokens):
        log.info("hello.again", text=GREETER.text, num_requests=GREETER.num_requests, num_tokens=GREETER.num_tokens)


@hookimpl
def on_service_stopping() -> None:
    log.info("hello.goodbye", num_requests=GREETER.num_requests, num_tokens=GREETER.num_tokens)
