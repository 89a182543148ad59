// What a call of propagate works with: sizes, the directions in the order in which they are scanned, the packed
// projections and where everything lies in memory. Shared by forward and backward.
#pragma once
#include "parallel.h"
#include "propagate_api.h"
#include "propagate_gemm.h"
#include "propagate_maps.h"
#include "propagate_pixel.h"

namespace GSPN_NS {
namespace {

constexpr int64_t kDefaultWorkspace = (int64_t)256 << 20;
constexpr int64_t kRoundBytes = (int64_t)16 << 20;     // images are worked on in rounds: shared buffers fit this ...
constexpr int64_t kRoundShare = 4;                     // ... and this part of the workspace
constexpr int64_t kThreadWork = 4000000;               // multiply-adds that are worth a thread of their own

GSPN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
GSPN_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
GSPN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out pieces of one buffer; with a null buffer it only measures.
struct Carver {
    char* base;
    int64_t used = 0;
    template <class A> A* take(int64_t count) {
        char* p = base ? base + used : nullptr;
        used += ceil_div(count * (int64_t)sizeof(A), 64) * 64;
        return (A*)p;
    }
};

// One direction of travel over an image. Line t = 0 is where the scan starts; its places are walked from 0 up.
struct Walk {
    int64_t lines, places;
    bool over_columns, backwards;  // lines are columns of the image; the last column (or row) is line 0
    int source;                    // which of the caller's directions this is

