// What happens at one pixel, for one block of channels, in one direction: the new state and the output going forward,
// the gradients going back. Everything is a vector of channels; lines are scanned place by place, and what neighbouring
// places share is carried in registers.
//
// Projected maps of a pixel come as columns: prev, same, next (logits times -log2 e), input gate, output gate and,
// in the direction that also carries it, skip gate. The columns begin with the input gate in a line that starts a
// segment, which meets no earlier state, and where all channels share their weights (propagate/shared.h).
#pragma once
#include "common.h"

namespace GSPN_NS {
namespace {

enum Column { kPrev, kSame, kNext, kInput, kOutput, kSkip };
constexpr int kMostColumns = kSkip + 1;

// Where a line's weights come from: nowhere, since it starts a segment; from the columns of each channel, exactly or
// roughly; from SharedLine
enum Weights { kNoWeights, kChannelWeights, kRoughWeights, kSharedWeights };
constexpr int logit_columns(int weights) {
    return weights == kChannelWeights || weights == kRoughWeights ? kNeighbours : 0;
}

// What a pixel does to the output (or to the gradient of x): the first direction sets it, which saves clearing it
enum Output { kNone, kSet, kSetWithSkip, kAdd };

template <class A> GSPN_INLINE Triple<VecOf<A>> load_logits(const A* columns) {
    constexpr int L = kLanes<A>;
    return {load(columns + kPrev * L), load(columns + kSame * L), load(columns + kNext * L)};
}

// The weights of a line that all channels share, ready for use: elements between two places and two neighbours
template <class A> struct SharedLine {
    const A* weights;
    int64_t place, neighbour;

    GSPN_INLINE_MEMBER SharedLine from(int64_t p) const { return {weights + p * place, place, neighbour}; }
    GSPN_INLINE_MEMBER Triple<VecOf<A>> load() const {
        return {broadcast(weights[0]), broadcast(weights[neighbour]), broadcast(weights[2 * neighbour])};
    }
};

// Forward. `before` and `now` are the states of the line before and of this line at this place, possibly the same
// memory; `prev` is the line before's state at the previous place and moves on.
template <int WEIGHTS, int END, int OUT, class A>
GSPN_INLINE void forward_pixel(
    const A* columns, const SharedLine<A>& shared, const A* before, A* now, VecOf<A>& prev, VecOf<A> center, const A* x,
    A* out) {
    typedef VecOf<A> V;
    constexpr int L = kLanes<A>, gates = logit_columns(WEIGHTS) * L;
    V h = load(columns + gates) * load(x);
    if constexpr (WEIGHTS != kNoWeights) {
        h = h - center;
        Triple<V> w;
        if constexpr (WEIGHTS == kSharedWeights) w = shared.load();
        else w = normalise<WEIGHTS == kRoughWeights>(load_logits(columns), AtEnd<END>{}).weights;
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

// The weights of a pixel and, out of the gradient g of the gated input and the states of the line before, the gradients
// of its logits
template <int END, class A>
GSPN_INLINE Triple<VecOf<A>> channel_weights_back(const A* columns, VecOf<A> g, Triple<VecOf<A>> states, A* dcolumns) {
    typedef VecOf<A> V;
    constexpr int L = kLanes<A>;
    constexpr AtEnd<END> end;
    const Triple<V> logits = load_logits(columns);
    const Normalised<V> n = normalise(logits, end);
    const Triple<V>&w = n.weights, &product = n.products;
    const V r = reciprocal(product.same * n.denominators.same);  // so that product * r = sigmoid
    V mean = w.same * states.same;
    if constexpr (!(END & kFirst)) mean = fma(w.prev, states.prev, mean);
    if constexpr (!(END & kLast)) mean = fma(w.next, states.next, mean);

    // d w_k / d a_k = w_k (1 - sigmoid(a_k)): the clamped logits have none
    constexpr A highest = A(-kLowestLogit * kLog2e);
    V dprev = g * (states.prev - mean) * (w.prev * (n.decays.prev * product.prev * r));
    V dsame = g * (states.same - mean) * (w.same * (n.decays.same * product.same * r));
    V dnext = g * (states.next - mean) * (w.next * (n.decays.next * product.next * r));
    dprev = logits.prev > highest ? V{} : dprev;
    dsame = logits.same > highest ? V{} : dsame;
    dnext = logits.next > highest ? V{} : dnext;
    store(dcolumns + kPrev * L, end.keep_prev(dprev));
    store(dcolumns + kSame * L, end.unless_alone(dsame, V{}));
    store(dcolumns + kNext * L, end.keep_next(dnext));
    return w;
}

// What the gradients of shared weights are made of: of every channel g (states.prev - states.same), and likewise for
// next. Neighbouring states are much alike: sums of these differences lose less than differences of sums would.
template <class A> struct Differences {
    A *prev, *next;
    GSPN_INLINE_MEMBER Differences from(int64_t at) const { return {prev + at, next + at}; }
};

// Backward. `message` holds what the line after has sent to this place, and is overwritten, one place behind, by what
// this line sends to the line before. Writes the gradients of the columns, or differences, and adds to (or sets) that
// of x.
template <int WEIGHTS, int END, int OUT, class A>
GSPN_INLINE void backward_pixel(
    const A* columns, const SharedLine<A>& shared, const A* now, const A* before, A* message,
    Carried<VecOf<A>>& carried, const A* x, const A* grad_y, A* dcolumns, const Differences<A>& differences, A* dx) {
    typedef VecOf<A> V;
    constexpr int L = kLanes<A>, gates = logit_columns(WEIGHTS) * L;
    const V dy = load(grad_y), value = load(x);
    const V g = fma(load(columns + gates + L), dy, load(message));
    if constexpr (WEIGHTS == kNoWeights) {
        store(message, V{});
    } else {
        constexpr AtEnd<END> end;
        const V prev = end.keep_prev(carried.prev);
        const V same = load(before);
        const V next = END & kLast ? V{} : load(before + L);
        Triple<V> w;
        if constexpr (WEIGHTS == kChannelWeights) {
            w = channel_weights_back<END>(columns, g, Triple<V>{prev, same, next}, dcolumns);
        } else {
            w = shared.load();
            store(differences.prev, end.keep_prev(g * (prev - same)));
            store(differences.next, end.keep_next(g * (next - same)));
        }
        carried.prev = same;
        carried.sum = carried.sum + g;
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
