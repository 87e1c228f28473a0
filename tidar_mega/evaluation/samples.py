"""How good sampled text is: likelihood under an independent judge, entropy, and spelling (arXiv 2510.03929, section 5).

Shape suffixes: B samples, S tokens of each.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tidar_mega.data.stream import Samples
from tidar_mega.data.tokenizer import Tokenizer
from tidar_mega.model.attention import TrainingAttention, choose_backend
from tidar_mega.model.inference import InferenceModel
from tidar_mega.rows import CLEAN, Rows

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")  # letters, with apostrophes inside
WINDOW = 1 << 16  # tokens of the training text that `vocabulary` is to read at once, if there are so many
_JUDGED = 32  # samples of one forward of the judge


@torch.inference_mode()
def judged_loss(judge: InferenceModel, token_BS: Tensor) -> Tensor:
    """Mean negative log likelihood of each sample under a left-to-right model, nats per token, float64 [B].

    The first token of a sample has nothing before it and does not count.
    """
    return torch.cat([_judged(judge, part) for part in token_BS.split(_JUDGED)])


def _judged(judge: InferenceModel, token_BS: Tensor) -> Tensor:
    token_BS = token_BS.to(judge.device)
    order_BS = torch.arange(token_BS.shape[1], device=judge.device).expand_as(token_BS)
    zero = torch.zeros_like(token_BS)
    rows = Rows(token_BS, order_BS, order_BS, order_BS + 1, zero + CLEAN, zero, zero, zero.float())
    hidden_SBD = judge(rows, TrainingAttention(rows, choose_backend("auto", judge.device, judge.dtype)))
    log_SBV = judge.logits(hidden_SBD[:-1].flatten(0, 1)).log_softmax(dim=-1)
    label_N1 = token_BS[:, 1:].t().reshape(-1, 1)
    loss_SB = -log_SBV.gather(1, label_N1).view(-1, token_BS.shape[0])
    return loss_SB.double().mean(dim=0).cpu()


def entropy(tokens: Sequence[Sequence[int]]) -> float:
    """Of the distribution of tokens inside a sample, in nats, mean over the samples: low where text repeats itself."""
    return sum(_entropy(Counter(sample)) for sample in tokens) / len(tokens)


def _entropy(counts: Counter) -> float:
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


def words(text: str) -> list[str]:
    """Whole words of a cut piece of text, in lower case: the first and the last may have been cut, and do not count."""
    return [match.lower() for match in _WORD.findall(text)][1:-1]


def vocabulary(stream: Samples) -> set[str]:
    """Every word of a split; `stream` has long windows."""
    found: set[str] = set()
    for _, part, _ in stream.parts(1):
        for i in range(part.samples_per_epoch):
            found.update(words(stream.tokenizer.decode(part.rows(i).token[0].tolist())))
    return found


def spelling_accuracy(texts: Iterable[str], known: set[str]) -> float:
    """The share of the words of the texts that are in the training text; 0 where there is no word at all."""
    found = [word in known for text in texts for word in words(text)]
    return sum(found) / max(len(found), 1)


def measure(judge: InferenceModel, tokenizer: Tokenizer, known: set[str], token_BS: Tensor) -> dict[str, float]:
    """judge_nll (nats per token) with its standard error over samples, entropy (nats), spelling_accuracy."""
    loss_B, tokens = judged_loss(judge, token_BS), token_BS.tolist()
    return {
        "judge_nll": float(loss_B.mean()),
        "judge_nll_error": float(loss_B.std() / math.sqrt(len(loss_B))) if len(loss_B) > 1 else float("nan"),
        "entropy": entropy(tokens),
        "spelling_accuracy": spelling_accuracy(map(tokenizer.decode, tokens), known),
    }
