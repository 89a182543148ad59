// The weights of a vector of elements, from what the caller hands over, and the way back of their gradients.
#pragma once
#include "common.h"

namespace GSPN_NS {
namespace {

struct Yes {
    static constexpr bool value = true;
};
struct No {
    static constexpr bool value = false;
};

// ---- ends of lines -------------------------------------------------------------------------------------------------

template <class V> GSPN_INLINE MaskOf<V> lane_numbers() {
    MaskOf<V> m{};
    for (int i = 0; i < (int)(sizeof(V) / sizeof(V{}[0])); i++) m[i] = i;
    return m;
}
template <class V> GSPN_INLINE MaskOf<V> all_lanes(bool yes) { return MaskOf<V>{} - (yes ? 1 : 0); }

// Of a vector that holds the places from `first` on; it is inside the line unless CAREFUL.
template <bool CAREFUL, class V> GSPN_INLINE auto edges_of_places(int64_t first, int64_t places) {
    if constexpr (CAREFUL) {
        typedef decltype(MaskOf<V>{}[0] + 0) Int;
        const MaskOf<V> place = lane_numbers<V>();
        return Edges<V>{place > MaskOf<V>{} - Int(first), place < MaskOf<V>{} + Int(places - 1 - first)};
    } else {
        return Inside{};
    }
}
// Of a vector all of whose elements are at one place.
template <class V> GSPN_INLINE Edges<V> edges_of_place(int64_t place, int64_t places) {
    return {all_lanes<V>(place > 0), all_lanes<V>(place < places - 1)};
}
template <bool CAREFUL, class V> GSPN_INLINE auto edges_if(const Edges<V>& edges) {
    if constexpr (CAREFUL) return edges;
    else return Inside{};
}

// ---- weights -------------------------------------------------------------------------------------------------------

// How the weights are handed over.
enum Form {
    kGiven,     // as they are, but nothing comes from neighbours that do not exist
    kLogits,    // to be normalised
    kPrepared,  // as they are: already formed, in scratch
};

template <class V> GSPN_INLINE Triple<V> scaled(Triple<V> logits) {
    typedef decltype(logits.same[0] + logits.same[0]) A;
    return {logits.prev * A(-kLog2e), logits.same * A(-kLog2e), logits.next * A(-kLog2e)};
}

template <Form FORM, class V, class E> GSPN_INLINE Triple<V> form_weights(Triple<V> raw, const E& edges) {
    if constexpr (FORM == kLogits) return normalise(scaled(raw), edges).weights;
    if constexpr (FORM == kGiven) return keep_existing(raw, edges);
    return raw;
}

// The weights and what turns their gradients into those of the raw ones.
template <class V> struct Slopes {
    Triple<V> weights;
    Triple<V> slopes;  // w (1 - sigmoid), 0 beneath the clamp
};

template <class V, class E> GSPN_INLINE Slopes<V> normalise_with_slopes(Triple<V> logits, const E& edges) {
    typedef decltype(logits.same[0] + logits.same[0]) A;
    const Normalised<V> n = normalise(scaled(logits), edges);
    const V r = reciprocal(n.denominators.prev * n.products.prev);  // so that product * r = sigmoid
    Triple<V> slopes = {
        n.weights.prev * n.decays.prev * (n.products.prev * r), n.weights.same * n.decays.same * (n.products.same * r),
        n.weights.next * n.decays.next * (n.products.next * r)};
    const A lowest = A(kLowestLogit);
    slopes.prev = keep(logits.prev >= lowest, slopes.prev);
    slopes.same = keep(logits.same >= lowest, slopes.same);
    slopes.next = keep(logits.next >= lowest, slopes.next);
    return {n.weights, slopes};
}

template <Form FORM, class V, class E> GSPN_INLINE Slopes<V> form_slopes(Triple<V> raw, const E& edges) {
    if constexpr (FORM == kLogits) return normalise_with_slopes(raw, edges);
    else return {form_weights<FORM>(raw, edges), Triple<V>{}};
}

// From the gradients of the weights to those of what was handed over. Exactly 0 for neighbours that do not exist.
template <Form FORM, class V, class E>
GSPN_INLINE Triple<V> weight_gradient(Triple<V> dw, const Slopes<V>& s, const E& edges) {
    if constexpr (FORM == kLogits) {
        const Triple<V> term = keep_existing(Triple<V>{s.weights.prev * dw.prev, V{}, s.weights.next * dw.next}, edges);
        const V mean = term.prev + s.weights.same * dw.same + term.next;
        dw = {s.slopes.prev * (dw.prev - mean), s.slopes.same * (dw.same - mean), s.slopes.next * (dw.next - mean)};
        dw.same = edges.unless_alone(dw.same, V{});
    }
    return keep_existing(dw, edges);
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
        if (i > 0 && places - i > LANES) body(No{}, i, LANES);
        else body(Yes{}, i, int(min(LANES, places - i)));
    }
}

}  // namespace
}  // namespace GSPN_NS
