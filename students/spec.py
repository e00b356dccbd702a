"""What a student is made of, as data: which routers, at which sites, and which low-rank corrections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from students.architectures.record import LINEAR_SITES
from students.kinds.registry import Kind, KindName, kinds


@dataclass(frozen=True)
class RouterSpec:
    """One kind of router and where it stands."""

    kind: KindName
    """What a gate switches: token (a branch, for one token), layer (the whole block), head (one attention head), expert
    (one group of MLP neurons), neuron (one of a gated MLP), channel (one input channel of a linear layer), vocab (one
    row of the LM head), image (one image token in front of a language model); see students/kinds."""
    sites: tuple[str, ...] = ()
    """token: attn, mlp. channel: attn_in, attn_out, mlp_in, mlp_out. Empty means all of them; other kinds have one."""
    blocks: Literal["all", "odd", "even", "thirds"] = "all"
    """Which blocks carry this router, counted from zero; thirds: 1, 4, 7, ..."""
    granularity: Literal["token", "sequence"] = "token"
    """sequence: one decision per sequence, taken from the mean of the prompt's tokens."""
    network: Literal["linear", "mlp", "static"] = "linear"
    """How a score is computed: a linear map of the input, that plus a small MLP, or a learned constant (no input)."""
    hidden: int = 32
    """Width of the router's hidden layer (network: mlp)."""
    selection: Literal["threshold", "topk", "quota"] = "threshold"
    """threshold: a gate opens where its score is >= 0. topk: head and expert routers keep the best k for each token;
    token and layer routers keep the best k of the sequence, in language models only while training. quota (image
    routers, and token and layer routers of image models): every image keeps its best k, k being how many scores are
    >= 0 on average (while training, of the batch; from then on, of training images): each router learns its share, and
    shapes stay the same from image to image."""
    weight: Literal["none", "score"] = "none"
    """score: what passes an open gate is multiplied by 2*sigmoid(score) (token, layer) or n*softmax(score) (head,
    expert), which is 1 at the zero start; the gradient flows through that weight instead of straight through."""
    kv: Literal["keep", "drop"] = "keep"
    """token and layer: whether a token that attention skips still writes its keys and values."""
    dropped: Literal["return", "stay", "merge"] = "return"
    """layer, image models: whether a token that a block leaves out is back for the next one, or stays out until the
    last block is done (the sequence gets shorter). merge: it stays out, and the token most like it becomes the mean of
    what it stands for and counts as so many in attention (kernels/merging.py); half of them can go at a time."""
    multiple: int = 1
    """quota, and threshold in layer routers of image models: an image keeps a multiple of so many tokens, the prefix
    included, or fewer than that; attention on some CPUs takes a third of the time for 32 tokens that it takes for 50,
    and as long for 37."""
    groups: int = 16
    """expert: into how many groups the MLP's neurons are split."""
    grouping: Literal["contiguous", "coactivation"] = "contiguous"
    """expert: neighbouring neurons, or neurons that are active together on calibration data."""
    substitute: int = 0
    """token and layer: rank of the affine map that stands in for a closed branch; 0 puts nothing there."""
    rank: int = 0
    """vocab: rank of the cheap preview of the logits; 0 means a quarter of the hidden width."""
    query: int = 0
    """image: rank of a bilinear form of image token and question, added to the score; 0 looks at the image alone."""
    part: Literal["language", "vision"] = "language"
    """Vision-language models: in the blocks of which tower the router stands."""

    def __post_init__(self) -> None:
        if self.kind not in kinds():
            raise ValueError(f"there is no {self.kind!r} router; there are {', '.join(kinds())}")
        kind = self.of_kind
        for site in self.sites:
            if site not in kind.sites:
                raise ValueError(
                    f"a {self.kind} router has no site {site!r}; "
                    + (f"use some of: {', '.join(kind.sites)}" if kind.sites else "leave `sites` away")
                )
        for name, setting in RouterSpec.__dataclass_fields__.items():
            takers = [other.name for other in kinds().values() if name in other.fields]
            if takers and self.kind not in takers and getattr(self, name) != setting.default:
                raise ValueError(f"`{name}` has no effect on a {self.kind} router, only on: {', '.join(takers)}")
        if self.hidden < 1 or self.groups < 1 or min(self.substitute, self.rank, self.query) < 0:
            raise ValueError(
                "router sizes (hidden, groups, substitute, rank, query) cannot be negative, hidden and groups not 0"
            )
        if self.network != "mlp" and self.hidden != RouterSpec.hidden:
            raise ValueError("`hidden` has no effect without `network: mlp`")
        if self.network == "static" and (
            self.granularity == "sequence" or (kind.over_tokens and self.selection != "threshold")
        ):
            raise ValueError("a static router decides once for all: leave `granularity` and `selection` away")
        if self.multiple != 1 and (self.multiple < 1 or not kind.takes_multiple(self)):
            raise ValueError("`multiple` is for `selection: quota` and, in layer routers, threshold, and at least 1")
        if self.selection == "quota" and not (kind.may_keep_quota and self.granularity == "token"):
            raise ValueError("`selection: quota` is for image, token and layer routers that decide token by token")
        if self.network == "static" and self.weight == "score":
            raise ValueError("a static router has no score to weigh by: use `weight: none`")
        kind.check(self)

    @property
    def of_kind(self) -> Kind:
        """What its kind says about it."""
        return kinds()[self.kind]

    @property
    def where(self) -> tuple[str, ...]:
        """The sites with the default filled in."""
        return self.sites or self.of_kind.sites

    def on(self, block: int) -> bool:
        """Whether block number `block` carries this router."""
        if self.blocks == "thirds":
            return block % 3 == 1
        return self.blocks == "all" or (block % 2 == 1) == (self.blocks == "odd")


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank corrections of linear layers (arXiv 2106.09685), trained by the same loss; they read all channels."""

    rank: int = 0
    """Rank of every correction; 0 switches LoRA off."""
    sites: tuple[str, ...] = LINEAR_SITES
    """Which linear layers are corrected."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank is {self.rank}; it cannot be negative")
        for site in self.sites:
            if site not in LINEAR_SITES:
                raise ValueError(f"lora has no site {site!r}; use some of: {', '.join(LINEAR_SITES)}")


