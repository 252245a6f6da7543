"""A run's file: what `plugmesh rl run config.toml` reads."""

from __future__ import annotations

import pathlib
import tomllib
from typing import Any, Literal

import pydantic

from plugmesh.config import StrictModel
from plugmesh.errors import ConfigError
from plugmesh.types import ModelConfig
from plugmesh_rollout.loop import tasks


class RunPart(StrictModel):
    """`[run]`."""

    folder: pathlib.Path                                    # weights, checkpoint, table, figures
    seed: int = pydantic.Field(0, ge=0)
    steps: int = pydantic.Field(100, ge=1)
    time_limit_s: float = pydantic.Field(0.0, ge=0)         # above 0: ends after the step in which it passes
    eval_every: int = pydantic.Field(10, ge=0)              # steps between measurements on held-out examples; 0: only at start and end
    eval_examples: int = pydantic.Field(200, ge=1)
    checkpoint_every: int = pydantic.Field(1, ge=1)         # steps
    plugins: tuple[str, ...] = ()                           # slugs
    pin: bool = False                                       # the trainer's process has cores of its own, as many as it has threads; Linux
    table: str = ""                                         # address of a table that runs already; "": one in the run's own process
    durability: Literal["commit", "batch", "none"] = "batch"  # of the run's own table


class ModelPart(StrictModel):
    """`[model]`: a Llama from scratch, one that an earlier run wrote, or a base model of this machine with its own tokenizer and chat template."""

    weights: pathlib.Path | None = None                     # a file that `save_weights` wrote; sizes are then ignored
    base: str = ""                                          # as for `plugmesh pull`: "smollm2", a path, hf:owner/repo; sizes but max_position are then ignored
    system: str = ""                                        # system message of the base model's chats; "": whatever its template puts there
    hidden_size: int = pydantic.Field(128, ge=8)
    intermediate_size: int = pydantic.Field(384, ge=8)
    num_layers: int = pydantic.Field(5, ge=1)
    num_heads: int = pydantic.Field(4, ge=1)
    num_kv_heads: int = pydantic.Field(2, ge=1)
    max_position: int = pydantic.Field(256, ge=16)

    def config(self) -> ModelConfig:
        return ModelConfig(
            architecture="llama", vocab_size=tasks.VOCAB_SIZE, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size,
            num_layers=self.num_layers, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.hidden_size // self.num_heads,
            max_position=self.max_position, rms_norm_eps=1e-5, rope_theta=10000.0, rope_style="half", tie_word_embeddings=False,
            bos_token_id=tasks.BOS, eos_token_ids=(tasks.EOS,), name="rl",
        )  # fmt: skip

    @pydantic.model_validator(mode="after")
    def _heads_fit(self) -> ModelPart:
        if self.hidden_size % (2 * self.num_heads) or self.num_heads % self.num_kv_heads:
            raise ValueError("hidden_size must be an even multiple of num_heads, and num_heads a multiple of num_kv_heads")
        return self


class Named(StrictModel):
    """A record's name and what it is built with."""

    name: str
    options: dict[str, Any] = {}


class WarmupPart(StrictModel):
    """`[warmup]`: supervised steps on training examples before the first version; 0 for none."""

    steps: int = pydantic.Field(0, ge=0)
    rows: int = pydantic.Field(128, ge=1)
    lr: float = pydantic.Field(1e-3, gt=0)


