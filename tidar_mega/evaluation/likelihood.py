"""The likelihood of held-out text under the AR half: a plain causal forward."""

from __future__ import annotations

import torch

from tidar_mega.data.stream import Stream
from tidar_mega.decode.engine import Engine
from tidar_mega.device import device
from tidar_mega.losses import cross_entropy
from tidar_mega.model.attention import TrainingAttention, choose_backend
from tidar_mega.rows import concatenate


@torch.inference_mode()
def held_out_loss(engine: Engine, stream: Stream, token_bytes, sequences: int = 16) -> dict:
    """AR loss on some held-out sequences: acceptance means nothing without it, as untrained halves agree on noise."""
    count = min(sequences, stream.samples_per_epoch)
    spread = [i * stream.samples_per_epoch // count for i in range(count)]
    rows = concatenate([stream.rows(i) for i in spread], dim=0).to(device())
    backend = choose_backend("auto", rows.token.device, next(engine.model.parameters()).dtype)
    hidden_TBD = engine.model(rows=rows, context=TrainingAttention(rows, backend))
    losses = cross_entropy(hidden_TBD, engine.model.head_weight, rows, engine.group, 2048)
    total = float(losses.loss.sum(dtype=torch.float64))
    length = torch.as_tensor(token_bytes, device=rows.token.device)[rows.label[losses.index]]
    return {
        "validation_nats_per_token": total / len(losses.loss),
        "validation_nats_per_byte": total / float(length.sum()),
    }
