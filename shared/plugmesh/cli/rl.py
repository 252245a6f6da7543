"""`plugmesh rl`: reinforcement learning over the experience table."""

from __future__ import annotations

import importlib
import pathlib
from typing import Annotated

import typer

rl_app = typer.Typer(help="Reinforcement learning: generation, scoring and training as streams.", no_args_is_help=True)


@rl_app.command("run")
def rl_run(
    config: Annotated[pathlib.Path, typer.Argument(help="The run's file (docs/rollout-training.md).")],
    steps: Annotated[int | None, typer.Option(min=1, help="In place of the file's; more than before goes on with a run that is done.")] = None,
    folder: Annotated[pathlib.Path | None, typer.Option(help="In place of the file's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the file's.")] = None,
    staleness: Annotated[int | None, typer.Option(min=0, help="In place of the file's, of the workflow asyncflow.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of a live display.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run what the file says until its steps are done, or go on with it. Ctrl-C stops; the same command goes on."""
    from plugmesh.errors import ConfigError

    changes = {"run__steps": steps, "run__folder": str(folder.absolute()) if folder else None, "run__seed": seed}
    try:
        show = importlib.import_module("plugmesh_rollout.loop.show")
    except ImportError as e:
        raise ConfigError(f"`plugmesh rl` needs {e.name}: pip install 'plugmesh[rl]'") from e
    given = {k: v for k, v in changes.items() if v is not None}
    if staleness is not None:
        given["workflow__options__staleness"] = staleness
    raise typer.Exit(show.run(config, changes=given, plain=plain, as_json=json))


@rl_app.command("export")
def rl_export(
    config: Annotated[pathlib.Path, typer.Argument(help="The run's file.")],
    target: Annotated[pathlib.Path, typer.Argument(help="A folder that is not there yet, or empty.")],
    version: Annotated[int | None, typer.Option(min=0, help="Whose weights; by default the newest that the run keeps.")] = None,
    folder: Annotated[pathlib.Path | None, typer.Option(help="The run's folder, in place of the file's.")] = None,
) -> None:
    """Write the run's model as a Hugging Face folder, for `plugmesh up --model` among others. Before the run: what it would begin with."""
    from plugmesh.errors import ConfigError

    try:
        settings = importlib.import_module("plugmesh_rollout.loop.settings")
        export = importlib.import_module("plugmesh_rollout.loop.export")
    except ImportError as e:
        raise ConfigError(f"`plugmesh rl` needs {e.name}: pip install 'plugmesh[rl]'") from e
    run = settings.Settings.read(config, **({"run__folder": str(folder.absolute())} if folder else {}))
    written = export.export_run(run, target, version)
    typer.echo(f"version {written} is in {target}")
