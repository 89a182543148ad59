// What all scan kernels share: geometry, the weights, and one step of the recurrence for one vector of elements.
//
// Words: a scan visits T lines; a line has P places; the state of a line is computed from that of the line before it.
// Three kernels divide the work by the layout of the tensors:
//   scan_rows.h   a line is contiguous: vectors hold neighbouring places
//   scan_runs.h   the channels of a place are contiguous (channels last): vectors hold channels
//   scan_tiles.h  anything else, and above all contiguous rows scanned along: tiles are transposed in registers
#pragma once
#include "api.h"
#include "vec.h"

namespace GSPN_NS {
namespace {

#define GSPN_INLINE_MEMBER inline __attribute__((always_inline))

struct Yes { static constexpr bool value = true; };
struct No { static constexpr bool value = false; };

// ---- geometry ------------------------------------------------------------------------------------------------------

// One direction of one scan, over some channels. Channels that share weights are scanned together, line by line.
struct Geometry {
  int64_t lines, places, segment;  // segment <= lines: the state is reset every so many lines
  int64_t channels;
  bool horizontal, reverse;        // along the width; from the last line to the first
};

GSPN_INLINE Geometry geometry_of(const GspnScanArgs& args, int64_t direction, int64_t channels) {
  const int64_t way = args.direction[direction];
  const bool horizontal = way == GSPN_RIGHT || way == GSPN_LEFT;
  const int64_t lines = horizontal ? args.width : args.height, places = horizontal ? args.height : args.width;
  const int64_t segment = args.segment > 0 && args.segment < lines ? args.segment : lines;
  return {lines, places, segment, channels, horizontal, way == GSPN_LEFT || way == GSPN_UP};
}

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
GSPN_INLINE Field<T> field_of(const GspnView& view, const Geometry& g, int64_t batch, int64_t direction,
                              int64_t channel) {
  T* data = static_cast<T*>(view.data) + batch * view.batch + direction * view.direction + channel * view.channel;
  if (!view.data) return {nullptr, 0, 0, 0};
  return g.horizontal ? Field<T>{data, view.column, view.row, view.channel}
                      : Field<T>{data, view.row, view.column, view.channel};
}

template <class T>
GSPN_INLINE WeightField<T> weights_of(const GspnView& view, const Geometry& g, int64_t batch, int64_t direction,
                                      int64_t group) {
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
  bool add_dx;  // an earlier direction has written dx
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

// ---- weights -------------------------------------------------------------------------------------------------------

template <class V> using MaskOf = decltype(V{} < V{});  // lanes of 0 or -1

template <class V> struct Triple { V prev, same, next; };

// Which elements of a vector have the two neighbours. Only looked at where EDGE is set.
template <class V> struct Edges { MaskOf<V> has_prev, has_next; };

template <class V> GSPN_INLINE MaskOf<V> lane_numbers() {
  MaskOf<V> m{};
  for (int i = 0; i < (int)(sizeof(V) / sizeof(V{}[0])); i++) m[i] = i;
  return m;
}
template <class V> GSPN_INLINE MaskOf<V> all_lanes(bool yes) { return MaskOf<V>{} - (yes ? 1 : 0); }

// Of a vector that holds the places from `first` on.
template <class V> GSPN_INLINE Edges<V> edges_of_places(int64_t first, int64_t places) {
  typedef decltype(MaskOf<V>{}[0] + 0) Int;
  const MaskOf<V> place = lane_numbers<V>();
  return {place > MaskOf<V>{} - Int(first), place < MaskOf<V>{} + Int(places - 1 - first)};
}
// Of a vector all of whose elements are at one place.
template <class V> GSPN_INLINE Edges<V> edges_of_place(int64_t place, int64_t places) {
  return {all_lanes<V>(place > 0), all_lanes<V>(place < places - 1)};
}

template <class V> GSPN_INLINE V keep(MaskOf<V> mask, V v) { return mask ? v : V{}; }
template <bool EDGE, class V> GSPN_INLINE Triple<V> keep_existing(Triple<V> v, Edges<V> edges) {
  if constexpr (EDGE) return {keep(edges.has_prev, v.prev), v.same, keep(edges.has_next, v.next)};
  return v;
}

constexpr double kLowestLogit = -28.0;
constexpr double kLog2E = 1.4426950408889634;

// e^-a for the clamped logit: at most e^28, so that products of three stay finite.
template <class V> GSPN_INLINE V decay(V logit) {
  typedef decltype(logit[0] + logit[0]) A;
  return exp2(at_most(logit * A(-kLog2E), A(-kLowestLogit * kLog2E)));
}

// sigmoid(a_k) = 1 / (1 + e^-a_k). Divided by their sum: products of the other two denominators, divided by their sum.
// A missing neighbour has denominator 1 and weight 0, whatever its logit.
template <bool EDGE, class V> GSPN_INLINE Triple<V> products(Triple<V>& denominators, Edges<V> edges) {
  Triple<V>& e = denominators;
  if constexpr (EDGE) {
    e.prev = edges.has_prev ? e.prev : V{} + 1;
    e.next = edges.has_next ? e.next : V{} + 1;
  }
  return {e.same * e.next, e.prev * e.next, e.prev * e.same};
}

template <bool EDGE, class V>
GSPN_INLINE Triple<V> divide_by_sum(Triple<V> product, Triple<V> denominators, Edges<V> edges) {
  product = keep_existing<EDGE>(product, edges);
  const V q = reciprocal(product.prev + product.same + product.next);
  Triple<V> w = {product.prev * q, product.same * q, product.next * q};
  if constexpr (EDGE) {  // without neighbours the weight is 1, or NaN
    const V alone = denominators.same == denominators.same ? V{} + 1 : denominators.same;
    w.same = (edges.has_prev | edges.has_next) ? w.same : alone;
  }
  return w;
}

template <bool EDGE, class V> GSPN_INLINE Triple<V> normalize(Triple<V> logits, Edges<V> edges) {
  Triple<V> e = {1 + decay(logits.prev), 1 + decay(logits.same), 1 + decay(logits.next)};
  const Triple<V> product = products<EDGE>(e, edges);
  return divide_by_sum<EDGE>(product, e, edges);
}

// How the weights are handed over.
enum Form {
  kGiven,     // as they are, but nothing comes from neighbours that do not exist
  kLogits,    // to be normalised
  kPrepared,  // as they are: already formed, in scratch
};

template <Form FORM, bool EDGE, class V> GSPN_INLINE Triple<V> form_weights(Triple<V> raw, Edges<V> edges) {
  if constexpr (FORM == kLogits) return normalize<EDGE>(raw, edges);
  if constexpr (FORM == kGiven) return keep_existing<EDGE>(raw, edges);
  return raw;
}

// The weights and what turns their gradients into those of the raw ones.
template <class V> struct Slopes {
  Triple<V> weights;
  Triple<V> slopes;  // w (1 - sigmoid), 0 beneath the clamp
};

template <bool EDGE, class V> GSPN_INLINE Slopes<V> normalize_with_slopes(Triple<V> logits, Edges<V> edges) {
  typedef decltype(logits.same[0] + logits.same[0]) A;
  const Triple<V> d = {decay(logits.prev), decay(logits.same), decay(logits.next)};
  Triple<V> e = {1 + d.prev, 1 + d.same, 1 + d.next};
  const Triple<V> product = products<EDGE>(e, edges);
  const V r = reciprocal(e.prev * product.prev);  // 1 / (all three denominators), so that product * r = sigmoid
  Slopes<V> s;
  s.weights = divide_by_sum<EDGE>(product, e, edges);
  s.slopes = {s.weights.prev * d.prev * (product.prev * r), s.weights.same * d.same * (product.same * r),
              s.weights.next * d.next * (product.next * r)};
  const A lowest = A(kLowestLogit);
  s.slopes.prev = keep(logits.prev >= lowest, s.slopes.prev);
  s.slopes.same = keep(logits.same >= lowest, s.slopes.same);
  s.slopes.next = keep(logits.next >= lowest, s.slopes.next);
  return s;
}

template <Form FORM, bool EDGE, class V> GSPN_INLINE Slopes<V> form_slopes(Triple<V> raw, Edges<V> edges) {
  if constexpr (FORM == kLogits) return normalize_with_slopes<EDGE>(raw, edges);
  return {form_weights<FORM, EDGE>(raw, edges), Triple<V>{}};
}

// From the gradients of the weights to those of what was handed over. Exactly 0 for neighbours that do not exist.
template <Form FORM, bool EDGE, class V>
GSPN_INLINE Triple<V> weight_gradient(Triple<V> dw, const Slopes<V>& s, Edges<V> edges) {
  if constexpr (FORM == kLogits) {
    Triple<V> term = {s.weights.prev * dw.prev, V{}, s.weights.next * dw.next};
    term = keep_existing<EDGE>(term, edges);
    const V mean = term.prev + s.weights.same * dw.same + term.next;
    dw = {s.slopes.prev * (dw.prev - mean), s.slopes.same * (dw.same - mean), s.slopes.next * (dw.next - mean)};
    if constexpr (EDGE) dw.same = keep(edges.has_prev | edges.has_next, dw.same);
  }
  return keep_existing<EDGE>(dw, edges);
}

// ---- memory --------------------------------------------------------------------------------------------------------

template <bool PARTIAL, class T> GSPN_INLINE Triple<VecOf<T>> load_triple(const T* const* p, int64_t i, int n) {
  return {load_if<PARTIAL>(p[0] + i, n), load_if<PARTIAL>(p[1] + i, n), load_if<PARTIAL>(p[2] + i, n)};
}
template <bool PARTIAL, class T> GSPN_INLINE void store_triple(T* const* p, int64_t i, Triple<VecOf<T>> v, int n) {
  store_if<PARTIAL>(p[0] + i, v.prev, n);
  store_if<PARTIAL>(p[1] + i, v.same, n);
  store_if<PARTIAL>(p[2] + i, v.next, n);
}

template <class A> GSPN_INLINE void fill_zero(A* p, int64_t count) { __builtin_memset(p, 0, sizeof(A) * count); }

template <class T> GSPN_INLINE void prefetch(const T* p) { __builtin_prefetch(p, 0, 3); }
template <class T> GSPN_INLINE void prefetch_write(T* p) { __builtin_prefetch(p, 1, 3); }

template <class T> GSPN_INLINE void gather(const T* p, int64_t stride, int64_t count, Acc<T>* out) {
  for (int64_t i = 0; i < count; i++) out[i] = load_one(p + i * stride);
}
template <class T> GSPN_INLINE void scatter(const Acc<T>* in, int64_t count, T* p, int64_t stride) {
  for (int64_t i = 0; i < count; i++) store_one(p + i * stride, in[i]);
}

// Calls body(careful, i, n) for each vector of a line of places, careful for the first and the last: these lack
// neighbours, and the last one may be partial. (Two kinds of body, not four: a kernel's size is a user's build time.)
template <int LANES, class Body> GSPN_INLINE void for_each_vector(int64_t places, Body body) {
  for (int64_t i = 0; i < places; i += LANES) {
    const int64_t left = places - i;
    if (i > 0 && left > LANES) body(No{}, i, LANES);
    else body(Yes{}, i, int(left < LANES ? left : LANES));
  }
}

}  // namespace
}  // namespace GSPN_NS
