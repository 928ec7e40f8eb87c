"""Where a script computes, how precisely, and with whom: device, dtype, process group, the claim on a run folder, and CUDA graphs."""

import atexit
import datetime
import os
from typing import NamedTuple

import torch
import torch.distributed as dist

from files import UserError, claim


class Ranks(NamedTuple):
    """This process among those that torchrun started; (0, 1) under plain python."""

    rank: int
    world: int

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def of_first(self, ask):
        """What ask() gives the first rank, on every rank: of a folder that machines share, each may see another state."""
        found = [ask() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(found)
        return found[0]


def init_distributed(device):
    """Join the process group that torchrun's environment describes, if any: NCCL on GPUs, gloo on CPUs.
    `device` is the flag: auto, cpu or cuda. Raises UserError for more processes than GPUs."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
            if local > (gpus := torch.cuda.device_count()):
                raise UserError(f"{local} processes but {gpus} GPUs here; start as many as there are, or pass --device cpu")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Whoever is done with its share of a long translation waits for the slowest: NCCL's ten minutes could be too few.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=6))
        atexit.register(dist.destroy_process_group)
    return Ranks(int(os.environ.get("RANK", "0")), world)


def claim_run(folder, config, ranks):
    """files.claim by the first rank, and its refusal on every rank. Returns the lock, None on the others."""
    lock, refusal = None, None
    if ranks.rank == 0:
        try:
            lock = claim(folder, config)
        except UserError as error:
            refusal = str(error)
    if why := ranks.of_first(lambda: refusal):
        raise UserError(why)
    return lock


def device_and_dtype(device, dtype="auto"):
    """Where and how precisely the backbone computes: bf16 on a GPU and fp32 on a CPU unless `dtype` says otherwise.
    Adapter parameters, optimizer and loss are fp32 everywhere. `device` is auto, cpu or cuda."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible to torch")
    if device == "cpu" or not torch.cuda.is_available():
        where, precision = torch.device("cpu"), torch.float32
    else:
        where, precision = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), torch.bfloat16
    return where, precision if dtype == "auto" else getattr(torch, dtype)


def dtype_name(dtype):
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def add_device_arguments(parser):
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"],
                        help="of the backbone; auto: bfloat16 on a GPU, float32 on a CPU")


def sum_over_ranks(values, ranks, device):
    """The sum of every rank's `values`, a CPU tensor; NCCL needs them on the rank's `device` in between."""
    if ranks.world == 1:
        return values
    values = values.to(device)
    dist.all_reduce(values)
    return values.cpu()


class Recorded:
    """function(*tensors) -> tensor as a CUDA graph: recorded once, then its kernels start without Python, which for a few tokens takes
    longer than they do. Shapes stay what they were, as does all memory that the function finds for itself; the result is overwritten
    by the next call. `first` is the result for the inputs at the beginning."""

    def __init__(self, before, function, *inputs):
        """before: the last record or None; its stream is taken over, since libraries keep memory for every stream."""
        self.aside = before.aside if before else torch.cuda.Stream()
        self.inputs, self.graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
        self.aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.aside):
            self.first = function(*self.inputs)  # what libraries do at their first call can't be recorded
        torch.cuda.current_stream().wait_stream(self.aside)
        with torch.cuda.graph(self.graph, stream=self.aside, capture_error_mode="thread_local"):  # NCCL's own thread may go on
            self.output = function(*self.inputs)

    def __call__(self, *inputs):
        for mine, new in zip(self.inputs, inputs, strict=True):
            mine.copy_(new)
        self.graph.replay()
        return self.output
