// Any layout, above all rows scanned along (channels first, right and left): lines are strided, so that the vectors of
// memory run across the lines. A block of lines is packed into scratch, transposed in registers tile by tile; there the
// scan finds contiguous lines; its result is transposed back. Weights are formed before they are transposed.
//
// Rows are the places of a line; small planes are stacked, so that a line holds the places of several channels. Here
// lines keep their order in memory, and the scan goes through them backwards if it has to.
#pragma once
#include "scan.h"

namespace GSPN_NS {
namespace {

constexpr int64_t kTileScratchBytes = 600 << 10;  // a block of lines should stay in the second-level cache
constexpr int kRun = 4;                           // vectors along a row that are read together: long runs for the prefetcher
constexpr int64_t kRowsAhead = 2;                 // to prefetch

template <class T> GSPN_INLINE VecOf<T> load_strided(const T* p, int64_t stride, int n) {
  if (stride == 1) return n == kLanes<T> ? load(p) : load_n(p, n);
  Acc<T> lanes[kLanes<T>] = {};
  gather(p, stride, n, lanes);
  return load(lanes);
}
template <class T> GSPN_INLINE void store_strided(T* p, int64_t stride, VecOf<T> v, int n) {
  if (stride == 1) {
    if (n == kLanes<T>) store(p, v);
    else store_n(p, v, n);
    return;
  }
  Acc<T> lanes[kLanes<T>];
  store(lanes, v);
  scatter(lanes, n, p, stride);
}

template <class V, int... I> GSPN_INLINE V shift_up(V v, Lanes<I...>) {
  return __builtin_shufflevector(V{}, v, (I == 0 ? 0 : int(sizeof...(I)) + I - 1)...);
}

// Sizes of the scratch of one scan; all counts are of elements of the state's type.
template <class S> struct TileShape {
  static constexpr int64_t kL = kLanes<S>;
  int64_t rows, pitch, block;  // rows of a packed line, elements from one to the next, lines packed at a time

  TileShape(int64_t lines, int64_t packed_rows) : rows(packed_rows) {
    pitch = (rows + kL - 1) / kL * kL;
    block = kTileScratchBytes / (4 * pitch * int64_t(sizeof(Acc<S>))) / kL * kL;
    const int64_t padded_lines = (lines + kL - 1) / kL * kL;
    block = block < kL ? kL : block < padded_lines ? block : padded_lines;
    // Lines a multiple of 4 KiB apart would compete for the same cache sets.
    if (pitch * int64_t(sizeof(Acc<S>)) % 1024 == 0) pitch += kL;
  }
  // `carried`: lines kept from block to block, one for each channel forward and six backward.
  int64_t scratch(int64_t lines, int64_t carried) const {
    return 4 * block * pitch + (carried + 2) * pitch + lines + 4 * kL;
  }
};

template <Form FORM, class S, class W, class DX, class DW> class Tiles {
  typedef Acc<S> A;
  typedef VecOf<S> V;
  typedef decltype(MaskOf<V>{}[0] + 0) Int;
  static constexpr int kL = kLanes<S>;
  static constexpr bool kGated = FORM == kLogits;

 public:
  // With shared weights the channels are scanned one by one, otherwise they are stacked.
  Tiles(const Geometry& geometry, const Fields<S, W, DX, DW>& fields, bool share_weights, A* scratch)
      : g(geometry), f(fields), shared(share_weights),
        shape(geometry.lines, geometry.places * (shared ? 1 : geometry.channels)) {
    const int64_t block = shape.block * shape.pitch;
    for (int k = 0; k < 3; k++) weights[k] = scratch + kL + k * block;  // room for the reads beyond either end
    state = weights[2] + block;
    has_prev = reinterpret_cast<Int*>(state + block + kL);
    has_next = has_prev + shape.pitch;
    live = has_next + shape.pitch;
    carried = reinterpret_cast<A*>(live + g.lines + kL);
    for (int64_t r = 0; r < shape.pitch; r++) {
      has_prev[r] = r < shape.rows && r % g.places > 0 ? -1 : 0;
      has_next[r] = r < shape.rows && r % g.places < g.places - 1 ? -1 : 0;
    }
    for (int64_t t = 0; t < g.lines + kL; t++) live[t] = t < g.lines && scan_index(t) % g.segment != 0 ? -1 : 0;
  }

  void forward() {
    for_each_block(g.reverse, [&](int64_t first, int64_t count) {
      pack_weights(first, count);
      for (int64_t c = 0; c < sets(); c++) {
        for_each_tile(count, [&](int64_t row, int64_t t, int64_t n) { pack_input(c, row, first, t, n); });
        scan_forward(carried + c * shape.pitch, first, count);
        for_each_tile(count, [&](int64_t row, int64_t t, int64_t n) { unpack(c, row, first, t, n); });
      }
    });
  }

  void backward() {
    for_each_block(!g.reverse, [&](int64_t first, int64_t count) {
      pack_weights(first, count);
      for (int64_t c = 0; c < sets(); c++) {
        for_each_tile(count, [&](int64_t row, int64_t t, int64_t n) { pack_gradient(c, row, first, t, n); });
        scan_backward(carried + 6 * c * shape.pitch + kL, first, count);
        for_each_tile(count, [&](int64_t row, int64_t t, int64_t n) { gradients(c, row, first, t, n); });
      }
      if (shared && f.finish_dweights)
        for_each_tile(count, [&](int64_t row, int64_t t, int64_t n) { finish_dweights(row, first, t, n); });
    });
  }

 private:
  const Geometry g;
  const Fields<S, W, DX, DW> f;
  const bool shared;
  const TileShape<S> shape;
  A *weights[3], *state, *carried;  // blocks of packed lines; carried from block to block
  Int *has_prev, *has_next;         // masks of the rows of a packed line
  Int* live;                        // masks of the lines: not the first of a segment

  int64_t sets() const { return shared ? g.channels : 1; }
  int64_t scan_index(int64_t t) const { return g.reverse ? g.lines - 1 - t : t; }

  // Blocks of lines, from the last one to the first if `backwards`.
  template <class Body> void for_each_block(bool backwards, Body body) {
    const int64_t blocks = (g.lines + shape.block - 1) / shape.block;
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t first = (backwards ? blocks - 1 - i : i) * shape.block;
      body(first, g.lines - first < shape.block ? g.lines - first : shape.block);
    }
  }

