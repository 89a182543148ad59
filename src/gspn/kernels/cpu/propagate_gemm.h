// The matrix products of propagate: small ones, between a strip of pixels and the projections of one block of channels.
//
// A strip holds n pixels; a "column" is one vector of channels of one projected map, so a strip of projected maps is
// [n][columns][lanes]. Projections of a block are [features][columns][lanes]. All operands stay in the first- and
// second-level cache; tiles are sized to keep the sums in registers. Gradients are summed over a strip before they are
// added to what is in memory: long chains of additions to a large number would lose the accuracy of the eager sums.
#pragma once
#include "vec.h"

namespace GSPN_NS {
namespace {

// Sums that fit in the registers. float64 is there for gradient checks: one tile size keeps the library small.
#if defined(GSPN_AVX512) || defined(__aarch64__)
template <class A> constexpr int kSums = sizeof(A) == 4 ? 25 : 12;
#else
template <class A> constexpr int kSums = 12;
#endif
template <class A> constexpr int kMostRows = sizeof(A) == 4 ? 8 : 2;
template <class A> constexpr int kProxyRows = sizeof(A) == 8 ? 4 : kSums<A> == 25 ? 12 : 8;
template <class A> constexpr int kMostRepeats = sizeof(A) == 4 && kLanes<A> >= 4 ? 4 : 1;  // see Features
template <class A> constexpr int rows_of_tile(int columns) {
    return kSums<A> / columns > kMostRows<A> ? kMostRows<A> : kSums<A> / columns;
}

// Rows of tiles of about equal size: each row is a chain of additions, and a last tile of few rows would wait for them.
GSPN_INLINE int64_t even_rows(int64_t rows, int most) {
    const int64_t tiles = (rows + most - 1) / most;
    return tiles ? (rows + tiles - 1) / tiles : 1;
}

// Projection: maps[i][c] = sum over s of proxy[i][s] w[s][c]

template <int ROWS, int COLS, class A>
GSPN_INLINE void project_tile(const A* proxy, int64_t step, int64_t features, const A* w, int64_t w_step, A* maps) {
    constexpr int L = kLanes<A>;
    VecOf<A> sum[ROWS][COLS] = {};
    for (int64_t s = 0; s < features; s++, w += w_step) {
        VecOf<A> row[COLS];
#pragma GCC unroll 8
        for (int c = 0; c < COLS; c++) row[c] = load(w + c * L);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const VecOf<A> value = broadcast(proxy[i * step + s]);
#pragma GCC unroll 8
            for (int c = 0; c < COLS; c++) sum[i][c] = fma(value, row[c], sum[i][c]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int c = 0; c < COLS; c++) store(maps + (i * COLS + c) * L, sum[i][c]);
}

template <int ROWS, int COLS, class A>
static void project_rest(int64_t n, const A* proxy, int64_t step, int64_t features, const A* w, int64_t w_step, A* maps) {
    if constexpr (ROWS > 0) {
        if (n == ROWS) project_tile<ROWS, COLS>(proxy, step, features, w, w_step, maps);
        else project_rest<ROWS - 1, COLS>(n, proxy, step, features, w, w_step, maps);
    }
}

// step: elements between the proxies of two pixels; w_step: between the projections of two features
template <int COLS, class A>
static void project(int64_t n, const A* proxy, int64_t step, int64_t features, const A* w, int64_t w_step, A* maps) {
    constexpr int rows = rows_of_tile<A>(COLS);
    for (; n >= rows; n -= rows, proxy += rows * step, maps += rows * COLS * kLanes<A>)
        project_tile<rows, COLS>(proxy, step, features, w, w_step, maps);
    project_rest<rows - 1, COLS>(n, proxy, step, features, w, w_step, maps);
}

// Gradient of the projections: dw[s][c] += sum over i of proxy[i][s] grad[i][c]

template <int ROWS, int COLS, class A>
GSPN_INLINE void project_grad_tile(int64_t n, const A* proxy, int64_t step, const A* grad, A* dw, int64_t w_step) {
    constexpr int L = kLanes<A>;
    VecOf<A> sum[ROWS][COLS] = {};
    for (int64_t i = 0; i < n; i++, proxy += step, grad += COLS * L) {
        VecOf<A> row[COLS];
#pragma GCC unroll 8
        for (int c = 0; c < COLS; c++) row[c] = load(grad + c * L);
#pragma GCC unroll 8
        for (int s = 0; s < ROWS; s++) {
            const VecOf<A> value = broadcast(proxy[s]);
#pragma GCC unroll 8
            for (int c = 0; c < COLS; c++) sum[s][c] = fma(value, row[c], sum[s][c]);
        }
    }
#pragma GCC unroll 8
    for (int s = 0; s < ROWS; s++)
#pragma GCC unroll 8
        for (int c = 0; c < COLS; c++) store(dw + s * w_step + c * L, load(dw + s * w_step + c * L) + sum[s][c]);
}

template <int ROWS, int COLS, class A>
static void project_grad_tiles(
    int64_t rows, int64_t n, const A* proxy, int64_t step, int64_t features, const A* grad, A* dw, int64_t w_step) {
    if constexpr (ROWS > 1)
        if (rows < ROWS)
            return project_grad_tiles<ROWS - 1, COLS>(rows, n, proxy, step, features, grad, dw, w_step);
    int64_t s = 0;
    for (; s + ROWS <= features; s += ROWS)
        project_grad_tile<ROWS, COLS>(n, proxy + s, step, grad, dw + s * w_step, w_step);
    if constexpr (ROWS > 1)
        if (s < features)
            project_grad_tiles<ROWS - 1, COLS>(
                features - s, n, proxy + s, step, features - s, grad, dw + s * w_step, w_step);
}

template <int COLS, class A>
static void project_grad(
    int64_t n, const A* proxy, int64_t step, int64_t features, const A* grad, A* dw, int64_t w_step) {
    constexpr int most = rows_of_tile<A>(COLS);
    const int64_t rows = even_rows(features, most);
    project_grad_tiles<most, COLS>(rows, n, proxy, step, features, grad, dw, w_step);
}

// Gradient of the proxy: dproxy[i][s] += sum over k of grad[i][k] w[k][s], k running over columns and lanes.
//
// Here the lanes hold features. Where half of the lanes or fewer are needed, R = lanes / width values of k (2 or 4) share
// a vector, feature-major, so that few lanes multiply padding; dproxy keeps these R partial sums per feature, and they
// are added up once, at the end (sum_feature).

template <class A> struct Features {
    static constexpr int L = kLanes<A>;
    int64_t count, full;  // features; full vectors of them
    int rest, width;      // features of the last, partial vector, and that rounded up to a power of two

    explicit Features(int64_t n) : count(n), full(n / L), rest((int)(n % L)), width(rest ? L / kMostRepeats<A> : 0) {
        while (width < rest) width *= 2;
    }
    int64_t lanes() const { return (full + (rest ? 1 : 0)) * L; }  // of dproxy for one pixel
    int64_t rows() const { return full * L + width; }             // of transposed projections, for each k
    int repeats() const { return L / width; }

    // One feature out of the lanes of a pixel
    A sum_feature(const A* lanes, int64_t s) const {
        if (s < full * L) return lanes[s];
        A sum = 0;
        const A* first = lanes + full * L + (s - full * L) * repeats();
        for (int r = 0; r < repeats(); r++) sum += first[r];
        return sum;
    }
};

template <int ROWS, int R, class A>
GSPN_INLINE void proxy_grad_tile(const A* grad, int64_t g_step, int64_t k_count, const A* wt, A* dproxy, int64_t step) {
    VecOf<A> sum[ROWS] = {};
    for (int64_t k = 0; k < k_count; k += R, wt += kLanes<A>) {
        const VecOf<A> row = load(wt);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) sum[i] = fma(repeat<R>(grad + i * g_step + k), row, sum[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) store(dproxy + i * step, load(dproxy + i * step) + sum[i]);
}

template <int ROWS, int R, class A>
static void proxy_grad_tiles(
    int64_t rows, int64_t n, const A* grad, int64_t g_step, int64_t k_count, const A* wt, A* dproxy, int64_t step) {
    if constexpr (ROWS > 1)
        if (rows < ROWS)
            return proxy_grad_tiles<ROWS - 1, R>(rows, n, grad, g_step, k_count, wt, dproxy, step);
    for (; n >= ROWS; n -= ROWS, grad += ROWS * g_step, dproxy += ROWS * step)
        proxy_grad_tile<ROWS, R>(grad, g_step, k_count, wt, dproxy, step);
    if constexpr (ROWS > 1)
        if (n > 0) proxy_grad_tiles<ROWS - 1, R>(n, n, grad, g_step, k_count, wt, dproxy, step);
}

template <int R, class A>
static void proxy_grad_vector(
    int64_t n, const A* grad, int64_t g_step, int64_t k_count, const A* wt, A* dproxy, int64_t step) {
    proxy_grad_tiles<kProxyRows<A>, R>(even_rows(n, kProxyRows<A>), n, grad, g_step, k_count, wt, dproxy, step);
}

template <int R, class A>
static void proxy_grad_rest(
    int repeats, int64_t n, const A* grad, int64_t g_step, int64_t k_count, const A* wt, A* dproxy, int64_t step) {
    if (repeats == R) return proxy_grad_vector<R>(n, grad, g_step, k_count, wt, dproxy, step);
    if constexpr (R < kMostRepeats<A>) proxy_grad_rest<2 * R>(repeats, n, grad, g_step, k_count, wt, dproxy, step);
}

// columns of the gradient strip; the transposed projections `wt` have all_columns of them, of which the strip's are
// the last
template <class A>
static void proxy_grad(
    const Features<A>& features, int64_t n, const A* grad, int columns, int all_columns, const A* wt, A* dproxy,
    int64_t step) {
    constexpr int L = kLanes<A>;
    const int64_t k_count = columns * L, k_all = all_columns * L, k_first = k_all - k_count;
    for (int64_t f = 0; f < features.full; f++)
        proxy_grad_vector<1>(n, grad, k_count, k_count, wt + (f * k_all + k_first) * L, dproxy + f * L, step);
    if (features.rest) {
        const int r = features.repeats();
        const A* rest = wt + features.full * k_all * L + k_first / r * L;
        proxy_grad_rest<1>(r, n, grad, k_count, k_count, rest, dproxy + features.full * L, step);
    }
}

}  // namespace
}  // namespace GSPN_NS
