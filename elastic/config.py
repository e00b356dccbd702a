"""The configuration of a run, as frozen dataclasses whose attribute docstrings explain every setting.

`make_config` fills them from, in ascending priority: the defaults below, the preset, the configuration file, and the
command line. An unknown key is an error, and so are settings that would have no effect.

A preset or file may have the sections `prefill`, `vit` and `vlm`. Each is merged over the rest of its file where it
applies, because other routers save compute there: `prefill` if budget.phase is prefill (many tokens at once instead of
one at a time), `vit` for image models, `vlm` for vision-language models.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from configs import presets
from elastic.settings import from_dict, merge, near, parse_yaml, put, read_yaml, section_of
from elastic.sources import NAMED_DATA, require_data
from elastic.traits import SETTINGS, TRAITS
from students.spec import RouterSpec, StudentSpec
from teachers.data.questions import may_ask_about_images
from teachers.registry import ModelEntry, models, resolve

SECTIONS = ("prefill", *(traits.section for traits in TRAITS.values() if traits.section))
"""Sections of a preset or file that are used only for one phase or one family of models."""


@dataclass(frozen=True)
class BudgetConfig:
    """How much compute the student may use, and how training keeps to it."""

    target: float | str = 0.7
    """FLOPs of the student divided by FLOPs of the teacher, for the whole model with the routers' own cost: above 0, at
    most 1. A range "LOW:HIGH" trains one student that is set to any compute within it (`student.set_compute`)."""
    phase: Literal["decode", "prefill"] = "decode"
    """The phase whose compute is limited. decode: one token at a time, where every kind of router saves. prefill: all
    tokens of a window or image at once, where only token, layer and image routers, and decisions that hold for a
    whole sequence, save. Image and vision-language models always use prefill."""
    control: Literal["price", "capacity"] = "price"
    """How training reaches the target. price: the loss includes price * compute, with a price that rises while the
    budget is exceeded (augmented Lagrangian), so that routers learn where to save. capacity: all routers get the same
    share of open gates, the one that meets the target; top-k routers keep exactly this share, and a hinge loss
    penalises routers with a threshold for exceeding it."""
    stiffness: float = 20.0
    """control: price. How strongly the price (nats per unit of compute) answers to a miss, compute - target: the next
    step's price is higher by stiffness * miss, and 1/20 of that stays. For a range of budgets each price is multiplied
    by exp(stiffness / 20 * miss) instead. Higher values correct a miss faster."""
    hinge: float = 1.0
    """control: capacity. Weight of the hinge loss max(0, share of open gates - capacity) (arXiv 2410.13184)."""

    def __post_init__(self) -> None:
        if self.stiffness < 0 or self.hinge < 0:
            raise ValueError(f"budget.stiffness ({self.stiffness}) and budget.hinge ({self.hinge}) cannot be negative")
        try:
            low, high = self.span
        except ValueError:
            raise ValueError(
                f"--target-compute is {self.target!r}; write a number such as 0.7, or a range such as 0.5:1.0"
            ) from None
        if not 0 < low <= high <= 1 or (self.ranges and low == high):
            raise ValueError(
                f"--target-compute is {self.target}; it must be above 0 and at most 1 (0.7 means 70 %)"
                + ", the lower end of a range first (0.5:1.0)" * self.ranges
            )
        if self.ranges and self.control == "capacity":
            raise ValueError(
                f"--target-compute is {self.target}, but budget.control=capacity keeps one share of all gates open: a "
                "range needs budget.control=price, such as --preset default has"
            )

    @property
    def ranges(self) -> bool:
        """Whether the target is a range "LOW:HIGH"."""
        return isinstance(self.target, str)

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest budget, equal if the target is a single number."""
        if not isinstance(self.target, str):
            return self.target, self.target
        low, high = self.target.split(":")
        return float(low), float(high)

    @property
    def measured(self) -> tuple[float | None, ...]:
        """The budgets at which a finished run is measured: low end, middle and high end of a range, or for a single
        target (None,), which leaves the dial where training set it."""
        low, high = self.span
        return (low, (low + high) / 2, high) if self.ranges else (None,)


