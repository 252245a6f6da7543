"""What plugins hand to the host: frozen records, each a name, a factory and declared facts.

A hook runs once per process and returns records; a record's `build` makes one object per process, engine or request as its
docstring says; the object's plain methods run per request or step. Nothing here imports torch: engine records name the
engine's protocols (`plugmesh_engine.seams`) only as types of what `build` returns.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from plugmesh.ledger import Ledger
from plugmesh.types import FinishReason, InstanceInfo, KvLayout, ModelConfig, SamplingParams, TokenInfo

if TYPE_CHECKING:
    import numpy as np

    from plugmesh.grammar.seams import GrammarEngine, GrammarVocabulary

PrefillMode = Literal["auto", "local", "remote"]


@dataclass(frozen=True, slots=True)
class SchedulerContext:
    """What a scheduler may know when it is built.

    Attributes:
        max_tokens_per_step: The engine's own limit on scheduled tokens of one step.
        max_num_sequences: The engine's own limit on running sequences.
        num_blocks: Size of the KV pool in blocks of 16 tokens.
        measure_step_ms: Runs one synthetic step of (prefill tokens, decode rows, KV tokens per row) on the real model
            and returns milliseconds; for budgets that are profiled rather than set. Costs that long; call it at build only.
    """

    max_tokens_per_step: int
    max_num_sequences: int
    num_blocks: int
    measure_step_ms: Callable[[int, int, int], float] | None = None


@dataclass(frozen=True, slots=True)
class SchedulerRecord:
    """Decides which sequences run in a step and how many prompt tokens of each.

    `build(context)` is called once per engine and returns a `plugmesh_engine.seams.Scheduler`.
    """

    name: str
    build: Callable[[SchedulerContext], Any]


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What a draft method may know when it is built.

    Attributes:
        max_draft_tokens: The engine's own limit on drafted tokens of one sequence and step.
        max_num_sequences: The engine's own limit on running sequences.
        num_blocks: Size of the KV pool in blocks of 16 tokens.
        vocab_size: Drafted ids lie below it.
        measure_step_ms: As in `SchedulerContext`; what a drafted token costs is what one more decode row costs.
    """

    max_draft_tokens: int
    max_num_sequences: int
    num_blocks: int
    vocab_size: int
    measure_step_ms: Callable[[int, int, int], float] | None = None


@dataclass(frozen=True, slots=True)
class DraftRecord:
    """Guesses tokens that the model then checks several at a time; output is the same without it.

    `build(context)` is called once per engine and returns a `plugmesh_engine.seams.DraftMethod`.
    """

    name: str
    build: Callable[[DraftContext], Any]


@dataclass(frozen=True, slots=True)
class PromptFilterContext:
    """What a prompt filter may know when it is built.

    Attributes:
        max_model_len: The engine's longest prompt plus output.
        max_tokens_per_step: Rows of one chunk of stage one, unless the record has its own `chunk_tokens`.
    """

    config: ModelConfig
    max_model_len: int
    max_tokens_per_step: int


class PromptFilter(Protocol):
    """Chooses the tokens of a prompt that the whole model reads. One object per engine, called on its thread; `layers` from others, too.

    What it answers must depend on its arguments only: a request that moves to another instance is filtered there once more, and goes on
    with the tokens that were generated from the first selection.
    """

    def layers(self, num_prompt_tokens: int) -> int:
        """How many layers stage one computes, which is the index of the layer whose queries and keys `select` gets; 0 leaves a prompt of this length alone."""

    def select(self, q: np.ndarray, k: np.ndarray) -> Sequence[int] | np.ndarray:
        """Indices of the prompt's tokens to keep, ascending, at least one. They are read in this order, at positions from 0.

        Args:
            q: (Q, heads, head_dim) float32 after RoPE, of the last Q = min(`num_queries`, n) tokens.
            k: (n, kv_heads, head_dim) float32 after RoPE. Query head h reads KV head h // (heads / kv_heads).
        """


