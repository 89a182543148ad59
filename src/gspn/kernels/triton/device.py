"""The scans on the GPU, in Triton. plan.py beside this file chooses their launch parameters, launch.py starts them.

How a scan program works. It owns some channels of one image in one direction, a range of lines and all places of a
line (or a tile of them), and walks over the lines with the state h in registers, in float32 (float64 for float64).
Places are dealt out in strips: place = g * PLACES + r, where g runs over a tensor axis (the lanes) and r is unrolled in
the program, so that most neighbours are the same lane's own. What crosses from strip to strip is fetched by one gather
of the strips' borders a line. Channels are innermost in memory, so that a load is a vector of channels whatever the
direction; a direction is nothing but two strides and a sign. A step first issues all its loads, then computes: loads
written beside their use would leave too few bytes in flight.

Places beyond a tile. A line longer than a program can hold is cut into tiles, each with HALO places more on either
side: what a tile computes there goes wrong by one place a line, from the outside in, so its own places stay right for
HALO lines. After those the state goes through memory to the next launch (CHAINED), unless segments are that short.

Rules that make the kernels testable without a GPU: no launch reads what it writes, every element has one writer, and
there are no atomics. So results do not depend on the order of programs, and are the same bit for bit in every run.

Names. A program has STRIPS strips of PLACES places each, GROUPS groups of channels that share weights and MEMBERS
channels of each group, of which there are SHARE. T lines and P places make a map; t and place count them.
    a_, e_, w_, dw_   logits, inverse sigmoids, weights, gradients of the weights
    _prev _same _next of the previous, the same and the next place of the line before
    NAME_t, NAME_p    the step of a tensor from line to line and from place to place (l: logits, u: output_gate)
    NAME_at           where in a tensor the program's places are
    NAME_b ... NAME_w the strides of a tensor (B,D,K,H,W)
ALIGN is a number of elements by which every stride and the number of channels are divisible. They are passed divided by
it: so the compiler knows, and loads whole vectors. It does not specialise on sizes: another height, width or segment
compiles nothing. Within a map positions are numbers of the type INDEX, 64 bits only where a map has 2^31 elements or
more.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(-28.0)  # LOGIT_FLOOR of the reference: (1 + e^28)^3 is finite in float32
LOG2E = tl.constexpr(1.4426950408889634)

SIZES = [  # for which the compiler is to make no versions of their own (such as: is 1, is divisible by 16)
    *("height", "width", "maps", "directions", "count", "segment", "origin", "total", "state_places"),
    *("first", "lines", "own", "blocks", "tiles", "segments", "unit", "part_stride", "chunks"),
    *(
        f"{name}_{axis}"
        for name in ("x", "gate", "logits", "h", "grad", "output_gate", "skip", "y")
        for axis in "bdkhw"
    ),
    *(f"{name}_{axis}" for name in ("dlogits", "dgate", "dx", "doutput", "dskip") for axis in "bdkhw"),
]


# ---- the pieces of a scan --------------------------------------------------------------------------------------------


@triton.jit
def _locate(directions, count, blocks, tiles, segments):
    """What this program is about: block of channels, tile of places, which direction of the call, segment, image.
    `directions` holds 4 bits for each of the `count` directions of this launch: its index in the call, its number."""
    rest = tl.program_id(0)
    block = rest % blocks
    rest = rest // blocks
    tile = rest % tiles
    rest = rest // tiles
    bits = directions >> (4 * (rest % count))
    rest = rest // count
    return block, tile, bits & 3, rest % segments, rest // segments, (bits & 4) == 0, (bits >> 3) & 1


@triton.jit
def _channels(block, channels, SHARE: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr):
    """Of a block: its groups, its channels, which of them exist, and its number within a group that has several."""
    parts: tl.constexpr = (SHARE + MEMBERS - 1) // MEMBERS
    group = (block // parts) * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    member = (block % parts) * MEMBERS + tl.arange(0, MEMBERS)[None, None, :]
    group_exists = group < channels // SHARE
    return group, group * SHARE + member, group_exists, (member < SHARE) & group_exists, block % parts


@triton.jit
def _steps(row, column, horizontal, width, unit, INDEX: tl.constexpr, DENSE: tl.constexpr):
    """From line to line and from place to place in memory. What is known to be DENSE (..., H, W, C) is computed from
    its sizes, the same for all such tensors, so that they share positions: those cost more registers than the data."""
    if DENSE:
        row = width * unit
        column = unit
    return tl.where(horizontal, column, row).to(INDEX), tl.where(horizontal, row, column).to(INDEX)


@triton.jit
def _exists(place, P, HALO: tl.constexpr):
    """Whether a place is one of the line's; only tiles with a halo reach beyond its beginning."""
    if HALO > 0:
        return (place >= 0) & (place < P)
    else:
        return place < P


