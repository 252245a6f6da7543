"""What plugins give an engine: one value from the host to `build_engine`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plugmesh.errors import ConfigError
from plugmesh.host import PluginHost
from plugmesh.records import KvCodecRecord, PromptFilterRecord, WeightFormatRecord


@dataclass(frozen=True, slots=True)
class EnginePlugins:
    """Records of the plugins that an engine is built with; None is the engine's own behaviour.

    Attributes:
        scheduler: A `SchedulerRecord` or a `seams.Scheduler`.
        drafts: A `DraftRecord` or a `seams.DraftMethod`.
        weight_format: Of the manifest that the engine loads.
        kv_codec: In place of the executor's own KV.
        prompt_filter: Chooses the prompt's tokens that the model reads.
    """

    scheduler: Any = None
    drafts: Any = None
    weight_format: WeightFormatRecord | None = None
    kv_codec: KvCodecRecord | None = None
    prompt_filter: PromptFilterRecord | None = None

    @classmethod
    def from_host(cls, host: PluginHost, weight_format: str = "") -> EnginePlugins:
        """What the plugins of a process registered: of each kind the record registered last, of the formats the one that is named.

        Args:
            weight_format: The service's setting; "" for the executor's own format, for which no plugin is asked.

        Raises:
            ConfigError: No plugin that the process loads has a format of this name, or a hook raised.
        """
        return cls(
            scheduler=host.last("schedulers"), drafts=None if host.service == "prefill" else host.last("drafts"),
            weight_format=named_format(host, weight_format) if weight_format else None,
            kv_codec=host.last("kv_codecs"),
            prompt_filter=host.last("prompt_filters"),
        )  # fmt: skip


def named_format(host: PluginHost, name: str) -> WeightFormatRecord:
    """The weight format of this name. Raises ConfigError naming those that there are."""
    records: list[WeightFormatRecord] = host.records("weight_formats")
    for record in records:
        if record.name == name:
            return record
    known = ", ".join(r.name for r in records) or "none"
    key = f"services.{host.service}.weight_format"
    raise ConfigError(f"{key}: no plugin of this service has a weight format {name[:64]!r}; there are: {known}", key=key)
