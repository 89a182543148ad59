// The gradients of the projections and of the proxy by tiles (amx.h), out of the gradients of the projected maps.
// They are made for a bundle of up to 64 pixels at a time, which may be several short lines: every product reads and
// writes all gradients of the projections, however few its pixels are.
#pragma once
#include "propagate/amx.h"

namespace GSPN_NS {
namespace {

// The lines of one direction in bundles: as many lines that follow each other in the map as 64 pixels hold. A longer
// line is alone in its bundle and passed on in pieces. A line takes an even number of pixels, as pixels come in pairs.
struct LineBundles {
    static constexpr int64_t kMost = 64;
    int64_t lines, places, line_pixels, together;  // together: lines in a bundle

    LineBundles(int64_t lines_, int64_t places_)
        : lines(lines_), places(places_), line_pixels(round_up(places, 2)),
          together(max(1, kMost / max(2, line_pixels))) {}

    // The proxies of a bundle are [feature][pixel], whole tiles of both.
    int64_t pitch() const { return round_up(together * line_pixels, kTileDepth); }
    int64_t bundle_size(int64_t features) const { return round_up(features, kTileRows) * pitch(); }
    int64_t count() const { return ceil_div(lines, together); }
    int64_t size(int64_t features) const { return count() * bundle_size(features); }
};

// The columns of a strip stand in slots, those of gates first: then lines without logits take the first slots of what
// is packed for all columns.
constexpr int column_of_slot(int slot, int columns, int logits) {
    return slot < columns - logits ? logits + slot : slot - (columns - logits);
}

// The gradients of the projected maps of a bundle, in the two orders in which tiles want them
template <class A> struct GradientTiles {
    static constexpr int L = kLanes<A>, kRow = kMostColumns * L;
    static constexpr int64_t kPixels = LineBundles::kMost;
    static constexpr int64_t kTerm = kPixels * kRow;  // elements between the terms of by_pixel
    static constexpr int64_t kColumn = kPixels * L;   // elements between two columns of by_lane

    bf16* by_pixel;  // [term][pixel][slot][lane], to multiply projections
    bf16* by_lane;   // [term][slot][pair of pixels][lane], to be multiplied by proxies
    A* sums;         // of a bundle, before they are added to what is in memory
    A** dproxy;      // of each pixel; null where there is none

    template <class Carver>
    explicit GradientTiles(Carver& carver)
        : by_pixel(carver.template take<bf16>(kTiles * 2 * kTerm)),
          by_lane(carver.template take<bf16>(kTiles * 2 * kTerm)),
          sums(carver.template take<A>(kTiles * kTileRows * kRow)), dproxy(carver.template take<A*>(kTiles * kPixels)) {
    }

    // The gradients of n pixels of a line, of which `at` (even) in the bundle is the first. ALL: columns that the
    // bundle's product has; those that this line lacks are 0. dproxy_: of the first pixel, with `step` elements between
    // pixels
    template <int COLS, int LOGITS, int ALL>
    void pack(int64_t at, int64_t n, const A* dmaps, A* dproxy_, int64_t step) const {
        for (int64_t i = 0; i < n; i++) dproxy[at + i] = dproxy_ + i * step;
        if (n % 2) dproxy[at + n] = nullptr;
        for (int64_t i = 0; i < n; i += 2, dmaps += 2 * COLS * L)
            for_each_known<(ALL + 1) / 2>([&](auto pair) __attribute__((always_inline)) {
                constexpr int first = 2 * pair.value;
                Terms terms[2][2] = {};  // of two pixels and two columns
                for_each_known<2>([&](auto j) __attribute__((always_inline)) {
                    constexpr int slot = first + j.value, c = column_of_slot(slot, COLS, LOGITS);
                    if constexpr (slot < COLS) {
                        terms[0][j.value] = split<false>(load(dmaps + c * L));
                        if (i + 1 < n) terms[1][j.value] = split<false>(load(dmaps + (COLS + c) * L));
                    }
                    if constexpr (slot < ALL) {
                        bf16* const to = by_lane + slot * kColumn + (at + i) * L;
                        store_bits(to, paired(terms[0][j.value].high, terms[1][j.value].high));
                        store_bits(to + kTerm, paired(terms[0][j.value].low, terms[1][j.value].low));
                    }
                });
                for (int r = 0; r < 2; r++) {
                    bf16* const to = by_pixel + (at + i + r) * kRow + first * L;
                    store_bits(to, joined(terms[r][0].high, terms[r][1].high));
                    store_bits(to + kTerm, joined(terms[r][0].low, terms[r][1].low));
                }
            });
    }

    // Passes the gradients of the bundle's n pixels on. They stand in the slots that pack gives them, those of dw in
    // columns.
    template <int ALL, int LOGITS>
    void pass_on(
        int64_t n, const bf16* proxy, int64_t pitch, int64_t features, A* dw, int64_t w_step, const bf16* w,
        int64_t depth) const {
        const int64_t used = round_up(n, 2) * L, whole = round_up(n, kTileDepth) * L;
        for (int c = 0; c < 2 * kMostColumns; c++)
            if (c % kMostColumns < ALL) fill_zero(by_lane + c * kColumn + used, whole - used);
        project_grad<ALL, LOGITS>(n, proxy, pitch, features, dw, w_step);
        proxy_grad<ALL>(n, features, w, depth);
    }

    // dw[s][c] += sum over i of proxy[i][s] grad[i][c], with the proxy as [feature][pixel], `pitch` elements apart
    template <int ALL, int LOGITS>
    void project_grad(int64_t n, const bf16* proxy, int64_t pitch, int64_t features, A* dw, int64_t w_step) const {
        constexpr int left = 6;  // register; the other operand is in 7, or in 5 where it is free
        for (int64_t s = 0; s < features; s += kTileRows, proxy += kTileRows * pitch) {
            for_each_known<ALL>([](auto c) { tile_zero<c.value>(); });
            for (int64_t i = 0; i < n; i += kTileDepth) {
                tile_load<left>(proxy + i, pitch * 2);
                for (int64_t term = 0; term < 2; term++)
                    for_each_known<ALL>([&](auto c) {
                        constexpr int right = ALL < left && c.value % 2 ? 5 : 7;
                        tile_load<right>(by_lane + term * kTerm + c.value * kColumn + i * L, kTileBytes);
                        tile_multiply<c.value, left, right>();
                    });
            }
            for_each_known<ALL>([&](auto c) { tile_store<c.value>(sums + c.value * L, ALL * kTileBytes); });
            const int64_t rows = min(kTileRows, features - s);
            for (int64_t r = 0; r < rows; r++, dw += w_step)
                for_each_known<ALL>([&](auto slot) {
                    constexpr int c = column_of_slot(slot.value, ALL, LOGITS);
                    store(dw + c * L, load(dw + c * L) + load(sums + (r * ALL + slot.value) * L));
                });
        }
    }

    // dproxy[i][s] += sum over k of grad[i][k] w[k][s], k running over columns and lanes. w: see pack_transposed_tiles;
    // depth: tiles of the depth in it
    template <int ALL> void proxy_grad(int64_t n, int64_t features, const bf16* w, int64_t depth) const {
        int64_t s = 0;
        for (; s + L < features; s += 2 * L, w += 2 * depth * 2 * kTileSize) proxy_grad_pair<ALL, 2>(n, w, depth, s);
        if (s < features) proxy_grad_pair<ALL, 1>(n, w, depth, s);
    }

    template <int ALL, int N> void proxy_grad_pair(int64_t n, const bf16* w, int64_t depth, int64_t first) const {
        int64_t i = 0;
        for (; n - i > kTileRows; i += 2 * kTileRows) proxy_grad_tiles<ALL, 2, N>(i, n, w, depth, first);
        if (i < n) proxy_grad_tiles<ALL, 1, N>(i, n, w, depth, first);
    }

    // ROWS tiles of pixels by N tiles of features, from pixel i and feature `first` on
    template <int ALL, int ROWS, int N>
    GSPN_INLINE_MEMBER void proxy_grad_tiles(int64_t i, int64_t n, const bf16* w, int64_t depth, int64_t first) const {
        constexpr int sums_ = ROWS * N, left = sums_, right = left + ROWS;  // registers
        const auto load_left = [&](const bf16* from) __attribute__((always_inline)) {
            for_each_known<ROWS>(
                [&](auto r) { tile_load<left + r.value>(from + r.value * kTileRows * kRow, kRow * 2); });
        };
        const auto load_right = [&](const bf16* from) __attribute__((always_inline)) {
            for_each_known<N>(
                [&](auto s) { tile_load<right + s.value>(from + s.value * depth * 2 * kTileSize, kTileBytes); });
        };
        const auto multiply = [&]() __attribute__((always_inline)) {
            for_each_known<ROWS>([&](auto r) {
                for_each_known<N>(
                    [&](auto s) { tile_multiply<r.value * N + s.value, left + r.value, right + s.value>(); });
            });
        };
        for_each_known<sums_>([](auto s) { tile_zero<s.value>(); });
        for (int64_t k = 0; k < (ALL + 1) / 2; k++) {
            const bf16* const grad = by_pixel + i * kRow + k * kTileDepth;
            load_right(w + k * 2 * kTileSize);
            load_left(grad + kTerm), multiply();
            load_left(grad), multiply();
            load_right(w + (k * 2 + 1) * kTileSize), multiply();
        }
        for_each_known<ROWS>([&](auto r) {
            for_each_known<N>([&](auto s) {
                tile_store<r.value * N + s.value>(sums + (r.value * kTileRows * N + s.value) * L, N * kTileBytes);
            });
        });
        const int64_t rows = min(ROWS * kTileRows, n - i);
        for (int64_t r = 0; r < rows; r++) {
            if (!dproxy[i + r]) continue;
            A* const to = dproxy[i + r] + first;
            for (int s = 0; s < N; s++) store(to + s * L, load(to + s * L) + load(sums + (r * N + s) * L));
        }
    }
};

// [tile of features][tile of the depth][term][16 pairs of lanes][feature] out of w, [features][columns][lanes]
template <class A> void pack_transposed_tiles(int64_t features, int columns, int logits, const A* w, bf16* tiles) {
    constexpr int L = kLanes<A>;
    for (int64_t s = 0; s < features; s += kTileRows)
        for (int slot = 0; slot < columns; slot += 2) {
            vf high[kTileRows], low[kTileRows];
            for (int r = 0; r < kTileRows; r++) {
                Terms terms[2] = {};
                for (int j = 0; j < 2; j++) {
                    if (s + r >= features || slot + j >= columns) continue;
                    const int column = column_of_slot(slot + j, columns, logits);
                    terms[j] = split<true>(load(w + ((s + r) * columns + column) * L));
                }
                high[r] = (vf)joined(terms[0].high, terms[1].high), low[r] = (vf)joined(terms[0].low, terms[1].low);
            }
            transpose(high), transpose(low);
            for (int r = 0; r < kTileRows; r++) {
                store_bits(tiles + r * kTileDepth, high[r]);
                store_bits(tiles + kTileSize + r * kTileDepth, low[r]);
            }
            tiles += 2 * kTileSize;
        }
}
GSPN_INLINE int64_t transposed_tiles_size(int64_t features, int columns) {
    return ceil_div(features, kTileRows) * ceil_div(columns, 2) * 2 * kTileSize;
}

// ---- proxies -------------------------------------------------------------------------------------------------------

// The proxies of a bundle, out of those of project_tiles, as [feature][pixel]. What is beyond either is 0.
template <class A>
void transpose_bundle(
    const LineBundles& bundles, int64_t bundle, const bf16* from, int64_t line_step, int64_t place_step,
    int64_t features, bf16* to) {
    constexpr int L = kLanes<A>;
    for (int64_t i = 0; i < bundles.pitch(); i += L) {
        const bf16* pixels[L];
        for (int j = 0; j < L; j++) {
            const int64_t in_bundle = (i + j) / bundles.line_pixels, place = (i + j) % bundles.line_pixels;
            const int64_t line = bundle * bundles.together + in_bundle;
            const bool exists = in_bundle < bundles.together && line < bundles.lines && place < bundles.places;
            pixels[j] = exists ? from + line * line_step + place * place_step : nullptr;
        }
        for (int64_t s = 0; s < features; s += L) {
            vf square[L];
            for (int j = 0; j < L; j++) square[j] = pixels[j] ? load_n(pixels[j] + s, int(min(L, features - s))) : vf{};
            transpose(square);
            for (int r = 0; r < L; r++) store(to + (s + r) * bundles.pitch() + i, square[r]);
        }
    }
}

}  // namespace
}  // namespace GSPN_NS
