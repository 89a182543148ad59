// What a call of propagate works with: sizes, the directions in the order in which they are scanned, the packed
// projections and where everything lies in memory. Shared by forward and backward.
#pragma once
#include "common.h"
#include "maps.h"
#include "parallel.h"
#include "propagate/amx_gradients.h"
#include "propagate/gemm.h"
#include "propagate/merge.h"
#include "propagate/pixel.h"

namespace GSPN_NS {
namespace {

constexpr int64_t kDefaultWorkspace = int64_t(256) << 20;
constexpr int64_t kRoundBytes = int64_t(16) << 20;  // images are worked on in rounds: shared buffers fit this ...
constexpr int64_t kRoundShare = 4;                  // ... and this part of the workspace
constexpr int64_t kThreadWork = 4000000;            // multiply-adds that are worth a thread of their own

// Hands out pieces of one buffer; with a null buffer it only measures.
struct Carver {
    char* base;
    int64_t used = 0;
    template <class A> A* take(int64_t count) {
        char* p = base ? base + used : nullptr;
        used += round_up(count * int64_t(sizeof(A)), 64);
        return reinterpret_cast<A*>(p);
    }
};

// A call's maps are worked on by blocks of as many channels as a vector has lanes.
template <class A> struct Call {
    static constexpr int L = kLanes<A>;

    const GspnPropagateArgs& args;
    const int64_t batch, channels, height, width, pixels;
    const Features<A> features;
    const TileDepth tile_depth;
    const int directions;
    const bool skip, shared, proxy_in_place;  // shared: one set of weights for all channels, see SharedWeights
    const int64_t blocks, pitch;              // blocks of channels; pixels between two rows of a packed block
    Geometry scans[4];                        // in the order in which they are made
    int source[4];                            // which of the caller's directions each scan is

    // Filled in by the driver: the projections, a shared buffer, and the images first .. first + count of the current
    // round
    Projections<A> projections;
    A* packed_proxy = nullptr;
    bf16 *proxy_tiles = nullptr, *proxy_bundles[2] = {};  // with tiles, see below
    int64_t first = 0, count = 0;

    explicit Call(const GspnPropagateArgs& a)
        : args(a), batch(a.batch), channels(a.channels), height(a.height), width(a.width), pixels(height * width),
          features(a.features, kTiles), tile_depth(a.features), directions(int(a.directions)),
          skip(a.skip_proj != nullptr), shared(a.groups == 1),
          proxy_in_place(
              (a.dtype == GSPN_FLOAT32 || a.dtype == GSPN_FLOAT64) && (a.proxy.channel == 1 || a.features == 1)),
          blocks(ceil_div(channels, L)), pitch(width | 1), projections(a) {
        order_scans();
    }

    // Scans over rows go first and last where there are two: the first can pack the block as it goes, the last can
    // write the result as it goes. The columns lie between them.
    void order_scans() {
        int vertical = 0, n = 0;
        const auto add = [&](int d) {
            scans[n] = geometry_of(args.direction[d], height, width, args.segment);
            source[n++] = d;
        };
        for (int d = 0; d < directions; d++) vertical += args.direction[d] % 2;
        for (int d = 0, seen = 0; d < directions; d++)
            if (args.direction[d] % 2 && vertical > 1 && seen++ == 0) add(d);
        for (int d = 0; d < directions; d++)
            if (args.direction[d] % 2 == 0) add(d);
        for (int d = 0, seen = 0; d < directions; d++)
            if (args.direction[d] % 2 && (vertical == 1 || seen++ > 0)) add(d);
    }

    int lanes_of(int64_t block) const { return int(min(L, channels - block * L)); }

    // Packed projections of a scan and a block are [features][columns][lanes]: those of the logits, unless shared, of
    // the gates and, in scan 0, of the skip gate.
    int logits() const { return shared ? 0 : kNeighbours; }
    int columns(int i) const { return logits() + 2 + (skip && i == 0); }
    // Packed columns before those that a line with these weights takes
    template <int WEIGHTS> int unused_columns() const { return logits() - logit_columns(WEIGHTS); }
    Column column_at(int packed) const { return Column(packed + kNeighbours - logits()); }
    int64_t w_size() const { return features.count * kMostColumns * L; }
    int64_t wt_size() const { return kTiles ? 0 : features.rows() * kMostColumns * L; }  // transposed, see Features
    int64_t w_tiles_size() const { return kTiles ? tile_depth.tiles() * kMostColumns * kTileSize : 0; }
    int64_t wt_tiles_size() const { return kTiles ? transposed_tiles_size(features.count, kMostColumns) : 0; }

    // The features' projections for a column of scan i and a channel, and likewise their gradients
    template <class P>
    P* projection(P* weight, P* input, P* output, P* skip_, int i, int column, int64_t channel) const {
        const int64_t d = source[i], n = features.count;
        if (column == kSkip) return skip_ + channel * n;
        if (column == kInput) return input + (d * channels + channel) * n;
        if (column == kOutput) return output + (d * channels + channel) * n;
        const int64_t group = channel * args.groups / channels;
        return weight + ((d * kNeighbours + column) * args.groups + group) * n;
    }
    const A* projection(int i, int column, int64_t channel) const {
        const Projections<A>& p = projections;
        return projection(p.weight, p.input, p.output, p.skip, i, column, channel);
    }
    A* dprojection(int i, int column, int64_t channel) const {
        return projection(
            static_cast<A*>(args.dweight_proj), static_cast<A*>(args.dinput_proj), static_cast<A*>(args.doutput_proj),
            static_cast<A*>(args.dskip_proj), i, column, channel);
    }

    // What is taken from the gated input of scan i, for a block of channels of an image
    int64_t center_at(int64_t image, int i, int64_t block) const {
        return (image * directions + source[i]) * channels + block * L;
    }
    VecOf<A> center_of(int64_t image, int i, int64_t block) const {
        const A* const center = static_cast<const A*>(args.center);
        return center ? load_n(center + center_at(image, i, block), lanes_of(block)) : VecOf<A>{};
    }

    // The proxy of an image of the current round as [row][column][features]
    int64_t proxy_row() const { return proxy_in_place ? args.proxy.row : width * features.count; }
    int64_t proxy_column() const { return proxy_in_place ? args.proxy.column : features.count; }
    const A* proxy_of(int64_t image) const {
        if (proxy_in_place) return static_cast<const A*>(args.proxy.data) + image * args.proxy.batch;
        return packed_proxy + (image - first) * pixels * features.count;
    }
    int64_t packed_proxy_size(int64_t images) const {
        return proxy_in_place || (kTiles && !shared) ? 0 : images * pixels * features.count;
    }

    // The proxy for tiles: of every pixel as project_tiles wants it, rows at the pitch of packed blocks, and, backward,
    // of the bundles of rows and of columns as GradientTiles wants it
    int64_t tile_row() const { return pitch * tile_depth.depth; }
    const bf16* proxy_tiles_of(int64_t image) const { return proxy_tiles + (image - first) * height * tile_row(); }
    int64_t proxy_tiles_size(int64_t images) const {
        const int64_t beyond = scans_along(true) ? kTileRows : 0;  // rows that the last tiles read
        return kTiles ? (images * height + beyond) * tile_row() + kTileRows * tile_depth.depth : 0;
    }
    // Scratch that packing takes
    int64_t packing_bytes() const { return kTiles ? int64_t(sizeof(A)) * width * features.lanes() : 0; }
    bool scans_along(bool horizontal) const {
        for (int i = 0; i < directions; i++)
            if (scans[i].horizontal == horizontal) return true;
        return false;
    }
    LineBundles bundles_of(bool horizontal) const {
        return horizontal ? LineBundles(width, height) : LineBundles(height, width);
    }
    bf16* proxy_bundles_of(int64_t image, bool horizontal) const {
        return proxy_bundles[horizontal] + (image - first) * bundles_of(horizontal).size(features.count);
    }
    int64_t proxy_bundles_size(int64_t images, bool horizontal) const {
        return kTiles && scans_along(horizontal) ? images * bundles_of(horizontal).size(features.count) : 0;
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
        const int64_t per_pixel = int64_t(directions) * ((kNeighbours + 2) * features.count + 40);
        return max(1, min(args.threads, batch * blocks * L * pixels * per_pixel / kThreadWork));
    }
    int64_t round_bytes() const { return min(kRoundBytes, workspace() / kRoundShare); }
    int64_t workspace() const { return args.workspace > 0 ? args.workspace : kDefaultWorkspace; }
};

// Packing of the projections of one scan and one block. This takes so little beside the scan of an image that every
// task does it for itself, and has them in its cache.

template <class A> void pack_projections(const Call<A>& call, int i, int64_t block, A* w) {
    constexpr int L = kLanes<A>;
    const int n = call.lanes_of(block);
    const int64_t count = call.features.count, step = call.columns(i) * L;
    for (int packed = 0; packed < call.columns(i); packed++, w += L) {
        const Column column = call.column_at(packed);
        if (column >= kNeighbours || call.args.groups == call.channels) {
            pack_row(call.projection(i, column, block * L), count, 1, n, L, count, w, step);
            continue;
        }
        for (int c = 0; c < L; c++) {
            const A* row = c < n ? call.projection(i, column, block * L + c) : nullptr;
            for (int64_t s = 0; s < count; s++) w[s * step + c] = row ? row[s] : 0;
        }
    }
}

template <class A> void scale_logits(const Call<A>& call, int i, A* w) {
    constexpr int L = kLanes<A>;
    for (int64_t s = 0; s < call.features.count; s++, w += call.columns(i) * L)
        for (int column = 0; column < call.logits(); column++) store(w + column * L, load(w + column * L) * A(-kLog2e));
}

// R values of k share a vector of the last features: R neighbours in w go to R neighbours in wt.
template <int R, class A> void transpose_rest(int repeats, int features, int64_t k_count, const A* w, A* wt) {
    constexpr int L = kLanes<A>;
    if constexpr (R < kMostRepeats<A>)
        if (repeats > R) return transpose_rest<2 * R>(repeats, features, k_count, w, wt);
    for (int s = 0; s < features; s++, w += k_count)
        for (int64_t k = 0; k < k_count; k += R) __builtin_memcpy(wt + k / R * L + s * R, w + k, R * sizeof(A));
}

// wt out of w, [features][columns][lanes], as it is before scale_logits
template <class A> void transpose_projections(const Features<A>& features, int columns, const A* w, A* wt) {
    constexpr int L = kLanes<A>;
    const int64_t k_count = columns * L;
    for (int64_t f = 0; f < features.full; f++)
        pack_row(w + f * L * k_count, k_count, 1, L, L, k_count, wt + f * k_count * L, L);
    if (features.rest == 0) return;
    A* const rest = wt + features.full * k_count * L;
    fill_zero(rest, k_count * features.width);
    transpose_rest<1>(features.repeats(), features.rest, k_count, w + features.full * L * k_count, rest);
}

// Threads for the work before and after the scans: starting them costs more than moving a few elements
GSPN_INLINE int64_t threads_for(int64_t elements, int64_t threads) {
    constexpr int64_t worth = int64_t(1) << 17;
    return min(threads, 1 + elements / worth);
}

// The rows of the proxies of a round, where they are not already [row][column][features] of the accumulator's type

template <class A> void pack_proxy_row(const void* context, int64_t task, char*) {
    const Call<A>& call = *static_cast<const Call<A>*>(context);
    const int64_t image = call.first + task / call.height, row = task % call.height, n = call.features.count;
    A* const to = call.packed_proxy + task * call.width * n;
    for (int64_t s = 0; s < n; s += kLanes<A>) {
        const int lanes = int(min(kLanes<A>, n - s));
        pack_map_row(call.args.dtype, call.args.proxy, image, s, row, lanes, lanes, call.width, to + s, n);
    }
}

template <class A> void pack_tile_row(const void* context, int64_t task, char* memory) {
    const Call<A>& call = *static_cast<const Call<A>*>(context);
    const int64_t image = call.first + task / call.height, row = task % call.height, n = call.features.count;
    const int64_t lanes = call.features.lanes();
    A* const packed = reinterpret_cast<A*>(memory);
    for (int64_t s = 0; s < n; s += kLanes<A>) {
        const int some = int(min(kLanes<A>, n - s));
        pack_map_row(call.args.dtype, call.args.proxy, image, s, row, some, kLanes<A>, call.width, packed + s, lanes);
    }
    bf16* const to = call.proxy_tiles + task * call.tile_row();
    for (int64_t x = 0; x < call.width; x++)
        store_tile_pixel(packed + x * lanes, call.tile_depth, to + x * call.tile_depth.depth);
}

template <class A, bool HORIZONTAL> void pack_bundle(const void* context, int64_t task, char*) {
    const Call<A>& call = *static_cast<const Call<A>*>(context);
    const LineBundles bundles = call.bundles_of(HORIZONTAL);
    const int64_t count = bundles.count(), image = call.first + task / count, bundle = task % count;
    const int64_t row = call.tile_row(), column = call.tile_depth.depth, n = call.features.count;
    transpose_bundle<A>(
        bundles, bundle, call.proxy_tiles_of(image), HORIZONTAL ? column : row, HORIZONTAL ? row : column, n,
        call.proxy_bundles_of(image, HORIZONTAL) + bundle * bundles.bundle_size(n));
}

template <class A, bool HORIZONTAL> int64_t pack_bundles(const Call<A>& call, int64_t threads) {
    if (!call.scans_along(HORIZONTAL)) return GSPN_OK;
    const int64_t tasks = call.count * call.bundles_of(HORIZONTAL).count();
    return gspn::parallel_for(tasks, threads, 0, pack_bundle<A, HORIZONTAL>, &call);
}

template <class A> int64_t pack_proxies(const Call<A>& call, int64_t threads, bool backward) {
    const int64_t elements = call.count * call.pixels * call.features.count, rows = call.count * call.height;
    threads = threads_for(elements, threads);
    int64_t status = GSPN_OK;
    if (call.packed_proxy_size(1) > 0) status = gspn::parallel_for(rows, threads, 0, pack_proxy_row<A>, &call);
    if constexpr (kTiles) {
        if (status == GSPN_OK)
            status = gspn::parallel_for(rows, threads, call.packing_bytes(), pack_tile_row<A>, &call);
        if (status == GSPN_OK && backward) status = pack_bundles<A, false>(call, threads);
        if (status == GSPN_OK && backward) status = pack_bundles<A, true>(call, threads);
    }
    return status;
}

}  // namespace
}  // namespace GSPN_NS