@dataclass(frozen=True)
class DataConfig:
    """The data to train on and to measure on."""

    source: str = "builtin"
    """Where the data comes from.

    - Text: a text, JSON-lines or parquet file, a folder of these, a hub dataset id, or builtin.
    - Images: a folder with train/ and val/ or class sub-folders, parquet files, a hub dataset id, or fashion-mnist.
    - Questions about images: a JSON-lines, JSON or parquet file or folder, a hub dataset id, or easy-vqa.
    """
    window: int = 512
    """Text: tokens in a window, the unit in which text is held out, calibrated on and measured on; a multiple of
    train.window, and at most the model's own maximum."""
    held_out: int = 32
    """Number of windows, images or questions that are never trained on, but measured on: from the source's held-out
    part if it has one (see teachers/README.md), else from the training data; chosen by train.seed."""
    max_tokens: int | None = 2_000_000
    """Text: reading a part stops after this many tokens; None: the whole source is read."""
    max_images: int | None = 100_000
    """Images or questions about images: the most to train on, chosen by train.seed; None: all. Also limits how much of
    a hub data set is streamed."""
    classes: tuple[int, ...] | None = None
    """Images: numbers of the classes to train on and to hold out; None: all classes."""
    prompt: int = 64
    """Routers with granularity: sequence. Number of tokens at the start of a window that stand for the prompt, from
    which these routers decide; quality is measured on the tokens behind them only."""

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError("--data is empty: name a file, a folder or a data set")
        if self.window < 8 or self.held_out < 1:
            raise ValueError(
                f"data.window ({self.window}) must be at least 8 and data.held_out ({self.held_out}) at least 1"
            )
        if self.classes is not None and min(self.classes, default=-1) < 0:
            raise ValueError(f"data.classes is {list(self.classes)}; it needs one class or more, numbered from 0")
        for name in ("prompt", "max_tokens", "max_images"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"data.{name} is {number}; it must be at least 1")


@dataclass(frozen=True)
class CalibrationConfig:
    """The closed-form start of the routers before training (see students/calibration/language.py)."""

    windows: int = 16
    """Number of windows (of data.window tokens), images or questions from which calibration estimates the loss that
    closing each gate causes; training then starts at about the target compute. 0: all gates start open instead."""

    def __post_init__(self) -> None:
        if self.windows < 0:
            raise ValueError(f"calibration.windows is {self.windows}; it cannot be negative (0 starts from open gates)")