@dataclass(frozen=True, slots=True)
class PromptFilterRecord:
    """Has long prompts read in two stages: the early layers see every token, the whole model those that were chosen.

    `build(context)` is called once per engine. Prompts of requests that score, tap hidden states, are forked or bring KV are read whole.

    Attributes:
        num_queries: Last tokens whose queries `select` gets.
        chunk_tokens: Rows of stage one between two steps of everybody else; 0 for the engine's max_tokens_per_step.
    """

    name: str
    build: Callable[[PromptFilterContext], PromptFilter]
    num_queries: int = 1
    chunk_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What a router knows of a request; never its text.

    Attributes:
        block_ids: Names of the prompt's full blocks in order, as events name them; filled for a `RouterRecord` with
            `needs_block_ids`. They hold for the KV layout of the first decode instance that is offered: one with another
            layout has none of them.
        client: Name of the caller's API key, else the `user` that the request names; empty when there is neither.
    """

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    priority: int = 0
    block_ids: tuple[bytes, ...] = ()
    client: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes. An empty `prefill_instance` lets the work queue choose."""

    decode_instance: str
    prefill_instance: str = ""
    prefill_mode: PrefillMode = "auto"


@dataclass(frozen=True, slots=True)
class KvEvent:
    """A change of the set of blocks that one instance's prefix cache holds.

    Of one instance they come in order and complete: where one was lost, or the instance restarted or left, "cleared" comes
    first and a snapshot follows as "stored". What an event says may be outdated when it arrives; it is a hint.

    Attributes:
        kind: "stored" and "removed" name blocks, "cleared" means that none is known any more.
    """

    instance_id: str
    incarnation: str
    sequence: int
    kind: Literal["stored", "removed", "cleared"]
    block_ids: tuple[bytes, ...] = ()


class Router(Protocol):
    """One object per gateway process; called from its event loop, so methods must not block.

    A router may also have `on_kv_event(event: KvEvent) -> None`; the gateway then follows the prefix caches of all decode
    instances and calls it for each change. An error in it is logged and counted; the event is lost to this router.
    """

    def route(self, request: RouteRequest, decode: Sequence[InstanceInfo], prefill: Sequence[InstanceInfo]) -> Route:
        """Chooses among live instances (never empty for `decode`; draining and suspect ones are left out).

        Raising costs this request a PluginError and nothing else.
        """

    def on_progress(self, request_id: str, num_tokens: int) -> None:
        """`num_tokens` more tokens of this request arrived."""

    def on_finished(self, request_id: str) -> None:
        """The request ended, in whatever way, or is about to be routed again."""


@dataclass(frozen=True, slots=True)
class RouterRecord:
    """Chooses instances for requests. `build()` is called once per gateway process.

    `needs_block_ids` makes the gateway compute `RouteRequest.block_ids`, about 6 microseconds per block of 16 tokens.
    """

    name: str
    build: Callable[[], Router]
    needs_block_ids: bool = False


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """What an admission policy knows of a request; never its text.

    Attributes:
        client: As in `RouteRequest`.
        num_sequences: Choices that are wanted, over all prompts.
        deadline: Of time.monotonic().
    """

    request_id: str
    client: str
    priority: int
    num_sequences: int
    deadline: float


class AdmissionTicket(Protocol):
    """One admitted request."""

    async def take_tokens(self, num_prompt_tokens: int, num_wanted_tokens: int) -> None:
        """Called once, when the prompt's ids are known; may wait, or raise as `AdmissionPolicy.admit`.

        Args:
            num_wanted_tokens: The most that may be generated, over all sequences.
        """

    def release(self, num_generated_tokens: int) -> None:
        """The request ended, in whatever way, or somebody else refused it. Called exactly once; must not raise."""


class AdmissionPolicy(Protocol):
    """One object per gateway process; called from its event loop, so methods must not block (they may await)."""

    async def admit(self, request: AdmissionRequest) -> AdmissionTicket:
        """Lets a request in, at once or after waiting, at most until `request.deadline`.

        Being cancelled while it waits leaves nothing behind.

        Raises:
            Overloaded: Too much at the moment (429); `retry_after_s` says when to come again.
            PlugmeshError: Any other refusal.
            Exception: Costs this request a PluginError and nothing else.
        """


