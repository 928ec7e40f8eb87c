"""train.py's forward_sums and micro_batches, faster.

N target tokens, P passes (R-Drop has two), T tokens of all rows, D hidden.
"""

import bisect
from argparse import Namespace

import numpy as np
import torch
from torch import Tensor

from crosslora import CrossLoRA
from data import Example
from fast import experts
from fast.attention import Rows
from fast.kernels import head_loss
from fast.layers import hidden_states
from model import CausalLM


def direction(example: Example) -> tuple[str, str]:
    return example.src_lang, example.tgt_lang


def concatenate(examples: list[Example], copies: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Examples one after another, without pads: tokens (1, T), each row `copies` times; labels
    (N,), all target tokens, the end of turn included; where the tokens before them stand in each
    copy, (N, copies), indices into T; the lengths of all rows."""
    pieces, lengths, at, end = [], [], [], 0
    for example in examples:
        ends = []
        for _ in range(copies):
            pieces.append(example.ids[:-1])
            lengths.append(len(example.ids) - 1)
            end += lengths[-1]
            ends.append(end)
        # The last tokens of a row stand before its targets.
        at.append(np.arange(-example.target_count, 0)[:, None] + np.array(ends))
    tokens = np.concatenate(pieces)[None]
    labels = np.concatenate([example.ids[example.prompt_length :] for example in examples])
    tensors = [torch.from_numpy(x).long() for x in (tokens, labels, np.concatenate(at))]
    return *tensors, lengths


def forward_sums(
    model: CausalLM,
    adapter: CrossLoRA,
    examples: list[Example],
    rdrop_alpha: float,
    dropout: bool,
    together: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As train.forward_sums. Where rdrop_alpha > 0, every row stands there twice, each copy with
    its own dropout, the two side by side so that they share their experts, as neighbours of one
    direction do. together: see experts.for_rows."""
    device, passes = model.device, 2 if rdrop_alpha > 0 else 1
    examples = sorted(examples, key=direction)
    tokens, labels, at, lengths = concatenate(examples, passes)  # (1, T), (N,), (N, P)
    src_langs, tgt_langs = zip(*map(direction, examples))
    counts = [passes * (len(example.ids) - 1) for example in examples]
    last = [passes * example.target_count for example in examples]
    lora = experts.for_rows(
        adapter, src_langs, tgt_langs, counts, last, model.dtype, dropout, together
    )
    wanted = at.view(1, -1).to(device)  # (N, P) -> (1, N*P): only these need last layer and head
    rows = Rows.of(lengths, device)
    hidden = hidden_states(model, tokens.to(device), lora, rows, wanted=wanted)  # (1, N*P, D)
    hidden = hidden.view(*at.shape, -1)  # (1, N*P, D) -> (N, P, D)
    return head_loss(hidden, model.lm_head.weight, labels.to(device), rdrop_alpha)


def pass_tokens(model: CausalLM, args: Namespace) -> int:
    """Most tokens of a pass: on a GPU what --micro-batch-size rows of --max-length hold; on a CPU
    what its caches do, but enough for reading a weight from memory, once per pass, to be little
    beside the products."""
    if model.device.type == "cuda":
        return args.micro_batch_size * args.max_length
    return max(384, 2**20 // model.cfg.intermediate_size)


def cut(rows: list[Example], most: int) -> list[list[Example]]:
    """`rows` in passes of at most `most` tokens each; a longer row has a pass of its own."""
    passes, room = [], 0
    for row in rows:
        if len(row.ids) > room:
            passes.append([])
            room = most
        passes[-1].append(row)
        room -= len(row.ids)
    return passes


def micro_batches(model: CausalLM, examples: list[Example], args: Namespace) -> list[list[Example]]:
    """As train.micro_batches, cut by tokens: as few passes as pass_tokens allows, as even as these
    can be, with rows of one direction side by side."""
    rows = sorted(examples, key=direction)
    limits = range(pass_tokens(model, args) + 1)
    fewest = len(cut(rows, limits[-1]))

    def needs_no_more(most: int) -> bool:
        return len(cut(rows, most)) == fewest

    return cut(rows, bisect.bisect_left(limits, True, key=needs_no_more))
