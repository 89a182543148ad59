// Divides a scan into tasks and finds the kernel for its layout and types.
#pragma once
#include "parallel.h"
#include "scan/fields.h"
#include "scan/rows.h"
#include "scan/runs.h"
#include "scan/tiles.h"

namespace GSPN_NS {
namespace {

enum Layout { kRowsLayout, kRunsLayout, kAnyLayout };

constexpr int64_t kPixelsPerTask = 2048;          // small planes are taken together
constexpr int64_t kElementsPerThread = 16 << 10;  // a thread is not woken for less
constexpr int64_t kScratchPerScan = 512 << 10;    // bytes, where the number of channels can be chosen
constexpr int64_t kCacheLineBytes = 64;

GSPN_INLINE bool all_views(const GspnScanArgs& args, int64_t GspnView::*stride, bool with_weights) {
    const GspnView* const views[] = {&args.x, &args.gate, &args.h, &args.grad_h, &args.dx, &args.dgate};
    for (const GspnView* view : views)
        if (view->data && view->*stride != 1) return false;
    if (!with_weights) return true;
    return args.weights.*stride == 1 && (!args.dweights.data || args.dweights.*stride == 1);
}

// The kernel that takes any layout does for types that are there for exactness (double) or rare on CPUs (half). The
// others are compiled for what networks run in: float or bfloat16 maps, normalised weights in float.
template <Form FORM, class S, class W> constexpr bool kOnlyTiles = true;
template <> constexpr bool kOnlyTiles<kLogits, float, float> = false;
template <> constexpr bool kOnlyTiles<kLogits, bf16, bf16> = false;
template <> constexpr bool kOnlyTiles<kGiven, float, float> = false;
template <> constexpr bool kOnlyTiles<kGiven, bf16, float> = false;

template <Form FORM, class S, class W> Layout layout_of(const GspnScanArgs& args) {
    if (kOnlyTiles<FORM, S, W>) return kAnyLayout;
    if (all_views(args, &GspnView::column, true)) return kRowsLayout;
    if (all_views(args, &GspnView::channel, args.groups == args.channels)) return kRunsLayout;
    return kAnyLayout;
}

// How a scan is divided. A task is one batch item and `range` channels, forward in one direction, backward in all (dx
// is summed over them). Within a task `piece` channels at a time are scanned.
struct Plan {
    Layout layout;
    bool shared, backward;
    int64_t group, range, piece, ranges, tasks, threads;
};

// Channels for which one scan's scratch stays small.
template <class S> int64_t channels_at_once(const GspnScanArgs& args, const Plan& plan) {
    const int64_t places = max(args.height, args.width);
    const int64_t lines = plan.backward ? 7 : 2;
    return clamp(kScratchPerScan / (lines * (places + 2) * int64_t(sizeof(Acc<S>))), 1, args.channels);
}

template <Form FORM, class S, class W> Plan plan_of(const GspnScanArgs& args, bool backward) {
    Plan plan{};
    plan.layout = layout_of<FORM, S, W>(args);
    plan.backward = backward;
    plan.shared = args.groups != args.channels;
    plan.group = args.channels / args.groups;
    const int64_t pixels = args.height * args.width, directions = backward ? 1 : args.directions;
    const int64_t at_once = channels_at_once<S>(args, plan), few = clamp(kPixelsPerTask / pixels, 1, args.channels);
    const int64_t run = plan.layout == kRunsLayout ? kCacheLineBytes / int64_t(sizeof(S)) : 1;
    if (plan.shared) {
        plan.piece = clamp(at_once, min(run, plan.group), plan.group);
        plan.range = few >= plan.group ? few / plan.group * plan.group : backward ? plan.group : plan.piece;
    } else if (plan.layout == kRunsLayout) {
        plan.range = clamp(at_once / run * run, run, args.channels);
    } else {
        plan.range = few;
    }
    // More, smaller tasks rather than idle threads; but what shares weights stays together backward.
    const int64_t smallest = plan.shared && backward ? plan.group : run;
    while (args.threads > 1 && plan.range > smallest &&
           args.batch * directions * ceil_div(args.channels, plan.range) < 2 * args.threads) {
        const int64_t half = round_up(plan.range / 2, smallest);
        if (half == plan.range) break;
        plan.range = half;
    }
    if (!plan.shared || plan.piece > plan.range) plan.piece = plan.range;
    plan.ranges = ceil_div(args.channels, plan.range);
    plan.tasks = args.batch * directions * plan.ranges;
    const int64_t elements = args.batch * args.directions * args.channels * pixels;
    plan.threads = clamp(elements / kElementsPerThread, 1, args.threads);
    return plan;
}

template <class S> int64_t scratch_bytes(const GspnScanArgs& args, const Plan& plan) {
    int64_t most = 0;
    for (int64_t horizontal = 0; horizontal < 2; horizontal++) {
        const int64_t lines = horizontal ? args.width : args.height, places = horizontal ? args.height : args.width;
        const int64_t sets = plan.shared ? plan.piece : 1;
        const TileShape<S> tiles(lines, places * (plan.shared ? 1 : plan.piece));
        const int64_t sizes[3] = {
            rows_scratch<S>(places, sets, plan.backward), runs_scratch<S>(places, plan.piece, plan.backward),
            tiles.scratch(lines, (plan.backward ? 6 : 1) * sets)};
        for (int64_t size : sizes) most = max(most, size);
    }
    return most * int64_t(sizeof(Acc<S>));
}

// A scan of a call: what the tasks need to know.
struct Job {
    const GspnScanArgs* args;
    Plan plan;
};

template <bool BACKWARD, Form FORM, bool SHARED, class S, class W, class DX, class DW>
void scan_piece(const Geometry& g, Layout layout, Fields<S, W, DX, DW> f, Acc<S>* scratch) {
    if constexpr (!kOnlyTiles<FORM, S, W>) {
        const bool runs = layout == kRunsLayout, rows = layout == kRowsLayout && !g.horizontal;
        if (runs || rows) {
            f = all_in_scan_order(f, g);
            if constexpr (BACKWARD) {
                return runs ? runs_backward<FORM, SHARED>(g, f, scratch) : rows_backward<FORM, SHARED>(g, f, scratch);
            } else {
                return runs ? runs_forward<FORM, SHARED>(g, f, scratch) : rows_forward<FORM, SHARED>(g, f, scratch);
            }
        }
    }
    Tiles<FORM, S, W, DX, DW> tiles(g, f, SHARED, scratch);
    if constexpr (BACKWARD) tiles.backward();
    else tiles.forward();
}

// One direction of channels [first, end), piece by piece.
template <bool BACKWARD, Form FORM, bool SHARED, class S, class W, class DX, class DW>
void scan_range(const Job& job, int64_t batch, int64_t direction, int64_t first, int64_t end, Acc<S>* scratch) {
    const GspnScanArgs& args = *job.args;
    // Planes of their own weights: contiguous lines take one channel at a time, the other kernels several.
    const Geometry g = geometry_of(args.direction[direction], args.height, args.width, args.segment);
    const bool one = !SHARED && job.plan.layout == kRowsLayout && !g.horizontal;
    for (int64_t c = first; c < end;) {
        const int64_t group_end = SHARED ? (c / job.plan.group + 1) * job.plan.group : end;
        const int64_t stop = min(c + (one ? 1 : job.plan.piece), group_end);
        Fields<S, W, DX, DW> f{};
        f.channels = min(stop, end) - c;
        f.x = field_of<const S>(args.x, g, batch, direction, c);
        f.gate = field_of<const S>(args.gate, g, batch, direction, c);
        f.h = field_of<S>(args.h, g, batch, direction, c);
        f.weights = weights_of<const W>(args.weights, g, batch, direction, c / job.plan.group);
        if constexpr (BACKWARD) {
            f.grad_h = field_of<const S>(args.grad_h, g, batch, direction, c);
            f.dx = field_of<DX>(args.dx, g, batch, direction, c);
            f.dgate = field_of<S>(args.dgate, g, batch, direction, c);
            f.dweights = weights_of<DW>(args.dweights, g, batch, direction, c / job.plan.group);
            f.add_dx = direction > 0;
            f.add_dweights = c % job.plan.group != 0;
            f.finish_dweights = stop == group_end;
        }
        scan_piece<BACKWARD, FORM, SHARED>(g, job.plan.layout, f, scratch);
        c = stop;
    }
}

template <bool BACKWARD, Form FORM, bool SHARED, class S, class W, class DX, class DW>
void scan_task(const void* context, int64_t task, char* scratch) {
    const Job& job = *static_cast<const Job*>(context);
    const GspnScanArgs& args = *job.args;
    const int64_t directions = BACKWARD ? 1 : args.directions;  // of a task: forward they are tasks of their own
    const int64_t direction = task % directions, range = task / directions % job.plan.ranges;
    const int64_t batch = task / directions / job.plan.ranges, first = range * job.plan.range;
    const int64_t end = min(first + job.plan.range, args.channels);
    Acc<S>* memory = reinterpret_cast<Acc<S>*>(scratch);
    if (!BACKWARD) return scan_range<BACKWARD, FORM, SHARED, S, W, DX, DW>(job, batch, direction, first, end, memory);
    for (int64_t d = 0; d < args.directions; d++)
        scan_range<BACKWARD, FORM, SHARED, S, W, DX, DW>(job, batch, d, first, end, memory);
}

template <bool YES, class A, class B> struct Either {
    typedef A type;
};
template <class A, class B> struct Either<false, A, B> {
    typedef B type;
};

template <bool BACKWARD, Form FORM, class S, class W> int64_t run_scan(const GspnScanArgs& args) {
    if (args.batch * args.channels * args.height * args.width == 0) return GSPN_OK;
    const Job job = {&args, plan_of<FORM, S, W>(args, BACKWARD)};
    typedef Acc<S> A;
    gspn::TaskBody body;
    if constexpr (!BACKWARD) {
        body = job.plan.shared ? scan_task<false, FORM, true, S, W, S, W> : scan_task<false, FORM, false, S, W, S, W>;
    } else {
        // Directions are summed in the state's type, and so are channels.
        typedef typename Either<FORM == kLogits, A, S>::type DX;
        body = job.plan.shared ? scan_task<true, FORM, true, S, W, DX, A> : scan_task<true, FORM, false, S, W, DX, W>;
    }
    return gspn::parallel_for(job.plan.tasks, job.plan.threads, scratch_bytes<S>(args, job.plan), body, &job);
}

// gated_scan has logits of the maps' type; line_scan has weights of the state's.
template <bool BACKWARD> int64_t run_scan_of_any_type(const GspnScanArgs& args) {
    if (args.gated) {
        switch (args.dtype) {
            case GSPN_FLOAT32: return run_scan<BACKWARD, kLogits, float, float>(args);
            case GSPN_BFLOAT16: return run_scan<BACKWARD, kLogits, bf16, bf16>(args);
            case GSPN_FLOAT16: return run_scan<BACKWARD, kLogits, fp16, fp16>(args);
            case GSPN_FLOAT64: return run_scan<BACKWARD, kLogits, double, double>(args);
            default: return GSPN_BAD_ARGUMENT;
        }
    }
    switch (args.dtype) {
        case GSPN_FLOAT32: return run_scan<BACKWARD, kGiven, float, float>(args);
        case GSPN_BFLOAT16: return run_scan<BACKWARD, kGiven, bf16, float>(args);
        case GSPN_FLOAT16: return run_scan<BACKWARD, kGiven, fp16, float>(args);
        case GSPN_FLOAT64: return run_scan<BACKWARD, kGiven, double, double>(args);
        default: return GSPN_BAD_ARGUMENT;
    }
}

}  // namespace
}  // namespace GSPN_NS
