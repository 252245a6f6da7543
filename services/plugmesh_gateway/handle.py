"""The path of a request through the gateway, on one page: admit, prepare, route, stream."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from typing import Any

import structlog

from plugmesh.errors import AlreadyExists, Cancelled, DeadlineExceeded, InvalidRequest, PlugmeshError, Unavailable
from plugmesh.grammar.client import GrammarClient
from plugmesh.host import PluginHost
from plugmesh.kv.feed import DECODE, KvFeed
from plugmesh.ledger import Ledger
from plugmesh.limits import check_sampling, check_token_ids, fit_context
from plugmesh.mesh.api import Mesh
from plugmesh.records import AdmissionRequest
from plugmesh.tracing import TRACING, Span
from plugmesh.types import FinishReason, block_chain

from .admit import Admission, Admissions, Admitted
from .config import Settings
from .decode_links import DecodeLinks
from .generation import Engine, Generation, Outbox
from .local_texts import LocalTexts
from .measure import GatewayMetrics
from .prepare import Models, ServedModel, TokenizerFacts, Tokenizers
from .request import ChatPrompt, GrammarUse, GrammarWanted, Prepared, StrategyChoice, TextPrompt, Wanted
from .route import SafeRouter
from .strategies import Strategies, StrategyGeneration, Surroundings, num_computed
from .text_links import TextLinks
from .tool_formats import ToolFormat, choose_format, tools_grammar, with_tools
from .vocabularies import Vocabularies

log = structlog.get_logger()


@dataclasses.dataclass(frozen=True, slots=True)
class Accepted:
    """A running request and what its answer needs besides events."""

    generation: Generation
    model: ServedModel
    echoes: tuple[str, ...]      # per prompt; empty without `echo`
    tool_format: ToolFormat | None = None  # how the text has calls; None without tools


class Gateway:
    """Everything behind the edges; HTTP and gRPC both call `submit`."""

    def __init__(self, mesh: Mesh, settings: Settings, plugins: PluginHost, metrics: GatewayMetrics, *, default_model: str) -> None:
        self.mesh = mesh
        self.settings = settings
        self.plugins = plugins
        self.metrics = metrics
        self.limits = settings.limits()
        self.admission = Admission(max_places=settings.max_in_flight, max_queued=settings.max_queued, max_tokens=settings.max_pending_tokens)
        self.admissions = Admissions.choose(plugins, self.admission)
        self.strategies = Strategies.load(plugins, settings.default_strategy)
        self.texts = TextLinks(mesh, stall_s=settings.stall_s)
        self.decode = DecodeLinks(
            mesh, stall_s=settings.stall_s, hang_s=settings.hang_s, on_frame=self._on_frame, before_frame=self._before_frame)
        self.models = Models(mesh, self.decode.peers, default_model)
        self.tokenizers = Tokenizers(mesh, self.texts.peers)
        self.grammars = GrammarClient(mesh)
        self.vocabularies = Vocabularies(mesh, self.texts.peers, is_enabled=settings.detokenize == "local")
        self.engine = Engine(mesh, settings, self.decode, self.texts, SafeRouter.choose(plugins), metrics, Outbox(), LocalTexts())
        self._kv_feed = KvFeed(mesh, DECODE, self.engine.router.kv_event) if self.engine.router.wants_kv_events else None
        self._running: dict[str, Generation | None] = {}   # None while it is admitted and prepared
        self._one_less = asyncio.Event()
        metrics.gauge("gateway_in_flight", "Sequences being worked on", lambda: self.admission.num_places)
        metrics.gauge("gateway_queued", "Requests waiting for a place or for tokens", lambda: self.admission.num_queued)
        metrics.gauge("gateway_pending_tokens", "Prompt plus wanted tokens in flight", lambda: self.admission.num_tokens)
        metrics.gauge("gateway_buffered_events", "Events that clients have not taken yet",
                      lambda: sum(g.num_buffered for g in self._running.values() if g is not None))
        metrics.gauge("gateway_unsent_messages", "Messages that decode and tokenizer instances have not taken yet",
                      lambda: self.decode.num_unsent + self.texts.num_unsent)
        metrics.gauge("gateway_text_sequences", "Sequences open at tokenizer instances", lambda: self.texts.num_sequences)
        metrics.gauge("gateway_local_text_sequences", "Sequences whose tokens become text in this process", lambda: self.engine.local_texts.num_sequences)
        metrics.gauge("gateway_decode_requests", "Attempts open at decode instances", lambda: self.decode.num_requests)

    def start(self) -> None:
        self.decode.start()
        self.texts.start()
        if self._kv_feed is not None:
            self._kv_feed.start()

    async def stop(self) -> None:
        """Ends what still runs and closes all streams."""
        for generation in list(self._running.values()):
            if generation is not None:
                generation.end(Unavailable("this gateway is shutting down", retry_after_s=1))
        if self._kv_feed is not None:
            await self._kv_feed.close()
        await self.vocabularies.stop()
        await self.decode.stop()
        await self.texts.stop()

    async def drain(self, deadline_s: float) -> None:
        """Refuses new requests and waits for those in flight, at most so long."""
        self.admission.is_draining = True
        try:
            async with asyncio.timeout(deadline_s):
                while self._running:
                    self._one_less.clear()
                    await self._one_less.wait()
        except TimeoutError:
            log.warning("gateway.drain_incomplete", num_running=len(self._running))

    def missing_roles(self) -> list[str]:
        """Roles without which no request can be served and of which no instance lives."""
        return [peers.role for peers in (self.texts.peers, self.decode.peers) if not peers.live()]

    @property
    def num_running(self) -> int:
        return len(self._running)

    async def submit(self, wanted: Wanted) -> Accepted:
        """Brings a request to the point where its tokens come.

        The caller must end it: by reading all events, or with `Generation.cancel`. Being cancelled in here leaves nothing behind.

        Raises:
            PlugmeshError: Refused; nothing was started.
        """
        arrived = time.monotonic()
        span = TRACING.start("gateway.request", wanted.trace.get("traceparent", ""), request_id=wanted.request_id, route=wanted.route)
        wanted = dataclasses.replace(wanted, trace=span.carrier)
        if wanted.request_id in self._running:
            raise AlreadyExists(f"request id {wanted.request_id!r} is in use", param="request_id")
        deadline = arrived + min(wanted.timeout_s or self.settings.request_timeout_s, self.settings.request_timeout_s)
        self._running[wanted.request_id] = None
        ticket: Admitted | None = None
        try:
            async with asyncio.timeout(deadline - arrived):
                # 1. Is there anybody to serve it?
                missing = self.missing_roles()
                if missing:
                    raise Unavailable(f"no {' and no '.join(missing)} instance is ready", retry_after_s=2)
                model, instances = await self.models.choose(wanted.model)
                strategy = self.strategies.choose(wanted)
                # 2. A place, in order of priority.
                num_sequences = len(wanted.prompts) * wanted.sampling.num_sequences
                ticket = await self.admissions.admit(
                    AdmissionRequest(wanted.request_id, wanted.client, wanted.priority, num_sequences, deadline))
                # 3. Token ids, and the checks that need the model; meanwhile the grammar is compiled.
                facts = await self.tokenizers.facts(model, deadline)
                wanted, tool_format = self._with_tools(wanted, model, facts)
                prompts = await self._prepare(wanted, model, facts, deadline)
                echoes = await self._echoes(wanted, model, deadline)
                if strategy is None:
                    await ticket.take_tokens(
                        sum(len(p.token_ids) for p in prompts), sum(p.sampling.max_tokens * p.sampling.num_sequences for p in prompts))
                else:
                    ticket.release(0)  # its children are admitted one by one; a place held meanwhile could be the one they wait for
            # 4. Route and run.
            held = ticket
            if strategy is not None:
                parent = StrategyGeneration(
                    *strategy, self._ledger(strategy[1]), wanted, prompts[0],
                    Surroundings(self.engine, self.admissions, self.limits, model, facts, instances, self._on_children_end),
                    arrived=arrived, deadline=deadline, on_end=lambda g: self._on_end(g, held, span))
                self._running[wanted.request_id] = parent
                parent.run()
                return Accepted(parent, model, echoes, tool_format)
            generation = Generation(
                self.engine, request_id=wanted.request_id, route=wanted.route, arrived=arrived, deadline=deadline,
                on_end=lambda g: self._on_end(g, held, span))
            self._running[wanted.request_id] = generation
            generation.start(prompts, instances)
            return Accepted(generation, model, echoes, tool_format)
        except BaseException as error:
            e = DeadlineExceeded("the deadline passed before the request could start") if isinstance(error, TimeoutError) else error
            span.end(error=e.code if isinstance(e, PlugmeshError) else type(e).__name__)
            if ticket is not None:
                ticket.release(0)
            if self._running.get(wanted.request_id) is None:
                self._forget(wanted.request_id)
            if isinstance(e, PlugmeshError):
                self.refuse(wanted.request_id, wanted.route, e)
            elif isinstance(e, asyncio.CancelledError):
                self.refuse(wanted.request_id, wanted.route, Cancelled("the client went away"))
            raise e from None

    def refuse(self, request_id: str, route: str, error: PlugmeshError) -> None:
        """Counts and logs a request that was turned away."""
        self.metrics.refused.labels(error.code).inc()
        log.info("request.refused", request_id=request_id, route=route, code=error.code, param=error.param)

    def _forget(self, request_id: str) -> None:
        self._running.pop(request_id, None)
        self._one_less.set()

    def _with_tools(self, wanted: Wanted, model: ServedModel, facts: TokenizerFacts) -> tuple[Wanted, ToolFormat | None]:
        """Tools put into the prompt and the grammar, in the way of the model's family."""
        prompt, tools = wanted.prompts[0], wanted.tools
        if not isinstance(prompt, ChatPrompt):
            return wanted, None
        forced = self.settings.tool_format
        how, template_knows = choose_format(f"{model.model} {model.version}", facts.chat_template, "" if forced == "auto" else forced)
        prompt = with_tools(prompt, tools.shown if tools else (), how, template_knows=template_knows)
        if tools is None:
            return dataclasses.replace(wanted, prompts=(prompt,)), None
        return dataclasses.replace(wanted, prompts=(prompt,), grammar=tools_grammar(tools, how, wanted.grammar)), how

    async def _compile(self, grammar: GrammarWanted, model: ServedModel, deadline: float) -> GrammarUse:
        try:
            info = await self.grammars.compile(
                grammar.spec, model.model, timeout_s=max(0.001, min(deadline - time.monotonic(), self.settings.grammar_timeout_s)))
        except InvalidRequest as e:
            keyword, path = e.fields.get("keyword", ""), e.fields.get("path", "")
            message = e.message if not keyword or keyword in e.message else f"{e.message} (keyword {keyword!r})"
            self.metrics.grammars.labels(grammar.spec.kind, e.code).inc()
            fields: dict[str, Any] = {**e.fields}
            raise type(e)(message, param=grammar.locate(path), **fields) from None
        except PlugmeshError as e:
            self.metrics.grammars.labels(grammar.spec.kind, e.code).inc()
            raise
        self.metrics.grammars.labels(grammar.spec.kind, "cached" if info.was_cached else "compiled").inc()
        return GrammarUse(info.key, grammar.spec)

    async def _prepare(self, wanted: Wanted, model: ServedModel, facts: TokenizerFacts, deadline: float) -> list[Prepared]:
        check_sampling(wanted.sampling, self.limits, vocab_size=facts.vocab_size)
        compiling = None if wanted.grammar is None else asyncio.create_task(
            self._compile(wanted.grammar, model, deadline), name=f"compile:{wanted.request_id}")
        try:
            encoded = await asyncio.gather(*(self.tokenizers.encode(model, p, deadline) for p in wanted.prompts))
            use = None if compiling is None else await compiling
        finally:
            if compiling is not None:
                compiling.add_done_callback(lambda task: task.cancelled() or task.exception())  # somebody asked for it
                compiling.cancel()
        sampling = wanted.sampling
        if sampling.seed is None:
            # Chosen here rather than in decode: a request that moves to another instance must go on with the same randomness.
            sampling = dataclasses.replace(sampling, seed=secrets.randbits(62))
        ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else facts.eos_token_ids)
        table = self.vocabularies.known(model)
        prepared = []
        for i, (prompt, ids) in enumerate(zip(wanted.prompts, encoded, strict=True)):
            param = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
            check_token_ids(param, ids, facts.vocab_size)
            limit = fit_context(len(ids), wanted.max_tokens, model.context_length, param=param)
            limit = min(limit, self.limits.max_tokens)
            params = dataclasses.replace(sampling, max_tokens=limit, min_tokens=min(sampling.min_tokens, limit))
            prepared.append(Prepared(
                request_id=wanted.request_id if len(encoded) == 1 else f"{wanted.request_id}.{i}", model=model.model, token_ids=ids,
                sampling=params, end_token_ids=ends, stop=wanted.stop, priority=wanted.priority,
                base_index=i * sampling.num_sequences, trace=wanted.trace, client=wanted.client, block_ids=self._block_ids(model, ids),
                table=table, grammar=use))
        return prepared

    def _block_ids(self, model: ServedModel, token_ids: tuple[int, ...]) -> tuple[bytes, ...]:
        """Blocks that a decode instance may find in its prefix cache: all but the last token, whose logits are needed."""
        if not self.engine.router.needs_block_ids or not model.layout_key:
            return ()
        return tuple(block_chain(model.layout_key, token_ids[:-1]))

    async def _echoes(self, wanted: Wanted, model: ServedModel, deadline: float) -> tuple[str, ...]:
        if not wanted.echo:
            return ()
        texts = []
        for prompt in wanted.prompts:
            if isinstance(prompt, TextPrompt):
                texts.append(prompt.text)
            elif isinstance(prompt, ChatPrompt):
                texts.append("")
            else:
                texts.append(await self.tokenizers.decode(model, prompt.token_ids, deadline))
        return tuple(texts)

    def _before_frame(self) -> None:
        self.engine.local_texts.is_held = self.engine.outbox.is_held = True

    def _on_frame(self) -> None:
        """From rows to bytes on the clients' connections, all in the turn of the loop that read the frame."""
        self.engine.local_texts.flush()
        self.engine.outbox.flush()
        self.metrics.frames.inc()
        self.texts.flush()

    def _ledger(self, choice: StrategyChoice) -> Ledger:
        most_tokens, most_calls = self.settings.strategy_budget_tokens, self.settings.strategy_budget_calls
        return Ledger(min(choice.budget_tokens or most_tokens, most_tokens), min(choice.budget_calls or most_calls, most_calls))

    def _on_children_end(self, batch: Generation, strategy: str) -> None:
        num_out = num_computed(batch)
        self.metrics.count_tokens(batch.num_prompt_tokens, num_out, batch.num_cached_tokens)
        reasons = [s.finish_reason for run in batch.runs for s in run.sequences]
        for reason in reasons:
            self.metrics.children.labels(strategy, (reason or FinishReason.CANCELLED).value).inc()
        log.debug("strategy.children_finished", request_id=batch.request_id, strategy=strategy, num_children=len(reasons), num_generated_tokens=num_out)

    def _on_end(self, generation: Generation, ticket: Admitted, span: Span) -> None:
        span.end(
            error=generation.error.code if generation.error else "", num_prompt_tokens=generation.num_prompt_tokens,
            num_generated_tokens=generation.num_completion_tokens, num_migrations=generation.num_migrations,
        )
        ticket.release(generation.num_completion_tokens)
        self._forget(generation.request_id)
        error = generation.error
        if isinstance(error, Cancelled):
            outcome = "cancelled"
        elif error is not None:
            outcome = "error"
        else:
            outcome = "length" if FinishReason.LENGTH in generation.finish_reasons else "stop"
        num_prompt, num_out = generation.num_prompt_tokens, generation.num_completion_tokens
        e2e_s = generation.ended_at - generation.arrived
        m, route = self.metrics, generation.route
        m.requests.labels(route, outcome).inc()
        if not isinstance(generation, StrategyGeneration):  # else its children counted them
            m.count_tokens(num_prompt, num_out, generation.num_cached_tokens)
        m.e2e.labels(route).observe(e2e_s)
        ttft_s = generation.first_token_at - generation.arrived if generation.first_token_at else 0.0
        if generation.first_token_at:
            m.ttft.labels(route).observe(ttft_s)
            if num_out > 1 and error is None:
                m.tpot.labels(route).observe((e2e_s - ttft_s) / (num_out - 1))
        self.plugins.observe(
            "on_request_finished", request_id=generation.request_id, finish_reason=outcome, num_prompt_tokens=num_prompt, num_generated_tokens=num_out)
        log.info(
            "request.finished", request_id=generation.request_id, route=route, outcome=outcome, code=error.code if error else "",
            num_prompt_tokens=num_prompt, num_generated_tokens=num_out, num_cached_tokens=generation.num_cached_tokens,
            num_migrations=generation.num_migrations, ttft_ms=round(ttft_s * 1000, 1), e2e_ms=round(e2e_s * 1000, 1))
