// Any layout, above all rows scanned along (channels first, right and left): lines are strided, so that the vectors of
// memory run across the lines. A band of lines is packed into scratch, transposed in registers tile by tile; there the
// scan finds contiguous lines; its result is transposed back. Weights are formed before they are transposed.
//
// Rows are the places of a line; small planes are stacked, so that a line holds the places of several channels. Here
// lines keep their order in memory, and the scan goes through them backwards if it has to.
#pragma once
#include "scan/fields.h"
#include "scan/weights.h"

namespace GSPN_NS {
namespace {

constexpr int64_t kTileScratchBytes = 600 << 10;  // a band of lines should stay in the second-level cache
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
    static constexpr int64_t L = kLanes<S>;
    int64_t rows, pitch, band;  // rows of a packed line, elements from one to the next, lines packed at a time

    TileShape(int64_t lines, int64_t packed_rows) : rows(packed_rows) {
        pitch = round_up(rows, L);
        band = kTileScratchBytes / (4 * pitch * int64_t(sizeof(Acc<S>))) / L * L;
        band = max(L, min(band, round_up(lines, L)));
        // Lines a multiple of 4 KiB apart would compete for the same cache sets.
        if (pitch * int64_t(sizeof(Acc<S>)) % 1024 == 0) pitch += L;
    }
    // `carried`: lines kept from band to band, one for each channel forward and six backward.
    int64_t scratch(int64_t lines, int64_t carried) const {
        return 4 * band * pitch + (carried + 2) * pitch + lines + 4 * L;
    }
};

template <Form FORM, class S, class W, class DX, class DW> class Tiles {
    typedef Acc<S> A;
    typedef VecOf<S> V;
    typedef decltype(MaskOf<V>{}[0] + 0) Int;
    static constexpr int L = kLanes<S>;
    static constexpr bool kGated = FORM == kLogits;

public:
    // Channels that share weights are scanned one by one, others are stacked.
    Tiles(const Geometry& geometry, const Fields<S, W, DX, DW>& fields, bool share_weights, A* scratch)
        : g(geometry), f(fields), shared(share_weights),
          shape(geometry.lines, geometry.places * (shared ? 1 : fields.channels)) {
        const int64_t band = shape.band * shape.pitch;
        for (int k = 0; k < 3; k++) weights[k] = scratch + L + k * band;  // room for the reads beyond either end
        state = weights[2] + band;
        has_prev = reinterpret_cast<Int*>(state + band + L);
        has_next = has_prev + shape.pitch;
        live = has_next + shape.pitch;
        carried = reinterpret_cast<A*>(live + g.lines + L);
        fill_masks();
    }

    void forward() {
        for_each_band(g.reverse, [&](int64_t first, int64_t count) {
            for_each_tile(first, count, [&](const Tile& tile) { pack_weights(tile); });
            for (int64_t c = 0; c < sets(); c++) {
                for_each_tile(first, count, [&](const Tile& tile) { pack_input(c, tile); });
                scan_forward(carried + c * shape.pitch, first, count);
                for_each_tile(first, count, [&](const Tile& tile) { unpack(c, tile); });
            }
        });
    }

    void backward() {
        for_each_band(!g.reverse, [&](int64_t first, int64_t count) {
            for_each_tile(first, count, [&](const Tile& tile) { pack_weights(tile); });
            for (int64_t c = 0; c < sets(); c++) {
                for_each_tile(first, count, [&](const Tile& tile) { pack_gradient(c, tile); });
                scan_backward(carried + 6 * c * shape.pitch + L, first, count);
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
        int64_t line, count;  // the first line of the scan, and how many there are
        int64_t packed;       // where its lines lie in the packed band
    };

    // An offset that goes from row to row of a tile.
    struct Cursor {
        int64_t at, step, to_next_channel;
    };

    const Geometry g;
    const Fields<S, W, DX, DW> f;
    const bool shared;
    const TileShape<S> shape;
    A *weights[3], *state, *carried;  // a band of packed lines; carried from band to band
    Int *has_prev, *has_next;         // masks of the rows of a packed line
    Int* live;                        // masks of the lines: not the first of a segment

    int64_t sets() const { return shared ? f.channels : 1; }

    void fill_masks() {
        int64_t place = 0;
        for (int64_t r = 0; r < shape.pitch; r++) {
            has_prev[r] = r < shape.rows && place > 0 ? -1 : 0;
            has_next[r] = r < shape.rows && place < g.places - 1 ? -1 : 0;
            if (++place == g.places) place = 0;
        }
        int64_t since_reset = 0;
        for (int64_t i = 0; i < g.lines; i++) {
            live[g.index(i)] = since_reset > 0 ? -1 : 0;
            if (++since_reset == g.segment) since_reset = 0;
        }
    }

    // ---- loops ------------------------------------------------------------------------------------------------------

    // Bands of lines, from the last one to the first if `backwards`.
    template <class Body> GSPN_INLINE_MEMBER void for_each_band(bool backwards, Body body) {
        const int64_t bands = ceil_div(g.lines, shape.band);
        for (int64_t i = 0; i < bands; i++) {
            const int64_t first = (backwards ? bands - 1 - i : i) * shape.band;
            body(first, min(shape.band, g.lines - first));
        }
    }

    template <class Body> GSPN_INLINE_MEMBER void for_each_tile(int64_t first, int64_t count, Body body) {
        for (int64_t row = 0; row < shape.rows; row += L) {
            const int rows = int(min(L, shape.rows - row));
            for (int64_t t = 0; t < count; t += kRun * L)
                body(Tile{
                    row, row / g.places, row % g.places, rows, first + t, min(kRun * L, count - t),
                    t * shape.pitch + row});
        }
    }

    // For channel c of those that share weights; of the others all are in the tile.
    template <class F> GSPN_INLINE_MEMBER Cursor cursor(const F& field, int64_t c, const Tile& tile) {
        return {
            (c + tile.channel) * field.channel + tile.place * field.place + tile.line * field.line, field.place,
            field.channel - (g.places - 1) * field.place};
    }

    // Calls body(i, place) for the rows of a tile, while the cursors go along.
    template <class Body, class... Cursors>
    GSPN_INLINE_MEMBER void for_each_row(const Tile& tile, Body body, Cursors&... cursors) {
        int64_t place = tile.place;
        for (int i = 0; i < tile.rows; i++) {
            body(i, place);
            const bool last = ++place == g.places;
            if (last) place = 0;
            ((cursors.at += last ? cursors.to_next_channel : cursors.step), ...);
        }
    }

    // Calls body(j, lanes) for the vectors of a row of a tile.
    template <class Body> GSPN_INLINE_MEMBER void for_each_column(const Tile& tile, Body body) {
        for (int j = 0; j * L < tile.count; j++) body(j, int(min(L, tile.count - j * L)));
    }

    // ---- transposition ----------------------------------------------------------------------------------------------

    GSPN_INLINE_MEMBER void to_lines(V (*squares)[L], const Tile& tile, A* lines) {
        const int64_t pitch = shape.pitch, count = tile.count;
        A* line = lines + tile.packed;
        for (int j = 0; j * L < count; j++) {
            for (int i = tile.rows; i < L; i++) squares[j][i] = V{};
            transpose(squares[j]);
            for (int k = 0; k < L; k++, line += pitch) store(line, squares[j][k]);
        }
    }

    GSPN_INLINE_MEMBER void to_rows(const A* lines, const Tile& tile, V (*squares)[L]) {
        const int64_t pitch = shape.pitch, count = tile.count;
        const A* line = lines + tile.packed;
        for (int j = 0; j * L < count; j++) {
            for (int k = 0; k < L; k++, line += pitch) squares[j][k] = load(line);
            transpose(squares[j]);
        }
    }

    // ---- forward ----------------------------------------------------------------------------------------------------

    void pack_weights(const Tile& tile) {
        V squares[3][kRun][L];
        Cursor raw = cursor(f.weights, 0, tile);
        const auto body = [&](int i, int64_t place) {
            if (place == 0 || place == g.places - 1) pack_row_of_weights<true>(tile, raw.at, i, place, squares);
            else pack_row_of_weights<false>(tile, raw.at, i, place, squares);
        };
        for_each_row(tile, body, raw);
        for (int k = 0; k < 3; k++) to_lines(squares[k], tile, weights[k]);
    }

    template <bool EDGE>
    GSPN_INLINE_MEMBER void pack_row_of_weights(
        const Tile& tile, int64_t at, int i, int64_t place, V (*squares)[kRun][L]) {
        const auto edges = edges_if<EDGE>(edges_of_place<V>(place, g.places));
        for_each_column(tile, [&](int j, int lanes) {
            const auto w = form_weights<FORM>(raw_weights(at + j * L * f.weights.line, lanes), edges);
            squares[0][j][i] = w.prev;
            squares[1][j][i] = w.same;
            squares[2][j][i] = w.next;
        });
    }

    GSPN_INLINE_MEMBER Triple<V> raw_weights(int64_t at, int lanes) {
        for (int k = 0; k < 3; k++) prefetch(f.weights.data[k] + at + kRowsAhead * f.weights.place);
        return {
            load_strided(f.weights.data[0] + at, f.weights.line, lanes),
            load_strided(f.weights.data[1] + at, f.weights.line, lanes),
            load_strided(f.weights.data[2] + at, f.weights.line, lanes)};
    }

    void pack_input(int64_t c, const Tile& tile) {
        V squares[kRun][L];
        Cursor x = cursor(f.x, c, tile), gate = cursor(f.gate, c, tile), h = cursor(f.h, c, tile);
        const auto body = [&](int i, int64_t) {
            for_each_column(tile, [&](int j, int lanes) {
                V input = load_ahead(f.x, x.at + j * L * f.x.line, lanes);
                if constexpr (kGated) input = input * load_ahead(f.gate, gate.at + j * L * f.gate.line, lanes);
                squares[j][i] = input;
                prefetch_write(f.h.data + h.at + j * L * f.h.line);
            });
        };
        for_each_row(tile, body, x, gate, h);
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
                for (int64_t r = 0; r < shape.rows; r += L) {
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
        V squares[kRun][L];
        to_rows(state, tile, squares);
        Cursor h = cursor(f.h, c, tile);
        const auto body = [&](int i, int64_t) {
            for_each_column(tile, [&](int j, int lanes) {
                store_strided(f.h.data + h.at + j * L * f.h.line, f.h.line, squares[j][i], lanes);
            });
        };
        for_each_row(tile, body, h);
    }

    // ---- backward ---------------------------------------------------------------------------------------------------

    void pack_gradient(int64_t c, const Tile& tile) {
        V squares[kRun][L];
        Cursor grad_h = cursor(f.grad_h, c, tile);
        const auto body = [&](int i, int64_t) {
            for_each_column(tile, [&](int j, int lanes) {
                squares[j][i] = load_ahead(f.grad_h, grad_h.at + j * L * f.grad_h.line, lanes);
            });
        };
        for_each_row(tile, body, grad_h);
        to_lines(squares, tile, state);
    }

    // Turns the gradients of h that were packed into the whole ones. `lines`: three that the line after sent and three
    // that this one sends, six in all, which a band takes over from the one before.
    void scan_backward(A* lines, int64_t first, int64_t count) {
        for (int64_t i = count - 1; i >= 0; i--) {
            const int64_t t = g.reverse ? count - 1 - i : i, o = t * shape.pitch;
            const int64_t after = first + t + (g.reverse ? -1 : 1), index = g.index(first + t);
            const bool last = index == g.lines - 1 || !live[after];
            const A* received = lines + 3 * (index & 1) * shape.pitch;
            A* sent = lines + 3 * (1 - (index & 1)) * shape.pitch;
            for (int64_t r = 0; r < shape.rows; r += L) {
                V v = load(state + o + r);
                if (!last) {
                    v = v + keep(load_bits<MaskOf<V>>(has_next + r), load(received + r + 1)) +
                        load(received + shape.pitch + r) +
                        keep(load_bits<MaskOf<V>>(has_prev + r), load(received + 2 * shape.pitch + r - 1));
                    store(state + o + r, v);
                }
                for (int k = 0; k < 3; k++) store(sent + k * shape.pitch + r, v * load(weights[k] + o + r));
            }
        }
    }

    // h one step of the scan before lines t, t + 1, ... of a row; where a segment starts it is not used.
    GSPN_INLINE_MEMBER V previous_state(const S* h, int64_t t, int lanes) {
        prefetch(h + kRowsAhead * f.h.place);
        if (g.reverse) return load_strided(h + f.h.line, f.h.line, t + lanes < g.lines ? lanes : lanes - 1);
        if (t > 0) return load_strided(h - f.h.line, f.h.line, lanes);
        return shift_up(load_strided(h, f.h.line, lanes < L ? lanes : L - 1), typename MakeLanes<L>::type{});
    }

    void gradients(int64_t c, const Tile& tile) {
        V squares[kRun][L], above[kRun], here[kRun];
        to_rows(state, tile, squares);
        Cursor x = cursor(f.x, c, tile), gate = cursor(f.gate, c, tile);
        Cursor dx = cursor(f.dx, c, tile), dgate = cursor(f.dgate, c, tile);
        Cursor h = cursor(f.h, c, tile), raw = cursor(f.weights, 0, tile), dweights = cursor(f.dweights, 0, tile);
        const auto body = [&](int i, int64_t place) {
            const bool first = place == 0, last = place == g.places - 1;
            if (i == 0 || first)
                for_each_column(tile, [&](int j, int lanes) {
                    const S* row = f.h.data + h.at + j * L * f.h.line;
                    here[j] = previous_state(row, tile.line + j * L, lanes);
                    above[j] = first ? V{} : previous_state(row - f.h.place, tile.line + j * L, lanes);
                });
            for_each_column(tile, [&](int j, int lanes) {
                const int64_t line = tile.line + j * L;
                const S* row = f.h.data + h.at + j * L * f.h.line;
                const V below = last ? V{} : previous_state(row + f.h.place, line, lanes), gradient = squares[j][i];
                Triple<V> dw = {gradient * above[j], gradient * here[j], gradient * below};
                above[j] = here[j], here[j] = below;
                if constexpr (kGated) {
                    const V value = load_ahead(f.x, x.at + j * L * f.x.line, lanes);
                    put_ahead(f.dgate, dgate.at + j * L * f.dgate.line, gradient * value, lanes);
                    const V factor = load_ahead(f.gate, gate.at + j * L * f.gate.line, lanes);
                    put_dx(dx.at + j * L * f.dx.line, gradient * factor, lanes);
                } else {
                    put_dx(dx.at + j * L * f.dx.line, gradient, lanes);
                }
                const int64_t to = dweights.at + j * L * f.dweights.line;
                if (shared) {
                    if (c > 0 || f.add_dweights) dw = dw + load_dweights(to, lanes);
                    store_dweights(to, dw, lanes);
                } else {
                    const int64_t from = raw.at + j * L * f.weights.line;
                    if (first || last) put_dweights<true>(from, to, place, line, dw, lanes);
                    else put_dweights<false>(from, to, place, line, dw, lanes);
                }
            });
        };
        for_each_row(tile, body, x, gate, dgate, dx, h, raw, dweights);
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
    GSPN_INLINE_MEMBER void put_dweights(
        int64_t from, int64_t to, int64_t place, int64_t line, Triple<V> dw, int lanes) {
        const auto edges = edges_if<EDGE>(edges_of_place<V>(place, g.places));
        const auto slopes = form_slopes<FORM>(raw_weights(from, lanes), edges);
        for (int k = 0; k < 3; k++) prefetch_write(f.dweights.data[k] + to + kRowsAhead * f.dweights.place);
        dw = weight_gradient<FORM>(keep_existing(dw, edges), slopes, edges);
        store_dweights(to, keep_live(line, dw), lanes);
    }

    void finish_dweights(const Tile& tile) {
        Cursor raw = cursor(f.weights, 0, tile), dweights = cursor(f.dweights, 0, tile);
        const auto body = [&](int, int64_t place) {
            for_each_column(tile, [&](int j, int lanes) {
                const int64_t to = dweights.at + j * L * f.dweights.line;
                const Triple<V> dw = load_dweights(to, lanes);
                put_dweights<true>(raw.at + j * L * f.weights.line, to, place, tile.line + j * L, dw, lanes);
            });
        };
        for_each_row(tile, body, raw, dweights);
    }

    // The first line of a segment has no weights. (`live` can be read beyond its end.)
    GSPN_INLINE_MEMBER Triple<V> keep_live(int64_t line, Triple<V> v) {
        const MaskOf<V> mask = load_bits<MaskOf<V>>(live + line);
        return {keep(mask, v.prev), keep(mask, v.same), keep(mask, v.next)};
    }

    GSPN_INLINE_MEMBER Triple<V> load_dweights(int64_t at, int lanes) {
        return {
            load_strided(f.dweights.data[0] + at, f.dweights.line, lanes),
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
