// What a scan reads and writes. All three kernels take it:
//   rows.h   a line is contiguous: vectors hold neighbouring places
//   runs.h   the channels of a place are contiguous (channels last): vectors hold channels
//   tiles.h  anything else, and above all contiguous rows scanned along: tiles are transposed in registers
#pragma once
#include "common.h"

namespace GSPN_NS {
namespace {

// A tensor as one scan sees it: strides in elements between lines, places and channels.
template <class T> struct Field {
    T* data;
    int64_t line, place, channel;
};

// The three planes of the weights; channels of the scan share them, unless they have one plane each.
template <class T> struct WeightField {
    T* data[3];
    int64_t line, place, channel;
};

template <class T>
GSPN_INLINE Field<T> field_of(
    const GspnView& view, const Geometry& g, int64_t batch, int64_t direction, int64_t channel) {
    T* data = static_cast<T*>(view.data) + batch * view.batch + direction * view.direction + channel * view.channel;
    if (!view.data) return {nullptr, 0, 0, 0};
    return {data, g.line_stride(view.row, view.column), g.place_stride(view.row, view.column), view.channel};
}

template <class T>
GSPN_INLINE WeightField<T> weights_of(
    const GspnView& view, const Geometry& g, int64_t batch, int64_t direction, int64_t group) {
    const Field<T> f = field_of<T>(view, g, batch, direction, group);
    if (!f.data) return {};
    return {{f.data, f.data + view.neighbour, f.data + 2 * view.neighbour}, f.line, f.place, f.channel};
}

// All that one scan reads and writes. The gradients are null in a forward scan, the gate in line_scan.
template <class S, class W, class DX, class DW> struct Fields {
    Field<const S> x, gate, grad_h;
    WeightField<const W> weights;
    Field<S> h, dgate;
    Field<DX> dx;
    WeightField<DW> dweights;
    int64_t channels;  // those that share weights are scanned together, line by line
    bool add_dx;       // an earlier direction has written dx
    // Channels that share weights may come in several scans: dweights holds the sums, of which the last scan makes
    // gradients.
    bool add_dweights, finish_dweights;
};

// The same with the lines in the order of the scan: a scan that goes backwards sees negative strides.
template <class T> GSPN_INLINE void reverse_lines(Field<T>& f, int64_t lines) {
    if (f.data) f.data += (lines - 1) * f.line, f.line = -f.line;
}
template <class T> GSPN_INLINE void reverse_lines(WeightField<T>& f, int64_t lines) {
    if (!f.data[0]) return;
    for (T*& data : f.data) data += (lines - 1) * f.line;
    f.line = -f.line;
}
template <class F> GSPN_INLINE F all_in_scan_order(F f, const Geometry& g) {
    if (!g.reverse) return f;
    reverse_lines(f.x, g.lines), reverse_lines(f.gate, g.lines), reverse_lines(f.grad_h, g.lines);
    reverse_lines(f.h, g.lines), reverse_lines(f.dgate, g.lines), reverse_lines(f.dx, g.lines);
    reverse_lines(f.weights, g.lines), reverse_lines(f.dweights, g.lines);
    return f;
}

}  // namespace
}  // namespace GSPN_NS
