"""How much memory a module's method needs, before anything is computed, and how much is free; errors of too little."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # Linux: what limits containers and jobs
# By version: the files of a group with its limit and its usage, and the line of memory.stat with the part of this that
# the system takes back when memory is short.
CGROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


class _Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, except the `known` ones."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.now, self.peak = 0, 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            size = storage.nbytes()
            self.seen.add(storage)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, size)

    def _free(self, size):
        self.now -= size


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels compute it, which keep no matrix of all pairs; on "meta" torch would take another."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, _, value = (*args, *((kwargs or {})[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


class _Method(nn.Module):
    def __init__(self, module: nn.Module, name: str):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, *args, **kwargs):
        return getattr(self.module, self.name)(*args, **kwargs)


@torch.no_grad()
def peak_bytes(module: nn.Module, method: str, *args, dtype: torch.dtype | None = None, **kwargs) -> int:
    """The peak, in bytes, of the tensors that ``module.method(*args, **kwargs)`` makes, with weights in `dtype` (None:
    their own).

    Nothing is computed and no memory is taken: only shapes pass through the module, as tensors on "meta". Tensors among
    the arguments have to be on "meta" too. Workspaces inside kernels (some hundred MiB at most) are not counted.
    """
    module = getattr(module, "_orig_mod", module)  # a compiled module's own
    weights = {
        f"module.{name}": tensor.to("meta", dtype if tensor.is_floating_point() else None)
        for named in (module.named_parameters, module.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    }
    known = [value for value in tree_leaves((weights, args, kwargs)) if isinstance(value, Tensor)]
    with torch.compiler.set_stance("force_eager"), _FusedAttention(), _Peak(known) as peak:
        torch.func.functional_call(_Method(module, method), weights, args, kwargs, tie_weights=False)
    return peak.peak


def free_bytes(device: torch.device) -> int:
    """The memory for new tensors on `device`: what is free and what torch holds without using it. On the CPU a
    container's limit counts too."""
    if device.type == "cpu":
        import psutil  # comes with accelerate, which the extra installs

        return min([psutil.virtual_memory().available, *_rooms_in_cgroups()])
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    held = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return torch.accelerator.get_memory_info(device)[0] + held


def _rooms_in_cgroups() -> Iterator[int]:
    """What the limits of this process's cgroups, and of those around them, leave free. A group without a limit, or one
    that cannot be read, gives nothing."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()  # "0::/a/b" of version 2, "4:memory:/a/b" of version 1
    except (OSError, ValueError):
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            room = _room(group, *CGROUP_FILES[1 if controllers else 2])
            if room is not None:
                yield room
            if group == root:
                break


def _room(group, limit, usage, reclaimable):
    try:
        most, used = (int((group / name).read_text()) for name in (limit, usage))
    except (OSError, ValueError):  # ValueError: "max"
        return None
    try:
        rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(rows[reclaimable])
    except (OSError, ValueError, KeyError):
        pass  # then all of it counts
    return max(most - max(used, 0), 0)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory did not suffice; torch has a class of its own for that on GPUs only."""
    texts = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate")
    texts += ("storage size calculation overflowed",)  # more bytes than 64 bits count
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


@contextmanager
def enough_memory(error: type[Exception], what: str, advice: str) -> Iterator[None]:
    """Raises `error` where memory does not suffice in the block, for `what` is done there; `advice` mends it."""
    try:
        yield
    except (RuntimeError, MemoryError) as found:
        if not is_out_of_memory(found):
            raise
        raise error(f"memory does not suffice for {what}: {advice}") from found


def weight_bytes(module: nn.Module | None) -> int:
    """The bytes of a module's weights."""
    if module is None:
        return 0
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
