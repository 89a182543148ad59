// The channels of a place are contiguous (channels last): vectors hold channels, in any direction of the scan.
//
// The state of a line is a contiguous (place, channel) array in scratch, with a place of zeros at either end.
#pragma once
#include "scan/fields.h"
#include "scan/step.h"

namespace GSPN_NS {
namespace {

constexpr int64_t kPlacesAhead = 3;  // to prefetch

// Elements of scratch: prepared weights and their gradients (shared), then two states, or backward six messages.
template <class S> GSPN_INLINE int64_t runs_scratch(int64_t places, int64_t channels, bool backward) {
    return 6 * (places + kLanes<S>)+(backward ? 6 : 2) * (places + 2) * channels;
}

// A line of the raw weights of one group, whatever its stride.
template <class S, class W>
void gather_weights(const WeightField<const W>& f, int64_t line, int64_t places, Acc<S>* const* raw) {
    for (int k = 0; k < 3; k++) gather(f.data[k] + line * f.line, f.place, places, raw[k]);
}

template <Form FORM, class S> void form_in_place(Acc<S>* const* weights, int64_t places) {
    for_each_vector<kLanes<S>>(places, [&](auto careful, int64_t i, int n) {
        constexpr bool C = decltype(careful)::value;
        const auto edges = edges_of_places<C, VecOf<S>>(i, places);
        store_triple<C>(weights, i, form_weights<FORM>(load_triple<C>(weights, i, n), edges), n);
    });
}

template <class S> GSPN_INLINE Triple<VecOf<S>> broadcast_weights(Acc<S>* const* weights, int64_t place) {
    return {broadcast(weights[0][place]), broadcast(weights[1][place]), broadcast(weights[2][place])};
}

// Calls body(careful, i, n) for each vector of a run of channels, careful at the ends of the line and for what is left.
template <int LANES, class Body> GSPN_INLINE void for_each_run_vector(bool at_end, int64_t channels, Body body) {
    int64_t i = 0;
    if (!at_end)
        for (; i + LANES <= channels; i += LANES) body(No{}, i, LANES);
    for (; i < channels; i += LANES) body(Yes{}, i, int(min(LANES, channels - i)));
}

// ---- forward -------------------------------------------------------------------------------------------------------

// One place of one line.
template <Form FORM, bool GATED, class S, class W, class DX, class DW>
void run_forward(
    const Fields<S, W, DX, DW>& f, const ForwardStep<S>& p, const W* const* weights, Edges<VecOf<S>> edges, bool at_end,
    int64_t channels) {
    for_each_run_vector<kLanes<S>>(at_end, channels, [&](auto careful, int64_t i, int n) {
        constexpr bool C = decltype(careful)::value;
        prefetch(p.x + i + kPlacesAhead * f.x.place);
        if (GATED) prefetch(p.gate + i + kPlacesAhead * f.gate.place);
        for (int k = 0; k < 3; k++) prefetch(weights[k] + i + kPlacesAhead * f.weights.place);
        prefetch_write(p.h + i + kPlacesAhead * f.h.place);
        step_forward<C, GATED>(p, form_weights<FORM>(load_triple<C>(weights, i, n), edges_if<C>(edges)), i, n);
    });
}

template <Form FORM, bool SHARED, class S, class W, class DX, class DW>
void runs_forward(const Geometry& g, Fields<S, W, DX, DW> f, Acc<S>* scratch) {
    typedef Acc<S> A;
    constexpr bool GATED = FORM == kLogits;
    const int64_t n = f.channels, row = g.places + kLanes<S>, pitch = (g.places + 2) * n;
    A* prepared[3] = {scratch, scratch + row, scratch + 2 * row};
    A* states = scratch + 6 * row;
    fill_zero(states, 2 * pitch);
    for (int64_t t = 0; t < g.lines; t++) {
        const bool start = g.starts_segment(t);
        const A* before = states + (t & 1) * pitch + n;
        A* now = states + (1 - (t & 1)) * pitch + n;
        if (SHARED && !start) {
            gather_weights<S>(f.weights, t, g.places, prepared);
            form_in_place<FORM, S>(prepared, g.places);
        }
        for (int64_t place = 0; place < g.places; place++) {
            const A* same = before + place * n;
            const ForwardStep<S> p = {
                f.x.data + t * f.x.line + place * f.x.place,
                GATED ? f.gate.data + t * f.gate.line + place * f.gate.place : nullptr,
                {same - n, same, same + n},
                now + place * n,
                f.h.data + t * f.h.line + place * f.h.place};
            if (start) {
                for_each_run_vector<kLanes<S>>(false, n, [&](auto careful, int64_t i, int k) {
                    start_forward<decltype(careful)::value, GATED>(p, i, k);
                });
            } else if constexpr (SHARED) {
                const auto w = broadcast_weights<S>(prepared, place);
                for_each_run_vector<kLanes<S>>(false, n, [&](auto careful, int64_t i, int k) {
                    step_forward<decltype(careful)::value, GATED>(p, w, i, k);
                });
            } else {
                const auto edges = edges_of_place<VecOf<S>>(place, g.places);
                const int64_t o = t * f.weights.line + place * f.weights.place;
                const W* weights[3] = {f.weights.data[0] + o, f.weights.data[1] + o, f.weights.data[2] + o};
                run_forward<FORM, GATED>(f, p, weights, edges, place == 0 || place == g.places - 1, n);
            }
        }
    }
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <Form FORM, bool GATED, class S, class W, class DX, class DW>
void run_backward(
    const Fields<S, W, DX, DW>& f, const BackwardStep<S, S, DX>& p, const W* const* weights, DW* const* dweights,
    Edges<VecOf<S>> edges, bool at_end, int64_t channels) {
    for_each_run_vector<kLanes<S>>(at_end, channels, [&](auto careful, int64_t i, int n) {
        constexpr bool C = decltype(careful)::value;
        prefetch(p.grad_h + i + kPlacesAhead * f.grad_h.place);
        prefetch(p.before[1] + i + kPlacesAhead * f.h.place);
        prefetch_write(p.dx + i + kPlacesAhead * f.dx.place);
        if (GATED) {
            prefetch(p.x + i + kPlacesAhead * f.x.place);
            prefetch(p.gate + i + kPlacesAhead * f.gate.place);
            prefetch_write(p.dgate + i + kPlacesAhead * f.dgate.place);
        }
        for (int k = 0; k < 3; k++) {
            prefetch(weights[k] + i + kPlacesAhead * f.weights.place);
            prefetch_write(dweights[k] + i + kPlacesAhead * f.dweights.place);
        }
        const auto here = edges_if<C>(edges);
        const auto slopes = form_slopes<FORM>(load_triple<C>(weights, i, n), here);
        const auto dw = step_backward<C, GATED>(p, slopes.weights, here, i, n);
        store_triple<C>(dweights, i, weight_gradient<FORM>(dw, slopes, here), n);
    });
}

// The same with the weights of a group; its channels' weight gradients are summed at `place`.
template <bool GATED, class S, class DX>
void shared_run_backward(
    const BackwardStep<S, S, DX>& p, Acc<S>* const* prepared, Acc<S>* const* sums, Edges<VecOf<S>> edges, bool at_end,
    int64_t place, int64_t channels) {
    const auto w = broadcast_weights<S>(prepared, place);
    Triple<VecOf<S>> sum{};
    for_each_run_vector<kLanes<S>>(at_end, channels, [&](auto careful, int64_t i, int n) {
        constexpr bool C = decltype(careful)::value;
        sum = sum + step_backward<C, GATED>(p, w, edges_if<C>(edges), i, n);
    });
    sums[0][place] = sum_lanes(sum.prev);
    sums[1][place] = sum_lanes(sum.same);
    sums[2][place] = sum_lanes(sum.next);
}

// Adds the sums to those of earlier channels, and after the last channel makes gradients of the raw weights of them.
template <Form FORM, class S, class W, class DX, class DW>
void finish_run_line(
    const Geometry& g, const Fields<S, W, DX, DW>& f, int64_t t, bool start, Acc<S>* const* sums, Acc<S>* const* raw) {
    const int64_t o = t * f.dweights.line;
    if (start) {
        for (int k = 0; k < 3; k++) fill_zero(sums[k], g.places);
    } else {
        for (int64_t i = 0; f.add_dweights && i < g.places; i++)
            for (int k = 0; k < 3; k++) sums[k][i] += load_one(f.dweights.data[k] + o + i * f.dweights.place);
        if (f.finish_dweights) {
            gather_weights<S>(f.weights, t, g.places, raw);
            for_each_vector<kLanes<S>>(g.places, [&](auto careful, int64_t i, int n) {
                constexpr bool C = decltype(careful)::value;
                const auto edges = edges_of_places<C, VecOf<S>>(i, g.places);
                const auto slopes = form_slopes<FORM>(load_triple<C>(raw, i, n), edges);
                store_triple<C>(sums, i, weight_gradient<FORM>(load_triple<C>(sums, i, n), slopes, edges), n);
            });
        }
    }
    for (int k = 0; k < 3; k++) scatter(sums[k], g.places, f.dweights.data[k] + o, f.dweights.place);
}

template <class S, class DW> void zero_run(DW* const* dweights, int64_t channels) {
    for (int k = 0; k < 3; k++)
        for_each_run_vector<kLanes<S>>(false, channels, [&](auto careful, int64_t i, int n) {
            store_if<decltype(careful)::value>(dweights[k] + i, VecOf<S>{}, n);
        });
}

template <Form FORM, bool SHARED, class S, class W, class DX, class DW>
void runs_backward(const Geometry& g, Fields<S, W, DX, DW> f, Acc<S>* scratch) {
    typedef Acc<S> A;
    constexpr bool GATED = FORM == kLogits;
    const int64_t n = f.channels, row = g.places + kLanes<S>, pitch = (g.places + 2) * n;
    A* prepared[3] = {scratch, scratch + row, scratch + 2 * row};
    A* sums[3] = {scratch + 3 * row, scratch + 4 * row, scratch + 5 * row};
    A* messages = scratch + 6 * row;
    fill_zero(messages, 6 * pitch);
    for (int64_t t = g.lines - 1; t >= 0; t--) {
        const bool start = g.starts_segment(t), last = g.ends_segment(t);
        A* received = messages + 3 * (t & 1) * pitch + n;
        A* sent = messages + 3 * (1 - (t & 1)) * pitch + n;
        if (last)
            for (int k = 0; k < 3; k++) fill_zero(received + k * pitch, g.places * n);
        if (SHARED && !start) {
            gather_weights<S>(f.weights, t, g.places, prepared);
            form_in_place<FORM, S>(prepared, g.places);
        }
        for (int64_t place = 0; place < g.places; place++) {
            const int64_t here = place * n, o = t * f.weights.line + place * f.weights.place;
            const int64_t dw = t * f.dweights.line + place * f.dweights.place;
            const W* weights[3] = {f.weights.data[0] + o, f.weights.data[1] + o, f.weights.data[2] + o};
            DW* dweights[3] = {f.dweights.data[0] + dw, f.dweights.data[1] + dw, f.dweights.data[2] + dw};
            // What lies beyond the ends of the line is not read.
            const S* before = f.h.data + (start ? t : t - 1) * f.h.line + place * f.h.place;
            const BackwardStep<S, S, DX> p = {
                GATED ? f.x.data + t * f.x.line + place * f.x.place : nullptr,
                GATED ? f.gate.data + t * f.gate.line + place * f.gate.place : nullptr,
                f.grad_h.data + t * f.grad_h.line + place * f.grad_h.place,
                {place > 0 ? before - f.h.place : before, before, place < g.places - 1 ? before + f.h.place : before},
                {received + here + n, received + pitch + here, received + 2 * pitch + here - n},
                {sent + here, sent + pitch + here, sent + 2 * pitch + here},
                GATED ? f.dgate.data + t * f.dgate.line + place * f.dgate.place : nullptr,
                f.dx.data + t * f.dx.line + place * f.dx.place,
                f.add_dx};
            const auto edges = edges_of_place<VecOf<S>>(place, g.places);
            const bool at_end = place == 0 || place == g.places - 1;
            if (start) {
                for_each_run_vector<kLanes<S>>(false, n, [&](auto careful, int64_t i, int k) {
                    input_gradients<decltype(careful)::value, GATED>(p, i, k);
                });
                if (!SHARED) zero_run<S>(dweights, n);
            } else if constexpr (SHARED) {
                shared_run_backward<GATED>(p, prepared, sums, edges, at_end, place, n);
            } else {
                run_backward<FORM, GATED>(f, p, weights, dweights, edges, at_end, n);
            }
        }
        if (SHARED) finish_run_line<FORM>(g, f, t, start, sums, prepared);
    }
}

}  // namespace
}  // namespace GSPN_NS
