"""
Training on several devices, by PyTorch's DistributedDataParallel under torchrun:

    torchrun --standalone --nproc_per_node=8 train.py config/owt_mod_124m.py

torchrun starts train.py once per device. Each process, called a rank, has a copy of the model and does its share of the
micro-steps and of the evaluation. Then the ranks exchange gradients and losses. Only rank 0 prints and writes. Without
torchrun there is one rank, and these functions do nothing.
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
    """Under torchrun, join the other ranks and silence all but the first."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # gloo exchanges tensors on a CPU, NCCL those on a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with open(os.devnull, "w", encoding="utf-8", errors="replace") as nowhere:
            with contextlib.redirect_stdout(sys.stdout if is_main() else nowhere):
                yield
    except UserError:
        if os.environ["LOCAL_RANK"] == "0":
            raise
        _wait_for_the_end()  # the first rank of each machine prints the error
    except KeyboardInterrupt:
        if is_main():
            raise
        sys.exit(130)
    dist.destroy_process_group()  # not after an error: it might wait for ranks that are gone
    # Everything is saved. Python's own exit sometimes aborts in gloo's threads (PyTorch 2.13, even in a script without
    # our code), and torchrun would report a failure.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _wait_for_the_end():
    time.sleep(3)  # when one rank has ended, torchrun ends the others
    sys.exit(1)


def under_torchrun():
    return dist.is_initialized()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def share(n):
    """Which of n equal pieces of work belong to this rank."""
    return range(rank(), n, ranks())


def device(name):
    """The device of this rank: under torchrun each rank of a machine has one of its GPUs."""
    if not dist.is_initialized() or name == "cpu":
        return name
    if name == "mps":
        raise UserError("several ranks cannot share Apple's GPU; use --device=cpu, or start without torchrun")
    own = f"cuda:{os.environ['LOCAL_RANK']}"
    if name not in ("cuda", own):
        raise UserError(f"under torchrun each rank has a GPU of its own; use --device=cuda instead of {name}")
    on_machine, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if on_machine > gpus:
        raise UserError(f"--nproc_per_node={on_machine}, but this machine has {gpus} GPUs; use at most {gpus}")
    return own


def wrap(model, device):
    """The model to call in training. Its backward pass leaves the mean of all ranks' gradients."""
    if not dist.is_initialized():
        return model
    ids = [device] if device.startswith("cuda") else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def exchange_gradients(wrapped, now):
    """A context for a backward pass. It exchanges the ranks' gradients only if `now`, once per step."""
    return wrapped.no_sync() if dist.is_initialized() and not now else contextlib.nullcontext()


def sum_over_ranks(tensor):
    """The sum of the ranks' tensors, on each of them."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag):
    """
    True on all ranks if `flag` is true on any, so that they stop or continue together and none waits forever.

    All wait here for the slowest rank, at most 30 minutes, gloo's timeout.
    """
    return sum_over_ranks(torch.tensor(float(bool(flag)))).item() > 0


@contextlib.contextmanager
def main_first():
    """Rank 0 runs the block first, then the others. If it fails on rank 0, the others exit, and rank 0 prints why."""
    if not is_main() and any_rank(False):  # waits for rank 0's call below, which says whether it failed
        _wait_for_the_end()
    failed = True
    try:
        yield
        failed = False
    finally:
        if is_main():
            any_rank(failed)
