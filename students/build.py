"""Put routers in front of a frozen model's parts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from students.architectures import (
    VISION_TOWERS,
    Architecture,
    Sizes,
    architecture_of,
    kind_of,
    sizes_of,
    trunk_of,
    weight_of,
)
from students.compute import BlockShape, ComputeModel
from students.execution.attention import route_attention
from students.execution.block import BlockGather
from students.execution.branch import RoutedBranch, RoutedExit
from students.execution.handover import BlockHandover
from students.execution.head import RoutedHead
from students.execution.image_block import RoutedBlock
from students.execution.linear import RoutedLinear, Site
from students.execution.runtime import Runtime
from students.execution.wrapper import Wrapper
from students.families.image import ImageStudent, call
from students.families.language import LanguageStudent
from students.families.vision_language import Door, VisionLanguageStudent
from students.flops import flop_counter
from students.routers import ChannelRouter, ImageRouter, Lora, Router, Substitute, VocabRouter
from students.selfcheck import SelfCheck, must_check, some_tokens
from students.spec import BRANCHES, LINEAR_SITES, RouterSpec, StudentSpec
from students.student import Student


def elasticize(model: nn.Module, spec: StudentSpec) -> Student:
    """Put routers in front of a frozen model's parts, in place. All gates start open: the student is the teacher.

    model: a causal language model, vision transformer or vision-language model of transformers, or a vision transformer
    of timm. Raises ValueError for an architecture or a combination that is not supported, before anything is changed;
    and where the student does not do what the model does, with the libraries that are installed (students.selfcheck).
    """
    if any(isinstance(module, Wrapper) for module in model.modules()):
        raise ValueError("this model has routers already; load a fresh one")
    check = _self_check(model) if must_check(model, spec) else None
    student = _elasticize(model, spec).train(False)
    if check is not None:
        check.compare(student)
    return student


def _self_check(model: nn.Module) -> SelfCheck:
    language = kind_of(model) in VISION_TOWERS or architecture_of(model)[0].causal
    model.requires_grad_(False).eval()  # gradients alone can change torch's order of sums
    if language:
        return SelfCheck(model, model, some_tokens(model), language=True)
    parameter = next(model.parameters())
    images = torch.randn(2, *image_shape(model), generator=torch.Generator().manual_seed(0)).to(parameter)
    return SelfCheck(model, partial(call, model), images, language=False)


def _elasticize(model: nn.Module, spec: StudentSpec) -> Student:
    if kind_of(model) in VISION_TOWERS:
        return _elasticize_vision_language(model, spec)
    record, blocks = architecture_of(model)
    for router in spec.routers:
        if router.kind == "image" or router.part == "vision":
            raise ValueError("image routers and `part: vision` are for vision-language models, which this is not")
    model.requires_grad_(False).eval()
    return (_elasticize_language if record.causal else _elasticize_image)(model, record, blocks, spec)


def _elasticize_vision_language(model: PreTrainedModel, spec: StudentSpec) -> VisionLanguageStudent:
    trunk, tower = model.get_decoder(), model.base_model.get_submodule(VISION_TOWERS[kind_of(model)])
    record, blocks = architecture_of(trunk)
    inside = spec.of("vision")
    if inside.routers:
        tower_record, tower_blocks = architecture_of(tower)
        for router in inside.routers:
            if router.kind in ("layer", "channel"):
                raise ValueError(
                    f"a {router.kind} router cannot stand in the vision tower of a vision-language model, whose "
                    "language model reads the states after its blocks: use token, head or expert routers"
                )
    model.requires_grad_(False).eval()
    language = spec.of("language")
    runtime, compute = _language_parts(model, trunk, record, blocks, language)
    vision = _elasticize_image(tower, tower_record, tower_blocks, inside) if inside.routers else None
    image = spec.find("image")
    if image is not None:
        trunk.door = _like(blocks[0], Door(ImageRouter(image, trunk.config.hidden_size, spec.gains)))
    return VisionLanguageStudent(model, record, blocks, language, runtime, compute, trunk=trunk, vision=vision)


def _elasticize_language(
    model: PreTrainedModel, record: Architecture, blocks: list[nn.Module], spec: StudentSpec
) -> LanguageStudent:
    trunk = model.base_model
    return LanguageStudent(
        model, record, blocks, spec, *_language_parts(model, trunk, record, blocks, spec), trunk=trunk
    )


def _language_parts(
    model: PreTrainedModel, trunk: PreTrainedModel, record: Architecture, blocks: list[nn.Module], spec: StudentSpec
) -> tuple[Runtime, ComputeModel]:
    """Routers in the blocks of a language model and in front of its head."""
    for router in spec.routers:
        if router.selection == "quota" or router.dropped != "return" or router.multiple != 1:
            raise ValueError(
                f"a {router.kind} router of a language model decides without looking at later tokens: `selection: "
                "quota`, `dropped: stay`, `dropped: merge` and `multiple` are for images"
            )
    runtime = Runtime()
    shapes = _shapes(trunk, record, blocks, spec, runtime)
    head = model.get_output_embeddings()
    vocabulary, width = head.weight.shape
    head_routed = 0
    if spec.find("vocab") is not None:
        rank = spec.find("vocab").rank or width // 4
        head_routed = rank * (width + vocabulary + 1)
        router = VocabRouter(width, rank, spec.gains)
        model.set_output_embeddings(_like(head, RoutedHead(head, runtime, router, spec.find("vocab"))))
    return runtime, ComputeModel(spec, shapes, vocabulary * width, head_routed)


def _elasticize_image(
    model: nn.Module, record: Architecture, blocks: list[nn.Module], spec: StudentSpec
) -> ImageStudent:
    for router in spec.routers:
        if router.kind == "vocab":
            raise ValueError("a vocab router needs a language model's head; image models have none")
        if router.kind in ("token", "layer") and "attn" in router.touches and router.kv == "keep":
            raise ValueError(f"image models keep no keys of skipped tokens: give the {router.kind} router `kv: drop`")
        if router.kind == "layer" and router.substitute:
            raise ValueError("a layer router of an image model takes no substitute; token routers do")
        if router.kind == "layer" and (router.granularity == "sequence" or router.network == "static"):
            raise ValueError("a layer router of an image model decides token by token")
    if spec.find("layer") and spec.find("token"):
        raise ValueError("image models take layer routers or token routers, not both: a layer router is both branches'")
    tokens, others = _probe(model, blocks)
    runtime = Runtime(causal=False, prefix=record.prefix)
    shapes = _shapes(model, record, blocks, spec, runtime)
    layer = spec.find("layer")
    if layer is not None:
        parent = trunk_of(model).get_submodule(record.blocks)
        stays, last = layer.dropped != "return", len(blocks) - 1
        for number, block in enumerate(blocks):
            if not (stays or layer.on(number)):
                continue
            routed = RoutedBlock(block, runtime, number, record.prefix, record.mask, layer.dropped, last=number == last)
            _like(block, routed)
            if layer.on(number):
                width = sizes_of(model, record, number, block).width
                routed.routers["layer"] = _like(block, Router(layer, width, 1, gains=spec.gains))
                shapes[number].routers["layer"] = routed.routers["layer"].macs(width)
                if layer.dropped == "merge":
                    shapes[number].routers["match"] = width
            parent[number] = blocks[number] = routed
    compute = ComputeModel(spec, shapes, 0, 0, image=True, prefix=record.prefix)
    ones = torch.ones(1, tokens, dtype=torch.bool)
    inside = compute.dense(ones, "prefill").sum()
    compute = replace(compute, outside=max(0, round(others - float(inside))))
    return ImageStudent(model, record, blocks, spec, runtime, compute, tokens=tokens)


@torch.no_grad()
def _probe(model: nn.Module, blocks: list[nn.Module]) -> tuple[int, int]:
    """(tokens of an image, multiply-accumulates of a forward pass), by looking at one."""
    seen: list[int] = []
    hook = blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    parameter = next(model.parameters())
    try:
        with flop_counter() as flops:
            call(model, torch.zeros(1, *image_shape(model), dtype=parameter.dtype, device=parameter.device))
    finally:
        hook.remove()
    return seen[0], flops.get_total_flops() // 2


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a model takes."""
    if isinstance(model, PreTrainedModel):
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return model.config.num_channels, height, width
    return model.patch_embed.proj.in_channels, *model.patch_embed.img_size


