"""The command line of `elastic`: every command and its options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from os.path import expanduser
from typing import Any, NoReturn

from configs import presets
from elastic import __version__, launch
from elastic.cli import measuring, showing, training

EXAMPLES = """examples:
  elastic distill --model smollm2-135m --target-compute 0.7
  elastic distill --resume runs/smollm2-135m-0.7
  elastic eval runs/smollm2-135m-0.7 --data my-text.txt
  elastic generate runs/smollm2-135m-0.7 --prompt "What is a transformer?" --stream
  elastic sweep --model smollm2-135m --target-compute 0.5 0.7 1.0 --output sweeps/smollm2
  elastic report sweeps/smollm2 -o report.html
  elastic bench --model llama3-8b --random-weights --target-compute 0.7
  elastic models
"""

BASELINES = ("random", "uniform", "static", "teal", "tome")
"""Values of --baselines: untrained ways to reduce compute, to compare students with."""
SHARED = ("distill", "eval", "sweep")
"""Commands whose work several processes share."""


class _Parser(argparse.ArgumentParser):
    """ArgumentParser that reports an error in one line, from the first process only."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as ArgumentParser does, but let the command report an unknown option, since its --help lists them, and
        report one in front of a missing command rather than that. Only a prompt may be empty, for its own message. What
        a list of values, such as of --compute, names twice counts once."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            from elastic.settings import near  # reads yaml, which takes time that --help does not need

            known = re.findall(r"--[a-z-]+", options.parser.format_usage())
            hint = near(unknown[0].partition("=")[0], known)
            options.parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        if options.parser is self:
            self.error("the following arguments are required: command")
        for name, value in vars(options).items():
            if name != "prompt" and "" in (value if isinstance(value, list) else [value]):
                option = "--" + name.replace("_", "-")
                positional = option not in options.parser.format_usage()
                options.parser.error(
                    "an argument is empty: name a folder" if positional else f"{option} is empty: leave it away"
                )
            if isinstance(value, list) and name != "set":  # of --set the last of two wins
                setattr(options, name, list(dict.fromkeys(value)))
        return options

    def error(self, message: str) -> NoReturn:
        launch.let_the_first_speak()
        message = "\\n".join(message.splitlines())
        if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            from elastic.settings import near

            message += near(choice[1], re.findall(r"[\w-]+", choice[2]))
        self.exit(2, f"elastic: error: {message} (see {self.prog} --help)\n" if launch.is_main() else None)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands with their options: one list, in the order of --help."""
    root = _Parser(
        prog="elastic",
        description="Make a pretrained transformer elastic: frozen weights, tiny routers, one dial for compute.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"elastic {__version__}")
    root.set_defaults(parser=root)
    commands = root.add_subparsers(metavar="command", title="commands")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.set_defaults(command=run, shared=name in SHARED, parser=sub)
        return sub

    distill = command(
        "distill", training.distill_command, "train routers for a model until it runs at the target compute"
    )
    distill.add_argument("--model", help="short name (see elastic models), hub id or local folder")
    distill.add_argument(
        "--target-compute",
        type=_target,
        metavar="C",
        help="student's compute over the teacher's (default 0.7), or LOW:HIGH for any",
    )
    distill.add_argument("--preset", help=f"one of {', '.join(presets())}")
    distill.add_argument(
        "--data",
        help="file, folder or hub data set of text, images or questions about images; or builtin (default for text), "
        "fashion-mnist, easy-vqa",
    )
    distill.add_argument("--output", type=expanduser, metavar="RUN", help="run folder (default runs/MODEL-C)")
    distill.add_argument("--steps", type=int, help="optimizer steps")
    distill.add_argument("--minutes", type=float, help="training time, instead of steps (default 10)")
    distill.add_argument("--config", type=expanduser, metavar="FILE", help="YAML file of settings")
    distill.add_argument("--set", action="append", metavar="A.B=C", help="one setting, such as train.lr=0.001")
    distill.add_argument(
        "--resume", type=expanduser, metavar="RUN", help="continue an interrupted run with its own configuration"
    )
    distill.add_argument("--overwrite", action="store_true", help="replace a run folder that exists")
    distill.add_argument(
        "--teacher-cache",
        type=expanduser,
        metavar="DIR",
        help="keep what the teacher makes of the training data here, for whichever runs name it too",
    )

    measure = command("eval", measuring.eval_command, "measure a finished run against its teacher")
    measure.add_argument("run", type=expanduser, metavar="RUN")
    measure.add_argument(
        "--data", help="as for distill: its held-out part, else all of it (default: what the run holds out)"
    )
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

    bench = command(
        "bench",
        measuring.bench_command,
        "time a finished run against the dense model: prefill, decoding, training step",
    )
    bench.add_argument("run", type=expanduser, metavar="RUN", nargs="?")
    bench.add_argument("--model", metavar="SHAPE", help="instead of a run: what a model of this shape would gain here")
    bench.add_argument("--random-weights", action="store_true", help="--model: build it from nothing; no download")
    bench.add_argument("--target-compute", type=_target, metavar="C", help="--model: as for distill (default 0.7)")
    bench.add_argument("--preset", help="--model: as for distill")
    bench.add_argument("--set", action="append", metavar="A.B=C", help="--model: as for distill")
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
    help = "passes that a median is taken of (default 5; fewer, at least 2, where these take longer than a minute)"
    bench.add_argument("--repeats", type=int, metavar="N", help=help)
    bench.add_argument("--lossless", action="store_true", help="time lossless decoding too (batch 1; see students)")
    bench.add_argument("--json", action="store_true", help="print one JSON object with rows")

    plan = command(
        "plan", measuring.plan_command, "estimate on paper what distilling a model of some shape would take on GPUs"
    )
    plan.add_argument("--model", metavar="SHAPE", required=True, help="of configs/shapes.yaml, or as for distill")
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="a process on each (default 1)")
    plan.add_argument("--memory", type=float, default=80, metavar="GB", help="of one GPU (default 80)")
    plan.add_argument("--tokens", type=float, metavar="T", help="of text to train a language model on (default 1e8)")
    plan.add_argument("--samples", type=float, metavar="N", help="images, or questions, to train on (default 1e6)")
    plan.add_argument("--peak", type=float, default=989, metavar="TFLOPS", help="of one GPU (default 989, an H100's)")
    plan.add_argument("--share", type=float, default=0.4, metavar="S", help="of that peak, as reached (default 0.4)")
    plan.add_argument("--preset", help="as for distill")
    plan.add_argument("--set", action="append", metavar="A.B=C", help="as for distill, such as train.batch=64")
    plan.add_argument("--json", action="store_true", help="print one JSON object")

    sweep = command(
        "sweep", training.sweep_command, "distil, measure and time models at many budgets into one folder, for a report"
    )
    sweep.add_argument("--model", nargs="+", required=True, metavar="M", help="as for distill")
    sweep.add_argument(
        "--target-compute",
        nargs="+",
        type=_budget,
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
    sweep.add_argument("--teacher-cache", type=expanduser, metavar="DIR", help="as for distill")
    sweep.add_argument("--no-bench", action="store_true", help="do not time anything")
    sweep.add_argument("--set", action="append", default=[], metavar="A.B=C", help="as for distill")
    sweep.add_argument(
        "--output", type=expanduser, required=True, metavar="DIR", help="sweep folder; what is finished there stays"
    )

    report = command(
        "report", showing.report_command, "write a page about sweeps: quality, speed, and where the compute went"
    )
    report.add_argument("folders", type=expanduser, nargs="+", metavar="DIR", help="sweep folders")
    report.add_argument(
        "-o",
        "--output",
        type=expanduser,
        default="report.html",
        metavar="FILE",
        help="the page; tables as .md and .csv and plots as .svg go beside it (default report.html)",
    )

    compare = command(
        "compare",
        measuring.compare_command,
        "compare the decisions of two finished runs of an image model, router by router",
    )
    compare.add_argument("run", type=expanduser, metavar="RUN")
    compare.add_argument("other", type=expanduser, metavar="RUN")
    compare.add_argument("--data", help="as for distill; all of it is used (default: the first run's held-out images)")
    compare.add_argument("--json", action="store_true", help="print one JSON object with rows")

    generate = command("generate", showing.generate_command, "continue a prompt with a finished run")
    generate.add_argument("run", type=expanduser, metavar="RUN")
    generate.add_argument("--prompt", required=True, help="text to continue; a question where the model chats")
    generate.add_argument(
        "--image", type=expanduser, metavar="FILE", help="image that a vision-language model is asked about"
    )
    generate.add_argument("--compute", type=float, metavar="C", help="turn the dial to this compute first")
    generate.add_argument("--max-new-tokens", type=int, metavar="N", help="stop after so many (default 128)")
    generate.add_argument(
        "--lossless", action="store_true", help="the student only drafts: the text is the dense model's, one sequence"
    )
    generate.add_argument("--stream", action="store_true", help="print words as they come")

    pretrain = command(
        "pretrain", training.pretrain_command, "train a small teacher from scratch, as the shipped ones were made"
    )
    pretrain.add_argument(
        "--data", required=True, help="small square images of one size, as for distill (an image model); or easy-vqa"
    )
    pretrain.add_argument(
        "--output",
        type=expanduser,
        metavar="FOLDER",
        required=True,
        help="where the model goes; after Ctrl-C the same command goes on",
    )
    pretrain.add_argument("--epochs", type=int, help="passes over the images (default 12)")
    pretrain.add_argument(
        "--start", type=expanduser, metavar="FOLDER", help="go on from an image model that this command wrote"
    )

    info = command("info", showing.info_command, "say what a run is")
    info.add_argument("run", type=expanduser, metavar="RUN")
    info.add_argument("--json", action="store_true", help="print one JSON object: all settings, results and origins")
    models = command("models", showing.models_command, "list the models that have a short name")
    models.add_argument("--json", action="store_true", help="print one JSON object with rows")
    return root


def _target(text: str) -> float | str:
    """Parse --target-compute: return a budget as a number, or a range LOW:HIGH as the text itself."""
    try:
        budgets = [float(part) for part in text.split(":")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; write a number such as 0.7, or a range such as 0.5:1.0") from None
    return text if len(budgets) > 1 else budgets[0]


def _budget(text: str) -> float:
    """Parse one of the budgets of a sweep."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; write numbers, such as 0.5 0.7 1.0, which share a run") from None
