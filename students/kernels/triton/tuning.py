"""How the kernels that read weights are launched, for what shapes on what GPU, and where they are not used."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

MOST_ROWS = 8
"""Inputs for which channels and rows are chosen together; beyond, nearly all are needed by some, and a dense product is
faster."""
MOST_RANGES = 64
MOST_SPLITS = 32
"""Of a cache's slots: what they add up to is read by one program."""
MOST_WAVES = 4
"""Of programs: more of them are spread more evenly, but each begins with a wait for memory."""


@dataclass(frozen=True)
class Gather:
    """The launch of read_channels.py."""

    strip: int
    """Outputs that a program owns."""
    step: int
    """Channels that it multiplies by at a time."""
    resident: int
    """Programs that a multiprocessor runs at the same time."""
    warps: int
    stages: int
    """Steps that are under way at the same time, from the inputs to the product."""

    def split(self, inputs: int, strips: int, multiprocessors: int) -> int:
        """Into how many ranges the inputs are cut: programs in as few full waves as there can be."""
        wave = self.resident * multiprocessors
        most = max(1, min(MOST_RANGES, inputs // (4 * self.step)))
        idle: dict[int, float] = {}
        for split in range(1, most + 1):
            waves = -(-strips * split // wave)
            if waves > MOST_WAVES and idle:
                break
            idle[split] = max(round(1 - strips * split / (waves * wave), 2) - 0.05, 0)
        return min(idle, key=lambda split: (idle[split], split))


@dataclass(frozen=True)
class Rows:
    """The launch of dot_rows.py and exact_rows.py."""

    step: int
    """Rows that a program multiplies at a time."""
    width: int
    """Inputs that it reads of each at a time."""
    programs: int
    """Programs that share the list of rows."""
    warps: int
    stages: int


@dataclass(frozen=True)
class Attend:
    """The launch of decode_attention.py."""

    slots: int
    """Slots of the cache that a program reads at a time, at most."""
    tile: int
    """Bytes of keys that these have, at most: as many of values come with them."""
    resident: int
    """Programs that a multiprocessor runs at the same time."""
    warps: int
    stages: int

    def block(self, size: int, itemsize: int) -> int:
        """How many slots are read at a time of heads of this size."""
        return max(16, min(self.slots, self.tile // (size * itemsize)))

    def split(self, heads: int, multiprocessors: int) -> int:
        """Into how many ranges the slots of each of so many key heads are cut, those of all rows of a batch counted: a
        power of two, so that all programs run at once. It says nothing of how many slots there are, so that a cache
        that grows needs no other kernel."""
        most = max(1, min(MOST_SPLITS, self.resident * multiprocessors // heads))
        return 1 << most.bit_length() - 1


_ONE = Gather(strip=256, step=16, resident=4, warps=4, stages=5)
_FEW = Gather(strip=512, step=16, resident=2, warps=8, stages=4)
_FEW_NARROW = Gather(strip=256, step=32, resident=2, warps=8, stages=3)
_ONE_90 = replace(_ONE, stages=6)

GATHER: dict[int, dict[tuple[str, str], Gather | None]] = {
    80: {
        ("one", "narrow"): _ONE,
        ("one", "middle"): _ONE,
        ("one", "wide"): _ONE,
        ("few", "narrow"): _FEW_NARROW,
        ("few", "middle"): _FEW,
        ("few", "wide"): _FEW,
    },
    90: {
        ("one", "narrow"): _ONE_90,
        ("one", "middle"): _ONE_90,
        ("one", "wide"): _ONE_90,
        ("few", "narrow"): _FEW_NARROW,
        ("few", "middle"): _FEW,
        ("few", "wide"): _FEW,
    },
}
"""By compute capability, whether it is one input or a few, and how many outputs there are (see `width_of`); None: a
dense product is faster. Reckoned from what the compiled kernels need, not measured: `python -m students.kernels.bench
--tune` does that.

Four programs of four warps fit on a multiprocessor, or two of eight (at most 128 registers a thread), with 60 to 200
KiB of weights on their way, where an H200's bandwidth times latency asks for some 30 KiB of a multiprocessor. The loop
is 120 to 130 instructions of a warp for 2 KiB of weights that are kept. With the list, four inputs take 0.35 to 0.48 of
the issue slots that go by while memory reads an 8 B model's weights at 4.3 TB/s, and eight inputs 0.39 to 0.51 (with
four warps and strips half as wide 0.52 to 0.65), so that memory is the limit. What stands against 1.05 of a dense
product at a share of 1 is the list, before any weight is read: 70 to 300 instructions of a warp for one input (0.2 to
0.7 us a launch), 250 to 600 for two to eight, of which only the first 256 to 1,024 channels' are waited for. A wide
strip makes fewer programs that repeat the list, a narrow one of few outputs fewer ranges whose sums are added."""

ROWS: dict[int, dict[str, Rows]] = {
    80: {
        "one": Rows(step=16, width=256, programs=864, warps=4, stages=4),
        "few": Rows(step=16, width=256, programs=432, warps=4, stages=4),
    },
    90: {
        "one": Rows(step=16, width=256, programs=1056, warps=4, stages=4),
        "few": Rows(step=16, width=256, programs=528, warps=4, stages=4),
    },
}
"""By compute capability and whether it is one input or a few; not measured either."""


ATTEND: dict[int, Attend] = {
    80: Attend(slots=64, tile=16384, resident=2, warps=4, stages=3),
    90: Attend(slots=64, tile=16384, resident=2, warps=4, stages=3),
}
"""By compute capability. Reckoned for 8 key heads of 128 channels on 132 multiprocessors, not measured. One row has 32
ranges a head, of which 4 read something of 256 slots, 16 of 1,024 and all of 4,096 (128 slots each, all of which are on
their way at once: 64 KiB a program); 8 rows have 4 ranges a head, of which each reads 64 slots of 256."""


def width_of(outputs: int) -> str:
    """How many outputs there are, roughly, as in projections of attention; gate and up; LM heads."""
    return "narrow" if outputs <= 8192 else "middle" if outputs <= 65536 else "wide"


@cache
def multiprocessors(device: torch.device) -> int:
    """How many there are; of a device that is no GPU, those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def capability(device: torch.device) -> int:
    """The nearest compute capability that the tables know; a device that is no GPU is given the last."""
    if device.type != "cuda":
        return max(GATHER)
    major, minor = torch.cuda.get_device_capability(device)
    return max((known for known in GATHER if known <= 10 * major + minor), default=min(GATHER))


def gather(device: torch.device, rows: int, outputs: int) -> Gather | None:
    """How `rows` inputs read channels of a weight [*, outputs]; None: they had better read all."""
    if rows > MOST_ROWS:
        return None
    return GATHER[capability(device)]["one" if rows == 1 else "few", width_of(outputs)]


def rows_of(device: torch.device, rows: int) -> Rows:
    """How `rows` inputs are multiplied with chosen rows of a weight."""
    return ROWS[capability(device)]["one" if rows == 1 else "few"]


def attend(device: torch.device) -> Attend:
    """How one token attends to a cache."""
    return ATTEND[capability(device)]
