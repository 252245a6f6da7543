"""Every hook of plugmesh, along the timeline of a process, a request and a step.

    process starts
      | configuration read, cards of the named plugins checked together (conflicts, requirements)
      | register_*        once per hook and process; returns records
      | select_*          once per choice; the first plugin that answers wins, else the core's default
      | WeightFormatRecord.pack, .load   per model           <- register_weight_formats
      | KvCodecRecord.build              per engine          <- register_kv_codecs
      | GrammarEngineRecord.build        per tokenizer       <- register_grammar_engines
      v
    service announced in the mesh
      request arrives (gateway)
        | AdmissionPolicy.admit            per request         <- register_admission
        | Strategy.run                     per request         <- register_strategies
        | Router.route                     per request         <- register_routers
      request reaches decode
        | PrefillPolicyRecord.choose       per request         <- register_prefill_policies
        | PromptFilter.layers, .select     per prompt          <- register_prompt_filters
        | GrammarEngine.compile (grammar), .load (decode)  per new grammar
      job reaches prefill
        | KvHandOverRecord.plan            per job             <- register_kv_hand_overs
      blocks come and go (kvstore)
        | EvictionOrder.add, .touch        per block
        | EvictionOrder.victim             per block that must leave <- register_evictions
      every step (prefill, decode)
        | Scheduler.schedule               per step            <- register_schedulers
        | DraftMethod.propose, .observe    per step, decode    <- register_drafts
        | Matcher.fill, .accept, .rollback per constrained row, decode
        | Foreign linears of the format    per layer
        | KvCodec.plan, .attend            per step, per layer
      request ends
        | on_request_finished              observers, isolated by the host
    process stops
      | on_service_stopping
    a worker asks the experience table for rows (rollout)
        | Sampler.sample                   per batch           <- register_samplers
    plugmesh rl run (rollout)
        | WorkflowRecord.plan              per run             <- register_workflows
        | Reward.score                     per response        <- register_rewards
        | Loss.__call__                    per training step   <- register_losses
    plugmesh ab (tools)
        | WorkloadRecord.build             per round           <- register_workloads
        | QualityMetricRecord.observe      per side            <- register_quality_metrics

Three tiers: a hook runs once per process and returns records (`plugmesh.records`); a record builds an object per process,
engine or request; plain methods of that object run per request or per step. Hooks are called by keyword; an implementation
names only the arguments that it wants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from plugmesh.host import PluginContext
    from plugmesh.records import (
        AdmissionRecord,
        DraftRecord,
        EvictionRecord,
        GrammarEngineRecord,
        KvCodecRecord,
        KvHandOverRecord,
        LossRecord,
        PrefillPolicyRecord,
        PromptFilterRecord,
        QualityMetricRecord,
        RewardRecord,
        RouterRecord,
        SamplerRecord,
        SchedulerRecord,
        StrategyRecord,
        WeightFormatRecord,
        WorkflowRecord,
        WorkloadRecord,
    )

hookspec = pluggy.HookspecMarker("plugmesh")
hookimpl = pluggy.HookimplMarker("plugmesh")


@hookspec
def register_admission(context: PluginContext) -> list[AdmissionRecord]:
    """Rules for who may come in now.

    Runs in: gateway.
    When: at process start.  How often: once.
    Combines: every policy must let a request in; they are asked in reverse order of registration, so that the core's own,
        which may let a request wait for a place, comes last.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the start with the plugin's name; an error in `AdmissionPolicy.admit` or `take_tokens` costs that request.
    Example: plugins/plugmesh_aibrix_routing/plugin.py
    """


@hookspec
def register_routers(context: PluginContext) -> list[RouterRecord]:
    """Ways of choosing the instances that serve a request.

    Runs in: gateway.
    When: at process start.  How often: once.
    Combines: all lists are joined; `select_router` picks one by name, by default the last registered.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the start with the plugin's name.
    Example: plugins/plugmesh_splitwise/plugin.py
    """


@hookspec(firstresult=True)
def select_router(names: list[str]) -> str | None:
    """Which of the registered routers this gateway uses.

    Runs in: gateway.
    When: after register_routers.  How often: once.
    Combines: the first answer that is not None wins; without one the record registered last.
    Arguments: names: the records' names in order of registration, the core's own first.
    Returns: one of `names`, or None for no opinion.
    Raising: stops the start.
    Example: plugins/plugmesh_splitwise/plugin.py
    """


@hookspec
def register_prefill_policies(context: PluginContext) -> list[PrefillPolicyRecord]:
    """Rules for computing a prompt locally or in a prefill instance.

    Runs in: decode.
    When: at process start.  How often: once.
    Combines: lists are joined; the record registered last is used.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the start with the plugin's name.
    Example: docs/examples/plugmesh-hello/plugmesh_hello/plugin.py
    """


@hookspec
def register_kv_hand_overs(context: PluginContext) -> list[KvHandOverRecord]:
    """Rules for how the KV of a prompt travels from prefill to decode.

    Runs in: prefill.
    When: at process start.  How often: once.
    Combines: lists are joined; the record registered last is used.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the start with the plugin's name.
    Example: plugins/plugmesh_splitwise/plugin.py
    """


@hookspec
def register_weight_formats(context: PluginContext) -> list[WeightFormatRecord]:
    """Ways to store a model's weights and to multiply by them.

    Runs in: weightstore, prefill, decode, tools.
    When: at process start.  How often: once.
    Combines: all lists are joined; `weight_format` of [services.prefill] and [services.decode] names one, "" is the executor's own.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the start with the plugin's name. An error in `pack` fails the request for that form, one in `load` the start of
        the engine, one in a callable of `PluginWeights` the step, whose sequences then run one by one.
    Example: plugins/plugmesh_qserve/plugin.py
    """


@hookspec
def register_kv_codecs(context: PluginContext) -> list[KvCodecRecord]:
    """Forms of KV of their own, with the attention over them.

    Runs in: prefill, decode, tools.
    When: at process start.  How often: once.
    Combines: lists are joined; the record registered last is used, the executor's own KV when there is none.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the start with the plugin's name; an error in `KvCodec.plan` or `attend` fails the step, whose sequences then run one by
        one, and those that fail again end with an error.
    Example: plugins/plugmesh_qserve/plugin.py
    """


@hookspec
def register_prompt_filters(context: PluginContext) -> list[PromptFilterRecord]:
    """Rules for which tokens of a long prompt the model reads, decided after its early layers.

    Runs in: decode.
    When: at process start.  How often: once.
    Combines: lists are joined; the record registered last is used, none when there is none.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the start with the plugin's name; an error in `PromptFilter.layers` or `select` has that prompt read whole and is
        counted and logged with the record's name.
    Example: plugins/plugmesh_gemfilter/plugin.py
    """


@hookspec
def register_evictions(context: PluginContext) -> list[EvictionRecord]:
    """Rules for which block leaves the kvstore when room is needed.

    Runs in: kvstore.
    When: at process start.  How often: once.
    Combines: lists are joined; the record registered last is used, least recently used first when there is none.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the start with the plugin's name; an order that raises later, hangs or names what may not go is dropped, with a line in the
        log and a count: the kvstore's own order by recency goes on, and no block is lost.
    Example: plugins/plugmesh_aibrix_kv/plugin.py
    """


@hookspec
def register_schedulers(context: PluginContext) -> list[SchedulerRecord]:
    """Rules for what runs in one engine step.

    Runs in: prefill, decode.
    When: at process start.  How often: once.
    Combines: lists are joined; the record registered last is used.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the start with the plugin's name; an error in `Scheduler.schedule` makes the engine fall back to its own
        scheduler for that step and is counted and logged with the plugin's name.
    Example: plugins/plugmesh_sarathi/plugin.py
    """


@hookspec
def register_drafts(context: PluginContext) -> list[DraftRecord]:
    """Ways of guessing the next tokens, so that one forward pass checks several.

    Runs in: decode.
    When: at process start.  How often: once.
    Combines: lists are joined; the record registered last is used, none when there is none.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the start with the plugin's name; an error in `DraftMethod.propose` or `observe` costs that step its drafts
        and is counted and logged with the record's name. Drafts never change the output.
    Example: plugins/plugmesh_ngram_draft/plugin.py
    """


@hookspec
def register_grammar_engines(context: PluginContext) -> list[GrammarEngineRecord]:
    """Engines that hold an output to a grammar: compile it once, then say at each step which tokens may come next.

    Runs in: grammar, decode.
    When: at process start.  How often: once.
    Combines: all lists are joined; a grammar goes to the first engine that takes its language and can enforce it exactly, and to no
        other when the request names one. `services.grammar.plugins` is the list for both services.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the start with the plugin's name; an engine whose `build` raises Unavailable is left out and logged. An error in
        `GrammarEngine.compile` or `load` costs the requests for that grammar, one in a `Matcher` the request that it belongs to.
    Example: plugins/plugmesh_xgrammar/plugin.py
    """


@hookspec
def on_request_finished(request_id: str, finish_reason: str, num_prompt_tokens: int, num_generated_tokens: int) -> None:
    """Tells observers that a request ended.

    Runs in: gateway, decode.
    When: after the last token or error was sent.  How often: once per request and process.
    Combines: every implementation is called.
    Arguments: ids and counts, never text; finish_reason is "stop", "length", "cancelled" or "error".
    Returns: nothing.
    Raising: logged and counted with the plugin's name; nobody else notices.
    Example: docs/examples/plugmesh-hello/plugmesh_hello/plugin.py
    """


@hookspec
def on_service_stopping() -> None:
    """Tells plugins to release what they hold.

    Runs in: every service.
    When: after the drain, before the process ends.  How often: once.
    Combines: every implementation is called.
    Returns: nothing.
    Raising: logged with the plugin's name.
    Example: docs/examples/plugmesh-hello/plugmesh_hello/plugin.py
    """


@hookspec
def register_quality_metrics(context: PluginContext) -> list[QualityMetricRecord]:
    """Measures of what plugins do to the output; the core's own come through this door, too.

    Runs in: tools.
    When: when `plugmesh ab` starts a side.  How often: once per side.
    Combines: all lists are joined.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the command with the plugin's name; an error in `observe` or `compare` is reported for that metric alone.
    Example: shared/plugmesh/quality/core.py
    """


@hookspec
def register_workloads(context: PluginContext) -> list[WorkloadRecord]:
    """Work that shows what a plugin is for; `plugmesh ab` runs it beside the core's own.

    Runs in: tools.
    When: when `plugmesh ab` starts.  How often: once.
    Combines: all lists are joined.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the command with the plugin's name.
    Example: plugins/plugmesh_ngram_draft/plugin.py
    """


@hookspec
def register_strategies(context: PluginContext) -> list[StrategyRecord]:
    """Ways of making one answer out of several generations: sampling and voting, search, refinement.

    Runs in: gateway.
    When: at process start.  How often: once.
    Combines: all lists are joined; a request names the one that it wants (`"strategy": {"name": ...}`), else
        `services.gateway.default_strategy` does, else there is none.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the start with the plugin's name; an error in `Strategy.run` costs its request a PluginError.
    Example: plugins/plugmesh_deepconf/plugin.py
    """


@hookspec
def register_samplers(context: PluginContext) -> list[SamplerRecord]:
    """Ways of choosing the rows of the experience table that a task gets next.

    Runs in: rollout.
    When: at process start.  How often: once.
    Combines: all lists are joined; a request names the one that it wants.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the start with the plugin's name; an error in `build` or `Sampler.sample` costs that request a PluginError.
    Example: services/plugmesh_rollout/table/samplers.py
    """


@hookspec
def register_workflows(context: PluginContext) -> list[WorkflowRecord]:
    """Ways of running generation and training together: how far apart, and which rows train next.

    Runs in: rollout.
    When: at the start of `plugmesh rl run` and of each of its workers.  How often: once.
    Combines: all lists are joined; the run's file names the one that it wants.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the start with the plugin's name; an error in `plan` stops the run before anything is generated.
    Example: plugins/plugmesh_asyncflow/plugin.py
    """


@hookspec
def register_rewards(context: PluginContext) -> list[RewardRecord]:
    """Verifiers that tell how good a response is.

    Runs in: rollout.
    When: at the start of a run's reward workers.  How often: once.
    Combines: all lists are joined; the run's file names the one that it wants.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the start with the plugin's name; an error in `Reward.score` ends the worker, and its rows go to another one.
    Example: services/plugmesh_rollout/loop/rewards.py
    """


@hookspec
def register_losses(context: PluginContext) -> list[LossRecord]:
    """What a trainer minimises over responses, their rewards and the log-probabilities recorded at generation.

    Runs in: rollout.
    When: at the start of a run's trainer.  How often: once.
    Combines: all lists are joined; the run's file names the one that it wants.
    Arguments: context: the plugin's settings and facts of the process.
    Returns: records, or an empty list.
    Raising: stops the start with the plugin's name; an error in the loss ends the run, which can be resumed.
    Example: services/plugmesh_rollout/loop/losses.py
    """
