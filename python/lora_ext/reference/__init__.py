"""The oracle: what every op computes, in plain torch.

Three independent forms of the same mathematics, for tests and for reading:

* fp64, one slot at a time, in any of the three weight layouts:
  `shrink`, `expand`, `apply`, `embedding`;
* per-segment control flow with `addmm`, as engines run it eagerly:
  `segmented_shrink`, `segmented_expand`;
* a masked loop over all slots without a host read, as engines capture it:
  `masked_shrink`, `masked_expand`.

`plan` and `moe_lora_info` are the batch's bookkeeping; `moe_groups`, `moe_routing` and `moe_apply`
are the MoE ops, in fp64.

Symbols: T tokens, K input features, S slices, N_i output features of slice i (N their sum), L
slots, R maximum rank, r_l the rank of slot l. A token of slot -1, or of a slot of rank 0, has no
adapter.
The intermediate of a token of slot l is packed at its rank: slice i occupies columns `i * r_l` to
`(i + 1) * r_l` of `[T, S * R]`, zeros behind.
"""

from lora_ext.reference.batch_plan import Plan, moe_lora_info, plan
from lora_ext.reference.dense import apply, embedding, expand, factors_a, factors_b, shrink
from lora_ext.reference.moe import moe_apply, moe_groups, moe_routing
from lora_ext.reference.torch_native import (
    masked_expand,
    masked_shrink,
    segmented_expand,
    segmented_shrink,
)

__all__ = [
    "Plan",
    "apply",
    "embedding",
    "expand",
    "factors_a",
    "factors_b",
    "masked_expand",
    "masked_shrink",
    "moe_apply",
    "moe_groups",
    "moe_lora_info",
    "moe_routing",
    "plan",
    "segmented_expand",
    "segmented_shrink",
    "shrink",
]
