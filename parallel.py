"""
Training on several devices, by PyTorch's DistributedDataParallel under torchrun:

    torchrun --standalone --nproc_per_node=8 train.py config/owt_mod_124m.py

torchrun starts train.py once for each device; such a process is called a rank. Each rank has a copy of the model and
does its share of the micro-steps and of the evaluation; then all exchange gradients and losses. Rank 0 alone prints
and writes. Without torchrun there is one rank, and all of this does nothing.
"""

import contextlib
import os

import torch
import torch.distributed as dist


@contextlib.contextmanager
def joined():
    """Under torchrun: one of its ranks."""
    if "RANK" not in os.environ:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with contextlib.ExitStack() as stack:
            if not is_main():
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield
    finally:
        dist.destroy_process_group()


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
    """The device of this rank: `name`, but of several GPUs one for each rank of the machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and dist.is_initialized() else name


def wrap(model, device):
    """The model to call in training: its backward pass leaves the mean of all ranks' gradients."""
    if not dist.is_initialized():
        return model
    ids = [device] if device.startswith("cuda") else None
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def gradients_meet(wrapped, now):
    """A context: the ranks' gradients are exchanged in its backward pass only if `now`, once for each step."""
    return wrapped.no_sync() if dist.is_initialized() and not now else contextlib.nullcontext()


def total(tensor):
    """The sum of the ranks' tensors, on each of them."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag):
    """True on all ranks if `flag` is true on any: what they all must do or leave, or some would wait for ever."""
    return bool(flag) if not dist.is_initialized() else total(torch.tensor(float(bool(flag)))).item() > 0


@contextlib.contextmanager
def main_first():
    """The others wait until rank 0 has done it. Where it fails there, torchrun ends them."""
    if not is_main():
        any_rank(False)
    yield
    if is_main():
        any_rank(False)
