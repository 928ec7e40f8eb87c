"""Numbers that go wrong in training: at which step, on which rank, on which pairs."""

import math
import os
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
        names step and rank, and its pairs are written to not_finite.jsonl. All ranks call it after
        the same step."""
        if not self.steps:
            return
        numbers = torch.stack([step.numbers for step in self.steps]).cpu()  # (steps, 3)
        good = numbers.isfinite()  # (steps, 3)
        at = [*good.all(1).tolist(), False].index(False)  # the first that is not, or one too many
        loss_is_good = at == len(good) or bool(good[at, 1:].all())
        found = self.of_all_ranks((at, loss_is_good))
        at = min(first for first, _ in found)
        if at == len(good):
            self.steps = []
            return
        step, pairs = self.steps[at].step, self.steps[at].pairs
        bad = [rank for rank, (first, fine) in enumerate(found) if first == at and not fine]
        what, where = "the gradient norm", "all ranks, whose losses are finite"
        if bad:
            what, where = "the loss", "rank " + ", ".join(map(str, bad))
        file = self.out / "not_finite.jsonl"
        if self.ranks.rank == 0:
            write_jsonl(file, pairs)
        raise UserError(
            f"{self.out}: {what} is no number at step {step} on {where}; its {len(pairs)} pairs "
            f"are in {file}. Look at them; the last checkpoint is of before. Or lower --lr and "
            "choose another --out"
        )

    def of_all_ranks(self, value: tuple[int, bool]) -> list[tuple[int, bool]]:
        """Every rank's value, in their order."""
        found = [value]
        if self.ranks.world > 1:
            found = [value] * self.ranks.world
            dist.all_gather_object(found, value)
        return found


def keep_last(checkpoint: Path, dev_is_due: bool) -> None:
    """Set aside the checkpoint that is about to be replaced, until the dev loss is known."""
    if dev_is_due and checkpoint.exists():
        last = checkpoint.with_name("checkpoint.last.pt")
        last.unlink(missing_ok=True)
        os.link(checkpoint, last)


def check_dev_loss(loss: float, step: int, out: str | Path, ranks: Ranks) -> None:
    """Raises UserError where it is no number; then the checkpoint before is the last again."""
    checkpoint, last = Path(out) / "checkpoint.pt", Path(out) / "checkpoint.last.pt"
    good = math.isfinite(loss)
    if ranks.rank == 0 and good:
        last.unlink(missing_ok=True)
    elif ranks.rank == 0:
        checkpoint.unlink(missing_ok=True)
        if last.exists():
            os.replace(last, checkpoint)
    if not good:
        raise UserError(
            f"{out}: the dev loss is {loss} after step {step}; the last checkpoint is of before. "
            "Lower --lr and choose another --out"
        )
