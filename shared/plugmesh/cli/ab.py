"""`plugmesh ab`: plugins beside the same without them, and which go together."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plugmesh.cli.bench import Executor, HtmlFile, JsonFile, KvDtype, Model, Rounds, Seed, Threads

if TYPE_CHECKING:
    from plugmesh.ab.compare import Options
    from plugmesh.bench.systems import Setting


def ab(
    plugins: Annotated[list[str] | None, typer.Argument(help="Plugins to measure, one after another.")] = None,
    together: Annotated[str, typer.Option("--with", metavar="A,B,C", help="Measure these plugins as one combination.")] = "",
    measure_all: Annotated[bool, typer.Option("--all", help="Every installed plugin.")] = False,
    pairs: Annotated[bool, typer.Option("--pairs", help="Try which plugins go together instead of measuring; all installed ones, or those named.")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="PLUGIN.KEY=VALUE", help="A setting of a measured plugin; repeat for several.")] = None,
    only: Annotated[str, typer.Option("--only", help="Parts: speed, memory, quality; separated by commas. Output is compared in any case.")] = "",
    tier: Annotated[str, typer.Option("--tier", help="engine, served, or both separated by a comma; by default whatever the plugins touch.")] = "",
    workload: Annotated[list[str] | None, typer.Option("--workload", help="Only this workload; repeat for several.")] = None,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="Only this quality metric; repeat for several.")] = None,
    no_reference: Annotated[bool, typer.Option("--no-reference", help="Leave the slow float32 reference out.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write ab.json beside each card, and docs/leaderboard.md in a source tree.")] = False,
    model: Model = "smollm2", rounds: Rounds = 7, threads: Threads = 0, executor: Executor = "auto", kv_dtype: KvDtype = "bfloat16", seed: Seed = 0,
    json: JsonFile = None, html: HtmlFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny workloads, to see that everything runs; figures mean nothing.")] = False,
) -> None:  # fmt: skip
    """Speed, memory, quality and output with and without plugins, in turns on this machine.

    Exit status: 0 when everything was measured; 1 when something failed, or when output differs although a card says that it does not.
    """
    from plugmesh import cards
    from plugmesh.ab.compare import PARTS, TIERS, Options
    from plugmesh.cli.bench import setting
    from plugmesh.errors import InvalidRequest

    named = list(plugins or []) or (sorted(cards.installed()) if measure_all or pairs else [])
    if bool(named) == bool(together):
        raise InvalidRequest("name the plugins to measure, or --with a,b,c for a combination, or --all", param="plugins")
    if write and (quick or settings or together or only or tier or workload or metric):
        raise InvalidRequest("--write keeps full runs of single plugins with the settings of their cards; leave the options away that make it less", param="write")
    options = Options(
        num_rounds=rounds, seed=seed, is_quick=quick, parts=_choice(only, PARTS, "only"), tiers=_choice(tier, TIERS, "tier"), metrics=tuple(metric or ()),
        workloads=tuple(workload or ()), reference=not no_reference,
    )  # fmt: skip
    with setting(model, threads, executor, kv_dtype) as s:
        if pairs:
            raise typer.Exit(_pairs(named, s, write=write, quick=quick, json=json))
        subjects = [together.split(",")] if together else [[slug] for slug in named]
        raise typer.Exit(_measure(subjects, s, options, list(settings or []), write=write, json=json, html=html))


def _choice(text: str, known: Sequence[str], name: str) -> tuple[str, ...]:
    from plugmesh.errors import InvalidRequest

    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    for part in chosen:
        if part not in known:
            raise InvalidRequest(f"--{name} {part}: there are {', '.join(known)}", param=name)
    return chosen or tuple(known)


def _measure(
    subjects: Sequence[Sequence[str]], setting: Setting, options: Options, settings: Sequence[str], *, write: bool, json: pathlib.Path | None,
    html: pathlib.Path | None,
) -> int:  # fmt: skip
    from plugmesh.ab import leaderboard
    from plugmesh.ab.compare import run
    from plugmesh.ab.page import page
    from plugmesh.ab.sides import folder_of, subject_of
    from plugmesh.ab.table import print_report
    from plugmesh.cli import output
    from plugmesh.cli.bench import progress
    from plugmesh.errors import ConfigError

    status = 0
    reports: list[dict[str, Any]] = []
    chosen = [subject_of(slugs, [s for s in settings if s.split(".")[0] in slugs]) for slugs in subjects]
    for subject in chosen:
        try:
            with progress() as told:
                report = run(subject, setting, options, told)
        except ConfigError as e:
            if len(chosen) == 1:
                raise
            output.print_error(e.message)
            status = 1
            continue
        reports.append(report)
        print_report(output.err if str(json) == "-" else output.out, report)
        if report["failures"] or not report["holds"]:
            status = 1
        if write:
            path = leaderboard.write_report(report, folder_of(subject.slugs[0]))
            output.err.print(f"written: {path}", markup=False, soft_wrap=True)
        if html is not None:
            file = html if len(chosen) == 1 else html.with_stem(f"{html.stem}-{subject.name}")
            file.write_text(page(report), encoding="utf-8")
    _write_json(reports[0] if len(chosen) == 1 and reports else reports, json)
    if write:
        write_leaderboard()
    return status


def _pairs(slugs: Sequence[str], setting: Setting, *, write: bool, quick: bool, json: pathlib.Path | None) -> int:
    from plugmesh import cards
    from plugmesh.ab.leaderboard import MARKS, PAIRS_FILE, dumps
    from plugmesh.ab.pairs import run_pairs
    from plugmesh.cli import output
    from plugmesh.cli.bench import progress

    with progress() as told:
        found = run_pairs([cards.read(slug, where="plugmesh ab") for slug in slugs], setting, is_quick=quick, progress=told)
    console = output.err if str(json) == "-" else output.out
    for pair in found["pairs"]:
        mark = MARKS[pair["state"]].replace("*", "")
        console.print(f"{pair['a']} with {pair['b']}: {mark}" + (f": {pair['reason']}" if pair["reason"] else ""), markup=False, soft_wrap=True)
    _write_json(found, json)
    root = source_tree()
    if write and root is not None:
        (root / "docs" / "measurements" / PAIRS_FILE).write_text(dumps(found), encoding="utf-8")
        write_leaderboard()
    return 1 if any(p["state"] in ("differs", "fails") for p in found["pairs"]) else 0


def _write_json(value: Mapping[str, Any] | Sequence[Any], json: pathlib.Path | None) -> None:
    import json as codec

    from plugmesh.ab.leaderboard import plain
    from plugmesh.cli import output

    if json is not None and str(json) == "-":
        output.print_json(plain(value))
    elif json is not None:
        json.write_text(codec.dumps(plain(value), indent=1) + "\n", encoding="utf-8")


def source_tree() -> pathlib.Path | None:
    """The checkout that this package is imported from; None for an installed one."""
    root = pathlib.Path(__file__).resolve().parents[3]
    return root if (root / "plugins").is_dir() and (root / "docs").is_dir() else None


def write_leaderboard() -> pathlib.Path | None:
    """docs/leaderboard.md from what lies beside the cards; None outside of a source tree."""
    import json

    from plugmesh.ab import leaderboard

    root = source_tree()
    if root is None:
        return None
    reports = [r for folder in sorted((root / "plugins").glob("plugmesh_*")) if (r := leaderboard.read(folder))]
    pairs = root / "docs" / "measurements" / leaderboard.PAIRS_FILE
    path = root / "docs" / "leaderboard.md"
    path.write_text(leaderboard.page(reports, json.loads(pairs.read_text()) if pairs.is_file() else None), encoding="utf-8")
    return path