class RolloutPart(StrictModel):
    """`[rollout]`."""

    workers: int = pydantic.Field(1, ge=1, le=64)
    backend: Literal["engine", "mesh"] = "engine"           # an engine in the worker's process, or the decode instances of a mesh
    # What becomes of sequences that run when new weights come: they end under the old ones, go on under the new ones, or do so after their KV was made anew.
    swap: Literal["finish", "continue", "abort"] = "finish"
    mesh: str = ""                                          # of backend mesh: its name, where several run here
    nats: str = ""                                          # its broker, where it does not run here; with user and password file
    nats_user: str = ""
    nats_password_file: pathlib.Path | None = None
    address: str = ""                                       # in place of a mesh's table: "host:port" of each decode instance, with commas between them
    weightstore: str = ""                                   # and of the weightstore
    base: str = ""                                          # model of the mesh that the first publication is based on; "": its default
    publish_as: str = pydantic.Field("rl", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")  # name of the newest weights in the weightstore
    publish_dtype: Literal["float32", "bfloat16"] = "float32"  # of matrices
    executor: Literal["auto", "native", "torch"] = "auto"
    group_size: int = pydantic.Field(8, ge=1)
    groups_per_step: int = pydantic.Field(16, ge=1)
    groups_at_once: int = pydantic.Field(16, ge=1)          # of one worker
    max_tokens: int = pydantic.Field(16, ge=1)
    tail: float = pydantic.Field(0.0, ge=0)                 # above 0: responses have drawn lengths instead of ends, log-normal with this sigma (benchmarks)
    slow_s: float = pydantic.Field(0.0, ge=0)               # above 0: a group is held back for a drawn time with this median (tests of staleness)
    lease_s: float = pydantic.Field(10.0, gt=0)             # after which a dead worker's rows go to another one; living ones extend theirs


class TrainerPart(StrictModel):
    """`[trainer]`: AdamW."""

    lr: float = pydantic.Field(3e-4, gt=0)
    lr_warmup: int = pydantic.Field(5, ge=0)                # steps
    weight_decay: float = pydantic.Field(0.0, ge=0)
    beta1: float = pydantic.Field(0.9, ge=0, lt=1)
    beta2: float = pydantic.Field(0.95, ge=0, lt=1)
    max_norm: float = pydantic.Field(1.0, gt=0)
    part_rows: int = pydantic.Field(64, ge=1)               # rows of one forward and backward pass; gradients add up over parts
    share_prompts: bool = False                             # compute the prompt of a group once; pays where it is longer than the responses
    threads: int = pydantic.Field(1, ge=1, le=64)           # of the trainer's process; other numbers give other last bits
    epochs: int = pydantic.Field(1, ge=1)                   # passes over a batch
    scale_advantages: bool = True
    pause_s: float = pydantic.Field(0.0, ge=0)              # waits so long in each step (tests of staleness)


class Settings(StrictModel):
    """The whole file."""

    run: RunPart
    model: ModelPart = ModelPart()
    task: Named = Named(name="add")
    reward: Named = Named(name="exact")
    loss: Named = Named(name="grpo")
    workflow: Named = Named(name="synchronous")
    warmup: WarmupPart = WarmupPart()
    rollout: RolloutPart = RolloutPart()
    trainer: TrainerPart = TrainerPart()
    plugins: dict[str, dict[str, Any]] = {}                 # as in mesh.toml

    @property
    def batch_rows(self) -> int:
        return self.rollout.group_size * self.rollout.groups_per_step

    @staticmethod
    def read(path: pathlib.Path, **changes: Any) -> Settings:
        """Relative folders are below the file's own. `changes` are dotted keys with `__`: run__steps=5. Raises ConfigError."""
        try:
            data = tomllib.loads(path.read_text())
        except (OSError, tomllib.TOMLDecodeError) as e:
            raise ConfigError(f"{path}: {e}") from e
        for key, value in changes.items():
            *parts, name = key.split("__")
            part = data
            for x in parts:
                part = part.setdefault(x, {})
            part[name] = value
        return checked(data, path.parent, str(path))


def checked(data: dict[str, Any], base: pathlib.Path = pathlib.Path(), source: str = "run") -> Settings:
    """Raises ConfigError naming the first key that is wrong."""
    try:
        settings = Settings.model_validate(data)
    except pydantic.ValidationError as e:
        first = e.errors()[0]
        raise ConfigError(f"{source}: {'.'.join(str(x) for x in first['loc'])}: {first['msg']}") from e
    def below(part: Any, name: str) -> Any:
        path = getattr(part, name)
        return part if path is None else part.model_copy(update={name: (base / path.expanduser()).absolute()})

    return settings.model_copy(update={"run": below(settings.run, "folder"), "model": below(settings.model, "weights")})
