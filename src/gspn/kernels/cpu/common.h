// What scan/ and propagate/ share: words, sizes, the geometry of a scan, and the normalisation of the weights.
//
// Words, here and in both folders:
//   line          a row or a column of the map; all of it is computed at once, from the line before it
//   place         a position in a line
//   neighbours    of a place: the previous, the same and the next place of the line before
//   segment       lines between two resets of the state: the line that starts a segment has no line before it
//   lane          an element of a vector (vec.h)
//   strip         a few places of a line that follow each other
//   message       in the backward scan, what a line adds to the gradients of the line before it
//   packed        copied into scratch in the order in which the kernel reads it
//   before, now   the states of the line before and of this line
//
// Types: S is that of the maps in memory, A = Acc<S> that of the state and of sums, V = VecOf<S> a vector of L lanes.
// Gradients that come in are called grad_NAME, those that are computed dNAME.
#pragma once
#include "api.h"
#include "vec.h"

#define GSPN_INLINE_MEMBER inline __attribute__((always_inline))

namespace GSPN_NS {
namespace {

// ---- sizes ---------------------------------------------------------------------------------------------------------

GSPN_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
GSPN_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
GSPN_INLINE int64_t clamp(int64_t v, int64_t low, int64_t high) { return v < low ? low : v > high ? high : v; }
GSPN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
GSPN_INLINE int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

// A value that the compiler knows
template <int N> struct Known {
    static constexpr int value = N;
};

// ---- geometry ------------------------------------------------------------------------------------------------------

// One direction of a scan over a map. Line t = 0 is where the scan starts.
struct Geometry {
    int64_t lines, places, segment;  // 1 <= segment <= lines, where there are lines
    bool horizontal, reverse;        // lines are columns, scanned along the width; line 0 is the last column or row

    // For a map with these strides between rows and columns: from a line or place to the next one in memory.
    int64_t line_stride(int64_t row, int64_t column) const { return horizontal ? column : row; }
    int64_t place_stride(int64_t row, int64_t column) const { return horizontal ? row : column; }

    // Which row or column of the map line t is, and how far it is from the first one.
    int64_t index(int64_t t) const { return reverse ? lines - 1 - t : t; }
    int64_t offset(int64_t t, int64_t row, int64_t column) const { return index(t) * line_stride(row, column); }

