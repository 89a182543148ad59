// propagate, forward. A task is one block of channels of one image (and, where there are few of these, a part of the
// directions): the block of x is packed once, its directions are scanned one after the other into a packed block of
// the output, and this is written once.
#pragma once
#include "propagate/call.h"
#include "propagate/shared.h"

namespace GSPN_NS {
namespace {

// Pixels whose projected maps are in the first-level cache at a time
constexpr int64_t kForwardStrip = kTiles ? kTileStrip : 40;

// Columns of projected maps that a line takes: no output gate where only the state is wanted
constexpr int columns_of(int out, int weights) {
    return logit_columns(weights) + (out == kNone ? 1 : out == kSetWithSkip ? 3 : 2);
}

// Calls body(Known<weights>) for line t of a scan. The backward scan is always exact: it gains less, and the gradients
// of the projections are no 16-bit numbers.
template <bool FORWARD, class A, class Body>
GSPN_INLINE void with_weights(const Call<A>& call, int i, int64_t t, Body body) {
    constexpr int unless_float32 = FORWARD && sizeof(A) == 4 ? kRoughWeights : kChannelWeights;
    if (call.scans[i].starts_segment(t)) body(Known<kNoWeights>{});
    else if (call.shared) body(Known<kSharedWeights>{});
    else if (call.args.dtype == GSPN_FLOAT32) body(Known<kChannelWeights>{});
    else body(Known<unless_float32>{});
}

// Calls body(Known<output>) for what a scan does to the output.
template <class Body> GSPN_INLINE void with_output(Output output, Body body) {
    if (output == kAdd) body(Known<kAdd>{});
    else if (output == kSet) body(Known<kSet>{});
    else body(Known<kSetWithSkip>{});
}

// A line of one place. Not inlined, so that it shares no computation with the strips: where a product is computed
// decides whether it is fused with an addition, and the states of the backward scan are those of the forward scan.
template <int WEIGHTS, int OUT, class A>
__attribute__((noinline)) void forward_only_pixel(
    const A* maps, const SharedLine<A>& shared, const A* before, A* now, VecOf<A> center, const A* x, A* out) {
    VecOf<A> prev{};
    forward_pixel<WEIGHTS, kOnly, OUT>(maps, shared, before, now, prev, center, x, out);
}

// A strip of a line. `before` and `now` may be the same memory.
template <int OUT, int WEIGHTS, int COLUMNS, class A>
void forward_strip(
    int64_t n, bool first, bool last, const A* maps, const SharedLine<A>& shared, const A* before, A* now,
    VecOf<A>& prev, VecOf<A> center, const A* x, A* out, int64_t step) {
    constexpr int L = kLanes<A>;
    if (first && last && n == 1) return forward_only_pixel<WEIGHTS, OUT>(maps, shared, before, now, center, x, out);
    VecOf<A> p = prev;  // a copy of its own stays in a register
    int64_t i = 0;
    if (first) forward_pixel<WEIGHTS, kFirst, OUT>(maps, shared, before, now, p, center, x, out), i = 1;
    for (; i < n - last; i++)
        forward_pixel<WEIGHTS, kInside, OUT>(
            maps + i * COLUMNS * L, shared.from(i), before + i * L, now + i * L, p, center, x + i * step,
            out + i * step);
    if (last)
        forward_pixel<WEIGHTS, kLast, OUT>(
            maps + i * COLUMNS * L, shared.from(i), before + i * L, now + i * L, p, center, x + i * step,
            out + i * step);
    prev = p;
}

// What the projected maps of a line come from. Steps are elements, between two places and between two features.
template <class A> struct LineProjection {
    const A* proxy;
    int64_t proxy_step, features;
    const A* w;
    int64_t w_step;

    template <int COLUMNS> void project_strip(int64_t p, int64_t n, A* maps) const {
        project<COLUMNS>(n, proxy + p * proxy_step, proxy_step, features, w, w_step, maps);
    }
};

// The same with tiles
struct TileProjection {
    const bf16* proxy;
    int64_t proxy_step;
    const TileDepth& depth;
    const bf16* w;
    int64_t w_step;

