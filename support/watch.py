"""Numbers that go wrong in training: at which step, on which rank, on which pairs."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from support.runs import Ranks, UserError, write_jsonl


class Step(NamedTuple):
    """What one step leaves behind; the numbers stay on the device until they are looked at."""

    step: int  # from 1
    numbers: Tensor  # (3,): gradient norm of all ranks, this rank's sums of NLL and KL
    pairs: list[dict]  # the whole effective batch


class Watch:
    """The steps since the last look at them. A GPU is asked once per look, not once per step."""

    def __init__(self, out: str | Path, ranks: Ranks):
        self.out, self.ranks = Path(out), ranks
        self.steps: list[Step] = []

    def note(self, step: int, norm: Tensor, sums: Tensor, pairs: list[dict]) -> None:
        """norm: (), after the ranks' gradients were added up. sums: (2,), this rank's part."""
        self.steps.append(Step(step, torch.stack((norm, *sums)), pairs))

    def check(self) -> None:
        """Raises UserError on all ranks for the first step whose loss or gradient is no number. It
        names step and rank, and its pairs are written to not_finite.jsonl."""
        if not self.steps:
            return
        numbers = torch.stack([step.numbers for step in self.steps]).cpu()  # (steps, 3)
        norms_are_good = numbers[:, 0].isfinite().tolist()
        if all(norms_are_good):  # a loss that is none has a gradient that is none
            self.steps = []
            return
        at = norms_are_good.index(False)
        step, pairs = self.steps[at].step, self.steps[at].pairs
        losses = self.of_all_ranks(numbers[at, 1:].sum().item())
        bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        what, where = "the gradient norm", "all ranks, whose losses are finite"
        if bad:
            what, where = "the loss", "rank " + ", ".join(map(str, bad))
        file = self.out / "not_finite.jsonl"
        if self.ranks.rank == 0:
            write_jsonl(file, pairs)
        raise UserError(
            f"{self.out}: {what} is no number at step {step} on {where}; its {len(pairs)} pairs "
            f"are in {file}. Look at them, or lower --lr and choose another --out; the last "
            "checkpoint is kept"
        )

    def of_all_ranks(self, value: float) -> list[float]:
        """Every rank's value, in their order."""
        found = [value]
        if self.ranks.world > 1:
            found = [0.0] * self.ranks.world
            dist.all_gather_object(found, value)
        return found


def check_dev_loss(loss: float, step: int, out: str | Path) -> None:
    """Raises UserError where it is no number."""
    if not math.isfinite(loss):
        raise UserError(
            f"{out}: the dev loss is {loss} after step {step}; lower --lr and choose another --out"
        )
