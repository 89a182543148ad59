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
constexpr int kRun = 4;                           // vectors along a row that are read together
constexpr int64_t kRowsAhead = 2;                 // to prefetch

// Not inlined: slow anyway, and there are many calls.
template <class T> __attribute__((noinline)) VecOf<T> gather_vector(const T* p, int64_t stride, int n) {
  Acc<T> lanes[kLanes<T>] = {};
  gather(p, stride, n, lanes);
  return load(lanes);
}
template <class T> __attribute__((noinline)) void scatter_vector(T* p, int64_t stride, VecOf<T> v, int n) {
  Acc<T> lanes[kLanes<T>];
  store(lanes, v);
  scatter(lanes, n, p, stride);
}

template <class T> GSPN_INLINE VecOf<T> load_strided(const T* p, int64_t stride, int n) {
  if (stride != 1) return gather_vector(p, stride, n);
  return n == kLanes<T> ? load(p) : load_n(p, n);
}
template <class T> GSPN_INLINE void store_strided(T* p, int64_t stride, VecOf<T> v, int n) {
  if (stride != 1) scatter_vector(p, stride, v, n);
  else if (n == kLanes<T>) store(p, v);
  else store_n(p, v, n);
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
  // Channels that share weights are scanned one by one, others are stacked.
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
    fill_masks();
  }

  void forward() {
    for_each_block(g.reverse, [&](int64_t first, int64_t count) {
      for_each_tile(first, count, [&](const Tile& tile) { pack_weights(tile); });
      for (int64_t c = 0; c < sets(); c++) {
        for_each_tile(first, count, [&](const Tile& tile) { pack_input(c, tile); });
        scan_forward(carried + c * shape.pitch, first, count);
        for_each_tile(first, count, [&](const Tile& tile) { unpack(c, tile); });
      }
    });
  }

  void backward() {
    for_each_block(!g.reverse, [&](int64_t first, int64_t count) {
      for_each_tile(first, count, [&](const Tile& tile) { pack_weights(tile); });
      for (int64_t c = 0; c < sets(); c++) {
        for_each_tile(first, count, [&](const Tile& tile) { pack_gradient(c, tile); });
        scan_backward(carried + 6 * c * shape.pitch + kL, first, count);
        for_each_tile(first, count, [&](const Tile& tile) { gradients(c, tile); });
      }
      if (shared && f.finish_dweights)
        for_each_tile(first, count, [&](const Tile& tile) { finish_dweights(tile); });
    });
  }

 private:
  // A vector of rows by a few vectors of lines, in registers or on the stack on its way between memory and scratch.
  struct Tile {
    int64_t row, channel, place;  // the first row, and what it is
    int rows;
    int64_t line, count;          // the first line of the scan, and how many there are
    int64_t packed;               // where its lines lie in the blocks of scratch
  };

  // An offset that goes from row to row of a tile.
  struct Walk {
    int64_t at, step, to_next_channel;
  };

  const Geometry g;
  const Fields<S, W, DX, DW> f;
  const bool shared;
  const TileShape<S> shape;
  A *weights[3], *state, *carried;  // blocks of packed lines; carried from block to block
  Int *has_prev, *has_next;         // masks of the rows of a packed line
  Int* live;                        // masks of the lines: not the first of a segment

  int64_t sets() const { return shared ? g.channels : 1; }

  void fill_masks() {
    int64_t place = 0;
    for (int64_t r = 0; r < shape.pitch; r++) {
      has_prev[r] = r < shape.rows && place > 0 ? -1 : 0;
      has_next[r] = r < shape.rows && place < g.places - 1 ? -1 : 0;
      if (++place == g.places) place = 0;
    }
    int64_t since_reset = 0;
    for (int64_t i = 0; i < g.lines; i++) {
      live[g.reverse ? g.lines - 1 - i : i] = since_reset > 0 ? -1 : 0;
      if (++since_reset == g.segment) since_reset = 0;
    }
  }

  // ---- loops -------------------------------------------------------------------------------------------------------

  // Blocks of lines, from the last one to the first if `backwards`.
  template <class Body> GSPN_INLINE_MEMBER void for_each_block(bool backwards, Body body) {
    const int64_t blocks = (g.lines + shape.block - 1) / shape.block;
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t first = (backwards ? blocks - 1 - i : i) * shape.block;
      body(first, g.lines - first < shape.block ? g.lines - first : shape.block);
    }
  }

  template <class Body> GSPN_INLINE_MEMBER void for_each_tile(int64_t first, int64_t count, Body body) {
    for (int64_t row = 0; row < shape.rows; row += kL) {
      const int rows = int(shape.rows - row < kL ? shape.rows - row : kL);
      for (int64_t t = 0; t < count; t += kRun * kL)
        body(Tile{row, row / g.places, row % g.places, rows, first + t, count - t < kRun * kL ? count - t : kRun * kL,
                  t * shape.pitch + row});
    }
  }

  // For channel c of those that share weights; of the others all are in the tile.
  template <class F> GSPN_INLINE_MEMBER Walk walk(const F& field, int64_t c, const Tile& tile) {
    return {(c + tile.channel) * field.channel + tile.place * field.place + tile.line * field.line, field.place,
            field.channel - (g.places - 1) * field.place};
  }

  // Calls body(i, place) for the rows of a tile, while the walks go along.
  template <class Body, class... Walks>
  GSPN_INLINE_MEMBER void for_each_row(const Tile& tile, Body body, Walks&... walks) {
    int64_t place = tile.place;
    for (int i = 0; i < tile.rows; i++) {
      body(i, place);
      const bool last = ++place == g.places;
      if (last) place = 0;
      ((walks.at += last ? walks.to_next_channel : walks.step), ...);
    }
  }

  // Calls body(j, lanes) for the vectors of a row of a tile.
  template <class Body> GSPN_INLINE_MEMBER void for_each_column(const Tile& tile, Body body) {
    for (int j = 0; j * kL < tile.count; j++) body(j, int(tile.count - j * kL < kL ? tile.count - j * kL : kL));
  }

  // ---- transposition -----------------------------------------------------------------------------------------------

  GSPN_INLINE_MEMBER void to_lines(V (*squares)[kL], const Tile& tile, A* lines) {
    const int64_t pitch = shape.pitch, count = tile.count;
    A* line = lines + tile.packed;
    for (int j = 0; j * kL < count; j++) {
      for (int i = tile.rows; i < kL; i++) squares[j][i] = V{};
      transpose(squares[j]);
      for (int k = 0; k < kL; k++, line += pitch) store(line, squares[j][k]);
    }
  }

  GSPN_INLINE_MEMBER void to_rows(const A* lines, const Tile& tile, V (*squares)[kL]) {
    const int64_t pitch = shape.pitch, count = tile.count;
    const A* line = lines + tile.packed;
    for (int j = 0; j * kL < count; j++) {
      for (int k = 0; k < kL; k++, line += pitch) squares[j][k] = load(line);
      transpose(squares[j]);
    }
  }

  // ---- forward -----------------------------------------------------------------------------------------------------

  void pack_weights(const Tile& tile) {
    V squares[3][kRun][kL];
    Walk raw = walk(f.weights, 0, tile);
    for_each_row(tile, [&](int i, int64_t place) {
      if (place == 0 || place == g.places - 1) pack_row_of_weights<true>(tile, raw.at, i, place, squares);
      else pack_row_of_weights<false>(tile, raw.at, i, place, squares);
    }, raw);
    for (int k = 0; k < 3; k++) to_lines(squares[k], tile, weights[k]);
  }

  template <bool EDGE>
  GSPN_INLINE_MEMBER void pack_row_of_weights(const Tile& tile, int64_t at, int i, int64_t place,
                                              V (*squares)[kRun][kL]) {
    const auto edges = edges_of_place<V>(place, g.places);
    for_each_column(tile, [&](int j, int lanes) {
      const auto w = form_weights<FORM, EDGE>(raw_weights(at + j * kL * f.weights.line, lanes), edges);
      squares[0][j][i] = w.prev;
      squares[1][j][i] = w.same;
      squares[2][j][i] = w.next;
    });
  }

  GSPN_INLINE_MEMBER Triple<V> raw_weights(int64_t at, int lanes) {
    for (int k = 0; k < 3; k++) prefetch(f.weights.data[k] + at + kRowsAhead * f.weights.place);
    return {load_strided(f.weights.data[0] + at, f.weights.line, lanes),
            load_strided(f.weights.data[1] + at, f.weights.line, lanes),
            load_strided(f.weights.data[2] + at, f.weights.line, lanes)};
  }

  void pack_input(int64_t c, const Tile& tile) {
    V squares[kRun][kL];
    Walk x = walk(f.x, c, tile), gate = walk(f.gate, c, tile), h = walk(f.h, c, tile);
    for_each_row(tile, [&](int i, int64_t) {
      for_each_column(tile, [&](int j, int lanes) {
        V input = load_ahead(f.x, x.at + j * kL * f.x.line, lanes);
        if constexpr (kGated) input = input * load_ahead(f.gate, gate.at + j * kL * f.gate.line, lanes);
        squares[j][i] = input;
        prefetch_write(f.h.data + h.at + j * kL * f.h.line);
      });
    }, x, gate, h);
    to_lines(squares, tile, state);
  }

  template <class T> static GSPN_INLINE_MEMBER V load_ahead(const Field<const T>& field, int64_t at, int lanes) {
    prefetch(field.data + at + kRowsAhead * field.place);
    return load_strided(field.data + at, field.line, lanes);
  }

  void scan_forward(A* last_line, int64_t first, int64_t count) {
    const A* before = last_line;
    for (int64_t i = 0; i < count; i++) {
      const int64_t t = g.reverse ? count - 1 - i : i, o = t * shape.pitch;
      A* now = state + o;
      if (live[first + t])
        for (int64_t r = 0; r < shape.rows; r += kL) {
          const V prev = keep(load_bits<MaskOf<V>>(has_prev + r), load(before + r - 1));
          const V next = keep(load_bits<MaskOf<V>>(has_next + r), load(before + r + 1));
          V h = fma(load(weights[0] + o + r), prev, load(now + r));
          h = fma(load(weights[1] + o + r), load(before + r), h);
          store(now + r, fma(load(weights[2] + o + r), next, h));
        }
      before = now;
    }
    __builtin_memcpy(last_line, before, sizeof(A) * shape.pitch);
  }

  void unpack(int64_t c, const Tile& tile) {
    V squares[kRun][kL];
    to_rows(state, tile, squares);
    Walk h = walk(f.h, c, tile);
    for_each_row(tile, [&](int i, int64_t) {
      for_each_column(tile, [&](int j, int lanes) {
        store_strided(f.h.data + h.at + j * kL * f.h.line, f.h.line, squares[j][i], lanes);
      });
    }, h);
  }

  // ---- backward ----------------------------------------------------------------------------------------------------

  void pack_gradient(int64_t c, const Tile& tile) {
    V squares[kRun][kL];
    Walk grad_h = walk(f.grad_h, c, tile);
    for_each_row(tile, [&](int i, int64_t) {
      for_each_column(tile, [&](int j, int lanes) {
        squares[j][i] = load_ahead(f.grad_h, grad_h.at + j * kL * f.grad_h.line, lanes);
      });
    }, grad_h);
    to_lines(squares, tile, state);
  }

  // Turns the gradients of h that were packed into the whole ones. `lines`: three that the line after sent and three
  // that this one sends, six in all, which a block takes over from the one before.
  void scan_backward(A* lines, int64_t first, int64_t count) {
    for (int64_t i = count - 1; i >= 0; i--) {
      const int64_t t = g.reverse ? count - 1 - i : i, o = t * shape.pitch;
      const int64_t after = first + t + (g.reverse ? -1 : 1), index = g.reverse ? g.lines - 1 - first - t : first + t;
      const bool last = index == g.lines - 1 || !live[after];
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
  GSPN_INLINE_MEMBER V previous_state(const S* h, int64_t t, int lanes) {
    prefetch(h + kRowsAhead * f.h.place);
    if (g.reverse) return load_strided(h + f.h.line, f.h.line, t + lanes < g.lines ? lanes : lanes - 1);
    if (t > 0) return load_strided(h - f.h.line, f.h.line, lanes);
    return shift_up(load_strided(h, f.h.line, lanes < kL ? lanes : kL - 1), typename MakeLanes<kL>::type{});
  }

  void gradients(int64_t c, const Tile& tile) {
    V squares[kRun][kL], above[kRun], here[kRun];
    to_rows(state, tile, squares);
    Walk x = walk(f.x, c, tile), gate = walk(f.gate, c, tile), dgate = walk(f.dgate, c, tile), dx = walk(f.dx, c, tile);
    Walk h = walk(f.h, c, tile), raw = walk(f.weights, 0, tile), dweights = walk(f.dweights, 0, tile);
    for_each_row(tile, [&](int i, int64_t place) {
      const bool first = place == 0, last = place == g.places - 1;
      if (i == 0 || first)
        for_each_column(tile, [&](int j, int lanes) {
          const S* row = f.h.data + h.at + j * kL * f.h.line;
          here[j] = previous_state(row, tile.line + j * kL, lanes);
          above[j] = first ? V{} : previous_state(row - f.h.place, tile.line + j * kL, lanes);
        });
      for_each_column(tile, [&](int j, int lanes) {
        const int64_t line = tile.line + j * kL;
        const S* row = f.h.data + h.at + j * kL * f.h.line;
        const V below = last ? V{} : previous_state(row + f.h.place, line, lanes), gradient = squares[j][i];
        Triple<V> dw = {gradient * above[j], gradient * here[j], gradient * below};
        above[j] = here[j], here[j] = below;
        if constexpr (kGated) {
          const V value = load_ahead(f.x, x.at + j * kL * f.x.line, lanes);
          put_ahead(f.dgate, dgate.at + j * kL * f.dgate.line, gradient * value, lanes);
          const V factor = load_ahead(f.gate, gate.at + j * kL * f.gate.line, lanes);
          put_dx(dx.at + j * kL * f.dx.line, gradient * factor, lanes);
        } else {
          put_dx(dx.at + j * kL * f.dx.line, gradient, lanes);
        }
        const int64_t to = dweights.at + j * kL * f.dweights.line;
        if (shared) {
          if (c > 0 || f.add_dweights) dw = sum(dw, load_dweights(to, lanes));
          store_dweights(to, dw, lanes);
        } else {
          const int64_t from = raw.at + j * kL * f.weights.line;
          if (first || last) put_dweights<true>(from, to, place, line, dw, lanes);
          else put_dweights<false>(from, to, place, line, dw, lanes);
        }
      });
    }, x, gate, dgate, dx, h, raw, dweights);
  }

  template <class T> static GSPN_INLINE_MEMBER void put_ahead(const Field<T>& field, int64_t at, V v, int lanes) {
    prefetch_write(field.data + at + kRowsAhead * field.place);
    store_strided(field.data + at, field.line, v, lanes);
  }

  GSPN_INLINE_MEMBER void put_dx(int64_t at, V v, int lanes) {
    if (f.add_dx) v = v + load_strided(f.dx.data + at, f.dx.line, lanes);
    put_ahead(f.dx, at, v, lanes);
  }

  // Gradients of the raw weights at `from`, for the lines from `line` on, from those of the formed ones.
  template <bool EDGE>
  GSPN_INLINE_MEMBER void put_dweights(int64_t from, int64_t to, int64_t place, int64_t line, Triple<V> dw, int lanes) {
    const auto edges = edges_of_place<V>(place, g.places);
    const auto slopes = form_slopes<FORM, EDGE>(raw_weights(from, lanes), edges);
    for (int k = 0; k < 3; k++) prefetch_write(f.dweights.data[k] + to + kRowsAhead * f.dweights.place);
    dw = weight_gradient<FORM, EDGE>(keep_existing<EDGE>(dw, edges), slopes, edges);
    store_dweights(to, keep_live(line, dw), lanes);
  }

  void finish_dweights(const Tile& tile) {
    Walk raw = walk(f.weights, 0, tile), dweights = walk(f.dweights, 0, tile);
    for_each_row(tile, [&](int, int64_t place) {
      for_each_column(tile, [&](int j, int lanes) {
        const int64_t to = dweights.at + j * kL * f.dweights.line;
        const Triple<V> dw = load_dweights(to, lanes);
        put_dweights<true>(raw.at + j * kL * f.weights.line, to, place, tile.line + j * kL, dw, lanes);
      });
    }, raw, dweights);
  }

  static GSPN_INLINE_MEMBER Triple<V> sum(Triple<V> a, Triple<V> b) {
    return {a.prev + b.prev, a.same + b.same, a.next + b.next};
  }

  // The first line of a segment has no weights. (`live` can be read beyond its end.)
  GSPN_INLINE_MEMBER Triple<V> keep_live(int64_t line, Triple<V> v) {
    const MaskOf<V> mask = load_bits<MaskOf<V>>(live + line);
    return {keep(mask, v.prev), keep(mask, v.same), keep(mask, v.next)};
  }

  GSPN_INLINE_MEMBER Triple<V> load_dweights(int64_t at, int lanes) {
    return {load_strided(f.dweights.data[0] + at, f.dweights.line, lanes),
            load_strided(f.dweights.data[1] + at, f.dweights.line, lanes),
            load_strided(f.dweights.data[2] + at, f.dweights.line, lanes)};
  }
  GSPN_INLINE_MEMBER void store_dweights(int64_t at, Triple<V> v, int lanes) {
    store_strided(f.dweights.data[0] + at, f.dweights.line, v.prev, lanes);
    store_strided(f.dweights.data[1] + at, f.dweights.line, v.same, lanes);
    store_strided(f.dweights.data[2] + at, f.dweights.line, v.next, lanes);
  }
};

}  // namespace
}  // namespace GSPN_NS