@triton.jit
def _owned(place, first, own, P, HALO: tl.constexpr):
    """Whether a place is one that this program writes: not in the halo of its tile."""
    if HALO > 0:
        return (place >= first) & (place < tl.minimum(first + own, P))
    else:
        return place < P


@triton.jit
def _cross(low, high, STRIPS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr):
    """The highest place of the strip before and the lowest of the strip after. At the ends of the line, where weights
    are zero, the place's own value: another's could be NaN, which zero times is."""
    if STRIPS == 1:
        return low, high
    else:
        g = tl.arange(0, STRIPS)[:, None, None]
        side = tl.arange(0, 2)[None, None, None, :]
        source = tl.where(side == 0, tl.minimum(g[:, :, :, None] + 1, STRIPS - 1), tl.maximum(g[:, :, :, None] - 1, 0))
        source = tl.broadcast_to(source, (STRIPS, GROUPS, MEMBERS, 2))
        after, before = tl.split(tl.gather(tl.join(low, high), source, 0))
        return tl.where(g == 0, low, before), tl.where(g == STRIPS - 1, high, after)


@triton.jit
def inverse_sigmoid(logit):
    return 1.0 + tl.exp2(tl.maximum(logit, FLOOR, propagate_nan=tl.PropagateNan.ALL) * -LOG2E)


@triton.jit
def _reciprocal(value):
    """1 / value for a positive value: a fast approximation and one step of Newton's, less than half a division."""
    root = tl.rsqrt(value)
    q = root * root
    return q + q * (1.0 - value * q)


@triton.jit
def normalize(e_prev, e_same, e_next, first, last):
    """The weights of the previous and the next place from the inverse sigmoids; that of the same place is what is
    missing to one, and is not formed: so weights sum to one exactly."""
    previous = tl.where(first, 0.0, e_same * e_next)
    following = tl.where(last, 0.0, e_prev * e_same)
    q = _reciprocal(previous + e_prev * e_next + following)
    return previous * q, following * q


# ---- scans -----------------------------------------------------------------------------------------------------------


