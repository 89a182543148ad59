// Lines are contiguous in memory (rows of a channels-first map, scanned down or up): vectors hold neighbouring places.
//
// The state of a line lives in scratch, in the state's type, between zeros that stand for the missing neighbours.
// Channels that share weights advance together, so that a line's weights are formed once for all of them.
#pragma once
#include "scan/fields.h"
#include "scan/step.h"

namespace GSPN_NS {
namespace {

// Lines this far ahead (in bytes) are prefetched: the hardware does not follow nine streams.
constexpr int64_t kPrefetchBytes = 2048;

template <class S> GSPN_INLINE int64_t row_pitch(int64_t places) { return round_up(places, kLanes<S>) + 2 * kLanes<S>; }
template <class S> GSPN_INLINE int64_t lines_ahead(int64_t places) {
    return max(1, kPrefetchBytes / int64_t(sizeof(S)) / places);
}

// Elements of scratch: prepared weights, then per channel two states, or backward seven lines.
template <class S> GSPN_INLINE int64_t rows_scratch(int64_t places, int64_t channels, bool backward) {
    return row_pitch<S>(places) * (3 + (backward ? 7 : 2) * channels) + kLanes<S>;
}

template <Form FORM, class S, class W>
void prepare_row(const WeightField<const W>& weights, int64_t line, int64_t places, Acc<S>* const* prepared) {
    const W* raw[3] = {weights.data[0] + line, weights.data[1] + line, weights.data[2] + line};
    for_each_vector<kLanes<S>>(places, [&](auto careful, int64_t i, int n) {
        constexpr bool C = decltype(careful)::value;
        const auto edges = edges_of_places<C, VecOf<S>>(i, places);
        store_triple<C>(prepared, i, form_weights<FORM>(load_triple<C>(raw, i, n), edges), n);
    });
}

// ---- forward -------------------------------------------------------------------------------------------------------

struct ForwardAhead {  // what to prefetch for each element, in elements
    int64_t x, gate, weights, h;
};

template <Form FORM, bool GATED, class S, class W>
void row_forward(const ForwardStep<S>& p, const W* const* weights, int64_t places, const ForwardAhead& ahead) {
    for_each_vector<kLanes<S>>(places, [&](auto careful, int64_t i, int n) {
        constexpr bool C = decltype(careful)::value;
        prefetch(p.x + i + ahead.x);
        if (GATED) prefetch(p.gate + i + ahead.gate);
        if (FORM != kPrepared)
            for (int k = 0; k < 3; k++) prefetch(weights[k] + i + ahead.weights);
        prefetch_write(p.h + i + ahead.h);
        const auto raw = load_triple<C>(weights, i, n);
        step_forward<C, GATED>(p, form_weights<FORM>(raw, edges_of_places<C, VecOf<S>>(i, places)), i, n);
    });
}

template <bool GATED, class S> void row_start(const ForwardStep<S>& p, int64_t places) {
    for_each_vector<kLanes<S>>(
        places, [&](auto careful, int64_t i, int n) { start_forward<decltype(careful)::value, GATED>(p, i, n); });
}

// FORM: how the weights are given. Several channels share them if SHARED; otherwise there is one channel.
template <Form FORM, bool SHARED, class S, class W, class DX, class DW>
void rows_forward(const Geometry& g, Fields<S, W, DX, DW> f, Acc<S>* scratch) {
    typedef Acc<S> A;
    constexpr bool GATED = FORM == kLogits;
    const int64_t pitch = row_pitch<S>(g.places), soon = lines_ahead<S>(g.places);
    A* prepared[3] = {scratch, scratch + pitch, scratch + 2 * pitch};
    A* states = scratch + (SHARED ? 3 * pitch : 0) + kLanes<S>;
    fill_zero(states - kLanes<S>, 2 * pitch * f.channels);
    const ForwardAhead ahead = {soon * f.x.line, soon * f.gate.line, soon * f.weights.line, soon * f.h.line};
    for (int64_t t = 0; t < g.lines; t++) {
        const bool start = g.starts_segment(t);
        if (SHARED && !start) prepare_row<FORM, S>(f.weights, t * f.weights.line, g.places, prepared);
        for (int64_t c = 0; c < f.channels; c++) {
            A* before = states + (2 * c + (t & 1)) * pitch;
            A* now = states + (2 * c + 1 - (t & 1)) * pitch;
            const ForwardStep<S> p = {
                f.x.data + c * f.x.channel + t * f.x.line,
                GATED ? f.gate.data + c * f.gate.channel + t * f.gate.line : nullptr,
                {before - 1, before, before + 1},
                now,
                f.h.data + c * f.h.channel + t * f.h.line};
            if (start) {
                row_start<GATED>(p, g.places);
            } else if constexpr (SHARED) {
                row_forward<kPrepared, GATED>(p, prepared, g.places, ahead);
            } else {
                const int64_t o = t * f.weights.line;
                const W* weights[3] = {f.weights.data[0] + o, f.weights.data[1] + o, f.weights.data[2] + o};
                row_forward<FORM, GATED>(p, weights, g.places, ahead);
            }
        }
    }
}

// ---- backward ------------------------------------------------------------------------------------------------------

struct BackwardAhead {
    int64_t x, gate, weights, grad_h, dx, dgate, dweights;
};

// One line of one channel. Shared weights come prepared, and their gradients are summed in dweights.
template <Form FORM, bool GATED, class S, class W, class DX, class DW>
void row_backward(
    const BackwardStep<S, Acc<S>, DX>& p, const W* const* weights, DW* const* dweights, bool add_dweights,
    int64_t places, const BackwardAhead& ahead) {
    for_each_vector<kLanes<S>>(places, [&](auto careful, int64_t i, int n) {
        constexpr bool C = decltype(careful)::value;
        prefetch(p.grad_h + i + ahead.grad_h);
        prefetch_write(p.dx + i + ahead.dx);
        if (GATED) {
            prefetch(p.x + i + ahead.x);
            prefetch(p.gate + i + ahead.gate);
            prefetch_write(p.dgate + i + ahead.dgate);
        }
        if (FORM != kPrepared)
            for (int k = 0; k < 3; k++) {
                prefetch(weights[k] + i + ahead.weights);
                prefetch_write(dweights[k] + i + ahead.dweights);
            }
        const auto edges = edges_of_places<C, VecOf<S>>(i, places);
        const auto slopes = form_slopes<FORM>(load_triple<C>(weights, i, n), edges);
        auto dw = step_backward<C, GATED>(p, slopes.weights, edges, i, n);
        if constexpr (FORM != kPrepared) {
            dw = weight_gradient<FORM>(dw, slopes, edges);
        } else if (add_dweights) {
            dw = load_triple<C>(dweights, i, n) + dw;
        }
        store_triple<C>(dweights, i, dw, n);
    });
}

template <bool GATED, class S, class DX> void row_start_backward(const BackwardStep<S, Acc<S>, DX>& p, int64_t places) {
    for_each_vector<kLanes<S>>(
        places, [&](auto careful, int64_t i, int n) { input_gradients<decltype(careful)::value, GATED>(p, i, n); });
}

template <class S, class DW> void zero_row(DW* const* rows, int64_t places) {
    for (int k = 0; k < 3; k++)
        for_each_vector<kLanes<S>>(places, [&](auto careful, int64_t i, int n) {
            store_if<decltype(careful)::value>(rows[k] + i, VecOf<S>{}, n);
        });
}

// Copies the line before to where the neighbours of its ends read as 0.
template <class S> void stage_row(const S* h, Acc<S>* staged, int64_t places, int64_t ahead) {
    for_each_vector<kLanes<S>>(places, [&](auto careful, int64_t i, int n) {
        prefetch(h + i + ahead);
        store_if<decltype(careful)::value>(staged + i, load_if<decltype(careful)::value>(h + i, n), n);
    });
}

// What the gradients of shared weights, summed over the channels, are for the raw weights.
template <Form FORM, class S, class W, class DW>
void finish_row(const W* const* raw, DW* const* dweights, int64_t places) {
    for_each_vector<kLanes<S>>(places, [&](auto careful, int64_t i, int n) {
        constexpr bool C = decltype(careful)::value;
        const auto edges = edges_of_places<C, VecOf<S>>(i, places);
        const auto slopes = form_slopes<FORM>(load_triple<C>(raw, i, n), edges);
        store_triple<C>(dweights, i, weight_gradient<FORM>(load_triple<C>(dweights, i, n), slopes, edges), n);
    });
}

template <Form FORM, bool SHARED, class S, class W, class DX, class DW>
void rows_backward(const Geometry& g, Fields<S, W, DX, DW> f, Acc<S>* scratch) {
    typedef Acc<S> A;
    constexpr bool GATED = FORM == kLogits;
    const int64_t pitch = row_pitch<S>(g.places), back = -lines_ahead<S>(g.places);
    A* prepared[3] = {scratch, scratch + pitch, scratch + 2 * pitch};
    A* lines = scratch + (SHARED ? 3 * pitch : 0) + kLanes<S>;
    fill_zero(lines - kLanes<S>, 7 * pitch * f.channels);
    const BackwardAhead ahead = {back * f.x.line,  back * f.gate.line,  back * f.weights.line, back * f.grad_h.line,
                                 back * f.dx.line, back * f.dgate.line, back * f.dweights.line};
    for (int64_t t = g.lines - 1; t >= 0; t--) {
        const bool start = g.starts_segment(t), last = g.ends_segment(t);
        const int64_t o = t * f.weights.line, dw = t * f.dweights.line;
        const W* raw[3] = {f.weights.data[0] + o, f.weights.data[1] + o, f.weights.data[2] + o};
        DW* dweights[3] = {f.dweights.data[0] + dw, f.dweights.data[1] + dw, f.dweights.data[2] + dw};
        if (SHARED && !start) prepare_row<FORM, S>(f.weights, o, g.places, prepared);
        for (int64_t c = 0; c < f.channels; c++) {
            A* staged = lines + 7 * c * pitch;
            A* received = staged + (1 + 3 * (t & 1)) * pitch;
            A* sent = staged + (4 - 3 * (t & 1)) * pitch;
            if (last)
                for (int k = 0; k < 3; k++) fill_zero(received + k * pitch, g.places);
            const BackwardStep<S, A, DX> p = {
                GATED ? f.x.data + c * f.x.channel + t * f.x.line : nullptr,
                GATED ? f.gate.data + c * f.gate.channel + t * f.gate.line : nullptr,
                f.grad_h.data + c * f.grad_h.channel + t * f.grad_h.line,
                {staged - 1, staged, staged + 1},
                {received + 1, received + pitch, received + 2 * pitch - 1},
                {sent, sent + pitch, sent + 2 * pitch},
                GATED ? f.dgate.data + c * f.dgate.channel + t * f.dgate.line : nullptr,
                f.dx.data + c * f.dx.channel + t * f.dx.line,
                f.add_dx};
            if (start) {
                row_start_backward<GATED>(p, g.places);
                continue;
            }
            stage_row(f.h.data + c * f.h.channel + (t - 1) * f.h.line, staged, g.places, back * f.h.line);
            const bool add = c > 0 || f.add_dweights;
            if constexpr (SHARED) row_backward<kPrepared, GATED>(p, prepared, dweights, add, g.places, ahead);
            else row_backward<FORM, GATED>(p, raw, dweights, false, g.places, ahead);
        }
        if (start) zero_row<S>(dweights, g.places);
        else if (SHARED && f.finish_dweights) finish_row<FORM, S>(raw, dweights, g.places);
    }
}

}  // namespace
}  // namespace GSPN_NS