@dataclass(frozen=True)
class LossConfig:
    """The terms of the training loss besides the price of compute. A weight of 0 switches a term off."""

    logits: Literal["forward_kl", "reverse_kl", "jensen_shannon", "topk_kl"] = "forward_kl"
    """Divergence between the output distributions (next token, class) of teacher p and student q, in nats.

    - forward_kl: KL(p || q), which makes the student cover every token that the teacher finds likely.
    - reverse_kl: KL(q || p), which keeps the student off tokens that the teacher finds unlikely.
    - jensen_shannon: the generalised form of both (arXiv 2306.13649).
    - topk_kl: forward KL over the teacher's k likeliest tokens and one bucket for all others; a cache of the teacher's
      outputs is then much smaller.
    """
    logits_weight: float = 1.0
    """Weight of the divergence `logits`."""
    temperature: float = 1.0
    """Number above 0 that both models' logits are divided by; larger values weigh unlikely tokens more. The divergence
    is multiplied by its square, so that gradients keep their size (arXiv 1503.02531)."""
    beta: float = 0.5
    """logits: jensen_shannon. Teacher's weight in the mixture beta p + (1 - beta) q; 0 is forward, 1 reverse KL."""
    k: int = 64
    """logits: topk_kl. Number of the teacher's likeliest tokens whose probabilities are compared one by one."""
    hidden: Literal["cosine", "mse", "relative_mse"] = "cosine"
    """Distance between the student's and the teacher's hidden states. cosine ignores their norms; relative_mse divides
    by the teacher's squared norm, so that layers whose states differ in size weigh the same."""
    hidden_weight: float = 0.0
    """Weight of the distance `hidden`."""
    hidden_layers: Literal["final", "all"] = "final"
    """The hidden states to compare. final: those that the LM head or classifier reads. all: those after every block (in
    image models of class and register tokens, if there are any). Vision-language models only know final."""
    cross_entropy_weight: float = 0.0
    """Language models: weight of the cross-entropy of predicting the text's next token, which needs no teacher."""
    load_balance_weight: float = 0.0
    """Head and expert routers: weight of the load-balancing loss (arXiv 2101.03961), which is smallest if a router uses
    all heads or experts equally."""
    topk_weight: float = 0.0
    """Token and layer routers with selection: topk. Weight of the cross-entropy that trains scores to predict the top-k
    choice, so that a threshold can replace top-k in causal inference (arXiv 2404.02258, 2411.15281)."""

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.beta <= 1 or self.k < 1:
            raise ValueError(
                f"loss.temperature ({self.temperature}) must be above 0, loss.beta ({self.beta}) between 0 and 1, and "
                f"loss.k ({self.k}) at least 1"
            )
        for part in fields(self):
            if part.name.endswith("_weight") and getattr(self, part.name) < 0:
                raise ValueError(f"loss.{part.name} is {getattr(self, part.name)}; it cannot be negative")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop: Adam on the added parameters, with linear warm-up and cosine decay."""

    steps: int | None = None
    """Number of optimizer steps; None: as many as `minutes` allow."""
    minutes: float | None = 10.0
    """Training time, without calibration and measuring. It is turned into a number of steps after the first five steps,
    and that number is corrected a few times later. Give either `steps` or `minutes`."""
    batch: int = 4
    """Number of windows, images or questions in a micro-batch, all processes taken together, so that the number of
    processes changes the result by rounding only."""
    window: int = 256
    """Text: tokens in a training window; each window of data.window tokens is cut into such pieces."""
    accumulation: int = 1
    """Number of micro-batches whose gradients are averaged in one optimizer step."""
    lr: float = 0.001
    """Peak learning rate of everything that is multiplied with an input: linear maps and MLPs of routers, low-rank
    corrections (LoRA), substitutes."""
    limit_lr: float = 0.01
    """Peak learning rate of parameters that are not multiplied with an input: limits of channels and neurons (as
    logarithms), the two numbers that set the limit of LM-head rows, static scores, gains."""
    warmup: int = 10
    """Number of steps over which the learning rate rises linearly to its peak; after them it falls to 0 by a cosine."""
    clip: float = 1.0
    """Largest gradient norm; each of the two groups of parameters (`lr`, `limit_lr`) is clipped to it separately."""
    seed: int = 0
    """Seed of the choice of held-out data, the order of training data, the calibration sample and initial values."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the frozen weights and activations (added parameters are always float32). auto: bfloat16 on GPUs and CPUs
    with instructions for it, else float32."""
    checkpointing: bool = False
    """Whether activations inside blocks are recomputed in the backward pass instead of stored (gradient checkpointing):
    less memory for about one more forward pass of the student."""
    log_every: int = 10
    """Number of steps between lines of metrics.jsonl. Writing a line makes the host wait for the device."""
    save_every: int = 50
    """Number of steps between checkpoints, rounded up to the next logging step."""
    tracker: Literal["none", "tensorboard"] = "none"
    """Tracker of accelerate that receives the metrics as well; tensorboard needs the package of that name."""

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("give train.steps or train.minutes")
        for name in ("batch", "window", "accumulation", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("steps", "lr", "limit_lr", "warmup", "seed"):
            if (number := getattr(self, name)) is not None and number < 0:
                raise ValueError(f"train.{name} is {number}; it cannot be negative")
        for name in ("minutes", "clip"):
            if (number := getattr(self, name)) is not None and number <= 0:
                raise ValueError(f"train.{name} is {number}; it must be above 0")
        for name, bits in (("seed", 32), ("batch", 20)):
            if (number := getattr(self, name)) >= 2**bits:
                raise ValueError(f"train.{name} is {number}; it must be below 2**{bits}")


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run."""

    model: str
    """Short name (listed by `elastic models`), hub id or local folder of the pretrained model."""
    family: Literal["llm", "vit", "vlm"] = "llm"
    """Kind of model, found by `make_config`: a causal language model, an image model or a vision-language model. Of
    Qwen3.5 texts take the language model alone, as does `llm` here."""
    quantization: Literal["none", "int8", "int4", "nf4"] = "none"
    """Format of the frozen linear layers of the blocks, in student and teacher. It saves memory, but quantized layers
    run whole, so that channel, head, expert and neuron routers save nothing. int8 and int4 need torchao, nf4 (arXiv
    2305.14314) bitsandbytes."""
    preset: str = "default"
    """Name of a file in configs/presets with the settings that the configuration file and the command line change."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    student: StudentSpec = field(default_factory=lambda: StudentSpec((RouterSpec("channel"),)))
    """Routers and low-rank corrections that are added to the model; see students/spec.py. Read last, because what kinds
    of routers say of themselves takes torch, whose import takes seconds."""

    def __post_init__(self) -> None:
        if not self.student.routers:
            raise ValueError("a student needs at least one router")
        traits = TRAITS[self.family]
        if not traits.decodes and self.budget.phase != "prefill":
            raise ValueError("budget.phase is decode; it has no effect on models of images: leave it away")
        if self.data.window % self.train.window:
            raise ValueError(
                f"train.window ({self.train.window}) must divide data.window ({self.data.window}): "
                "data windows are cut into training windows"
            )
        if self.budget.ranges and not self.calibration.windows:
            raise ValueError(
                "calibration.windows is 0: a range of budgets starts from calibrated prices, leave it away"
            )
        started = [r for r in self.student.routers if traits.starts_at in (None, r.of_kind.place)]
        if self.calibration.windows and not started:
            raise ValueError("calibration is for image routers, and there is none: use --set calibration.windows=0")
        selections = {r.selection for r in self.student.routers}
        if "topk" in selections and self.budget.control == "price":
            raise ValueError("top-k routers have a fixed share of open gates: use budget.control=capacity")
        per_sequence = any(r.granularity == "sequence" for r in self.student.routers)
        if per_sequence and self.data.prompt >= self.train.window:
            raise ValueError(
                f"data.prompt ({self.data.prompt}) must be shorter than train.window ({self.train.window})"
            )
        over_tokens = any(r.selection == "topk" and r.of_kind.over_tokens for r in self.student.routers)
        over_gates = any(r.of_kind.over_parts for r in self.student.routers)
        for name, works, needs in (
            *((name, name in traits.settings, nouns) for name, nouns in SETTINGS.items()),
            ("student.gains", self.budget.ranges, "a range of budgets (--target-compute 0.5:1.0)"),
            ("budget.stiffness", self.budget.control == "price", "budget.control=price"),
            ("budget.hinge", self.budget.control == "capacity", "budget.control=capacity"),
            ("data.prompt", per_sequence, "a router with granularity: sequence"),
            ("loss.beta", self.loss.logits == "jensen_shannon", "loss.logits=jensen_shannon"),
            ("loss.k", self.loss.logits == "topk_kl", "loss.logits=topk_kl"),
            ("loss.hidden", self.loss.hidden_weight > 0, "loss.hidden_weight above 0"),
            ("loss.hidden_layers", self.loss.hidden_weight > 0, "loss.hidden_weight above 0"),
            ("loss.topk_weight", over_tokens, "token or layer routers with selection: topk"),
            ("loss.load_balance_weight", over_gates, "head or expert routers"),
        ):
            section, key = name.split(".")
            part = getattr(self, section)
            if not works and getattr(part, key) != getattr(type(part), key):
                raise ValueError(f"{name} is {getattr(part, key)}, which has no effect without {needs}")


def make_config(
    *, file: str | None = None, settings: list[str] | None = None, entry: ModelEntry | None = None, **flags: Any
) -> RunConfig:
    """Return the configuration merged from defaults, the preset, a YAML `file`, `flags` and `settings`; later ones win.

    settings: strings "section.key=value", with YAML values. entry: the model's table entry, instead of looking up its
    name. flags: settings with `__` in place of dots, such as budget__target=0.7, or a Path for a folder or file; None
    means not given. Raises ValueError for unknown keys, wrong types and settings that contradict each other.
    """
    chosen: dict[str, Any] = {}
    for key, value in flags.items():
        if value is not None:
            put(chosen, key.split("__"), str(value) if isinstance(value, Path) else value)
    for setting in settings or []:
        key, separator, value = setting.partition("=")
        if not separator:
            raise ValueError(f"--set {setting}: write --set section.key=value, such as --set train.lr=0.01")
        try:
            put(chosen, key.split("."), parse_yaml(value))
        except (yaml.YAMLError, RecursionError):
            raise ValueError(f"--set {setting[:200]}: the value is not YAML") from None
    user = read_yaml(Path(file)) if file else {}
    chosen["preset"] = preset = chosen.get("preset") or user.get("preset") or "default"
    if preset not in presets():
        raise ValueError(f"unknown preset {preset!r}{near(str(preset), presets())}; there are {', '.join(presets())}")
    base = yaml.safe_load(files("configs").joinpath("presets", f"{preset}.yaml").read_text(encoding="utf-8"))
    layers = [base, user, chosen]
    model = chosen.get("model") or user.get("model")
    if not isinstance(model, str):
        raise ValueError("no model is given: add --model smollm2-135m, or another that `elastic models` lists")
    entry = entry or resolve(model)
    if entry.folder is not None and model not in models():
        put(chosen, ["model"], str(entry.folder.absolute()))  # for runs that are opened from another directory
    if entry.also is not None and _is_for(entry.also, layers):
        entry = replace(entry, family=entry.also, also=None)
    asked = next((layer["family"] for layer in reversed(layers) if "family" in layer), entry.family)
    if asked != entry.family and asked in list(TRAITS):
        raise ValueError(f"family is {asked}, but {model} is {TRAITS[entry.family].noun}: leave it away")
    phases = [phase for layer in layers if (phase := section_of(layer, "budget").get("phase"))]
    traits = TRAITS[entry.family]
    applies = traits.section or ("prefill" if phases[-1:] == ["prefill"] else "")
    merged: dict[str, Any] = {"data": {"source": entry.data}, "family": entry.family}
    if not traits.decodes:
        merged |= {"budget": {"phase": "prefill"}}
    for layer in layers:
        sections = {name: section_of(layer, name) for name in SECTIONS}
        layer = merge({k: v for k, v in layer.items() if k not in sections}, sections.get(applies, {}))
        # steps and minutes exclude each other: the layer of higher priority that gives either replaces both
        given = [key for key in ("steps", "minutes") if section_of(layer, "train").get(key) is not None]
        if len(given) == 2:
            raise ValueError("give --steps or --minutes (train.steps, train.minutes), not both: leave one away")
        if given:
            layer = merge({"train": {"steps": None, "minutes": None}}, layer)
        merged = merge(merged, layer)
    if ":" in str(section_of(merged, "budget").get("target")):
        merged["student"] = {"gains": True, **section_of(merged, "student")}
    source = section_of(merged, "data").get("source")
    if traits.data and source == "builtin":
        alone = ", or, for its language model alone, texts: --data FILE or builtin" if entry.also else ""
        raise ValueError(f"{model} needs {traits.data}{alone}")
    if isinstance(source, str) and source.strip() and source != entry.data:
        require_data(source, entry.family)
        if source not in NAMED_DATA and Path(source).expanduser().exists():
            merged["data"]["source"] = str(Path(source).expanduser().absolute())
    return from_dict(RunConfig, merged)


def _is_for(family: str, layers: list[dict[str, Any]]) -> bool:
    """Return whether the configuration in these layers, the last of which wins, asks for texts or for this family."""
    asked = [layer["family"] for layer in layers if "family" in layer]
    sources = [source for layer in layers if (source := section_of(layer, "data").get("source"))]
    if asked or not sources:
        return asked[-1:] == [family]
    named = NAMED_DATA.get(sources[-1])
    return named == family if named else not may_ask_about_images(str(sources[-1]))
