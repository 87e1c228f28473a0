"""The likelihood of held-out text under the AR half: a plain causal forward."""

from __future__ import annotations

import torch

from tidar_mega.data.stream import Stream
from tidar_mega.decode.engine import Engine
from tidar_mega.decode.sampling import log_sum, take_ids
from tidar_mega.model.attention import TrainingAttention, choose_backend


@torch.inference_mode()
def held_out_loss(engine: Engine, stream: Stream, token_bytes, sequences: int = 16) -> dict:
    """AR loss on some held-out sequences: acceptance means nothing without it, as untrained halves agree on noise.

    The same on every rank of a tensor-parallel layout; empty on pipeline stages before the last.
    """
    model = engine.model
    group = model.tensor if model.tensor.size() > 1 else None
    backend = choose_backend("auto", model.device, model.dtype)
    count = min(sequences, stream.samples_per_epoch)
    nats = tokens = length = 0.0
    for i in range(count):
        rows = stream.rows(i * stream.samples_per_epoch // count).to(model.device)
        hidden_T1D = model(rows, TrainingAttention(rows, backend))
        if hidden_T1D is None:
            continue
        counts_T = rows.weight[0] > 0
        logits_TV, label_T = model.logits(hidden_T1D[counts_T, 0]), rows.label[0, counts_T]
        nats += float((log_sum(logits_TV, group)[:, 0] - take_ids(logits_TV, label_T, group)).sum(dtype=torch.float64))
        tokens += len(label_T)
        length += float(torch.as_tensor(token_bytes, device=model.device)[label_T].sum())
    if not tokens:
        return {}
    return {"validation_nats_per_token": nats / tokens, "validation_nats_per_byte": nats / length}