  // Tiles of a block: a vector of rows by a few vectors of lines. body(row, line within the block, lines).
  template <class Body> void for_each_tile(int64_t count, Body body) {
    for (int64_t row = 0; row < shape.rows; row += kL)
      for (int64_t t = 0; t < count; t += kRun * kL) body(row, t, count - t < kRun * kL ? count - t : kRun * kL);
  }

  // Body(i, channel, place) for the rows of a tile.
  template <class Body> GSPN_INLINE_MEMBER void for_each_row(int64_t c, int64_t row, Body body) {
    const int rows = int(shape.rows - row < kL ? shape.rows - row : kL);
    int64_t channel = c + row / g.places, place = row % g.places;
    for (int i = 0; i < rows; i++) {
      body(i, channel, place);
      if (++place == g.places) place = 0, channel++;
    }
  }
  template <class Body> GSPN_INLINE_MEMBER void for_each_column(int64_t n, Body body) {
    for (int j = 0; j * kL < n; j++) body(j, int(n - j * kL < kL ? n - j * kL : kL));
  }

  // Transposes a tile of rows into lines: column j * kL + k of the rows becomes a piece of the k-th line.
  GSPN_INLINE_MEMBER void transpose_out(V (*tile)[kL], int64_t row, int64_t n, A* lines) {
    const int rows = int(shape.rows - row < kL ? shape.rows - row : kL);
    for (int j = 0; j * kL < n; j++) {
      for (int i = rows; i < kL; i++) tile[j][i] = V{};
      transpose(tile[j]);
      for (int k = 0; k < kL; k++) store(lines + (j * kL + k) * shape.pitch + row, tile[j][k]);
    }
  }
  GSPN_INLINE_MEMBER void transpose_in(const A* lines, int64_t row, int64_t n, V (*tile)[kL]) {
    for (int j = 0; j * kL < n; j++) {
      for (int k = 0; k < kL; k++) tile[j][k] = load(lines + (j * kL + k) * shape.pitch + row);
      transpose(tile[j]);
    }
  }

