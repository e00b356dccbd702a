"""Specification of a student: the routers and low-rank corrections that are added to a frozen model.

These dataclasses are the section `student` of a configuration (see configs/presets). A router computes *scores*, and a
*gate* is open where score + offset >= 0; what a closed gate switches is not computed. Channel, neuron, mixture and
vocab routers compare an activation, a routing weight or a preview of a logit with a learned *limit* instead, which
falls as the offset rises. The *offset* is one number for the whole student, set by the dial: 0 leaves gates as learned,
lower values close more.

    StudentSpec(routers=(RouterSpec("channel"), RouterSpec("vocab")))  # the preset `default` for dense models
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from students.kinds.registry import Kind, KindName, kinds
from students.sites import LINEAR_SITES


@dataclass(frozen=True)
class RouterSpec:
    """Settings of one kind of router, and the places of the model that get such a router.

    ValueError if a field is set that has no effect on the kind (see Kind.fields), or if settings contradict each other.
    """

    kind: KindName
    """What one gate switches, for one token unless `granularity` says otherwise (see students/kinds):

    - token: a branch of a block, attention or MLP;
    - layer: the whole block;
    - head: one attention head;
    - expert: one group of MLP neurons;
    - neuron: one neuron of a gated MLP;
    - mixture: one expert of a mixture, of those that the model's own router has chosen;
    - channel: one input channel of a linear layer;
    - vocab: one row of the LM head;
    - image: one image token in front of a language model.
    """
    sites: tuple[str, ...] = ()
    """Sites within a block that get a router: attn, mlp (token) or attn_in, attn_out, mlp_in, mlp_out (channel). Empty:
    all of these. Other kinds have one site only and take no `sites`."""
    blocks: Literal["all", "odd", "even", "thirds"] = "all"
    """Which blocks get this router, counted from zero; thirds: blocks 1, 4, 7, ..."""
    granularity: Literal["token", "sequence"] = "token"
    """token: one decision for each token. sequence: one decision for the whole sequence, made from the mean of the
    prompt's tokens (images: of all tokens) and kept while decoding."""
    network: Literal["linear", "mlp", "static"] = "linear"
    """How scores are computed. linear: a linear map of the router's input. mlp: the linear map plus an MLP with one
    hidden layer. static: a learned constant for each gate, so that the input has no influence."""
    hidden: int = 32
    """`network: mlp`: width of the router's hidden layer."""
    selection: Literal["threshold", "topk", "quota"] = "threshold"
    """Which gates the scores open.

    - threshold: every gate with score + offset >= 0.
    - topk: the k highest scores, k given by the budget's capacity: head and expert routers choose k gates for each
      token, token and layer routers k tokens of each sequence, image routers k image tokens. Language models choose
      tokens by top-k in training only, since it looks at later tokens, and by threshold afterwards.
    - quota (image routers, and token and layer routers of image models): the k tokens of each image with the highest
      scores, k being the mean number of scores >= 0, in training over the batch, afterwards over training images. Each
      router thereby learns the share that it keeps, and shapes are the same for every image.
    """
    weight: Literal["none", "score"] = "none"
    """Factor of what passes an open gate. none: 1; scores get their gradient by a straight-through estimator. score:
    2*sigmoid(score) (token, layer) or n*softmax(score) over the n gates (head, expert), which is 1 for the zero scores
    that training starts with; scores get their gradient through this factor instead."""
    kv: Literal["keep", "drop"] = "keep"
    """token, layer: whether a token that skips attention still writes its keys and values (keep) or not (drop), so that
    later tokens cannot attend to it and the key/value cache is shorter."""
    dropped: Literal["return", "stay", "merge"] = "return"
    """layer, image models: what happens to a token whose gate in a block is closed.

    - return: it skips this block and takes part in the next one.
    - stay: it leaves the sequence, which gets shorter, and is put back after the last block.
    - merge: it leaves the sequence, and the most similar remaining token becomes the mean of all tokens that it stands
      for and counts as that many in attention (kernels/merging.py). At most half of the patches merge in one block.
    """
    multiple: int = 1
    """`selection: quota`, and threshold in layer routers of image models: if an image keeps at least this many tokens,
    class and register tokens included, their number is rounded to a multiple of `multiple`. On some CPUs, attention
    over 37 tokens takes as long as over 50, and over 32 tokens a third of that. 0: 32, half a tile of attention on
    GPUs, for images of at least six times as many tokens; else 4."""
    groups: int = 16
    """expert: number of groups that the neurons of an MLP are split into."""
    grouping: Literal["contiguous", "coactivation"] = "contiguous"
    """expert: which neurons form a group: neighbours, or neurons that are active together on calibration data."""
    substitute: int = 0
    """token, layer: rank of the affine map of the branch's input that replaces a closed branch; 0: a closed branch adds
    nothing to the residual stream."""
    rank: int = 0
    """vocab: rank of the low-rank preview of the logits that decides which rows are computed exactly; 0: a quarter of
    the model's width."""
    query: int = 0
    """image: rank of a bilinear form of image token and question that is added to the score; 0: scores depend on the
    image alone."""
    prefix: int = 0
    """token, layer: number of tokens at the start of each sequence, padding not counted, whose gates are open
    whatever their scores. Later tokens attend to the first one above all (attention sinks, arXiv 2309.17453)."""
    optional: bool = False
    """mixture: whether a model whose MLPs are dense goes without this router, instead of being refused."""
    part: Literal["language", "vision"] = "language"
    """Vision-language models: the tower whose blocks get the router."""

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
        if self.hidden < 1 or self.groups < 1 or min(self.substitute, self.rank, self.query, self.prefix) < 0:
            raise ValueError(
                "router sizes (hidden, groups, substitute, rank, query, prefix) cannot be negative, hidden and groups "
                "not 0"
            )
        if self.network != "mlp" and self.hidden != RouterSpec.hidden:
            raise ValueError("`hidden` has no effect without `network: mlp`")
        if self.network == "static" and (
            self.granularity == "sequence" or (kind.over_tokens and self.selection != "threshold")
        ):
            raise ValueError("a static router decides once for all: leave `granularity` and `selection` away")
        if self.multiple != 1 and (self.multiple < 0 or not kind.takes_multiple(self)):
            raise ValueError("`multiple` is for `selection: quota` and, in layer routers, threshold, and not negative")
        if self.selection == "quota" and not (kind.may_keep_quota and self.granularity == "token"):
            raise ValueError("`selection: quota` is for image, token and layer routers that decide token by token")
        if self.network == "static" and self.weight == "score":
            raise ValueError("a static router has no score to weigh by: use `weight: none`")
        kind.check(self)

    @property
    def of_kind(self) -> Kind:
        """The `Kind` object of this router's kind."""
        return kinds()[self.kind]

    @property
    def where(self) -> tuple[str, ...]:
        """The router's sites: `sites`, or all sites of its kind if `sites` is empty."""
        return self.sites or self.of_kind.sites

    def on(self, block: int) -> bool:
        """Return whether block number `block` gets this router."""
        if self.blocks == "thirds":
            return block % 3 == 1
        return self.blocks == "all" or (block % 2 == 1) == (self.blocks == "odd")


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank corrections of linear layers (LoRA, arXiv 2106.09685), trained with the routers by the same loss.

    A correction reads all input channels of its layer, also those that a channel router closes.
    """

    rank: int = 0
    """Rank of every correction; 0: no corrections."""
    sites: tuple[str, ...] = LINEAR_SITES
    """Sites whose linear layers are corrected: attn_in (q, k, v), attn_out (o), mlp_in (gate, up), mlp_out (down)."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank is {self.rank}; it cannot be negative")
        for site in self.sites:
            if site not in LINEAR_SITES:
                raise ValueError(f"lora has no site {site!r}; use some of: {', '.join(LINEAR_SITES)}")


