"""What only a process on the stub of CUDA can find out about captures and launches; prints it as JSON."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from students import StudentSpec
from students.families.language import LanguageStudent
from students.kernels.capture import CudaGraph
from tests.cuda_stub.run import graphs
from tests.students.test_execution import make
from tests.students.test_launches import DEFAULT

OPTIONS = dict(max_new_tokens=3, do_sample=False, pad_token_id=0)
SIZES = dict(vocab_size=512, hidden_size=64, intermediate_size=128)
"""Those of the shape tiny-llm, whose kernels are compiled where a bench of it ran before."""


def step(blocks: int, rows: int, kind: str) -> int:
    """Return the launches in a recorded decoding step; kind: gates are "open", or as they are ("routed")."""
    tokens = torch.randint(3, 120, (rows, 7), generator=torch.Generator().manual_seed(0)).cuda()
    student = make("llama", StudentSpec(DEFAULT), num_hidden_layers=blocks, **SIZES)
    assert isinstance(student, LanguageStudent)
    student.to("cuda", torch.bfloat16)
    student.prepare()
    student.runtime.bypass = kind == "open"
    student.generate(tokens, **OPTIONS)
    return graphs()[-1]


def refused(work: object) -> str:
    """Return the error of work in a capture; empty if there is none."""
    try:
        CudaGraph(work)  # type: ignore[arg-type]
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def main() -> None:
    """Print launches per block by kind and rows, and what a capture refuses."""
    one: Tensor = torch.ones(3, device="cuda")
    found = {
        "allowed": refused(lambda: torch.histc(one.int(), bins=4, min=0, max=3)),  # as mixtures count their tokens
        "item": refused(lambda: one.sum().item()),
        "nonzero": refused(lambda: one.nonzero()),
        "synchronize": refused(torch.cuda.synchronize),
        "after": refused(lambda: one + 1),
    }
    for kind, rows in (("routed", 1), ("open", 1), ("routed", 17)):
        found[f"{kind} {rows}"] = step(3, rows, kind) - step(2, rows, kind)
    print(json.dumps(found))


if __name__ == "__main__":
    with torch.no_grad():
        main()
