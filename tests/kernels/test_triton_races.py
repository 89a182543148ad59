"""The checks that the tests of the GPU kernels rely on, checked: each rule of triton_race.py broken by a kernel written
for it, and mistakes seeded into the kernels' own sources, each of which a small named case has to catch.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_triton_races.py
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from helpers.triton_cases import Case, check_line_scans, check_propagate, check_scans, force, nan_filled, scan_problem  # noqa: E402

from gspn.kernels import triton as backend  # noqa: E402
from gspn.kernels.triton import launch, pieces  # noqa: E402
from gspn.kernels.triton.plan import Plan  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not launch.INTERPRETED, reason="runs in Triton's interpreter: set TRITON_INTERPRET=1"),
]


# ---- the rules -------------------------------------------------------------------------------------------------------


@triton.jit
def _each_its_own(x, y, size, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at, at < size, 0.0) + 1.0, at < size)


@triton.jit
def _stored_again(x, y, size, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at, at < size, 0.0), at < size)


@triton.jit
def _loaded_from_another(x, y, size, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, tl.load(y + (size - 1 - at), at < size, 0.0), at < size)


@triton.jit
def _loaded_too_late(x, y, size, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(x + at, tl.load(x + at, at < size, 0.0) + 1.0, at < size)
    tl.store(y + at, tl.load(x + at, at < size, 0.0), at < size)


@triton.jit
def _beyond_the_end(x, y, size, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at + 1, at < size, 0.0), at < size)


@triton.jit
def _no_value_where_masked(x, y, size, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at, at < size), at < size)


@triton.jit
def _gathered_from_beyond(x, y, size, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + at, at < size, 0.0)
    tl.store(y + at, tl.gather(value, tl.arange(0, SIZE) - 1, 0), at < size)


@triton.jit
def _atomic(x, y, size, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.atomic_add(y + at, tl.load(x + at, at < size, 0.0), at < size)


@pytest.mark.parametrize(
    "kernel, message",
    [
        (_each_its_own, None),
        (_stored_again, "stored again"),
        (_loaded_from_another, "loaded by another"),
        (_loaded_too_late, "loaded after"),
        (_beyond_the_end, "outside"),
        (_no_value_where_masked, "no value"),
        (_gathered_from_beyond, "gather"),
        (_atomic, "atomic"),
    ],
    ids=lambda k: getattr(k, "__name__", ""),
)
def test_every_rule(kernel, message):
    from helpers.triton_race import Race, watched

    x, y = torch.arange(6.0), torch.zeros(6)
    with watched() as watch:
        if message is None:
            kernel[(2,)](x, y, 6, SIZE=4)
            assert torch.equal(y, x + 1) and (watch.launches, watch.stores) == (1, 6)
            kernel[(2,)](x, x, 6, SIZE=4)  # in place, each element by its own program
            assert watch.launches == 2
        else:
            with pytest.raises(Race, match=message):
                kernel[(2,)](x, y, 6, SIZE=4)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def _one(channels, height, width, groups, *directions, **rest):
    return Case(1, channels, height, width, groups, directions=directions, **rest)


def _plain():
    check_scans(_one(1, 4, 2, 1, 0, 3), Plan(2, 2, 1, 1, 1))


def _padded_groups():
    check_scans(_one(6, 2, 2, 2, 1), Plan(1, 2, 8, 1, 1))


def _last_block():
    check_scans(_one(3, 2, 2, 3, 0), Plan(1, 2, 2, 1, 1))


def _parts():
    check_scans(_one(4, 2, 2, 1, 2), Plan(2, 1, 2, 1, 1))


def _tiles():
    check_scans(_one(1, 5, 3, 1, 0), Plan(4, 1, 1, 1, 1, 1))


def _tiles_and_segments():
    check_scans(_one(1, 5, 4, 1, 2, segment=3), Plan(8, 1, 1, 1, 1, 2))


def _segments():
    check_scans(_one(1, 2, 5, 1, 0, segment=2), Plan(2, 1, 1, 1, 1))


def _two_launches():
    check_scans(_one(1, 1, 3, 1, 1, 0), Plan(4, 1, 1, 1, 1))


def _beneath_the_floor():
    x, gate, logits, grad = scan_problem(_one(1, 2, 2, 1, 0))
    logits[0, 0, 0, 0, :, 1], logits[0, 0, 0, 1, 0, 1] = -28.5, -1e30
    options, p = ([0], None), Plan(2, 1, 1, 1, 1)
    h = backend.gated_scan(x, gate, logits, *options, plan=p)
    dlogits = backend.gated_scan_backward(grad, x, gate, logits, h, *options, plan=p)[2]
    assert h.isfinite().all() and not dlogits[0, 0, 0, 0, :, 1].any()


def _nan_at_the_end():
    x, gate, logits, _ = scan_problem(_one(1, 4, 2, 1, 0))
    x[0, 0, 3, 0] = float("nan")
    h = backend.gated_scan(x, gate, logits, [0], None, plan=Plan(1, 4, 1, 1, 1))
    assert h[0, 0, 0, :2, 1].isfinite().all()


def _parts_that_differ():
    """Of one axis a group is in two parts, of the other in one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.launch, "plan", lambda places, *_: Plan(4, 1, 1 if places == 3 else 2, 1, 1))
        check_scans(_one(2, 1, 3, 1, 0, 1))