    template <int COLUMNS, class A> void project_strip(int64_t p, int64_t n, A* maps) const {
        project_tiles<COLUMNS>(n, proxy + p * proxy_step, proxy_step, depth, w, w_step, maps);
    }
};

// Elements from a place to the same place of a line that will be scanned soon; 0 for no prefetching
struct Ahead {
    int64_t map, proxy;
};

// Towards the second-level cache: n places `step` elements apart
template <class A> GSPN_INLINE void prefetch_places(const A* p, int64_t step, int64_t n) {
    for (int64_t i = 0; i < n; i++) __builtin_prefetch(p + i * step, 0, 2);
}

// One line: strips of projected maps, each used while it is in the cache; with KEEP, those of the whole line are kept.
template <int OUT, int WEIGHTS, int COLUMNS, bool KEEP, class Projection, class A>
void forward_line(
    int64_t places, const Projection& projection, A* maps, const SharedLine<A>& shared, const A* before, A* now,
    VecOf<A> center, const A* x, A* out, int64_t step, const Ahead& ahead) {
    constexpr int L = kLanes<A>;
    VecOf<A> prev{};
    for (int64_t p = 0; p < places; p += kForwardStrip) {
        const int64_t n = min(kForwardStrip, places - p), at = p * step;
        A* const strip = maps + (KEEP ? p * COLUMNS * L : 0);
        if (ahead.map) {
            prefetch_places(x + at + ahead.map, step, n);
            if (OUT != kNone) prefetch_places(out + at + ahead.map, step, n);
            prefetch_places(projection.proxy + p * projection.proxy_step + ahead.proxy, projection.proxy_step, n);
        }
        projection.template project_strip<COLUMNS>(p, n, strip);
        forward_strip<OUT, WEIGHTS, COLUMNS>(
            n, p == 0, p + n == places, strip, shared.from(p), before + p * L, now + p * L, prev, center, x + at,
            out + at, step);
    }
}

template <int WEIGHTS, class A>
LineProjection<A> line_projection(const Call<A>& call, int64_t image, const A* w, int i, int64_t t) {
    const int64_t row = call.proxy_row(), column = call.proxy_column();
    const Geometry& g = call.scans[i];
    return {
        call.proxy_of(image) + g.offset(t, row, column), g.place_stride(row, column), call.features.count,
        w + call.template unused_columns<WEIGHTS>() * kLanes<A>, call.columns(i) * kLanes<A>};
}
template <int WEIGHTS, class A>
TileProjection line_projection(const Call<A>& call, int64_t image, const bf16* w, int i, int64_t t) {
    const int64_t row = call.tile_row(), column = call.tile_depth.depth;
    const Geometry& g = call.scans[i];
    return {
        call.proxy_tiles_of(image) + g.offset(t, row, column), g.place_stride(row, column), call.tile_depth,
        w + call.template unused_columns<WEIGHTS>() * kTileSize, call.columns(i) * kTileSize};
}

// The packed projections of a scan that its lines are projected with
template <class Scratch> GSPN_INLINE auto projections_of(const Scratch& scratch) {
    if constexpr (kTiles) return scratch.w_tiles;
    else return scratch.w;
}

// Columns of a large map lie too far apart for the hardware's prefetching
template <class A> Ahead ahead_of(const Call<A>& call, const Geometry& g) {
    constexpr int64_t lines = 2, small = int64_t(1) << 20;
    if (!g.horizontal || call.packed_size() * int64_t(sizeof(A)) < small) return {0, 0};
    const int64_t ahead = g.reverse ? -lines : lines;
    return {ahead * kLanes<A>, ahead * (kTiles ? call.tile_depth.depth : call.proxy_column())};
}

template <class A> struct Forward {
    static constexpr int L = kLanes<A>;

    Call<A>& call;
    SharedWeights<A> shared;
    int64_t threads, parts;  // parts: tasks that share the directions of a block
    A* merged_projections;
    A* part_outputs;  // [image of the round][block][part][packed block], where parts > 1

    struct Scratch {
        A *x, *out, *state, *maps, *w;
        bf16* w_tiles;
        Scratch(const Forward& self, Carver carver) {
            const Call<A>& call = self.call;
            x = carver.take<A>(call.packed_size());
            out = carver.take<A>(self.parts > 1 ? 0 : call.packed_size());
            state = carver.take<A>(max(call.height, call.width) * L);
            maps = carver.take<A>(kForwardStrip * kMostColumns * L);
            w = carver.take<A>(call.w_size());
            w_tiles = carver.take<bf16>(call.w_tiles_size());
            bytes = carver.used;
        }
        int64_t bytes;
    };

    explicit Forward(Call<A>& p)
        : call(p), shared(p), threads(p.useful_threads()), parts(1), merged_projections(nullptr),
          part_outputs(nullptr) {
        choose_parts();
        while (threads > 1 && scratch_bytes(1) > call.workspace() - call.round_bytes()) {
            threads--;
            choose_parts();
        }
    }

    // Parts of the directions for different threads, where that ends earlier
    void choose_parts() {
        const int64_t tasks = call.batch * call.blocks;
        int64_t best = INT64_MAX;
        for (int64_t n = 1; n <= call.directions; n++) {
            const int64_t time = ceil_div(tasks * n, threads) * ceil_div(call.directions, n);
            if (time < best) best = time, parts = n;
            if (tasks >= threads) break;  // partial outputs cost memory
        }
    }

    int64_t shared_bytes(int64_t images, Carver carver) {
        merged_projections = carver.take<A>(Merging<A>(call.args).size());
        call.packed_proxy = carver.take<A>(call.packed_proxy_size(images));
        call.proxy_tiles = carver.take<bf16>(call.proxy_tiles_size(images));
        shared.carve(carver, images);
        part_outputs = carver.take<A>(parts > 1 ? images * call.blocks * parts * call.packed_size() : 0);
        return carver.used;
    }
    int64_t scratch_bytes(int64_t images) {
        return shared_bytes(images, Carver{nullptr}) +
               threads * max(call.packing_bytes(), Scratch(*this, Carver{nullptr}).bytes);
    }

    // Images of a round: as many as the shared buffers may hold
    int64_t round_images() {
        const int64_t fixed = shared_bytes(0, Carver{nullptr});
        const int64_t each = shared_bytes(1, Carver{nullptr}) - fixed;
        return max(1, min(call.batch, call.round_bytes() / max(1, each)));
    }

    int64_t run() {
        const int64_t round = round_images();
        char* buffer = gspn::call_buffer(shared_bytes(round, Carver{nullptr}));
        if (!buffer) return GSPN_NO_MEMORY;
        shared_bytes(round, Carver{buffer});
        call.projections = Merging<A>(call.args).run(merged_projections);
        shared.pack();
        int64_t status = GSPN_OK;
        for (call.first = 0; call.first < call.batch && status == GSPN_OK; call.first += round) {
            call.count = min(round, call.batch - call.first);
            status = pack_proxies(call, threads, false);
            if (status == GSPN_OK) status = shared.make(threads);
            const int64_t bytes = Scratch(*this, Carver{nullptr}).bytes;
            const int64_t tasks = call.count * call.blocks * parts;
            if (status == GSPN_OK) status = gspn::parallel_for(tasks, threads, bytes, scan_task, this);
            if (status == GSPN_OK && parts > 1)
                status = gspn::parallel_for(call.count * call.blocks, threads, 0, sum_task, this);
        }
        return status;
    }

    static void scan_task(const void* context, int64_t task, char* memory) {
        const Forward& self = *static_cast<const Forward*>(context);
        Scratch scratch(self, Carver{memory});
        if (self.parts > 1) scratch.out = self.part_outputs + task * self.call.packed_size();
        const int64_t part = task % self.parts, block = task / self.parts % self.call.blocks;
        const int64_t image = self.call.first + task / self.parts / self.call.blocks, n = self.call.directions;
        self.scan(image, block, int(n * part / self.parts), int(n * (part + 1) / self.parts), scratch);
    }

    // The directions begin .. end - 1 of one block of one image
    void scan(int64_t image, int64_t block, int begin, int end, const Scratch& scratch) const {
        const TileRegisters registers;
        const bool pack_whole = call.scans[begin].horizontal;
        const bool unpack_whole = parts == 1 && call.scans[end - 1].horizontal;
        if (pack_whole)
            for (int64_t row = 0; row < call.height; row++)
                call.pack_block_row(call.args.x, image, block, row, scratch.x);
        for (int i = begin; i < end; i++) {
            pack_projections(call, i, block, scratch.w);
            scale_logits(call, i, scratch.w);
            if constexpr (kTiles) pack_projection_tiles(call.tile_depth, call.columns(i), scratch.w, scratch.w_tiles);
            const Geometry& g = call.scans[i];
            const bool pack_here = i == begin && !pack_whole;
            const bool unpack_here = i == end - 1 && parts == 1 && !unpack_whole;
            const Output output = i > begin ? kAdd : call.skip && i == 0 ? kSetWithSkip : kSet;
            for (int64_t t = 0; t < g.lines; t++) {
                if (pack_here) call.pack_block_row(call.args.x, image, block, g.index(t), scratch.x);
                scan_line(image, block, i, t, output, scratch);
                if (unpack_here) call.unpack_block_row(call.args.y, image, block, g.index(t), scratch.out);
            }
        }
        if (unpack_whole)
            for (int64_t row = 0; row < call.height; row++)
                call.unpack_block_row(call.args.y, image, block, row, scratch.out);
    }

    void scan_line(int64_t image, int64_t block, int i, int64_t t, Output output, const Scratch& scratch) const {
        with_weights<true>(call, i, t, [&](auto weights) {
            with_output(output, [&](auto out) { line<out.value, weights.value>(image, block, i, t, scratch); });
        });
    }

    template <int OUT, int WEIGHTS>
    void line(int64_t image, int64_t block, int i, int64_t t, const Scratch& scratch) const {
        const Geometry& g = call.scans[i];
        const int64_t at = g.offset(t, call.pitch * L, L);
        forward_line<OUT, WEIGHTS, columns_of(OUT, WEIGHTS), false>(
            g.places, line_projection<WEIGHTS>(call, image, projections_of(scratch), i, t), scratch.maps,
            shared.line(image, i, t), scratch.state, scratch.state, call.center_of(image, i, block), scratch.x + at,
            scratch.out + at, g.place_stride(call.pitch * L, L), ahead_of(call, g));
    }

    // The output of one block of one image out of the parts
    static void sum_task(const void* context, int64_t task, char*) {
        const Forward& self = *static_cast<const Forward*>(context);
        const Call<A>& call = self.call;
        A* const parts = self.part_outputs + task * self.parts * call.packed_size();
        call.sum_parts(call.args.y, call.first + task / call.blocks, task % call.blocks, self.parts, parts);
    }
};

}  // namespace
}  // namespace GSPN_NS