    int64_t line(int64_t t) const { return backwards ? lines - 1 - t : t; }
    int64_t offset(int64_t t, int64_t row, int64_t column) const { return line(t) * (over_columns ? column : row); }
    int64_t step(int64_t row, int64_t column) const { return over_columns ? row : column; }
};

// A: the type of the state, the sums and the projections
template <class A> struct Plan {
    static constexpr int L = kLanes<A>;

    const GspnPropagateArgs& args;
    const int64_t batch, channels, height, width, pixels, segment;
    const Features<A> features;
    const int directions;
    const bool skip, proxy_in_place;
    const int64_t blocks, pitch;  // blocks of L channels; pixels between two rows of a packed block
    Walk walks[4];

    // Filled in by the driver: a shared buffer, and the images first .. first + count of the current round
    A* packed_proxy = nullptr;
    int64_t first = 0, count = 0;

    explicit Plan(const GspnPropagateArgs& a)
        : args(a), batch(a.batch), channels(a.channels), height(a.height), width(a.width), pixels(height * width),
          segment(a.segment > 0 ? a.segment : INT64_MAX), features(a.features), directions((int)a.directions),
          skip(a.skip_proj != nullptr),
          proxy_in_place(
              (a.dtype == GSPN_FLOAT32 || a.dtype == GSPN_FLOAT64) && (a.proxy.channel == 1 || a.features == 1)),
          blocks(ceil_div(channels, L)), pitch(width | 1) {
        order_walks();
    }

    // Scans over rows go first and last where there are two: the first can pack the block as it goes, the last can
    // write the result as it goes. The columns lie between them.
    void order_walks() {
        int rows = 0, n = 0;
        for (int d = 0; d < directions; d++) rows += args.direction[d] % 2;
        for (int d = 0, seen = 0; d < directions; d++)
            if (args.direction[d] % 2 && rows > 1 && seen++ == 0) walks[n++] = walk(d);
        for (int d = 0; d < directions; d++)
            if (args.direction[d] % 2 == 0) walks[n++] = walk(d);
        for (int d = 0, seen = 0; d < directions; d++)
            if (args.direction[d] % 2 && (rows == 1 || seen++ > 0)) walks[n++] = walk(d);
    }
    Walk walk(int d) const {
        const bool over_columns = args.direction[d] % 2 == 0;
        return {over_columns ? width : height, over_columns ? height : width, over_columns, args.direction[d] >= 2, d};
    }

    int lanes_of(int64_t block) const { return (int)min64(L, channels - block * L); }

    // Packed projections of a walk and a block are [features][columns][lanes]. Walk 0 also carries the skip gate.
    static constexpr int kMostColumns = kLogits + 3;
    int columns(int i) const { return kLogits + 2 + (skip && i == 0); }
    int64_t w_size() const { return features.count * kMostColumns * L; }
    int64_t wt_size() const { return features.rows() * kMostColumns * L; }  // transposed, see Features

    // The features' projections for a column of walk i and a channel, and likewise their gradients
    template <class P> P* projection(
        P* weight, P* input, P* output, P* skip_, int i, int column, int64_t channel) const {
        const int64_t d = walks[i].source, n = features.count;
        if (column == kSkip) return skip_ + channel * n;
        if (column == kInput) return input + (d * channels + channel) * n;
        if (column == kOutput) return output + (d * channels + channel) * n;
        const int64_t group = channel * args.groups / channels;
        return weight + ((d * kLogits + column) * args.groups + group) * n;
    }
    const A* projection(int i, int column, int64_t channel) const {
        return projection(
            (const A*)args.weight_proj, (const A*)args.input_proj, (const A*)args.output_proj,
            (const A*)args.skip_proj, i, column, channel);
    }
    A* grad_projection(int i, int column, int64_t channel) const {
        return projection(
            (A*)args.grad_weight_proj, (A*)args.grad_input_proj, (A*)args.grad_output_proj, (A*)args.grad_skip_proj, i,
            column, channel);
    }

    // The proxy of an image of the current round as [row][column][features]
    int64_t proxy_row() const { return proxy_in_place ? args.proxy.row : width * features.count; }
    int64_t proxy_column() const { return proxy_in_place ? args.proxy.column : features.count; }
    const A* proxy_of(int64_t image) const {
        if (proxy_in_place) return (const A*)args.proxy.data + image * args.proxy.batch;
        return packed_proxy + (image - first) * pixels * features.count;
    }
    int64_t packed_proxy_size(int64_t images) const {
        return proxy_in_place ? 0 : images * pixels * features.count;
    }

    int64_t packed_size() const { return height * pitch * L; }  // of one block of an image

    void pack_block_row(const GspnView& map, int64_t image, int64_t block, int64_t row, A* packed) const {
        A* const to = packed + row * pitch * L;
        pack_map_row(args.dtype, map, image, block * L, row, lanes_of(block), L, width, to, L);
    }
    void unpack_block_row(const GspnView& map, int64_t image, int64_t block, int64_t row, const A* packed) const {
        const A* const from = packed + row * pitch * L;
        unpack_map_row(args.dtype, from, L, map, image, block * L, row, lanes_of(block), width);
    }

    // Adds up the parts of a block, which follow each other in memory (into the first), and writes it.
    void sum_parts(const GspnView& view, int64_t image, int64_t block, int64_t parts, A* packed) const {
        for (int64_t row = 0; row < height; row++) {
            for (int64_t at = row * pitch * L, end = at + width * L; at < end; at += L) {
                VecOf<A> v = load(packed + at);
                for (int64_t part = 1; part < parts; part++) v = v + load(packed + part * packed_size() + at);
                store(packed + at, v);
            }
            unpack_block_row(view, image, block, row, packed);
        }
    }

    // How many threads are worth it: a multiply-add counts once for each vector that it fills
    int64_t useful_threads() const {
        const int64_t per_pixel = (int64_t)directions * ((kLogits + 2) * features.count + 40);
        return max64(1, min64(args.threads, batch * blocks * L * pixels * per_pixel / kThreadWork));
    }
    int64_t round_bytes() const { return min64(kRoundBytes, workspace() / kRoundShare); }
    int64_t workspace() const { return args.workspace > 0 ? args.workspace : kDefaultWorkspace; }
};

// Packing of the projections of one walk and one block. This takes so little beside the scan of an image that every
// task does it for itself, and has them in its cache.

template <class A> static void pack_projections(const Plan<A>& plan, int i, int64_t block, A* w) {
    constexpr int L = kLanes<A>;
    const int n = plan.lanes_of(block);
    const int64_t count = plan.features.count, step = plan.columns(i) * L;
    for (int column = 0; column < plan.columns(i); column++, w += L) {
        if (column >= kLogits || plan.args.groups == plan.channels) {
            pack_row(plan.projection(i, column, block * L), count, 1, n, L, count, w, step);
            continue;
        }
        for (int c = 0; c < L; c++) {
            const A* row = c < n ? plan.projection(i, column, block * L + c) : nullptr;
            for (int64_t s = 0; s < count; s++) w[s * step + c] = row ? row[s] : 0;
        }
    }
}

template <class A> static void scale_logits(const Plan<A>& plan, int i, A* w) {
    constexpr int L = kLanes<A>;
    for (int64_t s = 0; s < plan.features.count; s++, w += plan.columns(i) * L)
        for (int column = 0; column < kLogits; column++)
            store(w + column * L, load(w + column * L) * (A)-kLog2e);
}

// R values of k share a vector of the last features: R neighbours in w go to R neighbours in wt.
template <int R, class A>
static void transpose_rest(int repeats, int features, int64_t k_count, const A* w, A* wt) {
    constexpr int L = kLanes<A>;
    if constexpr (R < kMostRepeats<A>)
        if (repeats > R) return transpose_rest<2 * R>(repeats, features, k_count, w, wt);
    for (int s = 0; s < features; s++, w += k_count)
        for (int64_t k = 0; k < k_count; k += R) __builtin_memcpy(wt + k / R * L + s * R, w + k, R * sizeof(A));
}

// wt out of w as it is before scale_logits
template <class A> static void transpose_projections(const Plan<A>& plan, int i, const A* w, A* wt) {
    constexpr int L = kLanes<A>;
    const Features<A>& features = plan.features;
    const int64_t k_count = plan.columns(i) * L;
    for (int64_t f = 0; f < features.full; f++)
        pack_row(w + f * L * k_count, k_count, 1, L, L, k_count, wt + f * k_count * L, L);
    if (features.rest == 0) return;
    A* const rest = wt + features.full * k_count * L;
    __builtin_memset(rest, 0, sizeof(A) * k_count * features.width);
    transpose_rest<1>(features.repeats(), features.rest, k_count, w + features.full * L * k_count, rest);
}

// Threads for the work before and after the scans: starting them costs more than moving a few elements
GSPN_INLINE int64_t threads_for(int64_t elements, int64_t threads) {
    constexpr int64_t worth = (int64_t)1 << 17;
    return min64(threads, 1 + elements / worth);
}

// The rows of the proxies of a round, where they are not already [row][column][features] of the accumulator's type

template <class A> static void pack_proxy_row(const void* context, int64_t task, char*) {
    const Plan<A>& plan = *(const Plan<A>*)context;
    const int64_t image = plan.first + task / plan.height, row = task % plan.height, n = plan.features.count;
    A* const to = plan.packed_proxy + task * plan.width * n;
    for (int64_t s = 0; s < n; s += kLanes<A>) {
        const int lanes = (int)min64(kLanes<A>, n - s);
        pack_map_row(plan.args.dtype, plan.args.proxy, image, s, row, lanes, lanes, plan.width, to + s, n);
    }
}

template <class A> static int64_t pack_proxies(const Plan<A>& plan, int64_t threads) {
    if (plan.proxy_in_place) return GSPN_OK;
    threads = threads_for(plan.packed_proxy_size(plan.count), threads);
    return gspn::parallel_for(plan.count * plan.height, threads, 0, pack_proxy_row<A>, &plan);
}

}  // namespace
}  // namespace GSPN_NS