  // ---- forward -----------------------------------------------------------------------------------------------------

  void pack_weights(int64_t first, int64_t count) {
    for_each_tile(count, [&](int64_t row, int64_t t, int64_t n) {
      V tile[3][kRun][kL];
      for_each_row(0, row, [&](int i, int64_t channel, int64_t place) {
        const int64_t o = place * f.weights.place + (shared ? 0 : channel * f.weights.channel) + (first + t) * f.weights.line;
        if (place == 0 || place == g.places - 1) form_row<true>(o, i, place, n, tile);
        else form_row<false>(o, i, place, n, tile);
      });
      for (int k = 0; k < 3; k++) transpose_out(tile[k], row, n, weights[k] + t * shape.pitch);
    });
  }

  template <bool EDGE>
  GSPN_INLINE_MEMBER void form_row(int64_t offset, int i, int64_t place, int64_t n, V (*tile)[kRun][kL]) {
    const auto edges = edges_of_place<V>(place, g.places);
    for_each_column(n, [&](int j, int lanes) {
      const auto w = form_weights<FORM, EDGE>(raw_weights(offset + j * kL * f.weights.line, lanes), edges);
      tile[0][j][i] = w.prev;
      tile[1][j][i] = w.same;
      tile[2][j][i] = w.next;
    });
  }

  GSPN_INLINE_MEMBER Triple<V> raw_weights(int64_t offset, int lanes) {
    const int64_t ahead = kRowsAhead * f.weights.place;
    for (int k = 0; k < 3; k++) prefetch(f.weights.data[k] + offset + ahead);
    return {load_strided(f.weights.data[0] + offset, f.weights.line, lanes),
            load_strided(f.weights.data[1] + offset, f.weights.line, lanes),
            load_strided(f.weights.data[2] + offset, f.weights.line, lanes)};
  }

  template <class T> static GSPN_INLINE_MEMBER T* at(const Field<T>& field, int64_t channel, int64_t place, int64_t line) {
    return field.data + channel * field.channel + place * field.place + line * field.line;
  }

  void pack_input(int64_t c, int64_t row, int64_t first, int64_t t, int64_t n) {
    V tile[kRun][kL];
    for_each_row(c, row, [&](int i, int64_t channel, int64_t place) {
      for_each_column(n, [&](int j, int lanes) {
        const int64_t line = first + t + j * kL;
        const S* x = at(f.x, channel, place, line);
        prefetch(x + kRowsAhead * f.x.place);
        prefetch_write(at(f.h, channel, place, line));
        tile[j][i] = load_strided(x, f.x.line, lanes);
        if constexpr (kGated) {
          const S* gate = at(f.gate, channel, place, line);
          prefetch(gate + kRowsAhead * f.gate.place);
          tile[j][i] = tile[j][i] * load_strided(gate, f.gate.line, lanes);
        }
      });
    });
    transpose_out(tile, row, n, state + t * shape.pitch);
  }

  void scan_forward(A* last_line, int64_t first, int64_t count) {
    const A* before = last_line;
    for (int64_t i = 0; i < count; i++) {
      const int64_t t = g.reverse ? count - 1 - i : i, o = t * shape.pitch;
      A* now = state + o;
      if (live[first + t])
        for (int64_t r = 0; r < shape.rows; r += kL) {
          V h = fma(load(weights[0] + o + r), keep(load_bits<MaskOf<V>>(has_prev + r), load(before + r - 1)), load(now + r));
          h = fma(load(weights[1] + o + r), load(before + r), h);
          h = fma(load(weights[2] + o + r), keep(load_bits<MaskOf<V>>(has_next + r), load(before + r + 1)), h);
          store(now + r, h);
        }
      before = now;
    }
    __builtin_memcpy(last_line, before, sizeof(A) * shape.pitch);
  }

