"""Expert routers: they choose groups of an MLP's neurons for each token."""

from __future__ import annotations

from students.architectures.record import Architecture
from students.calibration.fit import cluster_neurons
from students.calibration.observe import BlockStart
from students.calibration.price import Choice
from students.kinds.head import HeadKind
from students.places import BlockPlace
from students.spec import RouterSpec, StudentSpec


class ExpertKind(HeadKind):
    """A gate for each group of MLP neurons, executed like the gates of heads (students/execution/branch.py)."""

    name = "expert"
    fields = (*HeadKind.fields, "groups", "grouping")
    branch = "mlp"

    def check_model(self, spec: RouterSpec, record: Architecture, student: StudentSpec) -> None:
        super().check_model(spec, record, student)
        if not record.mlp_out:
            raise ValueError(
                "an expert router chooses groups of neurons of a dense MLP; the MLPs of this model are mixtures of "
                "experts already"
            )
        if not record.mlp:
            raise ValueError(
                "an expert router reads what the MLP reads; the blocks of this model run the layers of their MLP "
                "themselves: use channel routers"
            )

    def parts(self, spec: RouterSpec, place: BlockPlace) -> tuple[int, int]:
        return min(spec.groups, place.neurons), place.neurons

    def start(self, spec: RouterSpec, block: BlockStart) -> list[Choice]:
        if spec.grouping == "coactivation":
            router, neurons = block.router("mlp", "expert"), block.seen(block.record.linears("mlp_out")[0]).x
            assert router.members is not None
            router.members.copy_(cluster_neurons(neurons, router.gates))
        return super().start(spec, block)


KIND = ExpertKind()
