"""The command `elastic`. Heavy libraries are imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = """examples:
  elastic distill --model smollm2-135m --target-compute 0.7
  elastic distill --resume runs/smollm2-135m-0.7
  elastic eval runs/smollm2-135m-0.7 --data my-text.txt
  elastic generate runs/smollm2-135m-0.7 --prompt "What is a transformer?" --stream
  elastic sweep --model smollm2-135m --target-compute 0.5 0.7 1.0 --output sweeps/smollm2
  elastic report sweeps/smollm2 -o report.html
  elastic models
"""

QUIET_SECONDS = 20
"""Where no bar can be drawn, a long loop says so often how far it is."""
BASELINES = ("random", "uniform", "static", "teal", "tome")
"""What can be measured beside a student."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a mistake that one line can explain, 130 for Ctrl-C.

    141 where whoever reads the output closed the pipe.
    """
    options = _parser().parse_args(arguments)
    options.line = ["elastic", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        options.command(options)
        return 0
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        # whatever a user can mend is raised as one of these two, with one line that says how
        if os.environ.get("ELASTIC_TRACEBACK"):
            raise
        line = next((part.strip() for part in str(error).splitlines() if part.strip()), type(error).__name__)
        print(f"elastic: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"elastic: {str(interruption) or 'interrupted'}", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"elastic: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="elastic",
        description="Make a pretrained transformer elastic: frozen weights, tiny routers, one dial for compute.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command", title="commands")

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.set_defaults(command=run)
        return sub

    distill = command("distill", _distill, "train routers for a model until it runs at the target compute")
    distill.add_argument("--model", help="short name (see elastic models), hub id or local folder")
    distill.add_argument(
        "--target-compute",
        type=_target,
        metavar="C",
        help="student's compute over the teacher's (default 0.7), or LOW:HIGH for any",
    )
    distill.add_argument("--preset", help="default, elastiformer, router-tuning, mixture-of-depths or static")
    distill.add_argument("--data", help="text, JSON-lines or parquet file or folder, hub dataset id, or builtin")
    distill.add_argument("--output", metavar="RUN", help="run folder (default runs/MODEL-C)")
    distill.add_argument("--steps", type=int, help="optimizer steps")
    distill.add_argument("--minutes", type=float, help="training time, instead of steps (default 10)")
    distill.add_argument("--config", metavar="FILE", help="YAML file of settings")
    distill.add_argument("--set", action="append", metavar="A.B=C", help="one setting, such as train.lr=0.001")
    distill.add_argument("--resume", metavar="RUN", help="continue an interrupted run with its own configuration")
    distill.add_argument("--overwrite", action="store_true", help="replace a run folder that exists")

    measure = command("eval", _eval, "measure a finished run against its teacher")
    measure.add_argument("run", metavar="RUN")
    measure.add_argument("--data", help="as for distill; all of it is measured (default: the run's held-out windows)")
    measure.add_argument(
        "--compute", type=float, nargs="+", metavar="C", default=[], help="turn the dial to each of these"
    )
    measure.add_argument(
        "--baselines",
        nargs="+",
        default=[],
        metavar="B",
        choices=BASELINES,
        help="also measure these at the same compute: random, uniform; text: static, teal; images: tome (merging)",
    )
    measure.add_argument(
        "--tasks",
        metavar="T,T",
        help="zero-shot accuracy on these instead: names of lm-evaluation-harness, files of questions (JSON lines)",
    )
    measure.add_argument("--limit", type=int, metavar="N", help="--tasks: so many questions of each only")
    measure.add_argument("--json", action="store_true", help="print one JSON object with rows")

    bench = command("bench", _bench, "time a finished run against the dense model: prefill, decoding, training step")
    bench.add_argument("run", metavar="RUN")
    bench.add_argument(
        "--compute", type=float, nargs="+", metavar="C", default=[], help="turn the dial to each of these"
    )
    bench.add_argument(
        "--batch",
        type=int,
        nargs="+",
        metavar="B",
        help="inputs at once (default 1; images: 1 8 64; questions: 1 8)",
    )
    bench.add_argument("--tokens", type=int, nargs="+", metavar="T", help="prompt lengths of text (default 512)")
    bench.add_argument("--new-tokens", type=int, metavar="N", help="tokens of text to decode (default 128)")
    bench.add_argument("--repeats", type=int, default=5, help="runs that a median is taken of (default 5)")
    bench.add_argument("--json", action="store_true", help="print one JSON object with rows")

    sweep = command("sweep", _sweep, "distil, measure and time models at many budgets into one folder, for a report")
    sweep.add_argument("--model", nargs="+", required=True, metavar="M", help="as for distill")
    sweep.add_argument(
        "--target-compute",
        nargs="+",
        type=float,
        required=True,
        metavar="C",
        help="budgets, up to 1.0; a single one below 1 is trained for alone, several share a run",
    )
    sweep.add_argument("--preset", nargs="+", default=["default"], metavar="P", help="as for distill")
    sweep.add_argument("--seed", nargs="+", type=int, default=[0], metavar="S", help="one run each (default 0)")
    sweep.add_argument(
        "--per-budget", action="store_true", help="a run for each budget, instead of one that serves them all"
    )
    sweep.add_argument("--baselines", nargs="+", default=[], metavar="B", choices=BASELINES, help="as for eval")
    sweep.add_argument("--data", help="what to train on, as for distill")
    sweep.add_argument("--eval-data", metavar="DATA", help="what to measure on (default: each run's held-out data)")
    sweep.add_argument("--steps", type=int, help="optimizer steps of each run")
    sweep.add_argument("--minutes", type=float, help="training time of each run, instead of steps (default 10)")
    sweep.add_argument("--no-bench", action="store_true", help="do not time anything")
    sweep.add_argument("--set", action="append", default=[], metavar="A.B=C", help="as for distill")
    sweep.add_argument("--output", required=True, metavar="DIR", help="sweep folder; what is finished there stays")

    report = command("report", _report, "write a page about sweeps: quality, speed, and where the compute went")
    report.add_argument("folders", nargs="+", metavar="DIR", help="sweep folders")
    report.add_argument(
        "-o",
        "--output",
        default="report.html",
        metavar="FILE",
        help="the page; tables as .md and .csv and plots as .svg go beside it (default report.html)",
    )

    compare = command("compare", _compare, "say how alike the routers of two finished runs of an image model decide")
    compare.add_argument("run", metavar="RUN")
    compare.add_argument("other", metavar="RUN")
    compare.add_argument("--data", help="as for distill; all of it is used (default: the first run's held-out images)")
    compare.add_argument("--json", action="store_true", help="print one JSON object with rows")

    generate = command("generate", _generate, "continue a prompt with a finished run")
    generate.add_argument("run", metavar="RUN")
    generate.add_argument("--prompt", required=True, help="text to continue; a question where the model chats")
    generate.add_argument("--image", metavar="FILE", help="image that a vision-language model is asked about")
    generate.add_argument("--compute", type=float, metavar="C", help="turn the dial to this compute first")
    generate.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="stop after so many (default 128)"
    )
    generate.add_argument("--stream", action="store_true", help="print words as they come")

    pretrain = command("pretrain", _pretrain, "train a small teacher from scratch, as the shipped ones were made")
    pretrain.add_argument(
        "--data", required=True, help="small square images of one size, as for distill (an image model); or easy-vqa"
    )
    pretrain.add_argument(
        "--output", metavar="FOLDER", required=True, help="where the model goes; after Ctrl-C the same command goes on"
    )
    pretrain.add_argument("--epochs", type=int, help="passes over the images (default 12)")
    pretrain.add_argument("--start", metavar="FOLDER", help="go on from an image model that this command wrote")

    info = command("info", _info, "say what a run is")
    info.add_argument("run", metavar="RUN")
    models = command("models", _models, "list the models that have a short name")
    models.add_argument("--json", action="store_true", help="print one JSON object with rows")
    return parser


def _target(text: str) -> float | str:
    """A budget, or a range as it is written: LOW:HIGH."""
    try:
        budgets = [float(part) for part in text.split(":")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; write a number such as 0.7, or a range such as 0.5:1.0") from None
    return text if len(budgets) > 1 else budgets[0]


def _distill(options: argparse.Namespace) -> None:
    if options.resume:
        given = [
            name
            for name in ("model", "target_compute", "preset", "data", "output", "steps", "minutes", "config", "set")
            if getattr(options, name) is not None
        ]
        if given or options.overwrite:
            extra = ", ".join("--" + name.replace("_", "-") for name in given) or "--overwrite"
            raise ValueError(f"--resume continues with the run's own configuration: leave {extra} away")
    from elastic.config import make_config

    if not options.resume:
        if options.steps is not None and options.minutes is not None:
            raise ValueError("give --steps or --minutes, not both")
        config = make_config(
            file=options.config,
            settings=options.set,
            model=options.model,
            preset=options.preset,
            budget__target=options.target_compute,
            data__source=options.data,
            train__steps=options.steps,
            train__minutes=options.minutes,
        )
        name = os.path.basename(os.path.normpath(config.model))
        output = options.output or f"runs/{name}-{'-'.join(f'{end:g}' for end in sorted(set(config.budget.span)))}"
    from elastic import trainer
    from elastic.run import Run

    with _screen() as (say, progress):
        if options.resume:
            trainer.resume(options.resume, say=say, progress=progress)
        else:
            trainer.distill(config, output, overwrite=options.overwrite, say=say, progress=progress)
    folder = options.resume or output
    _print_rows(Run.open(folder).about["results"])
    print(f"student: {folder}   measure it elsewhere: elastic eval {folder} --data FILE")


def _eval(options: argparse.Namespace) -> None:
    if options.tasks is not None:
        return _eval_tasks(options)
    if options.limit is not None:
        raise ValueError("--limit is for --tasks: leave it away")
    from elastic.evaluate import measure_run

    with _screen() as (say, _):
        rows = measure_run(
            options.run, data=options.data, compute=options.compute, baselines=options.baselines, say=say
        )
    if options.json:
        print(json.dumps({"rows": rows}))
    else:
        _print_rows(rows)


def _eval_tasks(options: argparse.Namespace) -> None:
    if options.data or options.baselines:
        raise ValueError(
            "--tasks brings its own data and measures teacher and student: leave --data and --baselines away"
        )
    if options.limit is not None and options.limit < 1:
        raise ValueError("--limit must be at least 1")
    if find_spec("lm_eval") is None:
        raise ValueError("--tasks needs lm-evaluation-harness: pip install 'elastic-distill[tasks]'")
    from elastic.tasks import score_run

    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    with _screen() as (say, _):
        rows = score_run(options.run, names, compute=options.compute, limit=options.limit, say=say)
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    from rich.console import Console
    from rich.table import Table

    def accuracy(row: dict[str, Any], key: str) -> str:
        error = f" ± {row[f'{key}_stderr']:.2%}" if f"{key}_stderr" in row else ""
        return f"{row[key]:.2%}{error}" if key in row else ""

    table = Table("task", "examples", "asked", "decode", "prefill", "agreement")
    columns = "accuracy", "teacher_accuracy", "accuracy_norm", "teacher_accuracy_norm"
    for key in columns:
        table.add_column(key.replace("_", " "))
    for r in rows:
        spent = (f"{r[key]:.3f}" for key in ("compute_target", "compute", "compute_prefill"))
        numbers = f"{r['examples']:,}", *spent, f"{r['agreement']:.2%}"
        table.add_row(r["task"], *numbers, *(accuracy(r, key) for key in columns))
    Console(width=160).print(table)


def _bench(options: argparse.Namespace) -> None:
    from elastic.bench import bench_run

    for name in ("batch", "tokens", "repeats"):
        given = getattr(options, name)
        if given is not None and min(given if isinstance(given, list) else [given]) < 1:
            raise ValueError(f"--{name} must be at least 1")
    if options.new_tokens is not None and options.new_tokens < 2:
        raise ValueError("--new-tokens must be at least 2: the first one is not timed")
    with _screen() as (say, _):
        rows = bench_run(
            options.run,
            compute=options.compute,
            batch=options.batch,
            tokens=options.tokens,
            new_tokens=options.new_tokens,
            repeats=options.repeats,
            say=say,
        )
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    from rich.console import Console
    from rich.table import Table

    def speed(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}x"

    table = Table(
        "phase", "batch", "tokens", "compute", "predicted", "by bytes", "measured", "efficiency", "tuned", "ms"
    )
    table.add_column("dense ms")
    table.add_column("cache MB")
    table.add_column("dense MB")
    table.add_column("peak GB")
    table.add_column("dense GB")
    for r in rows:
        caches = (f"{r[k] / 1e6:.2f}" if k in r else "" for k in ("cache_bytes", "dense_cache_bytes"))
        speeds = (speed(r.get(k)) for k in ("predicted_speedup", "predicted_speedup_bytes", "measured_speedup"))
        numbers = f"{r['batch']}", f"{r['tokens']}", f"{r['compute']:.3f}", *speeds, f"{r['efficiency']:.2f}"
        times = (f"{1000 * r[k]:,.1f}" for k in ("seconds", "dense_seconds"))
        peaks = (f"{r[k] / 1e9:.2f}" for k in ("peak_bytes", "dense_peak_bytes"))
        table.add_row(r["phase"], *numbers, speed(r.get("tuned_speedup")), *times, *caches, *peaks)
    Console(width=160).print(table)
    train = rows[-1]
    print(
        f"{train['threads']} threads, {train['dtype']}; dense: the model as its library ships it (training: a teacher "
        f"forward; a step costs {train['teacher_forwards']:.2f} of them, ideal {train['ideal_teacher_forwards']:.2f})\n"
        f"peak: memory in use while the one or the other ran, both loaded; weights {train['weight_bytes'] / 1e9:.2f} GB"
    )


def _sweep(options: argparse.Namespace) -> None:
    import shlex

    from elastic.sweep import sweep

    if options.steps is not None and options.minutes is not None:
        raise ValueError("give --steps or --minutes, not both")
    with _screen() as (say, progress):
        rows = sweep(
            options.output,
            models=options.model,
            budgets=options.target_compute,
            presets=options.preset,
            seeds=options.seed,
            baselines=options.baselines,
            per_budget=options.per_budget,
            eval_data=options.eval_data,
            timed=not options.no_bench,
            command=shlex.join(options.line),
            say=say,
            progress=progress,
            settings=options.set,
            data__source=options.data,
            train__steps=options.steps,
            train__minutes=options.minutes,
        )
    from rich.console import Console
    from rich.table import Table

    keys = list(dict.fromkeys(key for row in rows for key, _, _ in row["metrics"]))
    table = Table("model", "preset", "seed", "asked", "compute", *(key.replace("_", " ") for key in keys))
    for row in rows:
        name = row["preset"] if row["baseline"] is None else f"{row['baseline']} (baseline of {row['preset']})"
        numbers = (f"{row['compute_target']:.3f}", f"{row['compute']:.3f}")
        table.add_row(
            row["model"], name, str(row["seed"]), *numbers, *(f"{row[k]:.4f}" if k in row else "" for k in keys)
        )
    Console().print(table)
    print(f"{len(rows)} points: {options.output}   a page about them: elastic report {options.output} -o report.html")


def _report(options: argparse.Namespace) -> None:
    from elastic.report import report

    for path in report(options.folders, options.output):
        print(path)


def _compare(options: argparse.Namespace) -> None:
    from elastic.evaluate import compare_runs

    rows = compare_runs(options.run, options.other, data=options.data)
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("router", "rank correlation of scores")
    for row in rows:
        table.add_row(row["router"], f"{row['correlation']:.3f}")
    Console().print(table)


def _generate(options: argparse.Namespace) -> None:
    from elastic.generate import generate_text

    if options.max_new_tokens < 1:
        raise ValueError("--max-new-tokens must be at least 1")

    def write(text: str) -> None:
        print(text, end="", flush=True)

    with _screen() as (say, _):
        result = generate_text(
            options.run,
            options.prompt,
            image=options.image,
            compute=options.compute,
            max_new_tokens=options.max_new_tokens,
            stream=write if options.stream else None,
        )
        print("" if options.stream else result["text"])
        say(f"{result['tokens']} tokens, {result['tokens_per_second']:.1f} tokens/s, compute {result['compute']:.3f}")


def _pretrain(options: argparse.Namespace) -> None:
    from teachers.questions import EASY_VQA
    from teachers.recipe import pretrain
    from teachers.vlm_recipe import pretrain_vlm

    if options.epochs is not None and options.epochs < 1:
        raise ValueError("--epochs must be at least 1")
    with _screen() as (say, _):
        if options.data == EASY_VQA:
            for option in ("epochs", "start"):
                if getattr(options, option) is not None:
                    raise ValueError(f"--{option} is for image models: leave it away with --data {EASY_VQA}")
            train, name = functools.partial(pretrain_vlm, options.output), "accuracy"
        else:
            epochs, start = options.epochs or 12, options.start
            train, name = functools.partial(pretrain, options.data, options.output, epochs=epochs, start=start), "top-1"
        try:
            accuracy = train(say=say)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on from here") from None
    print(f"{name} {accuracy:.2%}; use it: elastic distill --model {options.output} --data {options.data}")


def _info(options: argparse.Namespace) -> None:
    import yaml

    from elastic.config import to_dict
    from elastic.run import Run

    run = Run.open(options.run)
    print(yaml.safe_dump({"run": str(run.folder), **run.about, "config": to_dict(run.config)}, sort_keys=False), end="")


def _models(options: argparse.Namespace) -> None:
    from teachers.registry import models

    entries = models().values()
    if options.json:
        rows = [{"name": e.name, "hub": e.hub, "parameters": e.parameters, "license": e.license} for e in entries]
        print(json.dumps({"rows": rows}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "hub id", "parameters", "license", "note", box=None, pad_edge=False)
    for entry in entries:
        table.add_row(entry.name, entry.hub or "(shipped)", _count(entry.parameters), entry.license, entry.note)
    Console(width=160).print(table)  # names are for copying: none is cut to fit a narrow terminal
    print("Any other hub id or local folder of a supported architecture works too.")


@contextmanager
def _screen() -> Iterator[tuple[Callable[[str], None], Callable[..., None]]]:
    """(say, progress): lines and a progress bar on stderr, so that stdout holds results only."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from elastic.progress import watched_by

    # the harness is kept from writing to stderr while it asks; this is not
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=None, visible=False)
        loop = bar.add_task("this part", total=None, visible=False)
        times = [0.0, 0.0]  # when the loop began, when it was last reported

        def progress(step: int, steps: int | None, line: dict[str, float]) -> None:
            phases = [key.removeprefix("compute_") for key in line if key.startswith("compute_")]
            spent = ", ".join(f"{line[f'compute_{p}']:.3f}" + f" {p}" * (len(phases) > 1) for p in phases)
            bar.update(task, completed=step, total=steps, visible=steps is None or step < steps)
            if not console.is_terminal or step % 50 == 0 or step == steps:
                left = "" if steps is None else f", {(steps - step) / line['steps_per_second'] / 60:.1f} min left"
                console.print(f"step {step}/{steps or '?'}: KL {line['kl']:.4f}, compute {spent}{left}")

        def watch(done: int, total: int) -> None:
            now = time.monotonic()
            bar.update(loop, completed=done, visible=done < total)
            if done == 0:
                bar.reset(loop, total=total)
                times[:] = now, now
            elif not console.is_terminal and done < total and now - times[1] > QUIET_SECONDS:
                times[1] = now
                left = (now - times[0]) / done * (total - done) / 60
                console.print(f"{done} of {total} done, {left:.1f} min left")

        with watched_by(watch):
            yield console.print, progress


def _print_rows(rows: list[dict[str, Any]]) -> None:
    """The table at the end of a run: one line a quantity, one column a row."""
    from rich.console import Console
    from rich.table import Table

    from elastic import families

    lines: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("model, preset", lambda r: f"{r['model']}, {r['preset']}"),
        *families.of(rows[0]["family"]).lines(),
        ("trainable parameters", lambda r: f"{r['trainable_parameters']:,} ({r['trainable_share']:.3%})"),
        ("checkpoint", lambda r: f"{r['checkpoint_bytes'] / 1e6:.2f} MB"),
    ]
    table = Table(show_header=False)
    for name, show in lines:
        table.add_row(name, *(show(row) for row in rows))
    Console(soft_wrap=True).print(table)


def _count(number: float) -> str:
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.0f} M"


if __name__ == "__main__":
    sys.exit(main())