  void unpack(int64_t c, int64_t row, int64_t first, int64_t t, int64_t n) {
    V tile[kRun][kL];
    transpose_in(state + t * shape.pitch, row, n, tile);
    for_each_row(c, row, [&](int i, int64_t channel, int64_t place) {
      for_each_column(n, [&](int j, int lanes) {
        store_strided(at(f.h, channel, place, first + t + j * kL), f.h.line, tile[j][i], lanes);
      });
    });
  }

  // ---- backward ----------------------------------------------------------------------------------------------------

  void pack_gradient(int64_t c, int64_t row, int64_t first, int64_t t, int64_t n) {
    V tile[kRun][kL];
    for_each_row(c, row, [&](int i, int64_t channel, int64_t place) {
      for_each_column(n, [&](int j, int lanes) {
        const S* grad_h = at(f.grad_h, channel, place, first + t + j * kL);
        prefetch(grad_h + kRowsAhead * f.grad_h.place);
        tile[j][i] = load_strided(grad_h, f.grad_h.line, lanes);
      });
    });
    transpose_out(tile, row, n, state + t * shape.pitch);
  }

  // Turns the gradients of h that were packed into the whole ones. `lines`: three that the line after sent and three
  // that this one sends, six in all, which a block takes over from the one before.
  void scan_backward(A* lines, int64_t first, int64_t count) {
    for (int64_t i = count - 1; i >= 0; i--) {
      const int64_t t = g.reverse ? count - 1 - i : i, o = t * shape.pitch, index = scan_index(first + t);
      const bool last = index == g.lines - 1 || (index + 1) % g.segment == 0;
      const A* received = lines + 3 * (index & 1) * shape.pitch;
      A* sent = lines + 3 * (1 - (index & 1)) * shape.pitch;
      for (int64_t r = 0; r < shape.rows; r += kL) {
        V v = load(state + o + r);
        if (!last) {
          v = v + keep(load_bits<MaskOf<V>>(has_next + r), load(received + r + 1)) + load(received + shape.pitch + r) +
              keep(load_bits<MaskOf<V>>(has_prev + r), load(received + 2 * shape.pitch + r - 1));
          store(state + o + r, v);
        }
        for (int k = 0; k < 3; k++) store(sent + k * shape.pitch + r, v * load(weights[k] + o + r));
      }
    }
  }

  // h one step of the scan before lines t, t + 1, ... of a row. What it is for the first line of a segment is not used.
  GSPN_INLINE_MEMBER V previous_state(int64_t channel, int64_t place, int64_t t, int lanes) {
    const S* h = at(f.h, channel, place, t);
    if (g.reverse) return load_strided(h + f.h.line, f.h.line, t + lanes < g.lines ? lanes : lanes - 1);
    if (t > 0) return load_strided(h - f.h.line, f.h.line, lanes);
    return shift_up(load_strided(h, f.h.line, lanes < kL ? lanes : kL - 1), typename MakeLanes<kL>::type{});
  }

  void gradients(int64_t c, int64_t row, int64_t first, int64_t t, int64_t n) {
    V tile[kRun][kL], above[kRun], here[kRun];
    transpose_in(state + t * shape.pitch, row, n, tile);
    for_each_row(c, row, [&](int i, int64_t channel, int64_t place) {
      if (i == 0 || place == 0)
        for_each_column(n, [&](int j, int lanes) {
          here[j] = previous_state(channel, place, first + t + j * kL, lanes);
          above[j] = place > 0 ? previous_state(channel, place - 1, first + t + j * kL, lanes) : V{};
        });
      for_each_column(n, [&](int j, int lanes) {
        const int64_t line = first + t + j * kL;
        const V below = place < g.places - 1 ? previous_state(channel, place + 1, line, lanes) : V{};
        const Triple<V> h = {above[j], here[j], below};
        above[j] = here[j], here[j] = below;
        input_gradients(channel, place, line, lanes, tile[j][i]);
        if (place == 0 || place == g.places - 1) weight_gradients<true>(channel, place, line, lanes, tile[j][i], h);
        else weight_gradients<false>(channel, place, line, lanes, tile[j][i], h);
      });
    });
  }

