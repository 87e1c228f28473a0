"""Telling a failure of communication, which some other rank has caused, from a failure of this rank."""

from __future__ import annotations

import torch.distributed as dist


def of_communication(error: BaseException) -> bool:
    """True for what torch.distributed raises where another rank did not take part or is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
