"""Every command with its arguments. Light on purpose: `plugmesh --help` imports neither grpc nor NATS nor torch."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from plugmesh.cli.ab import ab
from plugmesh.cli.bench import bench_app
from plugmesh.cli.rl import rl_app

app = typer.Typer(
    name="plugmesh",
    help="A plugin-based microservice mesh that serves language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # errors of ours are one line; a traceback of ours should look like one
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys_app = typer.Typer(help="API keys of the gateway.", no_args_is_help=True)
app.add_typer(keys_app, name="keys", rich_help_panel="Prepare")
app.add_typer(bench_app, name="bench", rich_help_panel="Measure")
app.add_typer(rl_app, name="rl", rich_help_panel="Train")
app.command("ab", rich_help_panel="Measure")(ab)

Config = Annotated[pathlib.Path | None, typer.Option("--config", "-c", help="Configuration file (default: ./mesh.toml where there is one).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
Nats = Annotated[str, typer.Option("--nats", metavar="URL", help="Join the broker at this URL instead of starting one.")]
MeshName = Annotated[str | None, typer.Option("--mesh", help="Name of the mesh, where several run.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Known name, or path of a model file.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, max=2, help="0 always takes the likeliest token.")]
System = Annotated[str | None, typer.Option("--system", "-s", help="System message.")]
Seed = Annotated[int | None, typer.Option(help="Makes a sampled answer repeatable.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="PLUGMESH_API_KEY", help="When the gateway wants one.")]


@app.command(rich_help_panel="Serve")
def up(
    port: Annotated[int | None, typer.Option("--port", "-p", min=0, max=65535, help="HTTP port of the gateway; 0 takes a free one.")] = None,
    config: Config = None,
    nats: Nats = "",
    model: Model = None,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of a live display.")] = False,
    ready_timeout_s: Annotated[float, typer.Option("--ready-timeout", min=1, help="Seconds to wait until everything serves.")] = 120.0,
) -> None:
    """Start a mesh on this machine: broker, services, gateway. Ctrl-C drains and stops it."""
    from plugmesh.cli.up import run_up

    raise typer.Exit(run_up(port=port, config=config, nats=nats, model=model, plain=plain, ready_timeout_s=ready_timeout_s))


@app.command(rich_help_panel="Serve")
def serve(
    service: Annotated[str, typer.Argument(help="gateway, tokenizer, grammar, weightstore, prefill, decode or kvstore.")],
    config: Config = None,
    nats: Nats = "",
    mesh: MeshName = None,
) -> None:
    """Run one service in the foreground; it joins the mesh that runs here, or the broker at --nats."""
    from plugmesh.cli.serve import run_serve

    run_serve(service, config=config, nats=nats, mesh=mesh)


@app.command(rich_help_panel="Serve")
def status(json: Json = False, mesh: MeshName = None, config: Config = None, nats: Nats = "") -> None:
    """Show the mesh that runs here as it is: instances, roles, load, plugins, versions."""
    from plugmesh.cli.status import run_status

    raise typer.Exit(run_status(as_json=json, mesh=mesh, config=config, nats=nats))


@app.command(rich_help_panel="Ask")
def run(
    prompt: Annotated[str, typer.Argument(help="What to ask; '-' reads it from standard input.")],
    model: Model = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    system: System = None,
    seed: Seed = None,
    config: Config = None,
    mesh: MeshName = None,
    api_key: ApiKey = None,
) -> None:
    """Answer one prompt. Uses the mesh that runs here, or starts one and stops it afterwards."""
    from plugmesh.cli.ask import run_once

    raise typer.Exit(
        run_once(
            prompt, model=model, max_tokens=max_tokens, temperature=temperature, system=system, seed=seed, config=config, mesh=mesh,
            api_key=api_key,
        )
    )  # fmt: skip


@app.command(rich_help_panel="Ask")
def chat(
    model: Model = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    system: System = None,
    seed: Seed = None,
    config: Config = None,
    mesh: MeshName = None,
    api_key: ApiKey = None,
) -> None:
    """Talk with the model. /reset starts anew, /quit or Ctrl-D ends."""
    from plugmesh.cli.ask import run_chat

    raise typer.Exit(
        run_chat(model=model, max_tokens=max_tokens, temperature=temperature, system=system, seed=seed, config=config, mesh=mesh, api_key=api_key)
    )


@app.command(rich_help_panel="Prepare")
def pull(
    model: Annotated[str, typer.Argument(help="Known name (smollm2), path, or hf:owner/repository.")] = "smollm2",
    config: Config = None,
    json: Json = False,
) -> None:
    """Fetch a model's file into the cache."""
    from plugmesh.cli.pull import run_pull

    run_pull(model, config=config, as_json=json)


@app.command(rich_help_panel="Prepare")
def doctor(json: Json = False, config: Config = None) -> None:
    """Say what this machine has and what that means."""
    from plugmesh.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(as_json=json, config=config))


@app.command(rich_help_panel="Prepare")
def plugins(
    slug: Annotated[str, typer.Argument(metavar="[PLUGIN]", help="Show this one's card in full.", show_default=False)] = "",
    json: Json = False,
    config: Config = None,
    render: Annotated[bool, typer.Option("--render", help="Write the facts of every card into the README beside it.")] = False,
) -> None:
    """List the plugins that are installed, and which services the configuration switches them on in."""
    from plugmesh.cli.plugins import run_plugins, run_render

    if render:
        for page in run_render():
            typer.echo(page)
        return
    run_plugins(slug, as_json=json, config=config)


@app.command("new-plugin", rich_help_panel="Prepare")
def new_plugin(
    slug: Annotated[str, typer.Argument(help="Name of the plugin: small letters, digits, underscores.")],
    kind: Annotated[str, typer.Option("--kind", "-k", help="What it does: scheduler, draft, router, ...; a wrong one lists all.")],
    out: Annotated[pathlib.Path | None, typer.Option("--out", help="Folder to put it in (default: plugins/ of this checkout, else here).")] = None,
    distribution: Annotated[bool | None, typer.Option("--distribution/--package", help="With a pyproject.toml of its own, or the package alone.")] = None,
) -> None:
    """Write a new plugin that works and passes its tests, to be changed into something of use."""
    from plugmesh.cli.new_plugin import run_new_plugin

    run_new_plugin(slug, kind=kind, out=out, distribution=distribution)


@keys_app.command("new")
def keys_new(
    name: Annotated[str, typer.Argument(help="Whose key it is; appears in logs.")],
    scopes: Annotated[list[str] | None, typer.Option("--scope", help="inference, models, metrics or docs; repeat for several.")] = None,
    config: Config = None,
    file: Annotated[pathlib.Path | None, typer.Option("--file", help="Keys file (default: services.gateway.keys_file).")] = None,
) -> None:
    """Make an API key, store its hash and print the key once."""
    from plugmesh.cli.keys import run_new

    run_new(name, scopes=tuple(scopes or ()), config=config, file=file)


@app.command(rich_help_panel="Prepare")
def version() -> None:
    """Print the version."""
    from plugmesh import __version__

    typer.echo(__version__)