@dataclass(frozen=True)
class StudentSpec:
    """Everything that is added to a frozen model."""

    routers: tuple[RouterSpec, ...] = ()
    """The routers; a kind may appear once per site."""
    lora: LoraSpec = field(default_factory=LoraSpec)
    """Low-rank corrections."""
    gains: bool = False
    """Whether each router learns how far it turns with the dial: for a student that serves a range of budgets."""

    def __post_init__(self) -> None:
        seen: set[tuple[str, str, str]] = set()
        for router in self.routers:
            for place in router.where or ("",):
                if (router.part, router.kind, place) in seen:
                    raise ValueError(f"two {router.kind} routers at {place or 'the same place'}: one is enough")
                seen.add((router.part, router.kind, place))

    def of(self, part: str) -> StudentSpec:
        """What is added to the blocks of one tower of a vision-language model; LoRA is the language model's."""
        routers = tuple(r for r in self.routers if r.part == part and r.of_kind.place != "input")
        return StudentSpec(routers, self.lora if part == "language" else LoraSpec(), self.gains)

    def at(self, place: str) -> list[RouterSpec]:
        """The routers in a model's blocks, at its head or its input (see Kind.place), in the order of their kinds."""
        return [r for name, kind in kinds().items() if kind.place == place for r in self.routers if r.kind == name]

    @property
    def over_blocks(self) -> RouterSpec | None:
        """The router of whole blocks, or None."""
        return next((router for router in self.routers if router.of_kind.over_blocks), None)

    def find(self, kind: str, block: int | None = None, site: str = "") -> RouterSpec | None:
        """The router of this kind at this block and site, or None."""
        for router in self.routers:
            at_site = not site or not router.where or site in router.where
            if router.kind == kind and at_site and (block is None or router.on(block)):
                return router
        return None
