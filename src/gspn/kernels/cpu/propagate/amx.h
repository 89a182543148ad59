// The products of propagate by AMX, for maps of bfloat16. The processor multiplies tiles: 16 rows of 32 bf16 by 32 rows
// of 16, into 16 rows of 16 float. At its peak that is 16 times as fast as vectors of float.
//
// The proxy is bf16, so nothing is lost by it. Projections and gradients are float: each is split into two terms of
// bf16, high and low. Of a product with a proxy 2^-16 may be lost. Of a product of two floats that of the low terms is
// left out: at most 2^-14. (The maps themselves are rounded to 2^-8.) Where values are not finite, or tiny, results may
// differ from those of the vectors:
//   - a NaN or an infinity gives a NaN in sums that the vectors leave finite or infinite: here it also meets terms of 0
//   - numbers below 2^-126 count as 0, so numbers below about 2^-110 lose their low terms
//
// In memory every tile is 16 rows of 64 bytes. A tile on the right of a product holds pairs: row r has, for each
// column, the values 2r and 2r + 1.
//
// The templates are compiled for float alone, and only where kTiles is true.
#pragma once
#include "maps.h"
#include "propagate/pixel.h"

namespace GSPN_NS {
namespace {

#ifdef GSPN_TILES
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif

constexpr int kTileRows = 16, kTileDepth = 32;  // rows of a tile; values of bf16 in a row
constexpr int kTileSize = kTileRows * kTileDepth;
constexpr int64_t kTileBytes = 64;  // of a row
static_assert(!kTiles || GSPN_LANES == kTileRows);

// ---- the two terms of a float --------------------------------------------------------------------------------------

// The terms are the upper halves of these words; what stands in the lower halves does not count. high is cut off, low
// rounded, so that both have one sign. Of an infinity low is a NaN, unless EXACT: then it is 0.
struct Terms {
    vf high, low;
};
template <bool EXACT> GSPN_INLINE Terms split(vf v) {
    const vf high = (vf)((vu32)v & 0xffff0000u);
    vf low = v - high;
    if constexpr (EXACT) low = v == high ? vf{} : low;
    return {v, (vf)((vu32)low + 0x8000u)};
}

// The upper halves of two vectors: one after the other, and in turns
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
template <int... I> GSPN_INLINE Halves joined(vf a, vf b, Lanes<I...>) {
    constexpr int n = sizeof...(I);
    return __builtin_shufflevector((Halves)a, (Halves)b, (I < n / 2 ? 2 * I + 1 : 2 * (I - n / 2) + 1 + n)...);
}
template <int... I> GSPN_INLINE Halves paired(vf a, vf b, Lanes<I...>) {
    constexpr int n = sizeof...(I);
    return __builtin_shufflevector((Halves)a, (Halves)b, (I % 2 ? I + n : I + 1)...);
}
typedef MakeLanes<2 * GSPN_LANES>::type AllHalves;
GSPN_INLINE Halves joined(vf a, vf b) { return joined(a, b, AllHalves{}); }
GSPN_INLINE Halves paired(vf a, vf b) { return paired(a, b, AllHalves{}); }

// ---- tiles ---------------------------------------------------------------------------------------------------------

// Register T. Products are sums: C += A B.
#ifdef GSPN_TILES
// A sanitizer does not see what these instructions read and write: for it every row is touched.
#ifdef __has_feature
#define GSPN_HAS_SANITIZER __has_feature(address_sanitizer)
#else
#define GSPN_HAS_SANITIZER 0
#endif
GSPN_INLINE void touch_rows(const void* from, int64_t row_bytes) {
#if defined(__SANITIZE_ADDRESS__) || GSPN_HAS_SANITIZER
    for (int r = 0; r < kTileRows; r++) {
        const volatile char* const row = static_cast<const char*>(from) + r * row_bytes;
        row[0], row[kTileBytes - 1];
    }
#else
    (void)from, (void)row_bytes;
#endif
}
template <int T> GSPN_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T> GSPN_INLINE void tile_load(const bf16* from, int64_t row_bytes) {
    touch_rows(from, row_bytes);
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(T) : "memory");
}
template <int T> GSPN_INLINE void tile_store(float* to, int64_t row_bytes) {
    touch_rows(to, row_bytes);
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(T) : "memory");
}
template <int C, int A, int B> GSPN_INLINE void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
#else
template <int T> void tile_zero();
template <int T> void tile_load(const bf16*, int64_t);
template <int T> void tile_store(float*, int64_t);
template <int C, int A, int B> void tile_multiply();
#endif

// The use of the tile registers from here to the end of the scope. Every task sets them up for itself: another library
// may have used them in between.
struct TileRegisters {
#ifdef GSPN_TILES
    TileRegisters() {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; i++) config.row_bytes[i] = kTileBytes, config.rows[i] = kTileRows;
        asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
    }
    ~TileRegisters() { asm volatile("tilerelease" : : : "memory"); }
#else
    TileRegisters() {}
    ~TileRegisters() {}
#endif
    TileRegisters(const TileRegisters&) = delete;
};