@dataclass(frozen=True, slots=True)
class AdmissionRecord:
    """Decides who may come in now. `build()` is called once per gateway process."""

    name: str
    build: Callable[[], AdmissionPolicy]


@dataclass(frozen=True, slots=True)
class HandOver:
    """How the KV of one prompt travels from prefill to decode, in the chunks that the prefill instance's scheduler cuts.

    Attributes:
        overlap: True stores finished blocks while the next chunk is computed, False stores all after the last one.
    """

    overlap: bool = True


@dataclass(frozen=True, slots=True)
class KvHandOverRecord:
    """Chooses the hand-over of a prompt. `plan(num_prompt_tokens, layout)` runs once per prefill job, in the event loop."""

    name: str
    plan: Callable[[int, KvLayout], HandOver]


@dataclass(frozen=True, slots=True)
class PrefillPolicyRecord:
    """Decides, in a decode instance, whether a prompt whose mode is "auto" is computed here or by a prefill instance.

    `choose(num_uncached_tokens, num_running, num_prefill_instances)` runs once per request, in the event loop.
    """

    name: str
    choose: Callable[[int, int, int], Literal["local", "remote"]]


class QualitySubject(Protocol):
    """One side of a quality comparison: a model as it runs with or without plugins, or the float32 reference.

    Attributes:
        kinds: What this side can do: "logits" (`logits`), "tokens" (`generate`), "answers" (`answer`, `complete`). A metric runs where all that it needs is there.
        seed: Draws from it are the same on every side.
        is_quick: Only to see that everything runs; use the smallest size that does.
        context_tokens: Longest prompt plus output.
    """

    kinds: frozenset[str]
    seed: int
    is_quick: bool
    context_tokens: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without anything that begins or ends a document."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out."""

    def english(self) -> str:
        """Some 700,000 characters, the same on every machine with this Python."""

    def logits(self, token_ids: Sequence[int], *, chunk_tokens: int = 32) -> Iterator[Any]:
        """Teacher-forced logits: arrays (n, vocab) float32 that together have one row per token, in order, each valid until the next.

        `chunk_tokens` are computed together; what a codec does to the KV of earlier chunks is in later chunks' rows.
        """

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, *, temperature: float = 0.0, seed: int = 0) -> list[list[int]]:
        """Token ids after each prompt, all prompts at once; prompt i draws with `seed + i`. Ends at the model's end of text."""

    def answer(self, questions: Sequence[str], max_tokens: int) -> list[str]:
        """The greedy answer to each question, as a chat of one message."""

    def complete(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        """The greedy continuation of each text."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What one side showed to a quality metric.

    Attributes:
        figures: By name, for the report.
        arrays: numpy arrays (numbers and booleans only) that `compare` needs, one row per item where intervals are wanted; they may be large, and
            travel between processes as files.
    """

    figures: Mapping[str, float]
    arrays: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class QualityDelta:
    """How far one side is from another in one figure, with its 95 % interval; low equals high where there is none."""

    name: str
    value: float
    low: float
    high: float
    better: Literal["lower", "higher"]


@dataclass(frozen=True, slots=True)
class QualityMetricRecord:
    """A measure of what a plugin does to the output.

    Attributes:
        needs: Of `QualitySubject.kinds`.
        observe: Runs once per side, in that side's process, and must draw the same items from the subject's seed on every side.
        compare: `compare(without, with_)` gives deltas from the observations of two sides.
        uses_reference: Whether it also runs on the float32 reference, which only has logits.
    """

    name: str
    title: str
    needs: frozenset[str]
    observe: Callable[[QualitySubject], Observation]
    compare: Callable[[Observation, Observation], Sequence[QualityDelta]]
    uses_reference: bool = False


@dataclass(frozen=True, slots=True)
class WorkloadContext:
    """What a workload may use to make prompts. `encode` and `english` as in `QualitySubject`; `chat` gives the ids of a message up to where its answer starts."""

    seed: int
    vocab_size: int
    encode: Callable[[str], list[int]]
    chat: Callable[[str], list[int]]
    english: Callable[[], str]


@dataclass(frozen=True, slots=True)
class WorkloadRecord:
    """Work whose speed `plugmesh ab` measures with and without a plugin, greedy and of exact length.

    Attributes:
        build: Conversations, each a sequence of (prompt ids, tokens to generate) that follow one another; the same for the same seed.
        streams: Callers at once.
        figure: Path in a run's summary that this is about: "output_tok_s", "decode_tok_s", "prefill_tok_s", "ttft_ms.p50", "itl_ms.p99" and so on.
        tiers: Where it runs: "engine" (one process), "served" (a mesh over HTTP).
        use_cache: Whether prefixes may be found again.
    """

    name: str
    title: str
    build: Callable[[WorkloadContext], Sequence[Sequence[tuple[Sequence[int], int]]]]
    streams: int = 1
    figure: str = "output_tok_s"
    tiers: tuple[str, ...] = ("engine", "served")
    use_cache: bool = True


# -- strategies: one request into many ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StrategyRequest:
    """A request as its strategy gets it: encoded, checked and admitted.

    Attributes:
        sampling: What the client asked for; `seed` is always set, `num_sequences` is 1.
        options: The client's own keys beside the strategy's name and budgets, unchecked; a strategy refuses bad ones with InvalidRequest.
        deadline: Of time.monotonic().
    """

    request_id: str
    model: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    options: Mapping[str, Any]
    deadline: float


@dataclass(frozen=True, slots=True)
class ChildEvent:
    """New text of one child and the tokens it is made of; the end token is not among them. `finish_reason` is on a child's last event."""

    child: int
    text: str
    tokens: tuple[TokenInfo, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class StrategyEvent:
    """More of the answer. Exactly the last event of a run has a `finish_reason`; it may also hold `detail`, facts that JSON can carry
    (votes, counts) and that the client gets beside the usage."""

    text: str = ""
    tokens: tuple[TokenInfo, ...] = ()
    finish_reason: FinishReason | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


class StrategyApi(Protocol):
    """What a strategy may do for its request. Children are ordinary generations: routed, batched, moved when an instance dies, charged to `ledger`."""

    @property
    def ledger(self) -> Ledger:
        """Tokens and children of the request against its budgets; read it, the api writes it."""

    def generate(self, n: int, *, sampling: SamplingParams | None = None, prefix: Sequence[int] = ()) -> AsyncGenerator[ChildEvent, None]:
        """Runs `n` children on the request's prompt and gives their events as they come; ends after the last child.

        Starts as many as the ledger affords with `sampling.max_tokens` each: perhaps fewer than `n`, perhaps none. Children are numbered from 0
        over the whole request, in order of their start. Several calls may run at the same time. Closing the iterator cancels what it still runs.
        The request's seed decides all randomness; the first child of a request draws what the plain request would.

        Args:
            sampling: In place of the request's; `num_sequences` and `seed` of it are replaced.
            prefix: Token ids after the prompt, the beginning of every child's answer; its text is not part of the events.

        Raises:
            PlugmeshError: A child failed, or could not be admitted; the other children of the call are then cancelled.
        """

    def cancel(self, child: int) -> None:
        """Ends one child as soon as possible: it gets a last event with CANCELLED, its KV is released. Of one that ended, nothing changes."""


class Strategy(Protocol):
    """One object per gateway process; one `run` per request, many at a time in one event loop, so it must not block or keep a request's state on itself."""

    def run(self, request: StrategyRequest, api: StrategyApi) -> AsyncIterator[StrategyEvent]:
        """Makes the answer. Raising, ending without a final event, or yielding anything else costs this request a PluginError and nothing else; a PlugmeshError
        keeps its own status. When the run ends, in whatever way, children that still run are cancelled."""


@dataclass(frozen=True, slots=True)
class StrategyRecord:
    """Makes one answer out of several generations, for requests that name it. `build()` is called once per gateway process."""

    name: str
    build: Callable[[], Strategy]


# -- eviction: kvstore -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EvictionContext:
    """What an eviction order may know when it is built.

    Attributes:
        tier: The kvstore keeps blocks in an arena and, beside or after that, on disk; each tier has an order of its own.
        capacity_bytes: Most that all blocks of the tier take together.
    """

    tier: Literal["arena", "disk"]
    capacity_bytes: int


class EvictionOrder(Protocol):
    """Which block leaves a tier when room is needed. Called from the kvstore's event loop, so every method takes microseconds and none blocks.

    A key is 64 bytes, the KV layout's key and the block's name; the same content has the same key when it comes again. A block is *idle* from `add`
    to `discard` or `left`, and *busy* from `discard` to the next `add` or `left`; only idle ones may be named. The kvstore keeps its own order by
    recency beside this one. An order that raises, names a block that is not idle, or none while there are some, does not come back, or is late again
    and again is not asked any more: recency decides from then on, with a line in the log and a count in the metrics. No block is lost by it.
    """

    def add(self, key: bytes, num_bytes: int) -> None:
        """The block is idle from now on: because it is new in this tier, or because nobody holds it any more (then what is known of it still counts).

        Args:
            num_bytes: Room that it takes in the tier; the same for all blocks of a layout.
        """

    def discard(self, key: bytes) -> None:
        """The block is busy: it must not be named until it is added again. It is still in the tier."""

    def touch(self, key: bytes) -> None:
        """Somebody asked for the block, idle or busy, and it was there."""

    def left(self, key: bytes, evicted: bool) -> None:
        """The block is not in the tier any more. With `evicted` it had to go for want of room, and usually is the last victim that was named;
        without, it was damaged or removed by an operator."""

    def victim(self) -> bytes | None:
        """The idle block that should leave next; None only when there is none. Asked again before anything changed it gives the same one.

        The block stays until `left` is called. Perhaps that is another one: in the arena the kvstore prefers one of the `coldest` that is on disk, too.
        """

    def coldest(self, n: int) -> Sequence[bytes]:
        """About the next `n` victims, those that would go first in front, each once, fewer when fewer are idle; changes nothing.

        A hint: the background writer copies these to disk first. Asked far less often than `victim`.
        """


@dataclass(frozen=True, slots=True)
class EvictionRecord:
    """Decides which block leaves the kvstore's arena, or its disk, when room is needed.

    `build(context)` is called once per kvstore and tier. What is evicted is computed again when it is needed, so no order changes any output.
    """

    name: str
    build: Callable[[EvictionContext], EvictionOrder]


# -- weight formats: weightstore packs, prefill and decode load -----------------------------------------------------------------------------------------

Foreign = Any
"""A Python callable, or a PyCapsule made by `plugmesh_kernels.jit.capsule`.

A capsule is called without the GIL by all threads of the executor at once (v1 of the linear: by one); a callable by the executor's thread with the GIL held.
Arrays that a callable gets are views, valid for the call. What a capsule's context points at must live as long as the object that offers the capsule.
"""


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One tensor as a format stores it.

    Attributes:
        name: The model's name of the tensor, or one of the format's own ("codebook.3"), which must not be one of the model's.
        dtype: "float32", a type of `plugmesh_kernels.pack` ("q4_1x16", "q8_0x16", "bf16x16", "f32x16": then it is used as if no plugin were there), or
            "<format>/<kind>", which only the format understands. At most 32 characters.
        shape: At least one axis. Of a tensor of the model: the model's, whatever the bytes look like, since it is checked against the configuration.
        data: All bytes, in pieces of any length; consumed once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Iterable[bytes | bytearray | memoryview | np.ndarray]


class WeightSource(Protocol):
    """The imported model, as `WeightFormatRecord.pack` reads it. Matrices are (out, in); names are Hugging Face's."""

    @property
    def config(self) -> ModelConfig: ...

    def names(self) -> list[str]:
        """All tensors, in file order; a tied head is not among them."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> np.ndarray:
        """Float32 values, dequantised anew in every call, so the caller may change them. Raises KeyError."""

    def native(self, name: str) -> PackedTensor:
        """The tensor as the format "native" has it, every value unchanged: what embedding, head and norms usually keep. Raises KeyError."""

    def activations(self, num_tokens: int, seed: int) -> Mapping[str, np.ndarray]:
        """Inputs (num_tokens, K) float32 of every linear, by tensor name, on English text drawn by `seed`; read only.

        The head is under "lm_head.weight", also when it is tied. Linears of one input (q, k, v; gate, up) share an array. The model runs in float32 with
        the source's weights, once per (num_tokens, seed), when the first array is asked for: SmolLM2-135M takes some 10 s per 1,000 tokens on two cores
        and 0.5 MB per token. The same arguments give the same values.

        Raises:
            FailedPrecondition: The model came without a tokenizer that can be used here.
        """


class LoadedWeights(Protocol):
    """A packed model in an engine's process, as `WeightFormatRecord.load` reads it."""

    @property
    def config(self) -> ModelConfig: ...

    def names(self) -> list[str]: ...

    def entry(self, name: str) -> tuple[str, tuple[int, ...], np.ndarray]:
        """(dtype, shape, bytes): flat uint8, read only, starting at a multiple of 64, valid for as long as the array or a view of it lives; engines of a
        host share its memory, so a format that multiplies straight from it costs nothing more. Raises KeyError."""


class PluginWeights(Protocol):
    """What a format gives an engine in place of the native weights. The engine keeps the object for as long as it may call.

    Every tensor of the model whose dtype is the format's own must be in `linears` or `buffers`, the embedding in `embedding`.

    Attributes:
        linears: Tensor name to a Foreign that multiplies by it. A callable `f(x, y)` fills y (T, N) from x (T, K), float32; capsules are
            "plugmesh.linear.v1", `void(void* ctx, const float* x, int t, int k, float* y, int n)`, one thread while the others wait, and
            "plugmesh.linear.v2" with `int thread, int num_threads` at the end, called by every thread at once: each fills its own share of the N columns of y
            for all T rows and does not wait for the others. Linears of one input are called one after another with the same x (q, k, v; gate, up): the
            first may encode x for the rest, each thread for itself. x of another layer may lie at the same address.
            "lm_head.weight" names the head, tied or not. A bias is added by the engine.
        buffers: Tensor name to (dtype of `plugmesh_kernels.pack`, shape, uint8 array that starts at a multiple of 64): memory that stands for the tensor and
            that `before_layer` fills. Tensors of different layers may share one array. `plugmesh_engine.weights.aligned` makes such arrays.
        before_layer: Called before every layer with its number, and with `num_layers` before the head: a callable `f(layer)`, or a capsule
            "plugmesh.layer.v1", `void(void* ctx, int layer, int thread, int num_threads)`, called by every thread at once; all wait for all before they go on.
        embedding: For an embedding that is not native: a callable `f(tokens (T,) int32, x (T, hidden) float32 to fill)`, or a capsule "plugmesh.embedding.v1",
            `void(void* ctx, const int32_t* tokens, int t, float* x, int thread, int num_threads)`, each thread filling its share of the rows.
        num_bytes: Of weights that stay in memory, the mapped ones and the buffers; what the leaderboard shows.
    """

    @property
    def linears(self) -> Mapping[str, Foreign]: ...
    @property
    def buffers(self) -> Mapping[str, tuple[str, tuple[int, ...], np.ndarray]]: ...
    @property
    def before_layer(self) -> Foreign | None: ...
    @property
    def embedding(self) -> Foreign | None: ...
    @property
    def num_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class WeightFormatRecord:
    """A way to store a model's weights and to multiply by them.

    Used by a mesh that says `weight_format = "<name>"` in [services.prefill] and [services.decode] and loads the plugin there and in the weightstore. Works
    under the native executor and, slowly, under torch, which calls the same functions.

    Attributes:
        name: In the catalogue and in `weight_format`; letters, digits, "-" and "_", at most 24.
        pack: Packs a whole model, so that scales can be folded into norms and matrices rotated; runs in the weightstore, in a thread, once per model and
            `variant`. Tensors are consumed one by one, so a generator keeps memory low.
        load: Runs in the engine's process, once per load.
        is_lossless: Whether every product is that of the source's weights.
        variant: Whatever changes the bytes: settings, and a version of the packing code. Another variant is packed anew, and KV of different bytes never mixes.
    """

    name: str
    pack: Callable[[WeightSource], Iterable[PackedTensor]]
    load: Callable[[LoadedWeights], PluginWeights]
    is_lossless: bool
    variant: str = ""


# -- KV codecs: prefill, decode -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KvCodecContext:
    """What a KV codec may know when it is built.

    Attributes:
        config: Of the model.
        model_version: For `KvLayout.model`, and to find what was trained for these weights.
        num_blocks: Blocks 1 to num_blocks are handed out; block 0 is the null block, so the memory holds num_blocks + 1.
        num_threads: Threads that will call the capsule, or that a codec of Python may use itself.
    """

    config: ModelConfig
    model_version: str
    num_blocks: int
    num_threads: int


@dataclass(frozen=True, slots=True)
class KvCodecRecord:
    """A form of KV of its own, with the attention over it.

    `build(context)` is called once per engine and returns a `plugmesh_engine.seams.KvCodec`. Prefill and decode must use the same one: blocks of different
    layouts never mix, so otherwise every remote prefill is refused and computed again by decode.
    """

    name: str
    build: Callable[[KvCodecContext], Any]


@dataclass(frozen=True, slots=True)
class GrammarEngineRecord:
    """Compiles grammars and matches tokens against them.

    Attributes:
        version: Of everything that decides what a compiled form means; another version compiles anew.
        languages: Grammar languages that it takes: "ebnf" (GBNF), "regex", "lark" (llguidance's), "structural_tag" (xgrammar's JSON), "json_schema".
        build: Called once per process and tokenizer; returns a `plugmesh.grammar.seams.GrammarEngine`. May raise Unavailable when its library is not installed.
    """

    name: str
    version: str
    languages: frozenset[str]
    build: Callable[[GrammarVocabulary], GrammarEngine]


# -- the rollout service's table: which rows a task gets next -----------------------------------------------------------------------------------------


class RowView(Protocol):
    """A row of the experience table as a sampler sees it: metadata, never values.

    Attributes:
        index: Its number within the topic; grows with every row and is never used again.
        version: Version of the weights that made it; None before that.
        sizes: Field to number of elements, characters or bytes, of the fields that the row has; 1 for a number.
        scalars: Field to value, of the fields that are single numbers.
    """

    @property
    def index(self) -> int: ...
    @property
    def id(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def version(self) -> int | None: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...
    @property
    def scalars(self) -> Mapping[str, float]: ...


@dataclass(frozen=True, slots=True)
class SampleContext:
    """What a sampler may know about one request for a batch.

    Attributes:
        group_size: Rows of one group, as the topic was created.
        min_rows: Fewer than `batch_size` rows are welcome down to this number; below it the answer must be empty.
        staleness: How many versions behind `latest_version` a row may be; None: any number. Rows outside are not in `ready`.
        pending: Version to number of rows that this task will get but that lack fields still; only rows with a version.
        batch_rows: Rows that the topic's training step takes, 0 where that is not known.
        rank: Of the caller among `num_ranks` that train together on the batch number `batch_index`; None: there is no such number.
    """

    topic: str
    task: str
    group_size: int = 1
    min_rows: int = 1
    staleness: int | None = None
    latest_version: int | None = None
    pending: Mapping[int, int] = field(default_factory=dict)
    batch_rows: int = 0
    rank: int = 0
    num_ranks: int = 1
    batch_index: int | None = None


class Sampler(Protocol):
    """Chooses rows for one task of one topic. Called on the table's event loop, so it must be quick; may keep state.

    A sampler that keeps rows for later calls also has `forget(indexes)`, called when rows were cleared or came back from a dead consumer.
    """

    def sample(self, ready: Sequence[RowView], batch_size: int, context: SampleContext) -> tuple[list[int], list[int]]:
        """Indexes to hand out, in order, and those that the task has thereby got (a subset of `ready`); both empty to wait for more rows.

        Args:
            ready: Rows that have all fields asked for, that the task has not got, within the version window, by index. Not to be changed.
        """


@dataclass(frozen=True, slots=True)
class SamplerRecord:
    """A way of choosing rows. `build(options)` runs once per topic, task and set of options; it raises InvalidRequest for options that make no sense."""

    name: str
    build: Callable[[Mapping[str, Any]], Sampler]


class Loss(Protocol):
    """What a trainer minimises. Called once per part of a batch and per pass over it, with gradients.

    Attributes:
        needs_proximal: Whether `proximal` is wanted, which costs a forward pass. A loss that wants `reference` has a true `needs_reference` besides; then a
            worker computes it under the run's first weights.
    """

    needs_proximal: bool

    def __call__(self, logprobs: Any, batch: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The part's share of the batch's loss (a scalar tensor), and sums over its tokens to report.

        Args:
            logprobs: (rows, longest response) tensor of the trainer's log-probabilities of the responses' tokens, with gradients.
            batch: Of the same shape `behaviour` (recorded at generation), `mask` (tokens that are there), `proximal` (the trainer's at the start of the step) and
                `reference`, where the run has them; `advantage` (rows,); `num_tokens` and `num_rows` of the whole batch.
        """


@dataclass(frozen=True, slots=True)
class LossRecord:
    """A loss. `build(options)` runs once per trainer; it raises InvalidRequest for options that make no sense."""

    name: str
    build: Callable[[Mapping[str, Any]], Loss]


class Reward(Protocol):
    """Tells how good a response is."""

    def score(self, prompt: str, answer: str, response: str) -> float:
        """Any finite number, more is better. Called per response in a reward worker; may take long, and the same arguments give the same number."""


@dataclass(frozen=True, slots=True)
class RewardRecord:
    """A reward. `build(options)` runs once per reward worker; it raises InvalidRequest for options that make no sense."""

    name: str
    build: Callable[[Mapping[str, Any]], Reward]


@dataclass(frozen=True, slots=True)
class LoopShape:
    """What a workflow must know of a run: rows of a group, groups of a training step, and the groups that all rollout workers together generate at a time."""

    group_size: int
    groups_per_step: int
    groups_at_once: int = 1

    @property
    def batch_rows(self) -> int:
        return self.group_size * self.groups_per_step


@dataclass(frozen=True, slots=True)
class LoopPlan:
    """How the parts of a run stand to one another.

    Attributes:
        staleness: Versions that the weights that made a token may lie behind those that are trained with it.
        is_gated: Admission holds prompts back so that at most (staleness + 1) * batch_rows rows are in flight.
        capacity_rows: Rows that the table must be able to hold.
        train_sampler, train_options: Choose the rows of a training step.
        is_pinned: A group's weights follow from its number alone: those of version max(0, step - staleness), where step = number // groups_per_step. Then a
            run is the same every time.
        evicts: Rows that became too old are dropped, and their work with them.
    """

    staleness: int
    is_gated: bool
    capacity_rows: int
    train_sampler: str
    train_options: Mapping[str, Any] = field(default_factory=dict)
    is_pinned: bool = False
    evicts: bool = False


@dataclass(frozen=True, slots=True)
class WorkflowRecord:
    """A way of running generation and training together.

    `plan(options, shape)` runs once, before anything is started; it raises InvalidRequest for options that make no sense, and for a capacity with which the loop
    would stop for ever.
    """

    name: str
    plan: Callable[[Mapping[str, Any], LoopShape], LoopPlan]
