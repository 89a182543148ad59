// What happens at one pixel, for one block of channels, in one direction: the new state and the output going forward,
// the gradients going back. Everything is a vector of channels; lines are walked place by place, and what neighbouring
// places share is carried in registers.
//
// Projected maps of a pixel come as columns: previous, same, next (logits times -log2 e), input gate, output gate and,
// in the direction that also carries it, skip gate. A line that starts a segment meets no earlier state: its logits are
// not used, and its columns begin with the input gate.
#pragma once
#include "vec.h"

namespace GSPN_NS {
namespace {

enum Column { kPrevious, kSame, kNext, kInput, kOutput, kSkip };
constexpr int kLogits = 3;

constexpr double kLog2e = 1.44269504088896340736;
constexpr double kFloor = 28.0 * kLog2e;  // logits are clamped from below at -28: e^28 cubed is finite in float

// What a pixel does to the output (or to the gradient of x): the first direction sets it, which saves clearing it
enum Output { kNone, kSet, kSetWithSkip, kAdd };

// Which of a place's neighbours in the line do not exist
enum Edge { kInside = 0, kFirst = 1, kLast = 2, kOnly = 3 };

template <class V> struct Triple { V previous, same, next; };

// Weights, and 1 - sigmoid of the three logits
template <class V> struct Sigmoids { Triple<V> weights, complement; };

template <class V> GSPN_INLINE V exp_minus(V scaled_logit) {
    return exp2(at_most(scaled_logit, (decltype(scaled_logit[0] + 0))kFloor));
}
template <class V> GSPN_INLINE V one() { return zero<V>() + 1; }

// With E = 1 + e^-a for each logit a, sigmoid is 1/E, and the weights are E_m E_r, E_l E_r and E_l E_m over their sum:
// one reciprocal for all three. A neighbour that does not exist gets E = 1 and weight 0, whatever its logit is.
template <int EDGE, class V> GSPN_INLINE Triple<V> normalised(V el, V em, V er) {
    if constexpr (EDGE == kOnly) return {zero<V>(), em == em ? one<V>() : em, zero<V>()};
    const V wl = em * er, wm = el * er, wr = el * em;
    if constexpr (EDGE == kFirst) {
        const V q = reciprocal(wm + wr);
        return {zero<V>(), wm * q, wr * q};
    } else if constexpr (EDGE == kLast) {
        const V q = reciprocal(wl + wm);
        return {wl * q, wm * q, zero<V>()};
    } else {
        const V q = reciprocal(wl + wm + wr);
        return {wl * q, wm * q, wr * q};
    }
}

template <int EDGE, class A> GSPN_INLINE Triple<VecOf<A>> weights(const A* columns) {
    typedef VecOf<A> V;
    constexpr int L = kLanes<A>;
    const V em = exp_minus(load(columns + kSame * L)) + 1;
    const V el = EDGE & kFirst ? one<V>() : exp_minus(load(columns + kPrevious * L)) + 1;
    const V er = EDGE & kLast ? one<V>() : exp_minus(load(columns + kNext * L)) + 1;
    return normalised<EDGE>(el, em, er);
}

// The same with 1 - sigmoid = e^-a / E, for which one more reciprocal, of E_l E_m E_r, serves all three.
template <int EDGE, class A> GSPN_INLINE Sigmoids<VecOf<A>> sigmoids(const A* columns) {
    typedef VecOf<A> V;
    constexpr int L = kLanes<A>;
    const V am = exp_minus(load(columns + kSame * L));
    const V al = EDGE & kFirst ? zero<V>() : exp_minus(load(columns + kPrevious * L));
    const V ar = EDGE & kLast ? zero<V>() : exp_minus(load(columns + kNext * L));
    const V el = al + 1, em = am + 1, er = ar + 1;
    const V lr = el * er, all = reciprocal(lr * em);
    const V lm = el * em, mr = em * er;
    return {normalised<EDGE>(el, em, er), {al * mr * all, am * lr * all, ar * lm * all}};
}

// Forward. `from` and `to` are the state of the line before and of this line at this place, possibly the same memory;
// `before` is the line before's state at the previous place and moves on.
template <bool START, int EDGE, int OUT, class A>
GSPN_INLINE void forward_pixel(const A* columns, const A* from, A* to, VecOf<A>& before, const A* x, A* out) {
    typedef VecOf<A> V;
    constexpr int L = kLanes<A>, gates = START ? 0 : kLogits * L;
    V h = load(columns + gates) * load(x);
    if constexpr (!START) {
        const Triple<V> w = weights<EDGE>(columns);
        const V same = load(from);
        if constexpr (!(EDGE & kFirst)) h = fma(w.previous, before, h);
        h = fma(w.same, same, h);
        if constexpr (!(EDGE & kLast)) h = fma(w.next, load(from + L), h);
        before = same;
    }
    store(to, h);
    if constexpr (OUT != kNone) {
        V y = load(columns + gates + L) * h;
        if constexpr (OUT == kSetWithSkip) y = fma(load(columns + gates + 2 * L), load(x), y);
        if constexpr (OUT == kAdd) y = y + load(out);
        store(out, y);
    }
}

// Registers that a line's backward walk carries from place to place
template <class V> struct Carried {
    V before;                  // the earlier line's state at the previous place
    V to_previous, to_same;    // what this line has so far passed back to the previous place and to this one
};

// Backward. h is this line's state, `earlier` the line before's. `message` holds the gradient of this line's state that
// the later line has passed back, and is overwritten, one place behind, by what this line passes to the line before.
// Writes the gradients of the columns and adds to (or sets) that of x.
template <bool START, int EDGE, int OUT, class A>
GSPN_INLINE void backward_pixel(
    const A* columns, const A* h, const A* earlier, A* message, Carried<VecOf<A>>& carried, const A* x, const A* dy,
    A* grad_columns, A* dx) {
    typedef VecOf<A> V;
    constexpr int L = kLanes<A>, gates = START ? 0 : kLogits * L;
    const V grad_y = load(dy), value = load(x);
    const V g = fma(load(columns + gates + L), grad_y, load(message));
    if constexpr (START) {
        store(message, zero<V>());
    } else {
        const Sigmoids<V> s = sigmoids<EDGE>(columns);
        const Triple<V>& w = s.weights;
        const V previous = EDGE & kFirst ? zero<V>() : carried.before;
        const V same = load(earlier);
        const V next = EDGE & kLast ? zero<V>() : load(earlier + L);
        V mean = w.same * same;
        if constexpr (!(EDGE & kFirst)) mean = fma(w.previous, previous, mean);
        if constexpr (!(EDGE & kLast)) mean = fma(w.next, next, mean);
        carried.before = same;

        // d w_k / d a_k: the clamped logits have none
        constexpr Acc<A> floor = (Acc<A>)kFloor;
        V dl = g * (previous - mean) * (w.previous * s.complement.previous);
        V dm = g * (same - mean) * (w.same * s.complement.same);
        V dr = g * (next - mean) * (w.next * s.complement.next);
        dl = load(columns + kPrevious * L) > floor ? zero<V>() : dl;
        dm = load(columns + kSame * L) > floor ? zero<V>() : dm;
        dr = load(columns + kNext * L) > floor ? zero<V>() : dr;
        store(grad_columns + kPrevious * L, EDGE & kFirst ? zero<V>() : dl);
        store(grad_columns + kSame * L, EDGE == kOnly ? zero<V>() : dm);
        store(grad_columns + kNext * L, EDGE & kLast ? zero<V>() : dr);

        if constexpr (EDGE & kFirst) carried.to_previous = carried.to_same = zero<V>();
        else store(message - L, fma(w.previous, g, carried.to_previous));
        carried.to_previous = fma(w.same, g, carried.to_same);
        carried.to_same = w.next * g;
        if constexpr (EDGE & kLast) store(message, carried.to_previous);
    }
    store(grad_columns + gates, g * value);
    store(grad_columns + gates + L, load(h) * grad_y);
    V grad_x = g * load(columns + gates);
    if constexpr (OUT == kSetWithSkip) {
        store(grad_columns + gates + 2 * L, value * grad_y);
        grad_x = fma(load(columns + gates + 2 * L), grad_y, grad_x);
    }
    if constexpr (OUT == kAdd) grad_x = grad_x + load(dx);
    store(dx, grad_x);
}

}  // namespace
}  // namespace GSPN_NS
