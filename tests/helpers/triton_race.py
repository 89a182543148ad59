"""Races and stray addresses of Triton kernels, found without a GPU: watches what programs load and store when they run
in Triton's interpreter.

Inside one launch
    no address is stored twice;
    none is stored by one program and loaded by another, nor loaded by a program after it has stored it;
    every address is an element of one of the launch's tensors' memory;
    a load says what lanes without an address get, and a gather stays within its axis: the interpreter would fill in 0,
    and count from the end, where a GPU gives anything;
    there are no atomics.
A kernel for which this holds computes the same in whatever order programs, warps and loads in flight take their turns.
Needs TRITON_INTERPRET=1 in the environment.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_BUILDER = interpreter.InterpreterBuilder
_ATOMICS = [name for name in dir(_BUILDER) if name.startswith("create_atomic")]


class Race(AssertionError):
    """A launch broke one of the rules above."""


@contextmanager
def watched(overflow: bool = False) -> Iterator["Watch"]:
    """Checks every launch inside, and rounds to bfloat16 as a GPU does; raises Race. With `overflow` integer arithmetic
    is checked too, which is slow."""
    watch = Watch()
    launch, load, store = interpreter.GridExecutor.__call__, _BUILDER.create_masked_load, _BUILDER.create_masked_store
    gather, builder = _BUILDER.create_gather, interpreter.interpreter_builder

    def watched_launch(executor, *args, **kwargs):
        watch.begin([*args, *kwargs.values()])
        patched.clear()
        try:
            result = launch(executor, *args, **kwargs)
        except Exception:
            if watch.broken is not None:  # the interpreter wraps what is raised inside a program
                raise watch.broken from None
            raise
        watch.end(executor.fn.__name__)
        return result

    def watched_load(self, pointers, mask, other, *rest):
        if other is None and not np.all(mask.data) and mask.data.size > 1:  # of one lane, Triton drops a 0 itself
            watch.fail("lanes without an address, and no value for them")
        watch.access("loaded", self.grid_idx, pointers, mask)
        return load(self, pointers, mask, other, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        watch.access("stored", self.grid_idx, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def watched_gather(self, source, indices, axis):
        if indices.data.min() < 0 or indices.data.max() >= source.data.shape[axis]:
            watch.fail("a gather reaches beyond its axis")
        return gather(self, source, indices, axis)

    def atomic(*_, **__):
        watch.fail("an atomic operation")

    # The interpreter replaces Triton's language anew for every call of a device function: once a launch is enough.
    patched: set[int] = set()
    patch_language = interpreter._patch_lang

    def patch_once(function):
        known = id(function.__globals__) in patched
        patched.add(id(function.__globals__))
        return mock.Mock() if known else patch_language(function)  # what a launch restores when it ends

    convert = interpreter._convert_float

    def rounding_convert(data, source, target, mode):
        """The interpreter cuts off; a GPU rounds to the nearest, as torch does."""
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    options = dataclasses.replace(builder.options, sanitize_overflow=overflow)
    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", watched_launch),
        mock.patch.object(builder, "options", options),
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(interpreter, "_convert_float", rounding_convert),
        mock.patch.multiple(
            _BUILDER,
            create_masked_load=watched_load,
            create_masked_store=watched_store,
            create_gather=watched_gather,
            **dict.fromkeys(_ATOMICS, atomic),
        ),
    ):
        yield watch


class Watch:
    """What the launches did; `launches` and `stores` count them."""

    def __init__(self):
        self.launches, self.stores = 0, 0
        self.broken: Race | None = None

    def begin(self, args: list) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(args)}
        self._starts = np.array(sorted(storages), dtype=np.uint64)
        self._ends = self._starts + np.array([storages[s] for s in sorted(storages)], dtype=np.uint64)
        self._width: dict[int, int] = {}  # of the elements of each storage
        self._done: dict[str, list[tuple[np.ndarray, int, int]]] = {"loaded": [], "stored": []}
        self._moment = 0

    def access(self, kind: str, program: tuple, pointers, mask) -> None:
        addresses = pointers.data.ravel()[np.broadcast_to(mask.data, pointers.data.shape).ravel().astype(bool)]
        if addresses.size == 0:
            return
        addresses = addresses.astype(np.uint64)
        width = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        storage = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        inside = (storage >= 0) & (addresses + np.uint64(width) <= self._ends[storage])
        if not inside.all():
            self.fail(
                f"{int((~inside).sum())} addresses {kind} outside the tensors of the launch, by program {program}"
            )
        for number in set(storage.tolist()):
            if self._width.setdefault(number, width) != width:
                self.fail("one tensor's memory taken for elements of two sizes")
        if ((addresses - self._starts[storage]) % np.uint64(width)).any():
            self.fail(f"addresses {kind} between elements")
        self._done[kind].append((addresses, hash(program), self._moment))
        self._moment += 1

    def end(self, kernel: str) -> None:
        self.launches += 1
        stored, stored_by, stored_at = self._all("stored")
        self.stores += stored.size
        order = np.argsort(stored, kind="stable")
        stored, stored_by, stored_at = stored[order], stored_by[order], stored_at[order]
        again = int((stored[1:] == stored[:-1]).sum())
        if again:
            self.fail(f"{kernel}: {again} addresses stored again")
        loaded, loaded_by, loaded_at = self._all("loaded")
        if stored.size and loaded.size:
            at = np.minimum(np.searchsorted(stored, loaded), stored.size - 1)
            both = stored[at] == loaded
            others = int((both & (stored_by[at] != loaded_by)).sum())
            if others:
                self.fail(f"{kernel}: {others} addresses stored by one program and loaded by another")
            late = int((both & (stored_at[at] < loaded_at)).sum())
            if late:
                self.fail(f"{kernel}: {late} addresses loaded after they were stored")

    def fail(self, what: str) -> None:
        self.broken = Race(what)
        raise self.broken

    def _all(self, kind):
        done = self._done[kind]
        if not done:
            return (np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64))
        sizes = [addresses.size for addresses, _, _ in done]
        return (
            np.concatenate([addresses for addresses, _, _ in done]),
            np.repeat(np.array([by for _, by, _ in done], dtype=np.int64), sizes),
            np.repeat(np.array([at for _, _, at in done], dtype=np.int64), sizes),
        )


def _tensors(args) -> Iterator[torch.Tensor]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from _tensors(arg)
