// The projections that a call works with. Either the caller has merged them, or they come as a layer keeps them: output
// and skip gates of every direction, beside the scalars of its merger. Then they are merged here, once a call.
#pragma once
#include "maps.h"

namespace GSPN_NS {
namespace {

template <class A> struct Projections {
    const A *weight, *input, *output, *skip;

    explicit Projections(const GspnPropagateArgs& a)
        : weight(static_cast<const A*>(a.weight_proj)), input(static_cast<const A*>(a.input_proj)),
          output(static_cast<const A*>(a.output_proj)), skip(static_cast<const A*>(a.skip_proj)) {}
};

// to = or += scale * from
template <class T> void scale_into(const T* from, int64_t n, Acc<T> scale, bool add, Acc<T>* to) {
    constexpr int L = kLanes<T>;
    int64_t i = 0;
    for (; i + L <= n; i += L) store(to + i, load(from + i) * scale + (add ? load(to + i) : VecOf<T>{}));
    for (; i < n; i++) to[i] = load_one(from + i) * scale + (add ? to[i] : 0);
}

template <class A> struct Merging {
    const GspnPropagateArgs& args;
    const bool widen;  // 16-bit projections are converted too
    const int64_t weights, gates;

    explicit Merging(const GspnPropagateArgs& a)
        : args(a), widen(a.projections == GSPN_BFLOAT16 || a.projections == GSPN_FLOAT16),
          weights(kNeighbours * a.groups * a.features), gates(a.channels * a.features) {}

    int64_t size() const {
        if (!args.merge) return 0;
        return args.directions * (gates + (widen ? weights + gates : 0)) + (args.skip_proj ? gates : 0);
    }

    void scaled(const void* from, int64_t begin, int64_t n, A scale, bool add, A* to) const {
        const auto run = [&](auto* first) { scale_into(first + begin, n, scale, add, to); };
        if constexpr (sizeof(A) == 8) run(static_cast<const double*>(from));
        else if (args.projections == GSPN_BFLOAT16) run(static_cast<const bf16*>(from));
        else if (args.projections == GSPN_FLOAT16) run(static_cast<const fp16*>(from));
        else run(static_cast<const float*>(from));
    }

    A scalar(int64_t d) const {
        A scale = A(1) / A(args.directions);
        if (args.merger) scaled(args.merger, d, 1, 1, false, &scale);
        return scale;
    }

    // In `memory`, of size() elements
    Projections<A> run(A* memory) const {
        Projections<A> found(args);
        if (!args.merge) return found;
        const auto take = [&](int64_t n) { return (memory += n) - n; };
        A *const output = take(args.directions * gates), *const skip = args.skip_proj ? take(gates) : nullptr;
        for (int64_t d = 0; d < args.directions; d++) {
            const A scale = scalar(d);
            const Geometry scan = geometry_of(args.direction[d], args.height, args.width, args.segment);
            scaled(
                args.output_proj, d * gates, gates, args.average ? scale / A(scan.segment) : scale, false,
                output + d * gates);
            if (skip) scaled(args.skip_proj, d * gates, gates, scale, d > 0, skip);
        }
        found.output = output, found.skip = skip;
        if (widen) {
            A *const weight = take(args.directions * weights), *const input = take(args.directions * gates);
            scaled(args.weight_proj, 0, args.directions * weights, 1, false, weight);
            scaled(args.input_proj, 0, args.directions * gates, 1, false, input);
            found.weight = weight, found.input = input;
        }
        return found;
    }
};

}  // namespace
}  // namespace GSPN_NS
