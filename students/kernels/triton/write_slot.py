"""Write the keys and values of one token into their slot of a cache, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from students.kernels.triton.chaining import chained, follow
from students.kernels.triton.launching import launched


@launched()
def _write_slot(
    keys,
    values,
    key,
    value,
    slot,
    heads,
    length,
    key_size,
    value_size,
    key_row,
    key_head,
    value_row,
    value_head,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow(CHAINED)
    head, place = tl.program_id(0).to(tl.int64), tl.load(slot)
    row, own = head // heads, head % heads
    feature = tl.arange(0, KEY)
    here = feature < key_size
    one = tl.load(key + row * key_row + own * key_head + feature, mask=here)
    tl.store(keys + (head * length + place) * key_size + feature, one, mask=here)
    feature = tl.arange(0, VALUE)
    here = feature < value_size
    one = tl.load(value + row * value_row + own * value_head + feature, mask=here)
    tl.store(values + (head * length + place) * value_size + feature, one, mask=here)


def write_slot(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slot: Tensor) -> None:
    """`ops.write_slot` in Triton."""
    batch, heads, length, size = keys.shape
    other = values.shape[3]
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    _write_slot[(batch * heads,)](
        *(keys, values, key, value, slot, heads, length, size, other, *key.stride()[:2], *value.stride()[:2]),
        KEY=triton.next_power_of_2(size),
        VALUE=triton.next_power_of_2(other),
        CHAINED=chained(keys.device),
        launch_pdl=chained(keys.device),
        num_warps=1,
    )
