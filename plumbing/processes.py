"""Devices, threads, random numbers, and several processes that work together.

`torchrun --nproc-per-node 4 rloo.py` starts four processes ("ranks"). Each samples, scores and
backpropagates its share of the rows, and the results are shared, so whatever is computed from a
batch (advantages, statistics, metrics) is the same on every rank, and the same as with one process.
Without torchrun there is nothing to share, and these functions return what they are given.
"""

import itertools
import os
import random
import sys
import timeit
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist
from transformers import set_seed

from plumbing.errors import require, stop

# ------------------------------------------------------------------------------- device and threads


def pick_device(args):
    """Join the other processes, if torchrun has started several. Returns: torch.device."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    require(several or not args.shard,
            "--shard: there is only one process; launch with torchrun --nproc-per-node 2")
    mps = torch.backends.mps.is_available()
    best = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    name = best if args.device == "auto" else args.device
    if several:
        name = own_device(name)
    try:
        device = torch.empty(0, device=name).device
    except Exception:
        stop(f"--device {args.device}: not available here; use auto or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if several and not dist.is_initialized():
        timeout = timedelta(hours=2)  # others wait while the first writes a large checkpoint
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    return device


def own_device(name):
    """The device of one of several processes: each takes a GPU of its own."""
    require(":" not in name,
            f"--device {name}: with several processes, each takes its own; use cuda or cpu")
    if name != "cuda":
        return name
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    require(local < count,
            f"--nproc-per-node: there are more processes than GPUs ({count}); use {count}")
    return f"cuda:{local}"


def pick_threads(model):
    """Use fewer threads if the model is clearly faster so, as it is on a busy machine."""
    most, ids, seconds = torch.get_num_threads(), torch.zeros((16, 16), dtype=torch.long), {}
    alone = model.device.type == "cpu" and not dist.is_initialized()
    if not alone or "OMP_NUM_THREADS" in os.environ:
        return
    for number in {1, -(-most // 2), most}:
        torch.set_num_threads(number)
        calls, total = timeit.Timer(lambda: model.base_model(ids)).autorange()  # 0.2 s or more
        seconds[number] = total / calls * (1 if number == most else 1.5)
    torch.set_num_threads(min(seconds, key=seconds.get))
    print(f"{torch.get_num_threads()} of {most} threads (fewer on a busy machine; OMP_NUM_THREADS "
          "overrides)")


# -------------------------------------------------------------------------------- several processes


def rank_and_world_size():
    """This process's rank, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first():
    """Whether this process is the one that writes files and prints."""
    return rank_and_world_size()[0] == 0


def rank_slice(n):
    """The range within 0 ... n - 1 that this process works on."""
    rank, size = rank_and_world_size()
    return range(rank * n // size, (rank + 1) * n // size)


def equal_share(items):
    """This process's share of a list. All get equally many: the first items may be taken twice."""
    rank, size = rank_and_world_size()
    count = -(-len(items) // size)
    return list(itertools.islice(itertools.cycle(items), rank * count, (rank + 1) * count))


def my_parts(rows, divide, model):
    """Divide this process's share of row numbers into parts. Returns: list of index tensors.

    If the model is sharded, all processes must run it together, so all get equally many parts, and
    some of them are empty.
    """
    rank, size = rank_and_world_size()
    parts = [[part for part in divide(share) if len(part)] for share in rows.tensor_split(size)]
    missing = max(map(len, parts)) - len(parts[rank])
    return parts[rank] + [rows[:0]] * (missing if getattr(model, "is_sharded", False) else 0)


def sum_over_ranks(value):
    """Sum a tensor (of any shape and dtype) or a number over all processes."""
    if not dist.is_initialized():
        return value
    if not torch.is_tensor(value):
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return sum_over_ranks(torch.tensor(float(value), device=device)).item()
    numbers = value.int() if value.dtype == torch.bool else value.contiguous()
    dist.all_reduce(numbers)
    return numbers.to(value.dtype)


def gather(value):
    """The values of all processes (anything that can be pickled), as a list."""
    values = [value] * rank_and_world_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def everywhere(condition):
    """Whether a condition holds in all processes."""
    return all(gather(bool(condition)))


def sum_gradients(model):
    """Sum each gradient over all processes.

    By hand, since DistributedDataParallel averages, and wraps the model, so that every call would
    have to unwrap it.
    """
    if not dist.is_initialized():
        return
    parameters = list(model.parameters())
    used = [parameter.grad is not None for parameter in parameters]  # not if there were no rows
    used = sum_over_ranks(torch.tensor(used, device=parameters[0].device)).tolist()
    for parameter in itertools.compress(parameters, used):
        if hasattr(parameter.grad, "full_tensor"):  # sharded: summed already, and averaged
            parameter.grad.mul_(dist.get_world_size())
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def clip_gradients(model, max_norm):
    """Clip the norm of all gradients together. Returns: the norm before clipping, a scalar."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def leave():
    """The last line of a script: with torchrun, wait for the other processes, then exit."""
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # a normal exit, through the destructors of torch's threads, may abort


# ----------------------------------------------------------------------------------- random numbers


def random_states():
    """The states of all random number generators, as tensors and plain containers."""
    name, keys, *rest = numpy.random.get_state()
    states = {"torch": torch.get_rng_state(), "python": random.getstate(),
              "numpy": [name, keys.tolist(), *rest]}
    for name in ("cuda", "mps"):
        if getattr(torch, name).is_available():
            states[name] = getattr(torch, name).get_rng_state()
    return states


def set_random_states(states):
    """Restore what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    for name in ("cuda", "mps"):
        if name in states and getattr(torch, name).is_available():
            getattr(torch, name).set_rng_state(states[name])


@contextmanager
def isolated_rng(seed):
    """Seed all random number generators, and restore them afterwards."""
    states = random_states()
    set_seed(seed)
    yield
    set_random_states(states)


def own_rng():
    """Within this, each of several processes draws its own random numbers; a single one goes on."""
    rank, size = rank_and_world_size()
    # All processes draw the same number here, so they stay in step.
    return isolated_rng(torch.randint(2**31, ()).item() + rank) if size > 1 else nullcontext()
