"""What a run will cost, before it costs anything: parameters, memory, work, communication, time. Arithmetic, no torch.

layout.py         a config cut up over GPUs: who holds which layers, heads and rows
parameters.py     counts of weights
work.py           rows, visible pairs and floating point operations of the true mask
memory.py         weights, gradients, optimizer, activations and logits of one rank
communication.py  bytes of each kind of link
hardware.py       data-sheet figures, and the fractions of them that are assumed to be reached
timing.py         seconds of a step
search.py         all layouts of a number of GPUs
report.py         what `tidar plan` prints; command.py its options
"""

from tidar_mega.plan.parameters import head_parameters, layer_parameters
from tidar_mega.plan.work import training_flops

__all__ = ["head_parameters", "layer_parameters", "training_flops"]
