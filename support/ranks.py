"""
Training on several devices, by PyTorch's DistributedDataParallel under torchrun:

    torchrun --standalone --nproc_per_node=8 train.py config/owt_mod_124m.py

torchrun starts train.py once for each device; such a process is called a rank. Each rank has a copy of the model and
does its share of the micro-steps and of the evaluation; then all exchange gradients and losses. Rank 0 alone prints
and writes. Without torchrun there is one rank, and all of this does nothing.
"""

import contextlib
import os
import sys
import time

import torch
import torch.distributed as dist

from support.options import UserError


@contextlib.contextmanager
def joined():
    """Under torchrun: one of its ranks, of which the first alone prints."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Tensors of a CPU are exchanged by gloo, those of a GPU by NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if is_main() else nowhere):
            yield
    except UserError:
        if os.environ["LOCAL_RANK"] == "0":
            raise
        time.sleep(3)  # the first rank of each machine tells it; when one has ended, torchrun ends the others
        sys.exit(1)
    except KeyboardInterrupt:
        if is_main():
            raise
        sys.exit(130)
    dist.destroy_process_group()  # after an error it might wait for ranks that are gone
    # Everything is done and saved. Python's own end would now and then abort in gloo's threads (PyTorch 2.13, seen in a
    # script of nothing else), and torchrun would report a failure.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def under_torchrun():
    return dist.is_initialized()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def share(n):
    """Which of n equal pieces of work are this rank's."""
    return range(rank(), n, ranks())


def device(name):
    """The device of this rank, where there are several: of a machine's GPUs each of its ranks has one."""
    if not dist.is_initialized() or name == "cpu":
        return name
    if name == "mps":
        raise UserError("several ranks cannot share Apple's GPU; --device=cpu, or start without torchrun")
    own = f"cuda:{os.environ['LOCAL_RANK']}"
    if name not in ("cuda", own):
        raise UserError(f"under torchrun each rank has a GPU of its own: --device=cuda instead of {name}")
    if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
        raise UserError(
            f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}, but this machine has {torch.cuda.device_count()} GPUs"
        )
    return own


def wrap(model, device):
    """The model to call in training: its backward pass leaves the mean of all ranks' gradients."""
    if not dist.is_initialized():
        return model
    ids = [device] if device.startswith("cuda") else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def exchange_gradients(wrapped, now):
    """A context: its backward pass exchanges the ranks' gradients only if `now`, which is once for each step."""
    # DistributedDataParallel takes their mean during backward; no_sync puts that off.
    return wrapped.no_sync() if dist.is_initialized() and not now else contextlib.nullcontext()


def sum_over_ranks(tensor):
    """The sum of the ranks' tensors, on each of them."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag):
    """
    True on all ranks if `flag` is true on any: they must stop, or go on, together, or some would wait for ever.

    All wait here for the slowest, for 30 minutes at most, which is gloo's patience.
    """
    return sum_over_ranks(torch.tensor(float(bool(flag)))).item() > 0


@contextlib.contextmanager
def main_first():
    """Rank 0 does it first, then the others. Where it fails there, they end; it tells why."""
    if not is_main() and any_rank(False):
        time.sleep(3)  # when one has ended, torchrun ends the others
        sys.exit(1)
    try:
        yield
    except BaseException:
        if is_main():
            any_rank(True)
        raise
    if is_main():
        any_rank(False)