    bool starts_segment(int64_t t) const { return t % segment == 0; }
    bool ends_segment(int64_t t) const { return t == lines - 1 || starts_segment(t + 1); }
};

// segment is that of api.h: 0 where there is only one.
GSPN_INLINE Geometry geometry_of(int64_t direction, int64_t height, int64_t width, int64_t segment) {
    const bool horizontal = direction == GSPN_RIGHT || direction == GSPN_LEFT;
    const int64_t lines = horizontal ? width : height, places = horizontal ? height : width;
    if (segment <= 0 || segment > lines) segment = lines;
    return {lines, places, segment, horizontal, direction == GSPN_LEFT || direction == GSPN_UP};
}

// ---- neighbours ----------------------------------------------------------------------------------------------------

constexpr int kNeighbours = 3;

// A value for each neighbour.
template <class V> struct Triple {
    V prev, same, next;
};
template <class V> GSPN_INLINE Triple<V> operator+(Triple<V> a, Triple<V> b) {
    return {a.prev + b.prev, a.same + b.same, a.next + b.next};
}

template <class V> using MaskOf = decltype(V{} < V{});  // lanes of 0 or -1
template <class V> GSPN_INLINE V keep(MaskOf<V> mask, V v) { return mask ? v : V{}; }

// The ends of a line lack neighbours. Three types tell which exist, each for what is known when the kernel is compiled;
// their members are the same: a value where the neighbour exists, else 0, and a value where there are two places or
// more, else the other one.

// A vector that is not at an end.
struct Inside {
    template <class V> GSPN_INLINE_MEMBER V keep_prev(V v) const { return v; }
    template <class V> GSPN_INLINE_MEMBER V keep_next(V v) const { return v; }
    template <class V> GSPN_INLINE_MEMBER V unless_alone(V v, V) const { return v; }
};

// A vector all of whose lanes are at one place: at an end known at compile time.
enum End { kInside = 0, kFirst = 1, kLast = 2, kOnly = 3 };
template <int END> struct AtEnd {
    template <class V> GSPN_INLINE_MEMBER V keep_prev(V v) const { return END & kFirst ? V{} : v; }
    template <class V> GSPN_INLINE_MEMBER V keep_next(V v) const { return END & kLast ? V{} : v; }
    template <class V> GSPN_INLINE_MEMBER V unless_alone(V v, V other) const { return END == kOnly ? other : v; }
};

// Any vector: masks of the lanes whose neighbours exist.
template <class V> struct Edges {
    MaskOf<V> has_prev, has_next;
    GSPN_INLINE_MEMBER V keep_prev(V v) const { return keep(has_prev, v); }
    GSPN_INLINE_MEMBER V keep_next(V v) const { return keep(has_next, v); }
    GSPN_INLINE_MEMBER V unless_alone(V v, V other) const { return (has_prev | has_next) ? v : other; }
};

template <class V, class E> GSPN_INLINE Triple<V> keep_existing(Triple<V> v, const E& edges) {
    return {edges.keep_prev(v.prev), v.same, edges.keep_next(v.next)};
}

// ---- normalisation -------------------------------------------------------------------------------------------------

constexpr double kLog2e = 1.44269504088896340736;
constexpr double kLowestLogit = -28.0;  // logits are clamped from below: e^28 cubed is finite in float

// e^-a of the clamped logit a, which comes times -log2 e. ROUGH, for maps of 16 bits: still far more exact than they
// are.
template <bool ROUGH, class V> GSPN_INLINE V decay(V scaled) {
    typedef decltype(scaled[0] + scaled[0]) A;
    const V y = at_most(scaled, A(-kLowestLogit * kLog2e));
    if constexpr (ROUGH) return rough_exp2(y);
    else return exp2(y);
}

// The normalised sigmoids of three logits a_k, and what they were computed from:
//
//     decay_k = e^-a_k,  E_k = 1 + decay_k,  sigmoid(a_k) = 1 / E_k,  product_k = E_i E_j with i, j the other two
//     w_k = sigmoid(a_k) / sum of the sigmoids = product_k / sum of the products
//
// One reciprocal does for all three. The weights sum to 1 to the last place, ROUGH or not. A neighbour that does not
// exist has decay 0 and weight 0, whatever its logit is; a place without neighbours has weight 1, or NaN.
template <class V> struct Normalised {
    Triple<V> weights, decays, denominators, products;
};

template <bool ROUGH = false, class V, class E> GSPN_INLINE Normalised<V> normalise(Triple<V> scaled, const E& edges) {
    Normalised<V> n;
    n.decays = keep_existing(
        Triple<V>{decay<ROUGH>(scaled.prev), decay<ROUGH>(scaled.same), decay<ROUGH>(scaled.next)}, edges);
    const Triple<V> e = n.denominators = {n.decays.prev + 1, n.decays.same + 1, n.decays.next + 1};
    n.products = {e.same * e.next, e.prev * e.next, e.prev * e.same};
    const Triple<V> product = keep_existing(n.products, edges);
    const V q = reciprocal(product.prev + product.same + product.next);
    n.weights = {product.prev * q, product.same * q, product.next * q};
    n.weights.same = edges.unless_alone(n.weights.same, e.same == e.same ? V{} + 1 : e.same);
    return n;
}

// ---- memory --------------------------------------------------------------------------------------------------------

template <class A> GSPN_INLINE void fill_zero(A* p, int64_t count) { __builtin_memset(p, 0, sizeof(A) * count); }

template <class T> GSPN_INLINE void prefetch(const T* p) { __builtin_prefetch(p, 0, 3); }
template <class T> GSPN_INLINE void prefetch_write(T* p) { __builtin_prefetch(p, 1, 3); }

}  // namespace
}  // namespace GSPN_NS