# center may be a part of the call's (one direction, some images), which starts anywhere: one version for all of them.
@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["center"])
def scan_forward(
    x, gate, center, logits, h, state_in, state_out, x_b, x_h, x_w, gate_b, gate_d, gate_h, gate_w, logits_b, logits_d,
    logits_k, logits_h, logits_w, h_b, h_d, h_h, h_w,
    height, width, unit, maps, directions, count, segment, origin, state_places, first, lines, own, blocks, tiles,
    segments,
    SHARE: tl.constexpr, STRIPS: tl.constexpr, PLACES: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr,
    HALO: tl.constexpr, CHAINED: tl.constexpr, GATED: tl.constexpr, CENTERED: tl.constexpr, NORMALIZED: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_LOGITS: tl.constexpr, STATE: tl.constexpr, INDEX: tl.constexpr, STAGES: tl.constexpr,
    X_DENSE: tl.constexpr, GATE_DENSE: tl.constexpr, H_DENSE: tl.constexpr,
):  # fmt: skip
    """h of x, gate and logits. GATED: the input is gate * x, else x. CENTERED: center (B, maps, C), contiguous, is
    subtracted from the input of every line that has a line before it in its segment. NORMALIZED: logits are to be
    normalised, else they are the weights. CHAINED: lines [first, first + lines) of a scan whose line 0 is line `origin`
    of its map, the state before them from state_in and after them to state_out (B, maps, state_places, C); else a
    program has a segment."""
    block, tile, which, part_of_scan, image, horizontal, reverse = _locate(directions, count, blocks, tiles, segments)
    channels = unit * ALIGN
    group, c, group_exists, c_exists, _ = _channels(block, channels, SHARE, GROUPS, MEMBERS)
    T = tl.where(horizontal, width, height)
    P = tl.where(horizontal, height, width)
    begin = first if CHAINED else part_of_scan * segment
    end = tl.where(tile * own < P, tl.minimum(begin + (lines if CHAINED else segment), T), begin)

    image = image.to(tl.int64)
    place = tile * own - HALO + tl.arange(0, STRIPS)[:, None, None] * PLACES  # of r = 0
    x_t, x_p = _steps(x_h, x_w, horizontal, width, unit, INDEX, X_DENSE)
    h_t, h_p = _steps(h_h, h_w, horizontal, width, unit, INDEX, H_DENSE)
    l_t, l_p = _steps(logits_h, logits_w, horizontal, width, unit, INDEX, False)
    l_k = logits_k.to(INDEX) * ALIGN_LOGITS
    x += image * x_b * ALIGN
    h += (image * h_b + which * h_d.to(tl.int64)) * ALIGN
    logits += (image * logits_b + which * logits_d.to(tl.int64)) * ALIGN_LOGITS
    x_at = place * x_p * ALIGN + c
    h_at = place * h_p * ALIGN + c
    l_at = place * l_p * ALIGN_LOGITS + group
    if GATED:
        gate_t, gate_p = _steps(gate_h, gate_w, horizontal, width, unit, INDEX, GATE_DENSE)
        gate += (image * gate_b + which * gate_d.to(tl.int64)) * ALIGN
        gate_at = place * gate_p * ALIGN + c
    if CENTERED:
        mean = tl.load(center + (image * maps + which) * channels + c, c_exists, 0.0).to(STATE)

    state_at = ((image * maps + which) * state_places + place) * channels + c
    states = ()
    for r in tl.static_range(PLACES):
        if CHAINED:
            enters = _exists(place + r, P, HALO) & c_exists & (place * 0 + (origin + begin) % segment > 0)
            states = states + (tl.load(state_in + state_at + r * channels, enters, 0.0),)
        else:
            states = states + (tl.zeros((STRIPS, GROUPS, MEMBERS), STATE),)

    for t in tl.range(begin, end, num_stages=STAGES):
        at = t + reverse * (T - 1 - 2 * t)
        inputs = ()
        gates = ()
        a_prev = ()
        a_same = ()
        a_next = ()
        for r in tl.static_range(PLACES):
            exists = _exists(place + r, P, HALO)
            line = logits + (l_at + (at * l_t + r * l_p) * ALIGN_LOGITS)
            inputs = inputs + (tl.load(x + (x_at + (at * x_t + r * x_p) * ALIGN), exists & c_exists, 0.0),)
            if GATED:
                gates = gates + (
                    tl.load(gate + (gate_at + (at * gate_t + r * gate_p) * ALIGN), exists & c_exists, 0.0),
                )
            a_prev = a_prev + (tl.load(line, exists & group_exists, 0.0),)
            a_same = a_same + (tl.load(line + l_k, exists & group_exists, 0.0),)
            a_next = a_next + (tl.load(line + 2 * l_k, exists & group_exists, 0.0),)
        before, after = _cross(states[0], states[PLACES - 1], STRIPS, GROUPS, MEMBERS)
        goes_on = (place * 0 + ((origin + t) % segment if CHAINED else t - begin)) > 0
        new = ()
        for r in tl.static_range(PLACES):
            own_place = place + r
            z = inputs[r].to(STATE)
            if GATED:
                z = z * gates[r].to(STATE)
            entering = z - mean if CENTERED else z
            same = states[r]
            previous = before if r == 0 else states[r - 1]
            following = after if r == PLACES - 1 else states[r + 1]
            first_place = own_place == 0
            last_place = own_place == P - 1
            if NORMALIZED:
                e_prev = inverse_sigmoid(a_prev[r].to(STATE))
                e_same = inverse_sigmoid(a_same[r].to(STATE))
                e_next = inverse_sigmoid(a_next[r].to(STATE))
                w_prev, w_next = normalize(e_prev, e_same, e_next, first_place, last_place)
                value = (w_prev * (previous - same) + (w_next * (following - same) + same)) + entering
            else:
                previous = tl.where(first_place, 0.0, previous)
                following = tl.where(last_place, 0.0, following)
                w_prev = tl.where(first_place, 0.0, a_prev[r].to(STATE))
                w_next = tl.where(last_place, 0.0, a_next[r].to(STATE))
                value = entering + w_prev * previous + a_same[r].to(STATE) * same + w_next * following
            value = tl.where(goes_on, value, z)  # whatever the weights of a first line are, even NaN
            exists = _owned(own_place, tile * own, own, P, HALO) & c_exists
            tl.store(h + (h_at + (at * h_t + r * h_p) * ALIGN), value.to(h.dtype.element_ty), exists)
            new = new + (value,)
        states = new

    if CHAINED:
        for r in tl.static_range(PLACES):
            leaves = _owned(place + r, tile * own, own, P, HALO) & c_exists
            tl.store(state_out + state_at + r * channels, states[r], leaves)


