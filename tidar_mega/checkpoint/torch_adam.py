"""What megatron-core's distributed optimizer lacks to save and load torch's AdamW.

Without Transformer Engine and apex megatron-core falls back to torch's AdamW, whose state its distributed optimizer
cannot load: it expects state before the first step (`train/optim.py` makes it), has no place for AdamW's step tensor,
and after a load gives every parameter one shared step tensor, which AdamW then advances once per parameter (a silent
drift). Nothing here does anything when a fused Adam is in use.
"""

from __future__ import annotations

import functools

import torch
from megatron.core.optimizer import MegatronOptimizer, distrib_optimizer


def load_state(optimizer: MegatronOptimizer, state: dict) -> None:
    """`optimizer.load_state_dict`, after which every parameter has a step of its own."""
    _mend_loading()
    optimizer.load_state_dict(state)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for param_state in part.optimizer.state.values():
                param_state["step"] = torch.as_tensor(param_state["step"], dtype=torch.float32).clone()


@functools.cache
def _mend_loading() -> None:
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return

    megatrons = distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states

    @torch.no_grad()
    def set_main_param_and_optimizer_states(self, model_param, tensors):
        if not isinstance(self.optimizer, torch.optim.AdamW):
            megatrons(self, model_param, tensors)
            return
        group, place = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][place]
        for name, target in {"param": main_param, **self.optimizer.state[main_param]}.items():
            if name != "step":  # restored by load_state_dict from the parameter groups
                target.copy_(tensors[name])

    distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