  GSPN_INLINE_MEMBER void input_gradients(int64_t channel, int64_t place, int64_t line, int lanes, V g_here) {
    DX* dx = at(f.dx, channel, place, line);
    prefetch_write(dx + kRowsAhead * f.dx.place);
    V v = g_here;
    if constexpr (kGated) {
      const S *x = at(f.x, channel, place, line), *gate = at(f.gate, channel, place, line);
      S* dgate = at(f.dgate, channel, place, line);
      prefetch(x + kRowsAhead * f.x.place), prefetch(gate + kRowsAhead * f.gate.place);
      prefetch_write(dgate + kRowsAhead * f.dgate.place);
      store_strided(dgate, f.dgate.line, g_here * load_strided(x, f.x.line, lanes), lanes);
      v = g_here * load_strided(gate, f.gate.line, lanes);
    }
    if (f.add_dx) v = v + load_strided(dx, f.dx.line, lanes);
    store_strided(dx, f.dx.line, v, lanes);
  }

  template <bool EDGE>
  GSPN_INLINE_MEMBER void weight_gradients(int64_t channel, int64_t place, int64_t line, int lanes, V g_here, Triple<V> h) {
    const auto edges = edges_of_place<V>(place, g.places);
    h = keep_existing<EDGE>(h, edges);
    Triple<V> dw = {g_here * h.prev, g_here * h.same, g_here * h.next};
    const int64_t o = place * f.dweights.place + (shared ? 0 : channel * f.dweights.channel) + line * f.dweights.line;
    if (shared) {
      if (channel > 0 || f.add_dweights) dw = add(dw, load_dweights(o, lanes));
      store_dweights(o, lanes, dw);
    } else {
      const int64_t raw = place * f.weights.place + channel * f.weights.channel + line * f.weights.line;
      const auto slopes = form_slopes<FORM, EDGE>(raw_weights(raw, lanes), edges);
      for (int k = 0; k < 3; k++) prefetch_write(f.dweights.data[k] + o + kRowsAhead * f.dweights.place);
      store_dweights(o, lanes, keep_live(line, weight_gradient<FORM, EDGE>(dw, slopes, edges)));
    }
  }

  void finish_dweights(int64_t row, int64_t first, int64_t t, int64_t n) {
    for_each_row(0, row, [&](int, int64_t, int64_t place) {
      for_each_column(n, [&](int j, int lanes) {
        const int64_t line = first + t + j * kL, o = place * f.dweights.place + line * f.dweights.line;
        const auto edges = edges_of_place<V>(place, g.places);
        const auto slopes = form_slopes<FORM, true>(raw_weights(place * f.weights.place + line * f.weights.line, lanes), edges);
        store_dweights(o, lanes, keep_live(line, weight_gradient<FORM, true>(load_dweights(o, lanes), slopes, edges)));
      });
    });
  }

  static GSPN_INLINE_MEMBER Triple<V> add(Triple<V> a, Triple<V> b) {
    return {a.prev + b.prev, a.same + b.same, a.next + b.next};
  }
  // The first line of a segment has no weights.
  GSPN_INLINE_MEMBER Triple<V> keep_live(int64_t line, Triple<V> v) {
    const MaskOf<V> mask = load_bits<MaskOf<V>>(live + line);
    return {keep(mask, v.prev), keep(mask, v.same), keep(mask, v.next)};
  }
  GSPN_INLINE_MEMBER Triple<V> load_dweights(int64_t o, int lanes) {
    return {load_strided(f.dweights.data[0] + o, f.dweights.line, lanes),
            load_strided(f.dweights.data[1] + o, f.dweights.line, lanes),
            load_strided(f.dweights.data[2] + o, f.dweights.line, lanes)};
  }
  GSPN_INLINE_MEMBER void store_dweights(int64_t o, int lanes, Triple<V> v) {
    store_strided(f.dweights.data[0] + o, f.dweights.line, v.prev, lanes);
    store_strided(f.dweights.data[1] + o, f.dweights.line, v.same, lanes);
    store_strided(f.dweights.data[2] + o, f.dweights.line, v.next, lanes);
  }
};

}  // namespace
}  // namespace GSPN_NS
