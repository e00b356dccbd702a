"""The configuration of a run: frozen dataclasses, defaults <- preset <- file <- command line; unknown keys are errors.

A file or preset may have sections that are merged over the rest where they apply, because what saves compute there are
different routers: `prefill:` where budget.phase is prefill (many tokens at once instead of one at a time), `vit:` for
image models, and `vlm:` for vision-language models.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import yaml

from configs import presets
from elastic.settings import from_dict, merge, near, put, read_yaml, section_of
from elastic.traits import TRAITS
from students.spec import RouterSpec, StudentSpec
from teachers.data.records import is_path
from teachers.registry import ModelEntry, models, resolve

SECTIONS = ("prefill", *(traits.section for traits in TRAITS.values() if traits.section))
"""Sections of a file that hold only where they apply."""
NAMED_DATA = ("builtin", "fashion-mnist", "easy-vqa")
"""Data that is no file or folder of the user's, whatever lies in the working directory."""
_OF_FAMILIES = {name: traits.noun for traits in reversed(tuple(TRAITS.values())) for name in traits.settings}
"""Settings that not every family has a use for, and which model they need."""


@dataclass(frozen=True)
class BudgetConfig:
    """How much compute the student may use, and how it is brought there."""

    target: float | str = 0.7
    """Student's compute over the teacher's, whole model; or "LOW:HIGH", and one student serves all of that range."""
    phase: Literal["decode", "prefill"] = "decode"
    """Which phase the target speaks of: one token at a time, or all tokens of a window (or an image) at once."""
    control: Literal["price", "capacity"] = "price"
    """price: the loss pays for compute, at a price that rises while the budget is exceeded. capacity: every router gets
    the same share of open gates, the one at which the model meets the target; top-k routers keep it, others are
    punished for exceeding it (a hinge)."""
    stiffness: float = 20.0
    """How fast the price answers to a missed budget, in prices per unit of compute."""
    hinge: float = 1.0
    """Weight of the capacity hinge (control: capacity)."""

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
        """Whether the target is a range."""
        return isinstance(self.target, str)

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest budget."""
        if not isinstance(self.target, str):
            return self.target, self.target
        low, high = self.target.split(":")
        return float(low), float(high)

    @property
    def measured(self) -> tuple[float | None, ...]:
        """The budgets that results are shown of: both ends of a range and its middle; None: where the dial was left."""
        low, high = self.span
        return (low, (low + high) / 2, high) if self.ranges else (None,)


@dataclass(frozen=True)
class DataConfig:
    """What is trained on and measured on."""

    source: str = "builtin"
    """A text, JSON-lines or parquet file or folder, a hub dataset id, or builtin. Images: a folder with train/ and val/
    or class sub-folders, parquet files, a hub dataset id, or fashion-mnist. Questions about images: a JSON-lines, JSON
    or parquet file or folder, a hub dataset id, or easy-vqa."""
    window: int = 512
    """Tokens in a window."""
    held_out: int = 32
    """Windows, images or questions set aside for measuring, never trained on."""
    max_tokens: int | None = 2_000_000
    """Read no more than this many tokens."""
    max_images: int | None = 100_000
    """Train on no more than this many images, or questions about images."""
    classes: tuple[int, ...] | None = None
    """Images: train on and hold out only these classes, by number."""
    prompt: int = 64
    """Tokens of a window that sequence-level routers decide from; no quality is measured on them then."""

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError("--data is empty: name a file, a folder or a data set")
        if self.window < 8 or self.held_out < 1:
            raise ValueError(
                f"data.window ({self.window}) must be at least 8 and data.held_out ({self.held_out}) at least 1"
            )
        if self.prompt < 1 or (self.max_tokens is not None and self.max_tokens < 1):
            raise ValueError(f"data.prompt ({self.prompt}) and data.max_tokens ({self.max_tokens}) must be at least 1")
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"data.max_images is {self.max_images}; it must be at least 1")


@dataclass(frozen=True)
class CalibrationConfig:
    """The closed-form start (see students/calibration/language.py)."""

    windows: int = 16
    """Windows, images or questions that calibration looks at; 0 starts from open gates."""

    def __post_init__(self) -> None:
        if self.windows < 0:
            raise ValueError(f"calibration.windows is {self.windows}; it cannot be negative (0 starts from open gates)")


@dataclass(frozen=True)
class LossConfig:
    """What the routers learn from. Weights of 0 switch a part off."""

    logits: Literal["forward_kl", "reverse_kl", "jensen_shannon", "topk_kl"] = "forward_kl"
    """Divergence between the teacher's and the student's next-token distributions."""
    logits_weight: float = 1.0
    """Weight of the divergence."""
    temperature: float = 1.0
    """Softens both distributions."""
    beta: float = 0.5
    """jensen_shannon: weight of the teacher in the mixture."""
    k: int = 64
    """topk_kl: how many of the teacher's tokens are compared one by one."""
    hidden: Literal["cosine", "mse", "relative_mse"] = "cosine"
    """Distance between hidden states."""
    hidden_weight: float = 0.0
    """Weight of the distance between hidden states."""
    hidden_layers: Literal["final", "all"] = "final"
    """Which hidden states are compared."""
    cross_entropy_weight: float = 0.0
    """Weight of plain next-token prediction."""
    load_balance_weight: float = 0.0
    """Weight of even use of experts and heads (top-k routers)."""
    topk_weight: float = 0.0
    """Weight of teaching scores to predict the top-k choice of their sequence (top-k token and layer routers)."""

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
    """The training loop."""

    steps: int | None = None
    """Optimizer steps; None: as many as `minutes` allow."""
    minutes: float | None = 10.0
    """Training time, turned into a number of steps after the first few, which a few later looks at the clock change.
    Give one of the two."""
    batch: int = 4
    """Windows, images or questions in a micro-batch, of all processes together where a launcher starts several."""
    window: int = 256
    """Tokens in a training window: data windows are cut into these."""
    accumulation: int = 1
    """Micro-batches in a step."""
    lr: float = 0.001
    """Peak learning rate (Adam) of linear maps: routers that read an input, LoRA, substitutes."""
    limit_lr: float = 0.01
    """Peak learning rate of what stands for itself: limits of channels (in log units) and rows, static scores."""
    warmup: int = 10
    """Steps of linear warm-up; then cosine decay to zero."""
    clip: float = 1.0
    """Largest gradient norm of a parameter group."""
    seed: int = 0
    """Order of the data, calibration sample, initial values."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the frozen weights and activations; auto takes what the device computes fastest in."""
    checkpointing: bool = False
    """Recompute activations in backward to save memory."""
    log_every: int = 10
    """Steps between lines of metrics."""
    save_every: int = 50
    """Steps between checkpoints."""
    tracker: Literal["none", "tensorboard"] = "none"
    """Where else metrics go, through accelerate's trackers."""

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("give train.steps or train.minutes")
        for name in ("batch", "window", "accumulation", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        if (self.steps is not None and self.steps < 0) or (self.minutes is not None and self.minutes <= 0):
            raise ValueError("train.steps cannot be negative and train.minutes must be above 0")
        if self.seed >= 2**32:
            raise ValueError(f"train.seed is {self.seed}; it must be below 2 ** 32")
        if min(self.lr, self.limit_lr, self.warmup, self.seed) < 0 or self.clip <= 0:
            raise ValueError("train.lr, limit_lr, warmup and seed cannot be negative, and train.clip must be above 0")


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run."""

    model: str
    """Short name (see `elastic models`), hub id or local folder."""
    family: Literal["llm", "vit", "vlm"] = "llm"
    """What kind of model that is: a causal language model, an image model or a vision-language model."""
    quantization: Literal["none", "int8", "int4", "nf4"] = "none"
    """What the frozen linear layers of the blocks are kept in, the teacher's as well: int8 and int4 need torchao, nf4
    bitsandbytes."""
    preset: str = "default"
    """Where `student`, `loss` and `budget` start from; see configs/presets."""
    student: StudentSpec = field(default_factory=lambda: StudentSpec((RouterSpec("channel"),)))
    """What is added to the model."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

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
            *((name, name in traits.settings, noun) for name, noun in _OF_FAMILIES.items()),
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
    """Merge defaults, the preset, a YAML file, flags (dotted with `__`, None means not given) and `a.b=c` settings.

    entry: what the model's name stands for, where it is not to be looked up. Raises ValueError for unknown keys, wrong
    types and settings that contradict each other.
    """
    chosen: dict[str, Any] = {}
    for key, value in flags.items():
        if value is not None:
            put(chosen, key.split("__"), value)
    for setting in settings or []:
        key, separator, value = setting.partition("=")
        if not separator:
            raise ValueError(f"--set {setting}: write --set section.key=value, such as --set train.lr=0.01")
        try:
            put(chosen, key.split("."), yaml.safe_load(value))
        except yaml.YAMLError:
            raise ValueError(f"--set {setting}: {value!r} is not YAML") from None
    user = read_yaml(Path(file)) if file else {}
    preset = chosen.get("preset") or user.get("preset") or "default"
    if preset not in presets():
        raise ValueError(f"unknown preset {preset!r}{near(str(preset), presets())}; there are {', '.join(presets())}")
    base = yaml.safe_load(files("configs").joinpath("presets", f"{preset}.yaml").read_text(encoding="utf-8"))
    layers = [base, user, chosen]
    model = chosen.get("model") or user.get("model")
    if not isinstance(model, str):
        raise ValueError("no model is given: add --model smollm2-135m, or another that `elastic models` lists")
    entry = entry or resolve(model)
    if entry.folder is not None and model not in models():
        put(chosen, ["model"], str(entry.folder.absolute()))  # a run is used from other folders, too
    budget: dict[str, Any] = {}
    for layer in layers:
        budget |= section_of(layer, "budget")
    prefill = "prefill" if budget.get("phase") == "prefill" else ""
    traits = TRAITS[entry.family]
    applies = traits.section or prefill
    merged: dict[str, Any] = {"data": {"source": entry.data}, "family": entry.family}
    if not traits.decodes:
        merged |= {"budget": {"phase": "prefill"}}
    for layer in layers:
        sections = {name: section_of(layer, name) for name in SECTIONS}
        layer = merge({k: v for k, v in layer.items() if k not in sections}, sections.get(applies, {}))
        # the time and the number of steps exclude each other: the later word counts
        given = [key for key in ("steps", "minutes") if section_of(layer, "train").get(key) is not None]
        if len(given) == 2:
            raise ValueError("give --steps or --minutes (train.steps, train.minutes), not both: leave one away")
        if given:
            layer = merge({"train": {"steps": None, "minutes": None}}, layer)
        merged = merge(merged, layer)
    merged["preset"] = preset
    if ":" in str(budget.get("target")):
        merged["student"] = {"gains": True, **section_of(merged, "student")}
    if traits.data and merged["data"]["source"] == "builtin":
        raise ValueError(f"{model} needs {traits.data}")
    source = merged["data"].get("source")
    if isinstance(source, str) and source.strip() and source not in (*NAMED_DATA, entry.data):
        require_data(source, entry.family)
        if Path(source).expanduser().exists():
            merged["data"]["source"] = str(Path(source).expanduser().absolute())
    return from_dict(RunConfig, merged)


def require_data(source: str, family: str) -> None:
    """ValueError where data can only be a file or folder, and there is none: before a model is loaded for it."""
    path = Path(source).expanduser()
    on_hub = not is_path(source) and ("/" in source or TRAITS[family].one_word)
    if on_hub or source in NAMED_DATA or path.exists():
        return
    beside = [other.name for other in islice(path.parent.iterdir(), 1000)] if path.parent.is_dir() else []
    raise ValueError(
        f"no such file or folder: {source}{near(path.name, [*beside, *NAMED_DATA])}; --data takes one that exists"
    )