@dataclass(frozen=True)
class StudentSpec:
    """Everything that `elasticize` adds to a frozen model."""

    routers: tuple[RouterSpec, ...] = ()
    """The routers; a kind may appear once per site of a tower."""
    lora: LoraSpec = field(default_factory=LoraSpec)
    """The low-rank corrections of linear layers."""
    gains: bool = False
    """Whether each router learns a gain, its factor of the offset, for a student that serves a range of budgets."""

    def __post_init__(self) -> None:
        seen: set[tuple[str, str, str]] = set()
        for router in self.routers:
            for place in router.where or ("",):
                if (router.part, router.kind, place) in seen:
                    raise ValueError(
                        f"two {router.kind} routers at {place or 'the same place'}: a student has one of a kind at "
                        "each, even if their `blocks` differ"
                    )
                seen.add((router.part, router.kind, place))

    def of(self, part: str) -> StudentSpec:
        """Return the specification of one tower of a vision-language model, "language" or "vision".

        Routers of image tokens stand between the towers and are in neither; low-rank corrections are in "language".
        """
        routers = tuple(r for r in self.routers if r.part == part and r.of_kind.place != "input")
        return StudentSpec(routers, self.lora if part == "language" else LoraSpec(), self.gains)

    def at(self, place: str) -> list[RouterSpec]:
        """Return the routers with this `Kind.place`: "block", "head" or "input", in the order of `KindName`."""
        return [r for name, kind in kinds().items() if kind.place == place for r in self.routers if r.kind == name]

    def in_block(self, number: int, attends: bool = True) -> list[RouterSpec]:
        """Return the routers of block `number`, with the sites that it has; attends: whether it has attention."""
        found = [router for router in self.at("block") if router.of_kind.concerns(router, number)]
        if attends:
            return found
        return [own for router in found if (own := router.of_kind.without_attention(router)) is not None]

    @property
    def over_blocks(self) -> RouterSpec | None:
        """The first router whose gates switch whole blocks, or None."""
        return next((router for router in self.routers if router.of_kind.over_blocks), None)

    def find(self, kind: str, block: int | None = None, site: str = "") -> RouterSpec | None:
        """Return the first router of a kind in a block (None: any block) and at a site ("": any site), or None."""
        for router in self.routers:
            at_site = not site or not router.where or site in router.where
            if router.kind == kind and at_site and (block is None or router.on(block)):
                return router
        return None
