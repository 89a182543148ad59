// What happens at one pixel, for one block of channels, in one direction: the new state and the output going forward,
// the gradients going back. Everything is a vector of channels; lines are scanned place by place, and what neighbouring
// places share is carried in registers.
//
// Projected maps of a pixel come as columns: prev, same, next (logits times -log2 e), input gate, output gate and,
// in the direction that also carries it, skip gate. A line that starts a segment meets no earlier state: its logits are
// not used, and its columns begin with the input gate.
#pragma once
#include "common.h"

namespace GSPN_NS {
namespace {

enum Column { kPrev, kSame, kNext, kInput, kOutput, kSkip };

// What a pixel does to the output (or to the gradient of x): the first direction sets it, which saves clearing it
enum Output { kNone, kSet, kSetWithSkip, kAdd };

template <class A> GSPN_INLINE Triple<VecOf<A>> load_logits(const A* columns) {
    constexpr int L = kLanes<A>;
    return {load(columns + kPrev * L), load(columns + kSame * L), load(columns + kNext * L)};
}

// Forward. `before` and `now` are the states of the line before and of this line at this place, possibly the same
// memory; `prev` is the line before's state at the previous place and moves on.
template <bool START, int END, int OUT, class A>
GSPN_INLINE void forward_pixel(
    const A* columns, const A* before, A* now, VecOf<A>& prev, VecOf<A> center, const A* x, A* out) {
    typedef VecOf<A> V;
    constexpr int L = kLanes<A>, gates = START ? 0 : kNeighbours * L;
    V h = load(columns + gates) * load(x);
    if constexpr (!START) {
        h = h - center;
        const Triple<V> w = normalise(load_logits(columns), AtEnd<END>{}).weights;
        const V same = load(before);
        if constexpr (!(END & kFirst)) h = fma(w.prev, prev, h);
        h = fma(w.same, same, h);
        if constexpr (!(END & kLast)) h = fma(w.next, load(before + L), h);
        prev = same;
    }
    store(now, h);
    if constexpr (OUT != kNone) {
        V y = load(columns + gates + L) * h;
        if constexpr (OUT == kSetWithSkip) y = fma(load(columns + gates + 2 * L), load(x), y);
        if constexpr (OUT == kAdd) y = y + load(out);
        store(out, y);
    }
}

// Registers that a line's backward scan carries from place to place
template <class V> struct Carried {
    V prev;              // the state of the line before at the previous place
    V to_prev, to_same;  // the messages so far of this line to the previous place and to this one
    V sum;               // of the gradients of the gated inputs, which center is taken from
};

// Backward. `message` holds what the line after has sent to this place, and is overwritten, one place behind, by what
// this line sends to the line before. Writes the gradients of the columns and adds to (or sets) that of x.
template <bool START, int END, int OUT, class A>
GSPN_INLINE void backward_pixel(
    const A* columns, const A* now, const A* before, A* message, Carried<VecOf<A>>& carried, const A* x,
    const A* grad_y, A* dcolumns, A* dx) {
    typedef VecOf<A> V;
    constexpr int L = kLanes<A>, gates = START ? 0 : kNeighbours * L;
    const V dy = load(grad_y), value = load(x);
    const V g = fma(load(columns + gates + L), dy, load(message));
    if constexpr (START) {
        store(message, V{});
    } else {
        constexpr AtEnd<END> end;
        const Triple<V> logits = load_logits(columns);
        const Normalised<V> n = normalise(logits, end);
        const Triple<V>&w = n.weights, &product = n.products;
        const V r = reciprocal(product.same * n.denominators.same);  // so that product * r = sigmoid
        const V prev = end.keep_prev(carried.prev);
        const V same = load(before);
        const V next = END & kLast ? V{} : load(before + L);
        V mean = w.same * same;
        if constexpr (!(END & kFirst)) mean = fma(w.prev, prev, mean);
        if constexpr (!(END & kLast)) mean = fma(w.next, next, mean);
        carried.prev = same;
        carried.sum = carried.sum + g;

        // d w_k / d a_k = w_k (1 - sigmoid(a_k)): the clamped logits have none
        constexpr A highest = A(-kLowestLogit * kLog2e);
        V dprev = g * (prev - mean) * (w.prev * (n.decays.prev * product.prev * r));
        V dsame = g * (same - mean) * (w.same * (n.decays.same * product.same * r));
        V dnext = g * (next - mean) * (w.next * (n.decays.next * product.next * r));
        dprev = logits.prev > highest ? V{} : dprev;
        dsame = logits.same > highest ? V{} : dsame;
        dnext = logits.next > highest ? V{} : dnext;
        store(dcolumns + kPrev * L, end.keep_prev(dprev));
        store(dcolumns + kSame * L, end.unless_alone(dsame, V{}));
        store(dcolumns + kNext * L, end.keep_next(dnext));

        if constexpr (END & kFirst) carried.to_prev = carried.to_same = V{};
        else store(message - L, fma(w.prev, g, carried.to_prev));
        carried.to_prev = fma(w.same, g, carried.to_same);
        carried.to_same = w.next * g;
        if constexpr (END & kLast) store(message, carried.to_prev);
    }
    store(dcolumns + gates, g * value);
    store(dcolumns + gates + L, load(now) * dy);
    V dvalue = g * load(columns + gates);
    if constexpr (OUT == kSetWithSkip) {
        store(dcolumns + gates + 2 * L, value * dy);
        dvalue = fma(load(columns + gates + 2 * L), dy, dvalue);
    }
    if constexpr (OUT == kAdd) dvalue = dvalue + load(dx);
    store(dx, dvalue);
}

}  // namespace
}  // namespace GSPN_NS
