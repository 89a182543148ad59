"""The GPU kernels around the scans, elementwise: the merger, its gradients, and the end of shared weights' gradients.

A program has a tile of PIXELS pixels and BC channels. Sizes and strides are passed as in device.py."""

import triton
import triton.language as tl

from gspn.kernels.triton.device import SIZES, inverse_sigmoid, logit_gradients, normalize


@triton.jit
def _pixels(
    height, width, unit, chunks, ALIGN: tl.constexpr, INDEX: tl.constexpr, PIXELS: tl.constexpr, BC: tl.constexpr
):
    """A tile of PIXELS pixels of an image times BC channels: image, row, column, channel, and which exist."""
    rest = tl.program_id(0)
    c = (rest % chunks) * BC + tl.arange(0, BC)[None, :]
    rest = rest // chunks
    size = height.to(INDEX) * width
    tiles = (size + PIXELS - 1) // PIXELS
    pixel = (rest % tiles) * PIXELS + tl.arange(0, PIXELS)[:, None]
    row = pixel // width
    column = pixel - row * width
    exists = (pixel < size) & (c < unit * ALIGN)
    return (rest // tiles).to(tl.int64), row.to(tl.int64), column.to(tl.int64), c, exists


@triton.jit(do_not_specialize=SIZES)
def finish_logits(
    partial, logits, dlogits, logits_b, logits_d, logits_k, logits_h, logits_w, dlogits_b, dlogits_d, dlogits_k,
    dlogits_h, dlogits_w, part_stride, height, width, unit, directions, count,
    chunks, PARTS: tl.constexpr, NORMALIZED: tl.constexpr, ALIGN: tl.constexpr, STATE: tl.constexpr,
    INDEX: tl.constexpr, PIXELS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums what the PARTS blocks of each group gave to the gradients of its weights, (PARTS, B, count, H, W, 3, G), in
    their order, and takes it back to the logits where the weights were made of those. Channels here are groups."""
    image, i, j, g, exists = _pixels(height, width, unit, chunks, ALIGN, INDEX, PIXELS, BC)
    groups = unit * ALIGN
    which = (image % count).to(tl.int32)
    direction = (directions >> (4 * which + 2)) & 3
    at = partial + ((image * height + i) * width + j) * 3 * groups + g
    image = image // count
    horizontal = direction % 2 == 0
    place = tl.where(horizontal, i, j)
    last = tl.where(horizontal, height, width) - 1
    dw_prev = tl.zeros((PIXELS, BC), STATE)
    dw_same = tl.zeros((PIXELS, BC), STATE)
    dw_next = tl.zeros((PIXELS, BC), STATE)
    for part in tl.static_range(PARTS):
        from_part = at + part * part_stride.to(tl.int64)
        dw_prev += tl.load(from_part, exists, 0.0)
        dw_same += tl.load(from_part + groups, exists, 0.0)
        dw_next += tl.load(from_part + 2 * groups, exists, 0.0)
    if NORMALIZED:
        line = image * logits_b + which * logits_d.to(tl.int64) + i * logits_h
        line = logits + (line + j * logits_w) * ALIGN + g
        k = logits_k.to(tl.int64) * ALIGN
        a_prev = tl.load(line, exists, 0.0)
        a_same = tl.load(line + k, exists, 0.0)
        a_next = tl.load(line + 2 * k, exists, 0.0)
        e_prev = inverse_sigmoid(a_prev.to(STATE))
        e_same = inverse_sigmoid(a_same.to(STATE))
        e_next = inverse_sigmoid(a_next.to(STATE))
        w_prev, w_next = normalize(e_prev, e_same, e_next, place == 0, place == last)
        dw_prev, dw_same, dw_next = logit_gradients(
            dw_prev, dw_same, dw_next, w_prev, w_next, e_prev, e_same, e_next, a_prev, a_same, a_next, STATE
        )
    out = image * dlogits_b + which * dlogits_d.to(tl.int64) + i * dlogits_h
    out = dlogits + (out + j * dlogits_w) * ALIGN + g
    dk = dlogits_k.to(tl.int64) * ALIGN
    tl.store(out, dw_prev.to(dlogits.dtype.element_ty), exists)
    tl.store(out + dk, dw_same.to(dlogits.dtype.element_ty), exists)
    tl.store(out + 2 * dk, dw_next.to(dlogits.dtype.element_ty), exists)


@triton.jit(do_not_specialize=SIZES)
def merge_forward(
    h, output_gate, skip, x, y_in, y, h_b, h_d, h_h, h_w, output_gate_b, output_gate_d, output_gate_h, output_gate_w,
    skip_b, skip_h, skip_w, x_b, x_h, x_w, y_b, y_h, y_w,
    height, width, unit, chunks,
    COUNT: tl.constexpr, SKIP: tl.constexpr, ADD: tl.constexpr, ALIGN: tl.constexpr, STATE: tl.constexpr,
    INDEX: tl.constexpr, PIXELS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y = sum over the COUNT directions of output_gate * h, plus skip * x where SKIP, plus y_in where ADD; y_in has the
    strides of y, and may be y: each element is read by the one that writes it."""
    image, i, j, c, exists = _pixels(height, width, unit, chunks, ALIGN, INDEX, PIXELS, BC)
    total = tl.zeros((PIXELS, BC), STATE)
    y_at = (image * y_b + i * y_h + j * y_w) * ALIGN + c
    if ADD:
        total += tl.load(y_in + y_at, exists, 0.0).to(STATE)
    if SKIP:
        skip_at = (image * skip_b + i * skip_h + j * skip_w) * ALIGN + c
        x_at = (image * x_b + i * x_h + j * x_w) * ALIGN + c
        total += tl.load(skip + skip_at, exists, 0.0).to(STATE) * tl.load(x + x_at, exists, 0.0).to(STATE)
    h_at = (image * h_b + i * h_h + j * h_w) * ALIGN + c
    u_at = (image * output_gate_b + i * output_gate_h + j * output_gate_w) * ALIGN + c
    for n in tl.static_range(COUNT):
        state = tl.load(h + (h_at + n * h_d.to(tl.int64) * ALIGN), exists, 0.0).to(STATE)
        gate = tl.load(output_gate + (u_at + n * output_gate_d.to(tl.int64) * ALIGN), exists, 0.0)
        total += gate.to(STATE) * state
    tl.store(y + y_at, total.to(y.dtype.element_ty), exists)


@triton.jit(do_not_specialize=SIZES)
def merge_backward(
    g, gate, x, grad, h, skip, dx_in, dx, dgate, doutput, dskip,
    gate_b, gate_d, gate_h, gate_w, x_b, x_h, x_w, grad_b, grad_h, grad_w, h_b, h_d, h_h, h_w, skip_b, skip_h, skip_w,
    dx_b, dx_h, dx_w, dgate_b, dgate_d, dgate_h, dgate_w, doutput_b, doutput_d, doutput_h, doutput_w,
    dskip_b, dskip_h, dskip_w, height, width, unit, chunks,
    COUNT: tl.constexpr, MERGED: tl.constexpr, SKIP: tl.constexpr, ADD: tl.constexpr, ALIGN: tl.constexpr,
    STATE: tl.constexpr, INDEX: tl.constexpr, PIXELS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """From g, the gradient of gate * x (B, COUNT, H, W, C) dense: dgate = g * x and dx = sum over the directions of
    g * gate, plus dx_in where ADD, which has the strides of dx and may be dx. MERGED: also doutput = grad * h, the
    gradient of the output gates; SKIP: also dskip = grad * x, and skip * grad is added to dx."""
    image, i, j, c, exists = _pixels(height, width, unit, chunks, ALIGN, INDEX, PIXELS, BC)
    value = tl.load(x + (image * x_b + i * x_h + j * x_w) * ALIGN + c, exists, 0.0).to(STATE)
    total = tl.zeros((PIXELS, BC), STATE)
    dx_at = (image * dx_b + i * dx_h + j * dx_w) * ALIGN + c
    if ADD:
        total += tl.load(dx_in + dx_at, exists, 0.0).to(STATE)
    if MERGED:
        dy_at = (image * grad_b + i * grad_h + j * grad_w) * ALIGN + c
        dy = tl.load(grad + dy_at, exists, 0.0).to(STATE)
        h_at = (image * h_b + i * h_h + j * h_w) * ALIGN + c
        du_at = (image * doutput_b + i * doutput_h + j * doutput_w) * ALIGN + c
    if SKIP:
        skip_at = (image * skip_b + i * skip_h + j * skip_w) * ALIGN + c
        total += dy * tl.load(skip + skip_at, exists, 0.0).to(STATE)
        out_at = (image * dskip_b + i * dskip_h + j * dskip_w) * ALIGN + c
        tl.store(dskip + out_at, (dy * value).to(dskip.dtype.element_ty), exists)
    gate_at = (image * gate_b + i * gate_h + j * gate_w) * ALIGN + c
    dgate_at = (image * dgate_b + i * dgate_h + j * dgate_w) * ALIGN + c
    g_at = ((image * COUNT * height + i) * width + j) * unit * ALIGN + c
    map_size = height.to(tl.int64) * width * unit * ALIGN
    for n in tl.static_range(COUNT):
        adjoint = tl.load(g + (g_at + n * map_size), exists, 0.0).to(STATE)
        total += adjoint * tl.load(gate + (gate_at + n * gate_d.to(tl.int64) * ALIGN), exists, 0.0).to(STATE)
        out = dgate + (dgate_at + n * dgate_d.to(tl.int64) * ALIGN)
        tl.store(out, (adjoint * value).to(dgate.dtype.element_ty), exists)
        if MERGED:
            state = tl.load(h + (h_at + n * h_d.to(tl.int64) * ALIGN), exists, 0.0).to(STATE)
            out = doutput + (du_at + n * doutput_d.to(tl.int64) * ALIGN)
            tl.store(out, (dy * state).to(doutput.dtype.element_ty), exists)
    tl.store(dx + dx_at, total.to(dx.dtype.element_ty), exists)