def _shapes(
    model: nn.Module, record: Architecture, blocks: list[nn.Module], spec: StudentSpec, runtime: Runtime
) -> tuple[BlockShape, ...]:
    """Put the routers of branches and linear layers into all blocks."""
    return tuple(
        _elasticize_block(sizes_of(model, record, number, block), record, spec, runtime, number, block)
        for number, block in enumerate(blocks)
    )


def _elasticize_block(
    sizes: Sizes, record: Architecture, spec: StudentSpec, runtime: Runtime, number: int, block: nn.Module
) -> BlockShape:
    width, heads, size, groups = sizes.width, sizes.heads, sizes.size, sizes.groups
    macs = {s: sum(block.get_submodule(n).weight.numel() for n in record.linears(s)) for s in LINEAR_SITES}
    neurons = weight_of(block.get_submodule(record.linears("mlp_out")[0])).shape[1]
    lora: dict[str, int] = {}
    routers: dict[str, int] = {}
    substitutes: dict[str, int] = {}

    def find(wrapper: RoutedBranch, kind: str) -> RouterSpec:
        return spec.find(kind, number, wrapper.branch if kind == "token" else "")

    def add_router(wrapper: RoutedBranch, kind: str, key: str, gates: int, members: Tensor | None = None) -> None:
        router_spec = find(wrapper, kind)
        router = Router(router_spec, width, gates, members, spec.gains)
        wrapper.routers[kind] = _like(wrapper.base_layer, router)
        if router_spec.granularity == "token":
            routers[key] = router.macs(width)

    def add_substitute(wrapper: RoutedBranch, kind: str, key: str) -> None:
        if rank := find(wrapper, kind).substitute:
            substitute = Substitute(width, min(width, rank))
            wrapper.substitutes[kind] = _like(wrapper.base_layer, substitute)
            substitutes[key] = substitute.macs()

    handover = BlockHandover()
    runtime.handovers.append(handover)
    own_q = len(record.attn_in) == 3
    channels = {site.split("_")[0] for site in LINEAR_SITES if spec.find("channel", number, site)}
    narrows = {
        "head": own_q and not record.whole_heads and "attn" not in channels,
        "expert": "mlp" not in channels,
    }

    for branch in BRANCHES:
        path = getattr(record, branch)
        late = getattr(record, f"{branch}_exit")
        kind = "head" if branch == "attn" else "expert"
        wrapper = RoutedBranch(
            block.get_submodule(path),
            runtime,
            number,
            branch,
            handover,
            prenorm=record.prenorm,
            late_exit=late is not None,
            narrows=narrows[kind],
            window=sizes.window,
            mask=record.mask,
        )
        if spec.find("token", number, branch):
            add_router(wrapper, "token", f"{branch}.token", 1)
            add_substitute(wrapper, "token", branch)
        if record.causal and spec.find("layer", number):
            if branch == "attn":
                add_router(wrapper, "layer", "layer", 1)
                add_substitute(wrapper, "layer", "layer")
                layer_router = wrapper.routers["layer"]
            else:
                wrapper.block_router = (layer_router,)
        gated = spec.find(kind, number) is not None
        if gated:
            count = heads if branch == "attn" else min(spec.find("expert", number).groups, neurons)
            channel_count = heads * size if branch == "attn" else neurons
            add_router(wrapper, kind, kind, count, torch.arange(channel_count) * count // channel_count)
        opens = gated and narrows[kind] and wrapper.routers[kind].spec.granularity == "token"
        opens = opens and wrapper.routers[kind].spec.network != "static"  # which opens the same for all tokens
        asks = record.causal and branch == "attn" and ({"token", "layer"} & set(wrapper.routers))

        for end in ("in", "out"):
            site = f"{branch}_{end}"
            channel_spec = spec.find("channel", number, site)
            names = record.linears(site)
            linears = [block.get_submodule(name) for name in names]
            inputs = weight_of(linears[0]).shape[1]
            channel = _like(linears[0], ChannelRouter(channel_spec, inputs, spec.gains)) if channel_spec else None
            corrected = spec.lora.rank > 0 and site in spec.lora.sites
            shared = Site(f"{number}.{site}", end == "out", opens, handover)
            for name, linear in zip(names, linears, strict=True):
                first = linear is linears[0]
                per_query = bool(asks) and (end == "out" or (own_q and first))
                narrowed = gated and narrows[kind] and (branch == "mlp" or first)
                part = "inputs" if gated and end == "out" else "outputs" if narrowed and end == "in" else ""
                if channel is None and not corrected and not part and not per_query:
                    continue
                routed = RoutedLinear(
                    linear,
                    runtime,
                    shared,
                    wrapper.handover,
                    part=part,
                    per_query=per_query,
                )
                if channel is not None:
                    routed.add_channels(channel)
                if corrected:
                    outputs = weight_of(linear).shape[0]
                    routed.lora = _like(linear, Lora(inputs, outputs, spec.lora.rank))
                    cost = site if site != "attn_in" else "q" if first and own_q else "kv"
                    always, gated_side = (inputs, outputs) if end == "in" else (outputs, inputs)
                    if cost == "kv":
                        always, gated_side = inputs + outputs, 0
                    lora[cost] = lora.get(cost, 0) + spec.lora.rank * always
                    lora[f"{cost}_open"] = lora.get(f"{cost}_open", 0) + spec.lora.rank * gated_side
                block.set_submodule(name, routed)
        if branch == "attn" and (wrapper.routers or record.causal) and hasattr(wrapper.base_layer, "config"):
            route_attention(wrapper.base_layer, runtime)  # timm's attention is no function by name
        if wrapper.routers or wrapper.block_router:
            block.set_submodule(path, wrapper)
            if late is not None:
                block.set_submodule(late, RoutedExit(block.get_submodule(late), runtime, wrapper.handover))

    layer = spec.find("layer", number) if record.causal else None
    others = [kind for kind in ("token", "head", "expert") if spec.find(kind, number)]  # they decide for all tokens
    if layer is not None and layer.kv == "drop" and not layer.substitute and not others:
        norm = block.get_submodule(record.norm) if record.prenorm else None
        BlockGather(block, block.get_submodule(record.attn), norm, handover)

    kv_share = 2 * groups / (heads + 2 * groups)
    return BlockShape(
        q=round(macs["attn_in"] * (1 - kv_share)),
        kv=round(macs["attn_in"] * kv_share),
        o=macs["attn_out"],
        mlp_in=macs["mlp_in"],
        mlp_out=macs["mlp_out"],
        per_key=2 * heads * size,
        window=sizes.window,
        own_q=own_q,
        narrows=narrows,
        lora=lora,
        routers=routers,
        substitutes=substitutes,
    )


def _like(place: nn.Module, added: nn.Module) -> nn.Module:
    """Put a new module on the device of the module it serves (its parameters stay float32)."""
    return added.to(next(place.parameters()).device)
