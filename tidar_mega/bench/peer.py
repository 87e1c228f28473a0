"""Hugging Face transformers on the weights of a checkpoint: what decoding is measured against."""

from __future__ import annotations

from pathlib import Path

import torch

from tidar_mega.decode.load import Loaded, write_transformers
from tidar_mega.decode.requests import Generation
from tidar_mega.decode.sampling import SamplingParams


def open_peer(loaded: Loaded, folder: Path) -> Transformers | None:
    """transformers with the same weights, or None with a line that says why not."""
    if loaded.mesh.world_size > 1:
        print("transformers is left out: it would decode in one process, this runs in several")
        return None
    try:
        import transformers  # noqa: F401
    except ImportError:
        print('transformers is left out: not installed; pip install "tidar_mega[eval]"')
        return None
    written = loaded.checkpoint
    if loaded.step is not None:
        written = write_transformers(loaded.checkpoint, loaded.config, folder / "model", loaded.mesh)
    return Transformers(written, loaded.tokenizer.eod, loaded.engine.model.dtype, loaded.engine.model.device)


class Transformers:
    """Hugging Face's own generation, greedy, with its cache."""

    def __init__(self, folder: Path, eod: int, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.eod = eod  # a model's own generation_config may have several
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def generate(self, prompts, params: list[SamplingParams], batch: int, **options) -> list[Generation]:
        found = []
        for first in range(0, len(prompts), batch):
            token_NT = torch.tensor(prompts[first : first + batch], device=self.model.device)
            with torch.inference_mode():
                output_NT = self.model.generate(
                    token_NT,
                    attention_mask=torch.ones_like(token_NT),
                    max_new_tokens=params[first].max_tokens,
                    do_sample=False,
                    eos_token_id=self.eod,
                    pad_token_id=self.eod,
                    **options,
                )
            for row in output_NT[:, token_NT.shape[1] :].tolist():
                end = row.index(self.eod) + 1 if self.eod in row else len(row)
                found.append(Generation(tokens=row[:end]))
        return found
