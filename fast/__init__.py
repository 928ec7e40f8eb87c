"""Optional speed: three functions of the plain scripts, computed faster, and one that lays weights
out for them. Nothing else may be called from outside; without this folder everything works, slower.
Tests hold the three against their plain twins.

    forward_sums    train.py      rows without pads, tokens by expert, head and loss in one pass
    micro_batches   train.py      passes cut by tokens
    decode          generate.py   refilled batch slots, shared prompt prefixes, grouped experts,
                                  CUDA graphs, a shortlist for the head
    prepare         -             lays weights out once, after loading and fingerprinting
"""

from fast.decoding import decode
from fast.layers import prepare
from fast.training import forward_sums, micro_batches

__all__ = ["decode", "forward_sums", "micro_batches", "prepare"]
