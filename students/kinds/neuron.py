"""Neuron routers: they choose neurons of a gated MLP for each token by the activations of the neurons' gates."""

from __future__ import annotations

from students.architectures.lookup import shape_of
from students.architectures.record import Architecture
from students.calibration.observe import BlockObservers, BlockStart
from students.calibration.price import Choice, limit_choice
from students.compute import BlockCost
from students.execution.neuron import RoutedActivation
from students.kinds.registry import Kind
from students.places import BlockPlace
from students.routers import ChannelRouter
from students.spec import RouterSpec, StudentSpec

MLP = ("mlp_in", "mlp_out")


class NeuronKind(Kind):
    """A limit for the magnitude of each neuron's gate activation; below it, the neuron's row of `up` and channel of
    `down` are not read (CATS, arXiv 2404.08763, but with limits that follow from one price of compute for all layers).
    Executed by students/execution/neuron.py."""

    name = "neuron"
    fields = ("blocks", "part")
    in_vision_tower = False
    limits = ("log_limit", "log_gain")

    def check_model(self, spec: RouterSpec, record: Architecture, student: StudentSpec) -> None:
        if not record.causal or len(record.mlp_in) != 2 or record.activation is None:
            raise ValueError(
                "a neuron router needs a language model whose MLP has a gate and an up projection of its own, and a "
                "module for the activation between them (as Llama)"
            )
        if student.find("expert") or student.find("channel", site="mlp_in") or student.find("channel", site="mlp_out"):
            raise ValueError("a neuron router chooses in the MLP alone: no expert router, channels of attention only")

    def attach(self, spec: RouterSpec, place: BlockPlace) -> None:
        if place.branch != "mlp":
            return
        router, name = ChannelRouter(spec, place.neurons, place.spec.gains), self._activation(place.record)
        opaque = not place.opaque.isdisjoint(MLP)
        routed = RoutedActivation(
            place.block.get_submodule(name), place.runtime, router, place.number, place.wrapper.context, opaque=opaque
        )
        place.block.set_submodule(name, place.like(routed))
        if opaque:
            return
        place.opens.add("mlp")
        place.narrowed |= {place.record.linears("mlp_in")[1]: "outputs", place.record.linears("mlp_out")[0]: "inputs"}

    def cost(self, spec: RouterSpec, cost: BlockCost) -> None:
        """Lower the share of weights read; the gate, half of what reads the MLP's input, is always computed."""
        if not cost.shape.opaque.isdisjoint(MLP):
            return
        share = cost.share(spec, "mlp.neuron", missing=0.0)  # no token entered this branch
        cost.left["mlp_in"] = (1 + share) / 2
        cost.left["mlp_out"] = share

    def observe(self, spec: RouterSpec, block: BlockObservers) -> None:
        block.linears("mlp_in", outputs=True)
        block.linears("mlp_out")
        block.module(self._activation(block.record), outputs=True)

    def start(self, spec: RouterSpec, block: BlockStart) -> list[Choice]:
        """Return the start of the limits. The cost of closing a neuron is estimated from its gate's activation and the
        mean square of its output of `up`, which is not known when the gate decides."""
        if not self.saves(spec, block.phase) or not block.shape.opaque.isdisjoint(MLP):
            return []
        router = block.block.get_submodule(f"{self._activation(block.record)}.routers.neuron")
        assert isinstance(router, ChannelRouter)
        up, down = block.linears("mlp_in")[1], block.linears("mlp_out")[0]
        activation = block.seen(self._activation(block.record)).y
        weight = block.importance("mlp_out") * block.seen(block.record.linears("mlp_in")[1]).y.pow(2).mean(0)
        saving = (shape_of(up)[1] + shape_of(down)[0]) / block.dense
        return [limit_choice(router, activation, weight, saving)]

    @staticmethod
    def _activation(record: Architecture) -> str:
        return f"{record.mlp}.{record.activation}"


KIND = NeuronKind()
