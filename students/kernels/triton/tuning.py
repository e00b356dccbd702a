"""Launch configurations of the kernels that read weights or a cache, by shape and GPU; where kernels are not used."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

MOST_ROWS = 16
"""Maximum inputs that select channels and rows together: tensor cores multiply so many at a time. Eight or more need
nearly all channels and rows, and gain launches alone: 7 a block, where gates and dense products are 11."""
MOST_RANGES = 64
"""Maximum ranges of a weight's inputs."""
MOST_SPLITS = 32
"""Maximum ranges of a cache's slots, whose partial sums are read by one program."""
MOST_WAVES = 4
"""Maximum waves of programs: more programs balance better, but each program begins with a wait for memory."""


@dataclass(frozen=True)
class Gather:
    """Launch configuration of read_channels.py."""

    strip: int
    """Outputs that a program owns."""
    step: int
    """Channels that a program multiplies at a time."""
    resident: int
    """Programs that a multiprocessor runs at the same time."""
    warps: int
    stages: int
    """Pipelined steps in flight at the same time, from the inputs to the product."""

    def split(self, inputs: int, strips: int, multiprocessors: int) -> int:
        """Return into how many ranges the inputs are split: as few as leave the least idle share of full waves of
        programs, where up to 5 % idle counts as none."""
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
    """Launch configuration of dot_rows.py and exact_rows.py."""

    step: int
    """Rows that a program multiplies at a time."""
    width: int
    """Inputs of each row that a program reads at a time."""
    programs: int
    """Programs that share the list of rows."""
    warps: int
    stages: int


@dataclass(frozen=True)
class Attend:
    """Launch configuration of decode_attention.py."""

    slots: int
    """Maximum slots of the cache that a program reads at a time."""
    tile: int
    """Maximum bytes of keys that a program reads at a time; their values are as many bytes again."""
    resident: int
    """Programs that a multiprocessor runs at the same time."""
    warps: int
    stages: int

    def block(self, size: int, itemsize: int) -> int:
        """Return how many slots are read at a time, for heads with `size` channels of `itemsize` bytes."""
        return max(16, min(self.slots, self.tile // (size * itemsize)))

    def split(self, heads: int, multiprocessors: int) -> int:
        """Return into how many ranges the slots of each key head are split, `heads` counting the key heads of all rows
        of a batch: a power of two with which all programs run at once. It does not depend on the number of slots, so
        that a cache that grows needs no other kernel."""
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
"""Launches by compute capability, then by (one input or a few, class of output widths: see `width_of`); None: a dense
product is faster. Derived from the resources of the compiled kernels, not measured: `python -m students.kernels.bench
--tune` measures.

Four programs of four warps fit on a multiprocessor, or two of eight (at most 128 registers a thread), with 60 to 200
KiB of weights in flight, where an H200's bandwidth times latency asks for some 30 KiB a multiprocessor. The loop takes
a warp 120 to 130 instructions for 2 KiB of kept weights. With the list, four inputs take 0.35 to 0.48 of the issue
slots that pass while memory reads an 8 B model's weights at 4.3 TB/s, eight inputs 0.39 to 0.51 (0.52 to 0.65 with four
warps and strips half as wide), and sixteen 0.41 to 0.58, so that memory is the limit. The obstacle to 1.05 of a dense
product's time at a share of 1 is the list, which precedes the weights: 70 to 300 instructions of a warp for one input
(0.2 to 0.7 us a launch), 250 to 600 for two to sixteen, of which only those for the first 256 to 1,024 channels are
waited for. Wide strips mean fewer programs that repeat the list; narrow strips, with few outputs, fewer ranges whose
sums are added."""

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
"""Launches by compute capability and whether there is one input or a few; not measured either."""


ATTEND: dict[int, Attend] = {
    80: Attend(slots=64, tile=16384, resident=2, warps=4, stages=3),
    90: Attend(slots=64, tile=16384, resident=2, warps=4, stages=3),
}
"""Launches by compute capability, derived for 8 key heads of 128 channels on 132 multiprocessors, not measured. One row
of a batch has 32 ranges a head: with 256 slots in use 4 of them have slots to read, with 1,024 slots 16, with 4,096 all
(128 slots each, all in flight at once: 64 KiB a program). 8 rows have 4 ranges a head, each reading 64 of 256 slots."""


def width_of(outputs: int) -> str:
    """Return the class of a number of outputs: narrow, as attention projections; middle, as gate and up; wide, as LM
    heads."""
    return "narrow" if outputs <= 8192 else "middle" if outputs <= 65536 else "wide"


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; that of an H100 for any other device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def capability(device: torch.device) -> int:
    """Return the highest compute capability in the tables up to the device's, or the lowest if all are higher; for a
    device that is no GPU, the highest of all."""
    if device.type != "cuda":
        return max(GATHER)
    major, minor = torch.cuda.get_device_capability(device)
    return max((known for known in GATHER if known <= 10 * major + minor), default=min(GATHER))


def gather(device: torch.device, rows: int, outputs: int) -> Gather | None:
    """Return how `rows` inputs read channels of a weight [*, outputs]; None if reading all channels is faster."""
    if rows > MOST_ROWS:
        return None
    return GATHER[capability(device)]["one" if rows == 1 else "few", width_of(outputs)]


def rows_of(device: torch.device, rows: int) -> Rows:
    """Return how `rows` inputs are multiplied with selected rows of a weight."""
    return ROWS[capability(device)]["one" if rows == 1 else "few"]


def attend(device: torch.device) -> Attend:
    """Return how one token attends to a cache."""
    return ATTEND[capability(device)]
