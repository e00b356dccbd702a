"""What only a process on the stub of CUDA can find out about captures and launches; prints it as JSON."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from torch import Tensor

from students import RouterSpec, StudentSpec
from students.families.language import LanguageStudent
from students.kernels.capture import CudaGraph
from tests.cuda_stub.run import graphs
from tests.students.test_execution import make
from tests.students.test_launches import DEFAULT

OPTIONS = dict(max_new_tokens=3, do_sample=False, pad_token_id=0)
SIZES = dict(vocab_size=512, hidden_size=64, intermediate_size=128)
"""Those of the shape tiny-llm, whose kernels are compiled where a bench of it ran before."""
TOKENS = (RouterSpec("token", network="mlp", substitute=16, prefix=4),)


def step(blocks: int, rows: int, kind: str) -> int:
    """Return the launches in a recorded decoding step; kind: gates are "open", or as they are ("routed"), or routers
    decide on "tokens"."""
    tokens = torch.randint(3, 120, (rows, 7), generator=torch.Generator().manual_seed(0)).cuda()
    student = make("llama", StudentSpec(TOKENS if kind == "tokens" else DEFAULT), num_hidden_layers=blocks, **SIZES)
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


@torch.enable_grad()
def mask_gradient(device: str) -> Tensor:
    """Return the gradient of attention by its mask, on the CPU."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 7, 8, generator=draw).to(device) for _ in range(3))
    mask = torch.zeros(2, 1, 7, 7, device=device, requires_grad=True)
    query.requires_grad_()  # else torch keeps too little for the gradient of the mask
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return torch.autograd.grad(out.square().sum(), mask)[0].cpu()


def main() -> None:
    """Print launches per block by kind and rows, what a capture refuses, and whether masks have their gradient."""
    one: Tensor = torch.ones(3, device="cuda")
    found = {
        "allowed": refused(lambda: torch.histc(one.int(), bins=4, min=0, max=3)),  # as mixtures count their tokens
        "item": refused(lambda: one.sum().item()),
        "nonzero": refused(lambda: one.nonzero()),
        "synchronize": refused(torch.cuda.synchronize),
        "after": refused(lambda: one + 1),
        "mask": torch.allclose(mask_gradient("cuda"), mask_gradient("cpu"), atol=1e-5),
    }
    for kind, rows in (("routed", 1), ("open", 1), ("routed", 17), ("tokens", 1)):
        found[f"{kind} {rows}"] = step(3, rows, kind) - step(2, rows, kind)
    print(json.dumps(found))


if __name__ == "__main__":
    with torch.no_grad():
        main()