def _line_scan():
    check_line_scans(_one(1, 3, 3, 1, 3), Plan(4, 1, 1, 1, 1))


def _propagate(mode, *directions, channels=1, **rest):
    def check():
        with pytest.MonkeyPatch.context() as patch:
            force(patch, mode)
            check_propagate(_one(channels, 2, 4, 1, *directions, **rest))

    return check


_merger = _propagate("together", 1, channels=3)  # an elementwise tile has four then
_each = _propagate("each", 0, 1, centered=True)
_bands = _propagate(2, 2, centered=True)


class Mistake(NamedTuple):
    name: str
    module: str
    right: str
    wrong: str
    caught_by: Callable[[], None]
    count: int = 1  # how often `right` stands in the source


MISTAKES = [
    Mistake("members beyond a group", "device", "(member < SHARE) & group_exists", "group_exists", _padded_groups),
    Mistake("groups beyond the last", "device", "= group < channels // SHARE", "= group >= 0", _last_block),
    Mistake(
        "tiles write their halo",
        "device",
        "return (place >= first) & (place < tl.minimum(first + own, P))",
        "return (place >= 0) & (place < P)",
        _tiles,
    ),
    Mistake("before and after exchanged", "device", "after, before = tl.split", "before, after = tl.split", _plain),
    Mistake("no end of the strips", "device", "tl.maximum(g[:, :, :, None] - 1, 0)", "g[:, :, :, None] - 1", _plain),
    Mistake("no reset", "device", "value = tl.where(goes_on, value, z)", "value = value", _tiles_and_segments),
    Mistake("the first line centred", "device", "(goes_on, value, z)", "(goes_on, value, entering)", _bands),
    Mistake(
        "no clamp", "device", "tl.maximum(logit, FLOOR, propagate_nan=tl.PropagateNan.ALL)", "logit", _beneath_the_floor
    ),
    Mistake(
        "the halo starts from nothing",
        "device",
        "_exists(place + r, P, HALO) & c_exists & (place * 0 + (origin",
        "_owned(place + r, tile * own, own, P, HALO) & c_exists & (place * 0 + (origin",
        _tiles,
    ),
    Mistake(
        "the adjoint's halo starts from nothing",
        "device",
        "_exists(place + r, P, HALO) & c_exists & (place * 0 + after_end",
        "_owned(place + r, tile * own, own, P, HALO) & c_exists & (place * 0 + after_end",
        _tiles,
    ),
    Mistake(
        "all directions forward", "device", "at = t + reverse * (T - 1 - 2 * t)", "at = t + 0 * reverse", _plain, 2
    ),
    Mistake("a line before the first", "device", "< P) & goes_on & c_exists", "< P) & c_exists", _plain),
    Mistake("the line after is the next", "device", "at - 1 + 2 * reverse", "at - 1", _plain),
    Mistake(
        "a state after the last line",
        "device",
        " and origin + end < tl.where(total > 0, total, T)",
        "",
        _tiles,
    ),
    Mistake("a weight before the line", "device", "tl.where(first, 0.0, e_same * e_next)", "e_same * e_next", _plain),
    Mistake("a place too many", "device", "return place < P\n", "return place <= P\n", _plain, 2),
    Mistake("a line's ends are neighbours", "device", "return low, high", "return high, low", _nan_at_the_end),
    Mistake(
        "a gradient beneath the floor",
        "device",
        "a_prev.to(STATE) < FLOOR",
        "a_prev.to(STATE) < 2 * FLOOR",
        _beneath_the_floor,
    ),
    Mistake("gradients of parts, then of their sum", "device", "if not PARTIAL:", "if True:", _parts),
    Mistake("parts in one place", "device", "dlogits += part * part_stride", "dlogits += 0 * part_stride", _parts),
    Mistake(
        "a gradient of the weight that is not one", "device", "w_prev * (1.0 - q * (e_same * e_next))", "w_prev", _plain
    ),
    Mistake("one Newton step too few", "device", "q * (1.0 - value * q)", "q * 1e-3", _plain),
    Mistake(
        "the neighbours' weights exchanged",
        "device",
        "entering + w_prev * previous + a_same[r].to(STATE) * same + w_next * following",
        "entering + w_next * previous + a_same[r].to(STATE) * same + w_prev * following",
        _line_scan,
    ),
    Mistake("state in place", "launch", "else between[1 - n % 2]", "else between[n % 2]", _tiles),
    Mistake("a tile too few", "launch", "-(-self.places // self.plan.own)", "self.places // self.plan.own", _tiles),
    Mistake("the adjoint forward", "launch", "reversed(firsts) if backward else firsts", "firsts", _tiles),
    Mistake("a segment too few", "launch", "else -(-self.lines // length)", "else self.lines // length", _segments),
    Mistake("numbered by launch", "launch", "(index | direction << 2)", "(n | direction << 2)", _two_launches),
    Mistake("parts not filled", "launch", "if len(cuts) == 1 else torch.zeros", "", _parts_that_differ),
    Mistake("sums not added to", "merge", "total += tl.load(y_in + y_at, exists, 0.0).to(STATE)", "pass", _each),
    Mistake("gradients not added to", "merge", "total += tl.load(dx_in + dx_at, exists, 0.0).to(STATE)", "pass", _each),
    Mistake("channels beyond the last", "merge", "(pixel < size) & (c < unit * ALIGN)", "pixel < size", _merger),
    Mistake("the skip's gradient", "merge", "total += dy * tl.load(skip", "total += tl.load(skip", _merger),
    Mistake("one part of several", "merge", "tl.static_range(PARTS)", "tl.static_range(1)", _parts),
    Mistake("bands forget", "pieces", "projections, total, state)", "projections, total, None)", _bands),
    Mistake(
        "bands forget the adjoint", "pieces", "state_before, adjoint, *grads", "state_before, None, *grads", _bands
    ),
    Mistake(
        "bands from the other end",
        "pieces",
        "self.total - self.origin - self.lines if self.reverse else self.origin",
        "self.origin",
        _bands,
    ),
    Mistake(
        "the first direction's center",
        "pieces",
        "self.center[:, piece.indices.start : piece.indices.stop]",
        "self.center[:, :1]",
        _each,
    ),
    Mistake(
        "center's gradient: a band's first line",
        "pieces",
        "lines = piece.origin + torch.arange",
        "lines = torch.arange",
        _bands,
    ),
    Mistake(
        "center's gradient: the last line", "pieces", "starts.flip(0) if direction >= 2 else starts", "starts", _bands
    ),
    Mistake("no line before the band", "pieces", "line.copy_(band.state_in", "(band.state_in", _bands),
]
QUICK = {"members beyond a group", "state in place", "before and after exchanged", "bands forget the adjoint"}
PLACES = {"device": (launch, "device"), "merge": (launch, "merging"), "launch": (backend, "launch")}