@triton.jit(do_not_specialize=SIZES)
def scan_backward(
    grad, output_gate, logits, h, g, dlogits, state_in, state_out,
    grad_b, grad_d, grad_h, grad_w, output_gate_b, output_gate_d, output_gate_h, output_gate_w, logits_b, logits_d,
    logits_k, logits_h, logits_w, h_b, h_d, h_h, h_w, dlogits_b, dlogits_d, dlogits_k, dlogits_h, dlogits_w,
    part_stride, total,
    height, width, unit, maps, directions, count, segment, origin, state_places, first, lines, own, blocks, tiles,
    segments,
    SHARE: tl.constexpr, STRIPS: tl.constexpr, PLACES: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr,
    HALO: tl.constexpr, CHAINED: tl.constexpr, GATED: tl.constexpr, NORMALIZED: tl.constexpr, ALIGN: tl.constexpr,
    ALIGN_LOGITS: tl.constexpr, STATE: tl.constexpr, INDEX: tl.constexpr, STAGES: tl.constexpr, PARTIAL: tl.constexpr,
    GRAD_DENSE: tl.constexpr, H_DENSE: tl.constexpr, DLOGITS_ALIKE: tl.constexpr,
):  # fmt: skip
    """The adjoint of a scan: g, the gradient of what went into the scan, (B, maps, H, W, C) dense, and dlogits.

    g_t = dh_t + W_(t+1)^T g_(t+1), from the last line to the first; the gradient of a weight is g times the state that
    it met, which is read from h. GATED: dh is grad * output_gate, else grad. NORMALIZED: dlogits is the gradient of the
    logits, else that of the weights. PARTIAL: a group has several blocks; each writes its share of the gradient of the
    weights at dlogits + part * part_stride. CHAINED: as in scan_forward; `total` is
    the lines of the whole map where this is a part of one, else 0, and h must then have one line before line 0."""
    block, tile, which, part_of_scan, image, horizontal, reverse = _locate(directions, count, blocks, tiles, segments)
    channels = unit * ALIGN
    group, c, group_exists, c_exists, part = _channels(block, channels, SHARE, GROUPS, MEMBERS)
    T = tl.where(horizontal, width, height)
    P = tl.where(horizontal, height, width)
    begin = first if CHAINED else part_of_scan * segment
    end = tl.where(tile * own < P, tl.minimum(begin + (lines if CHAINED else segment), T), begin)

    image = image.to(tl.int64)
    place = tile * own - HALO + tl.arange(0, STRIPS)[:, None, None] * PLACES  # of r = 0
    g_t, g_p = _steps(0, 0, horizontal, width, unit, INDEX, True)
    grad_t, grad_p = _steps(grad_h, grad_w, horizontal, width, unit, INDEX, GRAD_DENSE)
    h_t, h_p = _steps(h_h, h_w, horizontal, width, unit, INDEX, H_DENSE)
    l_t, l_p = _steps(logits_h, logits_w, horizontal, width, unit, INDEX, False)
    l_k = logits_k.to(INDEX) * ALIGN_LOGITS
    dl_t, dl_p = _steps(dlogits_h, dlogits_w, horizontal, width, unit, INDEX, False)
    if DLOGITS_ALIKE:
        dl_t, dl_p = l_t, l_p
    dl_k = dlogits_k.to(INDEX) * ALIGN_LOGITS
    grad += (image * grad_b + which * grad_d.to(tl.int64)) * ALIGN
    h += (image * h_b + which * h_d.to(tl.int64)) * ALIGN
    logits += (image * logits_b + which * logits_d.to(tl.int64)) * ALIGN_LOGITS
    dlogits += (image * dlogits_b + which * dlogits_d.to(tl.int64)) * ALIGN_LOGITS
    dlogits += part * part_stride.to(tl.int64)
    g += (image * maps + which) * height.to(tl.int64) * width * unit * ALIGN
    grad_at = place * grad_p * ALIGN + c
    h_at = place * h_p * ALIGN + c
    l_at = place * l_p * ALIGN_LOGITS + group
    dl_at = place * dl_p * ALIGN_LOGITS + group
    g_at = place * g_p * ALIGN + c
    if GATED:
        u_t, u_p = _steps(output_gate_h, output_gate_w, horizontal, width, unit, INDEX, False)
        output_gate += (image * output_gate_b + which * output_gate_d.to(tl.int64)) * ALIGN
        u_at = place * u_p * ALIGN + c

    state_at = ((image * maps + which) * state_places + place) * channels + c
    carried = ()  # what the line after gives to this one
    for r in tl.static_range(PLACES):
        if CHAINED:
            after_end = (origin + end) % segment > 0 and origin + end < tl.where(total > 0, total, T)
            enters = _exists(place + r, P, HALO) & c_exists & (place * 0 + after_end.to(tl.int32) > 0)
            carried = carried + (tl.load(state_in + state_at + r * channels, enters, 0.0),)
        else:
            carried = carried + (tl.zeros((STRIPS, GROUPS, MEMBERS), STATE),)

    strip = tl.arange(0, STRIPS)[:, None, None]
    for i in tl.range(begin, end, num_stages=STAGES):
        t = begin + end - 1 - i
        at = t + reverse * (T - 1 - 2 * t)
        at_met = at - 1 + 2 * reverse  # the line before, in the order of the scan
        goes_on = (place * 0 + (origin + t) % segment) > 0
        grads = ()
        gates = ()
        a_prev = ()
        a_same = ()
        a_next = ()
        met = ()
        for r in tl.static_range(PLACES):
            exists = _exists(place + r, P, HALO)
            line = logits + (l_at + (at * l_t + r * l_p) * ALIGN_LOGITS)
            grads = grads + (tl.load(grad + (grad_at + (at * grad_t + r * grad_p) * ALIGN), exists & c_exists, 0.0),)
            if GATED:
                gates = gates + (tl.load(output_gate + (u_at + (at * u_t + r * u_p) * ALIGN), exists & c_exists, 0.0),)
            a_prev = a_prev + (tl.load(line, exists & group_exists, 0.0),)
            a_same = a_same + (tl.load(line + l_k, exists & group_exists, 0.0),)
            a_next = a_next + (tl.load(line + 2 * l_k, exists & group_exists, 0.0),)
        for r in tl.static_range(PLACES + 2):
            exists = (place + (r - 1) >= 0) & (place + (r - 1) < P) & goes_on & c_exists
            met = met + (tl.load(h + (h_at + (at_met * h_t + (r - 1) * h_p) * ALIGN), exists, 0.0),)
        to_previous = ()
        to_same = ()
        to_following = ()
        for r in tl.static_range(PLACES):
            own_place = place + r
            first_place = own_place == 0
            last_place = own_place == P - 1
            dh = grads[r].to(STATE)
            if GATED:
                dh = dh * gates[r].to(STATE)
            value = tl.where(_exists(own_place, P, HALO) & c_exists, dh + carried[r], 0.0)
            exists = _owned(own_place, tile * own, own, P, HALO)
            tl.store(g + (g_at + (at * g_t + r * g_p) * ALIGN), value.to(g.dtype.element_ty), exists & c_exists)

            dw_prev = value * met[r].to(STATE)
            dw_same = value * met[r + 1].to(STATE)
            dw_next = value * met[r + 2].to(STATE)
            if MEMBERS > 1:
                dw_prev = tl.sum(dw_prev, 2, keep_dims=True)
                dw_same = tl.sum(dw_same, 2, keep_dims=True)
                dw_next = tl.sum(dw_next, 2, keep_dims=True)
            if NORMALIZED:
                e_prev = inverse_sigmoid(a_prev[r].to(STATE))
                e_same = inverse_sigmoid(a_same[r].to(STATE))
                e_next = inverse_sigmoid(a_next[r].to(STATE))
                w_prev, w_next = normalize(e_prev, e_same, e_next, first_place, last_place)
                if not PARTIAL:
                    dw_prev, dw_same, dw_next = logit_gradients(
                        dw_prev, dw_same, dw_next, w_prev, w_next, e_prev, e_same, e_next,
                        a_prev[r], a_same[r], a_next[r], STATE,
                    )  # fmt: skip
                part_previous = w_prev * value
                part_following = w_next * value
                part_same = value - part_previous - part_following
            else:
                dw_prev = tl.where(first_place, 0.0, dw_prev)
                dw_next = tl.where(last_place, 0.0, dw_next)
                part_previous = tl.where(first_place, 0.0, a_prev[r].to(STATE) * value)
                part_following = tl.where(last_place, 0.0, a_next[r].to(STATE) * value)
                part_same = a_same[r].to(STATE) * value
            out = dlogits + (dl_at + (at * dl_t + r * dl_p) * ALIGN_LOGITS)
            tl.store(out, dw_prev.to(dlogits.dtype.element_ty), exists & group_exists)
            tl.store(out + dl_k, dw_same.to(dlogits.dtype.element_ty), exists & group_exists)
            tl.store(out + 2 * dl_k, dw_next.to(dlogits.dtype.element_ty), exists & group_exists)
            to_previous = to_previous + (part_previous,)
            to_same = to_same + (part_same,)
            to_following = to_following + (part_following,)
        before, after = _cross(to_previous[0], to_following[PLACES - 1], STRIPS, GROUPS, MEMBERS)
        before = tl.where(strip > 0, before, 0.0)
        after = tl.where(strip < STRIPS - 1, after, 0.0)
        new = ()
        for r in tl.static_range(PLACES):
            total_here = to_same[r] + (after if r == PLACES - 1 else to_previous[r + 1])
            total_here = total_here + (before if r == 0 else to_following[r - 1])
            new = new + (tl.where(goes_on, total_here, 0.0) if CHAINED else total_here,)
        carried = new

    if CHAINED:
        for r in tl.static_range(PLACES):
            leaves = _owned(place + r, tile * own, own, P, HALO) & c_exists
            tl.store(state_out + state_at + r * channels, carried[r], leaves)


@triton.jit
def logit_gradients(
    dw_prev, dw_same, dw_next, w_prev, w_next, e_prev, e_same, e_next, a_prev, a_same, a_next, STATE: tl.constexpr
):
    """Gradients of the three logits from those of the weights: w_k (1 - s_k) (dw_k - sum_j w_j dw_j), s_k = 1 / e_k;
    zero beneath the floor. dw of a neighbour that does not exist must be finite; its weight is zero."""
    mean = dw_same + (w_prev * (dw_prev - dw_same) + w_next * (dw_next - dw_same))
    product = e_prev * e_same
    q = _reciprocal(product * e_next)
    zero = tl.zeros_like(dw_prev)
    return (
        tl.where(a_prev.to(STATE) < FLOOR, zero, w_prev * (1.0 - q * (e_same * e_next)) * (dw_prev - mean)),
        tl.where(
            a_same.to(STATE) < FLOOR, zero, (1.0 - w_prev - w_next) * (1.0 - q * (e_prev * e_next)) * (dw_same - mean)
        ),
        tl.where(a_next.to(STATE) < FLOOR, zero, w_next * (1.0 - q * product) * (dw_next - mean)),
    )
