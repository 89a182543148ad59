"""Progress of long work: a bar on a terminal, elsewhere lines, so that a log or a pipe shows that it is alive."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

quiet = False  # whether the libraries below draw no bars (--quiet)
FIRST = 5.0  # seconds until the first line, if a step is done by then
EVERY = 30.0  # seconds between two lines at most
TICK = 0.5  # seconds between two looks at the clock


class Progress:
    """The progress of some work, for a `with` block.

    On a terminal it is rich's bar. Elsewhere the first line, after FIRST seconds, says how long the work will take in
    all; then a line follows every EVERY seconds, whether a step was done or not. Shorter work prints nothing.

    Args:
        what: what is done, such as "encoding".
        total: the number of steps; None where it is not known, which gives no bar.
        unit: what a step is, such as "images". done: steps that were done before.
        console: rich's; None is silent.
        say: prints a line, instead of a console.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "images",
        *,
        done: int = 0,
        console: Any = None,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.what, self.total, self.unit, self.before, self.done = what, total, unit, done, done
        self.console, self.clock, self.details, self.bar = console, clock, "", None
        self._say = say or (self.say if console is not None else None)
        self._start = self._updated = clock()
        self._last = None  # when the last line was printed
        self._lock, self._over = threading.Lock(), threading.Event()
        if console is not None and console.is_terminal and total is not None:
            self.bar, self._say = _bar(what, total, unit, done, console), None

    def __enter__(self) -> Self:
        self._start = self._updated = self.clock()
        if self.bar is not None:
            self.bar.start()
        elif self._say is not None:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._over.set()
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int | None = None, details: str | None = None) -> None:
        """Sets the number of steps done, and what else to show, such as a loss."""
        if done is not None:
            self.done, self._updated = done, self.clock()
        self.details = self.details if details is None else details
        if self.bar is not None:
            self.bar.update(0, completed=self.done, told=self.details or f"{self._rate():.3g} {self.unit}/s")
        else:
            self.look()

    def advance(self, count: int) -> None:
        """Adds `count` steps."""
        self.update(self.done + count)

    def say(self, text: str) -> None:
        """Prints a line above the bar. Silent without a console."""
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False)

    def look(self) -> None:
        """Prints a line if one is due."""
        if self._say is None:
            return
        with self._lock:
            now, first = self.clock(), self._last is None
            known = self.total is not None and self.done > self.before
            due = self._start + (FIRST if known else EVERY) if first else self._last + EVERY
            if now >= due - TICK and not self._over.is_set():
                self._last = now
                self._say(self._line(first))

    def _watch(self):
        while not self._over.wait(TICK):
            self.look()

    def _rate(self):
        return (self.done - self.before) / max(self._updated - self._start, 1e-9)

    def _line(self, first):
        now = self.clock()
        passed = f"{duration(now - self._start)} so far"
        if self.total is None:
            return f"{self.what}: {passed}"
        parts = [f"{self.what}: {self.done:,} of {self.total:,} {self.unit}", *filter(None, [self.details])]
        if not self.before < self.done < self.total:
            return ", ".join([*parts, passed])
        # The time since the last step is not subtracted: an evaluation between two steps may take longer than all.
        left = (self.total - self.done) / self._rate()
        if first:
            return ", ".join([*parts, passed, f"about {duration(now - self._start + left)} in all"])
        return ", ".join([*parts, f"about {duration(left)} left"])


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """In the block, Hugging Face's libraries draw their bars of loading only if stderr is a terminal, and never if
    `quiet`. A bar in a log or a pipe is a long line of control characters, and Progress says there what is done."""
    restore: list[Callable[[], None]] = []
    if quiet or not sys.stderr.isatty():
        for name in ("diffusers.utils.logging", "transformers.utils.logging"):
            library = sys.modules.get(name)
            if library is not None and library.is_progress_bar_enabled():
                library.disable_progress_bar()
                restore.append(library.enable_progress_bar)
        datasets = sys.modules.get("datasets")
        if datasets is not None and datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None:  # else the user decides
            if not datasets.are_progress_bars_disabled():
                datasets.disable_progress_bars()
                restore.append(datasets.enable_progress_bars)
    try:
        yield
    finally:
        for enable in restore:
            enable()


def duration(seconds: float) -> str:
    """
    >>> [duration(seconds) for seconds in (4.2, 89.7, 91, 3600 * 2.5, 3600 * 50)]
    ['4 s', '90 s', '2 min', '2 h 30 min', '2 d 2 h']
    """
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{hours // 24} d {hours % 24} h"


def _bar(what, total, unit, done, console):
    """rich's bar, with the time left. Where the terminal is narrow, the bar is short, and the details are cut."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(min(max(console.width - 80, 5), 40)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[unit]} ", markup=False),
        TextColumn("{task.fields[told]} ", markup=False, table_column=Column(ratio=1, no_wrap=True)),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        TextColumn("left"),
        console=console,
        transient=True,
        expand=True,
    )
    bar.add_task(what, total=total, completed=done, unit=unit, told="")
    return bar
