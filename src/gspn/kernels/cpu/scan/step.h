// One vector of one line, forward and backward. The caller says where the neighbours' values are.
#pragma once
#include "scan/weights.h"

namespace GSPN_NS {
namespace {

// ---- forward: now = w.prev * before[p-1] + w.same * before[p] + w.next * before[p+1] + input ------------------------

template <class S> struct ForwardStep {
    const S *x, *gate;
    const Acc<S>* before[3];  // from the previous, same and next place on; zeros outside the line
    Acc<S>* now;
    S* h;
};

template <bool PARTIAL, bool GATED, class S>
GSPN_INLINE VecOf<S> input_at(const S* x, const S* gate, int64_t i, int n) {
    const VecOf<S> v = load_if<PARTIAL>(x + i, n);
    if constexpr (GATED) return v * load_if<PARTIAL>(gate + i, n);
    return v;
}

template <bool PARTIAL, bool GATED, class S>
GSPN_INLINE void step_forward(const ForwardStep<S>& p, Triple<VecOf<S>> w, int64_t i, int n) {
    VecOf<S> h = input_at<PARTIAL, GATED>(p.x, p.gate, i, n);
    h = fma(w.prev, load_if<PARTIAL>(p.before[0] + i, n), h);
    h = fma(w.same, load_if<PARTIAL>(p.before[1] + i, n), h);
    h = fma(w.next, load_if<PARTIAL>(p.before[2] + i, n), h);
    store_if<PARTIAL>(p.now + i, h, n);
    store_if<PARTIAL>(p.h + i, h, n);
}

// The first line of a segment: there is no line before it, and its weights are not read.
template <bool PARTIAL, bool GATED, class S> GSPN_INLINE void start_forward(const ForwardStep<S>& p, int64_t i, int n) {
    const VecOf<S> h = input_at<PARTIAL, GATED>(p.x, p.gate, i, n);
    store_if<PARTIAL>(p.now + i, h, n);
    store_if<PARTIAL>(p.h + i, h, n);
}

// ---- backward: g = grad_h + what the line after sends back; g goes on to the line before, times the weights ---------

template <class S, class H, class DX> struct BackwardStep {
    const S *x, *gate, *grad_h;
    const H* before[3];         // from the previous, same and next place on
    const Acc<S>* received[3];  // messages from the next, same and previous place of the line after; zeros outside it
    Acc<S>* sent[3];            // messages: w.prev * g, w.same * g, w.next * g
    S* dgate;
    DX* dx;
    bool add_dx;
};

template <bool PARTIAL, bool GATED, class S, class H, class DX>
GSPN_INLINE VecOf<S> input_gradients(const BackwardStep<S, H, DX>& p, int64_t i, int n) {
    typedef VecOf<S> V;
    V g = load_if<PARTIAL>(p.grad_h + i, n);
    for (const Acc<S>* received : p.received) g = g + load_if<PARTIAL>(received + i, n);
    V dx = g;
    if constexpr (GATED) {
        dx = g * load_if<PARTIAL>(p.gate + i, n);
        store_if<PARTIAL>(p.dgate + i, g * load_if<PARTIAL>(p.x + i, n), n);
    }
    if (p.add_dx) dx = dx + load_if<PARTIAL>(p.dx + i, n);
    store_if<PARTIAL>(p.dx + i, dx, n);
    return g;
}

// Returns the gradients of the three weights.
template <bool PARTIAL, bool GATED, class S, class H, class DX, class E>
GSPN_INLINE Triple<VecOf<S>> step_backward(
    const BackwardStep<S, H, DX>& p, Triple<VecOf<S>> w, const E& edges, int64_t i, int n) {
    const VecOf<S> g = input_gradients<PARTIAL, GATED>(p, i, n);
    store_if<PARTIAL>(p.sent[0] + i, w.prev * g, n);
    store_if<PARTIAL>(p.sent[1] + i, w.same * g, n);
    store_if<PARTIAL>(p.sent[2] + i, w.next * g, n);
    const Triple<VecOf<S>> h = keep_existing(load_triple<PARTIAL>(p.before, i, n), edges);
    return {g * h.prev, g * h.same, g * h.next};
}

}  // namespace
}  // namespace GSPN_NS