// Calls body(Known<0>{}) .. body(Known<N - 1>{}).
template <int N, class Body> GSPN_INLINE void for_each_known(Body body) {
    if constexpr (N > 0) {
        for_each_known<N - 1>(body);
        body(Known<N - 1>{});
    }
}

// ---- projection: maps[i][c] = sum over s of proxy[i][s] w[s][c] ----------------------------------------------------
//
// A tile of few features has room for both terms of the projections: the proxy of a pixel then stands there twice,
// [features, features, zeros]. With more features the two terms are tiles of their own.

struct TileDepth {
    int64_t features, copies, depth, terms;  // depth: of the proxy of a pixel, whole tiles

    explicit TileDepth(int64_t n)
        : features(n), copies(2 * n <= kTileDepth ? 2 : 1), depth(round_up(copies * n, kTileDepth)), terms(3 - copies) {
    }
    int64_t tiles() const { return depth / kTileDepth * terms; }  // of a column's projections
};

// [tile of the depth][term][column][16 pairs][lanes] out of w, [features][columns][lanes]
template <class A> void pack_projection_tiles(const TileDepth& depth, int columns, const A* w, bf16* tiles) {
    constexpr int L = kLanes<A>;
    const int64_t features = depth.features;
    const auto value = [&](int64_t k, int64_t term, int column) __attribute__((always_inline)) {
        if (k >= features && depth.copies == 2) k -= features, term = 1;
        if (k >= features) return vf{};
        const Terms terms = split<true>(load(w + (k * columns + column) * L));
        return term ? terms.low : terms.high;
    };
    for (int64_t first = 0; first < depth.depth; first += kTileDepth)
        for (int64_t term = 0; term < depth.terms; term++)
            for (int column = 0; column < columns; column++)
                for (int64_t k = first; k < first + kTileDepth; k += 2, tiles += kTileDepth)
                    store_bits(tiles, paired(value(k, term, column), value(k + 1, term, column)));
}

// A strip: one or two tiles of pixels. Whole tiles are read and written, up to 15 pixels beyond those that are wanted.
constexpr int64_t kTileStrip = 2 * kTileRows;  // a longer strip took more time, for want of cache

// ROWS tiles of pixels by the columns FIRST .. FIRST + N - 1; see project_tiles
template <int ROWS, int FIRST, int N, int COLS, class A>
GSPN_INLINE void project_columns(
    const bf16* proxy, int64_t step, const TileDepth& depth, const bf16* w, int64_t w_step, A* maps) {
    constexpr int left = ROWS * N, right = left + ROWS;  // registers: sums first, then the proxy, then the projections
    for_each_known<ROWS * N>([](auto c) { tile_zero<c.value>(); });
    w += FIRST * kTileSize;
    for (int64_t k = 0; k < depth.depth; k += kTileDepth) {
        for_each_known<ROWS>(
            [&](auto r) { tile_load<left + r.value>(proxy + r.value * kTileRows * step + k, step * 2); });
        for (int64_t term = 0; term < depth.terms; term++, w += w_step)
            for_each_known<N>([&](auto c) {
                constexpr int w_tile = right + c.value % (8 - right);
                tile_load<w_tile>(w + c.value * kTileSize, kTileBytes);
                for_each_known<ROWS>([&](auto r) { tile_multiply<r.value * N + c.value, left + r.value, w_tile>(); });
            });
    }
    for_each_known<ROWS>([&](auto r) {
        for_each_known<N>([&](auto c) {
            tile_store<r.value * N + c.value>(
                maps + (r.value * kTileRows * COLS + FIRST + c.value) * kLanes<A>, COLS * kTileBytes);
        });
    });
}

// Eight registers hold the sums of two tiles by two columns, or of one tile by all.
template <int FIRST, int COLS, class A>
GSPN_INLINE void project_two(
    const bf16* proxy, int64_t step, const TileDepth& depth, const bf16* w, int64_t w_step, A* maps) {
    if constexpr (FIRST < COLS) {
        constexpr int n = COLS - FIRST < 2 ? 1 : 2;
        project_columns<2, FIRST, n, COLS>(proxy, step, depth, w, w_step, maps);
        project_two<FIRST + n, COLS>(proxy, step, depth, w, w_step, maps);
    }
}

// step: elements between the proxies of two pixels; w_step: between two tiles of the depth, or two terms
template <int COLS, class A>
void project_tiles(
    int64_t n, const bf16* proxy, int64_t step, const TileDepth& depth, const bf16* w, int64_t w_step, A* maps) {
    if (n <= kTileRows) project_columns<1, 0, COLS, COLS>(proxy, step, depth, w, w_step, maps);
    else project_two<0, COLS>(proxy, step, depth, w, w_step, maps);
}

// ---- proxies -------------------------------------------------------------------------------------------------------

// One pixel's proxy, widened, as project_tiles wants it
template <class A> void store_tile_pixel(const A* features, const TileDepth& depth, bf16* to) {
    fill_zero(to, depth.depth);
    for (int64_t copy = 0; copy < depth.copies; copy++)
        for (int64_t s = 0; s < depth.features; s += kLanes<A>) {
            const int n = int(min(kLanes<A>, depth.features - s));
            store_n(to + copy * depth.features + s, load_n(features + s, n), n);
        }
}

}  // namespace
}  // namespace GSPN_NS