def plant(mistake: Mistake, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The backend with the mistake in it."""
    source = (Path(backend.__file__).parent / f"{mistake.module}.py").read_text()
    assert source.count(mistake.right) == mistake.count, f"{mistake.name}: the source has changed"
    path = folder / f"{mistake.module}_{MISTAKES.index(mistake)}.py"
    path.write_text(source.replace(mistake.right, mistake.wrong))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if mistake.module == "pieces":
        for name in ("propagate", "propagate_backward"):
            patch.setattr(backend, name, getattr(module, name))
        patch.setattr(pieces, "_Work", module._Work)
    else:
        patch.setattr(*PLACES[mistake.module], module)
        if mistake.module == "launch":
            patch.setattr(pieces, "launch", module)


def is_caught(mistake: Mistake, folder: Path) -> str:
    """How; an empty string if it is not."""
    from helpers.triton_race import Race, watched

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch, nan_filled(), watched():
        plant(mistake, folder, patch)
        try:
            mistake.caught_by()
        except Race as error:
            return f"race: {error}"
        except AssertionError as error:
            return str(error) or "an assertion"
    return ""


def passes_without(mistakes: list[Mistake]) -> None:
    from helpers.triton_race import watched

    for check in dict.fromkeys(m.caught_by for m in mistakes):
        torch.manual_seed(0)
        with nan_filled(), watched():
            check()


def test_some_mistakes_are_caught(tmp_path):
    chosen = [m for m in MISTAKES if m.name in QUICK]
    assert len(chosen) == len(QUICK)
    passes_without(chosen)
    assert [m.name for m in chosen if not is_caught(m, tmp_path)] == []


def test_the_sources_still_hold_what_mistakes_replace(tmp_path):
    for mistake in MISTAKES:
        with pytest.MonkeyPatch.context() as patch:
            plant(mistake, tmp_path, patch)


@pytest.mark.slow
def test_all_mistakes_are_caught(tmp_path):
    passes_without(MISTAKES)
    found = {m.name: is_caught(m, tmp_path) for m in MISTAKES}
    print(*(f"{name}: {how or 'NOT CAUGHT'}" for name, how in found.items()), sep="\n")
    assert [name for name, how in found.items() if not how] == []
