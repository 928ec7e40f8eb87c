"""generate.py's decode, faster: batch slots that are refilled, shared prompt prefixes, experts in
groups, and on a GPU steps from CUDA graphs.

B rows in decoding, each at a place of the batch, n whose prompts are read, T tokens of those,
D hidden.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from crosslora import CrossLoRA
from fast import experts
from fast.attention import Rows
from fast.layers import Cache, greedy, hidden_states
from model import CausalLM

# Tokens of prompts, copied ones too, in one pass: wide enough for the products, little memory.
PREFILL_TOKENS = {"cpu": 2**10, "cuda": 2**14}
# Of the cache, all rows together, about: 16 GiB for 2**17 of Llama-3-8B in bf16.
MAX_CACHE_SLOTS = {"cpu": 2**17, "cuda": 2**18}
# Waiting rows are read when one in so many places is free: on a GPU a pass costs two steps or more.
REFILL_FRACTION = {"cpu": 8, "cuda": 4}


@dataclasses.dataclass
class Place:
    """A row at its place in the batch."""

    key: int  # the caller's
    prompt: list  # token ids
    src_lang: str
    tgt_lang: str
    room: int  # most new tokens, at least 1
    out: list = dataclasses.field(default_factory=list)  # new token ids
    finish: str = ""  # then "stop" or "length"

    @property
    def direction(self) -> tuple[str, str]:
        return self.src_lang, self.tgt_lang


class Recorded:
    """function(*tensors) -> tensor as a CUDA graph: recorded once, then its kernels start without
    Python, which for a few tokens takes longer than they do. Shapes stay what they were, as does
    all memory that the function finds for itself; the result is overwritten by the next call.
    `first` is the result for the inputs at the beginning."""

    def __init__(self, before: "Recorded | None", function: Callable, *inputs):
        """before: the last record or None; its stream is taken over, since libraries keep memory
        for every stream."""
        self.aside = before.aside if before else torch.cuda.Stream()
        self.inputs, self.graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
        self.aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.aside):
            # What libraries do at their first call can't be recorded.
            self.first = function(*self.inputs)
        torch.cuda.current_stream().wait_stream(self.aside)
        # thread_local: NCCL's own thread may go on.
        with torch.cuda.graph(self.graph, stream=self.aside, capture_error_mode="thread_local"):
            self.output = function(*self.inputs)

    def __call__(self, *inputs):
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.output


@torch.inference_mode()
def decode(
    model: CausalLM,
    adapter: CrossLoRA | None,
    rows: Iterable,
    stop_ids: tuple[int, ...],
    batch_size: int,
    record: bool | None = None,
) -> Iterator[tuple[int, list[int], str]]:
    """As generate.decode, in the order in which rows end.

    At most `batch_size` are decoded together, fewer if the longest of the first would make the
    cache too large. When an eighth (a quarter on a GPU) has ended, waiting ones take their places.
    A row keeps its own positions and limit, whatever its company; keys and values of what its
    prompt has in common with the beginning of an earlier one of its direction are copied from
    there. record: all experts are at hand, so that a step takes any rows, and Recorded plays it;
    default: on a GPU.
    """
    batch = Batch(model, adapter, rows, stop_ids, batch_size, record)
    while batch.rows:
        if batch.fresh:
            batch.read_prompts()
        else:
            batch.step_all()
        for row in batch.take_tokens():
            yield row.key, row.out, row.finish
        batch.refill()


class Batch:
    """Rows in decoding, their cache and their experts."""

    def __init__(self, model, adapter, rows, stop_ids, batch_size, record):
        self.model, self.adapter, self.stop_ids = model, adapter, stop_ids
        self.device, self.dtype = model.device, model.dtype
        queue = (Place(r.key, r.prompt, r.src_lang, r.tgt_lang, r.room) for r in rows)
        first = list(itertools.islice(queue, batch_size))
        longest = max((len(row.prompt) + row.room for row in first), default=1)
        fit = max(1, MAX_CACHE_SLOTS[self.device.type] // longest)
        self.rows = first[:fit]  # by place; where one has ended the place is free
        self.queue = itertools.chain(first[fit:], queue)
        self.fresh = list(range(len(self.rows)))  # places whose prompt was not read yet
        self.cache = Cache(model.cfg, len(self.rows), 0, self.device, self.dtype)
        self.token = torch.zeros(len(self.rows), dtype=torch.long, device=self.device)
        self.record = self.device.type == "cuda" if record is None else record
        self.routed = self.stacks = None
        if adapter is not None and adapter.learned:
            # For any rows, and made once, since a record keeps to its memory.
            self.routed = experts.routed(adapter, self.dtype)
        elif adapter is not None and self.record:
            self.stacks = [*experts.stacked(adapter, self.dtype)]
        self.lora, self.columns = self.routed, None  # the experts of a step
        self.recorded, self.shape = None, None  # the last record, and its cache's shape

    def languages(self, places: list[int]) -> Iterator[tuple[str, ...]]:
        """(src_langs, tgt_langs) of the rows at `places`."""
        return zip(*(self.rows[b].direction for b in places))

    # --- prompts

    def read_prompts(self) -> None:
        """Read the prompts at the fresh places: of each direction the longest in full, then the
        others, which copy the prefix that they share with it."""
        rows, fresh = self.rows, self.fresh
        self.columns = None  # the rows' experts are out of date: the next step finds them anew
        fresh.sort(key=lambda b: -len(rows[b].prompt))
        # An output is about as long as its prompt: so the cache moves seldom.
        lengths = (len(rows[b].prompt) + min(len(rows[b].prompt), rows[b].room) for b in fresh)
        self.cache.reserve(max(lengths))
        known = {}  # {direction: place of a row of it whose prompt is in the cache}
        for b in sorted({*range(len(rows))}.difference(fresh)):
            if not rows[b].finish:  # a step writes over slot 0 of ended ones
                known[rows[b].direction] = b
        first = {}  # the longest of each direction that is not known
        for b in fresh:
            if rows[b].direction not in known:
                first.setdefault(rows[b].direction, b)
        self.read_in_passes(list(first.values()), known)
        known.update(first)
        others = [b for b in fresh if first.get(rows[b].direction) != b]
        self.read_in_passes(others, known)

    def read_in_passes(self, places: list[int], known: dict) -> None:
        """Those whose tokens end in the same multiple of PREFILL_TOKENS share a pass."""
        passes, total = {}, 0
        for b in places:
            total += len(self.rows[b].prompt)
            passes.setdefault(total // PREFILL_TOKENS[self.device.type], []).append(b)
        for part in passes.values():
            self.read(part, known)

    def shared_prefix(self, a: int, b: int) -> int:
        """How many tokens the prompt at place b, its last apart, has in common with that at a."""
        if a == b:
            return 0
        # commonprefix works on lists of ids too.
        return len(os.path.commonprefix([self.rows[a].prompt, self.rows[b].prompt[:-1]]))

    def read(self, part: list[int], known: dict) -> None:
        """Prompts of the rows at places `part` go into the cache, first new tokens into `token`."""
        rows, device = self.rows, self.device
        places = torch.tensor(part, device=device)
        donors = [known.get(rows[b].direction, b) for b in part]  # or the row itself
        copied = [self.shared_prefix(a, b) for a, b in zip(donors, part)]  # numbers of tokens
        self.cache.copy(torch.tensor(donors, device=device), places, max(copied))
        new = [rows[b].prompt[n:] for b, n in zip(part, copied)]
        batch = Rows.of([*map(len, new)], device, copied, places)
        lora = self.routed
        if self.adapter is not None and self.routed is None:
            langs, counts = self.languages(part), (batch.lengths, [1] * len(part))
            lora = experts.for_rows(self.adapter, *langs, *counts, self.dtype, stacks=self.stacks)
        tokens = torch.tensor([[*itertools.chain(*new)]], device=device)  # (1, T)
        last = batch.starts[None, 1:] - 1  # (1, n)
        hidden = hidden_states(self.model, tokens, lora, batch, self.cache, last)  # (1, n, D)
        self.token[places] = greedy(self.model, hidden[0])  # (n, D) -> (n,)

    # --- steps

    def step(self, token: Tensor, at: Tensor, *columns) -> Tensor:
        """The next token (B,) of every row after `token` (B,) at positions `at` (B,)."""
        starts = torch.arange(len(token) + 1, dtype=torch.int32, device=self.device)
        batch = Rows([1] * len(token), starts, at[None])
        lora = self.lora
        if columns:
            lora = experts.by_token(self.adapter, self.stacks, itertools.repeat(columns[0]))
        hidden = hidden_states(self.model, token[None], lora, batch, self.cache)  # (1, B, D)
        return greedy(self.model, hidden[0])  # (B, D) -> (B,)

    def find_experts(self) -> None:
        """The experts of the next steps: of a record its input `columns`, else `lora`."""
        langs = [*self.languages(range(len(self.rows)))]
        self.columns = []
        if self.stacks is not None:
            self.columns = [experts.columns(self.adapter, *langs, [1] * len(self.rows))]
        if self.adapter is not None and self.routed is None and not self.record:
            self.lora = experts.grouped(self.adapter, *langs, self.dtype, self.lora)

    def step_all(self) -> None:
        if self.columns is None:
            self.find_experts()
        at = []  # where each row's last token stands
        for row in self.rows:
            at.append(0 if row.finish else len(row.prompt) + len(row.out) - 1)
        self.cache.reserve(max(at) + 1)
        inputs = self.token, torch.tensor(at, device=self.device), *self.columns
        if self.record and self.shape != self.cache.k[0].shape:
            # No record yet, or for a cache that has moved since.
            self.recorded = Recorded(self.recorded, self.step, *inputs)
            self.shape, self.token = self.cache.k[0].shape, self.recorded.first
        else:
            self.token = (self.recorded or self.step)(*inputs)

    def take_tokens(self) -> Iterator[Place]:
        """Give the rows that were read or stepped their new tokens; yields those that end."""
        new = self.token.tolist()
        places = self.fresh or [b for b, row in enumerate(self.rows) if not row.finish]
        for b in places:
            row, token = self.rows[b], new[b]
            if token in self.stop_ids:
                row.finish = "stop"
            else:
                row.out.append(token)
                row.finish = "length" if len(row.out) == row.room else ""
            if row.finish:
                yield row

    # --- places that have become free

    def refill(self) -> None:
        """Waiting rows take the places of ended ones, once so many are free; where none waits, give
        places back."""
        free = [b for b, row in enumerate(self.rows) if row.finish]
        self.fresh = []
        if REFILL_FRACTION[self.device.type] * len(free) < len(self.rows):
            return
        waiting = list(itertools.islice(self.queue, len(free)))
        self.fresh = free[: len(waiting)]
        for b, row in zip(self.fresh, waiting):
            self.rows[b] = row
        # One free place in so many makes it pay to find the rows' experts anew, on a GPU to record
        # anew.
        one_in = 5
        if self.record:
            one_in = 2 if len(self.rows) > 64 else 1
        if not waiting and one_in * len(free) >= len(self.rows):
            self.shrink(free)

    def shrink(self, free: list[int]) -> None:
        """Give the `free` places back. The rows beyond the new end fill the gaps before it, so that
        the others stay where they are, with their experts."""
        count = len(self.rows) - len(free)
        gaps = [b for b in free if b < count]
        last = [b for b in range(count, len(self.rows)) if not self.rows[b].finish]  # as many
        for gap, b in zip(gaps, last, strict=True):
            self.rows[gap] = self.rows[b]
        gaps = torch.tensor(gaps, dtype=torch.long, device=self.device)
        last = torch.tensor(last, dtype=torch.long, device=self.device)
        self.cache.copy(last, gaps)
        self.token[gaps] = self.token[last]
        self.cache.keep(count)
        self.rows, self.token, self.columns = self.rows[:count], self.token[:count], None
