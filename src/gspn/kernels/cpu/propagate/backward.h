// propagate, backward. Nothing but x and the proxy comes from the forward: in every direction the states are computed
// again (of one block of channels at a time), then the lines are scanned backwards, and the gradients of the projected
// maps go, strip by strip out of the first-level cache, into those of the projections and of the proxy.
//
// Sums over images, blocks and directions must not depend on which thread comes first. So work is dealt out in advance
// to a team of workers, and what several workers add to has a copy for each of them, added up in order at the end.
#pragma once
#include "propagate/forward.h"

namespace GSPN_NS {
namespace {

constexpr int64_t kBackwardStrip = 32;
static_assert(!kTiles || (kBackwardStrip == kTileStrip && LineBundles::kMost % kBackwardStrip == 0));

// The backward scan needs the projected maps again. From this many features on it is faster to keep those of a
// direction than to project twice, as long as they fit the second-level cache about.
constexpr int64_t kKeepFeatures = 12, kKeepMapsBytes = int64_t(4) << 20;

template <int OUT, int WEIGHTS, class A>
void backward_strip(
    int64_t n, bool first, bool last, const A* maps, const SharedLine<A>& shared, const A* now, const A* before,
    A* message, Carried<VecOf<A>>& carried, const A* x, const A* grad_y, A* dmaps, const Differences<A>& differences,
    A* dx, int64_t step) {
    constexpr int L = kLanes<A>, columns = columns_of(OUT, WEIGHTS);
    Carried<VecOf<A>> c = carried;  // a copy of its own stays in registers
    const auto pixel = [&](auto end, int64_t i) __attribute__((always_inline)) {
        const int64_t m = i * columns * L, s = i * L, at = i * step;
        backward_pixel<WEIGHTS, end.value, OUT>(
            maps + m, shared.from(i), now + s, before + s, message + s, c, x + at, grad_y + at, dmaps + m,
            differences.from(s), dx + at);
    };
    int64_t i = 0;
    if (first && last && n == 1) {
        pixel(Known<kOnly>{}, 0);
    } else {
        if (first) pixel(Known<kFirst>{}, i++);
        for (; i < n - last; i++) pixel(Known<kInside>{}, i);
        if (last) pixel(Known<kLast>{}, i);
    }
    carried = c;
}

// Lanes without a channel multiply 0 by whatever the proxy is; a NaN must not get from there into the proxy's gradient.
template <class A> void clear_lanes(int64_t vectors, int lanes, A* p) {
    constexpr int L = kLanes<A>;
    for (int64_t i = 0; i < vectors; i++)
        for (int c = lanes; c < L; c++) p[i * L + c] = 0;
}

template <class A> struct Backward {
    static constexpr int L = kLanes<A>;

    // The team: worker i of `images` has images i, i + images, ...; it has a range of blocks and a range of directions.
    struct Team {
        int64_t images, blocks, parts;
        int64_t workers() const { return images * blocks * parts; }
        int64_t proxy_copies() const { return blocks * parts; }
    };

    Call<A>& call;
    const bool keep;  // projected maps, of all lines of a direction
    SharedWeights<A> shared;
    SharedGradients<A> dshared;
    Team team;
    A* dw = nullptr;        // [worker among images][scan][block][features][columns][lanes]
    A* dproxy = nullptr;    // [worker among blocks and parts][image of the round][row][column][lanes of the features]
    A* dx_parts = nullptr;  // [image of the round][block][part][packed block], where there are parts

    struct Scratch {
        A *x, *grad_y, *dx, *h, *message, *sum, *maps, *dmaps, *w, *wt;
        bf16 *w_tiles, *wt_tiles;
        GradientTiles<A> gradients;
        Differences<A> differences;
        Scratch(const Backward& self, Carver carver) : gradients(carver) {
            const Call<A>& call = self.call;
            x = carver.take<A>(call.packed_size());
            grad_y = carver.take<A>(call.packed_size());
            dx = carver.take<A>(self.team.parts > 1 ? 0 : call.packed_size());
            h = carver.take<A>(call.pixels * L);
            message = carver.take<A>(max(call.height, call.width) * L);
            sum = carver.take<A>(L);  // of the gradients of the gated inputs of a scan
            maps = carver.take<A>(self.maps_size());
            dmaps = carver.take<A>(kBackwardStrip * kMapsOfPixel);
            w = carver.take<A>(call.w_size());
            wt = carver.take<A>(call.wt_size());
            w_tiles = carver.take<bf16>(call.w_tiles_size());
            wt_tiles = carver.take<bf16>(call.wt_tiles_size());
            differences = {carver.take<A>(kBackwardStrip * L), carver.take<A>(kBackwardStrip * L)};
            bytes = carver.used;
        }
        int64_t bytes;
    };

    explicit Backward(Call<A>& p) : call(p), keep(keep_maps(p)), shared(p), dshared(shared), team{1, 1, 1} {
        int64_t threads = call.useful_threads();
        choose_team(threads);
        while (threads > 1 && scratch_bytes(1) > call.workspace() - call.round_bytes()) choose_team(--threads);
    }

    static constexpr int64_t kMapsOfPixel = kMostColumns * L;
    static bool keep_maps(const Call<A>& call) {
        return call.features.count >= kKeepFeatures && kept_maps(call) * int64_t(sizeof(A)) <= kKeepMapsBytes;
    }
    static int64_t kept_maps(const Call<A>& call) {
        int64_t size = 0;
        for (int i = 0; i < call.directions; i++)
            size = max(size, call.scans[i].lines * kept_maps_of_line(call.scans[i]));
        return size;
    }
    static int64_t kept_maps_of_line(const Geometry& g) {  // tiles are written as a whole
        return (kTiles ? round_up(g.places, kTileRows) : g.places) * kMapsOfPixel;
    }
    int64_t maps_size() const { return keep ? kept_maps(call) : max(kForwardStrip, kBackwardStrip) * kMapsOfPixel; }

    // The split that is ready first; among equals the one with the smallest buffers.
    void choose_team(int64_t threads) {
        int64_t best_time = INT64_MAX, best_bytes = INT64_MAX;
        Team best = {1, 1, 1};
        for (int64_t images = 1; images <= min(threads, max(1, call.batch)); images++)
            for (int64_t blocks = 1; blocks <= min(threads / images, call.blocks); blocks++)
                for (int64_t parts = 1; parts <= min(threads / images / blocks, call.directions); parts++) {
                    int64_t time = 4 * ceil_div(call.batch, images) * ceil_div(call.blocks, blocks) *
                                   ceil_div(call.directions, parts);
                    if (parts > 1) time += time / 4;  // for the copies that parts of the directions write and add up
                    team = {images, blocks, parts};
                    const int64_t bytes = time <= best_time ? scratch_bytes(images) : 0;
                    if (time > best_time || (time == best_time && bytes >= best_bytes)) continue;
                    best = team, best_time = time, best_bytes = bytes;
                }
        team = best;
    }

    int64_t dw_at(int i, int64_t block) const {
        const int64_t scans_before = (call.logits() + 2) * i + (call.skip && i > 0);
        const int64_t columns_before = call.blocks * scans_before + block * call.columns(i);
        return columns_before * call.features.count * L;
    }
    int64_t dw_size() const { return dw_at(call.directions, 0); }
    int64_t dproxy_size() const { return call.pixels * call.features.lanes(); }

    __attribute__((noinline)) int64_t shared_bytes(int64_t images, Carver carver) {
        dw = carver.take<A>(team.images * dw_size());
        call.packed_proxy = carver.take<A>(call.packed_proxy_size(images));
        call.proxy_tiles = carver.take<bf16>(call.proxy_tiles_size(images));
        for (int horizontal = 0; horizontal < 2; horizontal++)
            call.proxy_bundles[horizontal] = carver.take<bf16>(call.proxy_bundles_size(images, horizontal));
        dproxy = carver.take<A>(team.proxy_copies() * images * dproxy_size());
        shared.carve(carver, images);
        dshared.carve(carver, images, team.blocks, team.workers());
        dx_parts = carver.take<A>(team.parts > 1 ? images * call.blocks * team.parts * call.packed_size() : 0);
        return carver.used;
    }
    __attribute__((noinline)) int64_t scratch_bytes(int64_t images) {
        return shared_bytes(images, Carver{nullptr}) +
               team.workers() * max(call.packing_bytes(), Scratch(*this, Carver{nullptr}).bytes);
    }

    // Images of a round: as many as the shared buffers may hold, but one for each worker
    int64_t round_images() {
        const int64_t fixed = shared_bytes(0, Carver{nullptr});
        const int64_t each = shared_bytes(1, Carver{nullptr}) - fixed;
        return max(1, min(call.batch, max(team.images, call.round_bytes() / max(1, each) / team.images * team.images)));
    }

    int64_t run() {
        const int64_t round = round_images(), threads = team.workers();
        char* buffer = gspn::call_buffer(shared_bytes(round, Carver{nullptr}));
        if (!buffer) return GSPN_NO_MEMORY;
        shared_bytes(round, Carver{buffer});
        const int64_t bytes = Scratch(*this, Carver{nullptr}).bytes;
        int64_t status = GSPN_OK;
        shared.pack();
        dshared.prepare();
        do {  // even without any image, for the gradients of the projections
            call.count = min(round, call.batch - call.first);
            status = pack_proxies(call, threads, true);
            if (status == GSPN_OK) status = shared.make(threads);
            if (status == GSPN_OK) status = gspn::parallel_for(threads, threads, bytes, worker_task, this);
            if (status == GSPN_OK) status = dshared.pass_on(dproxy);
            if (status == GSPN_OK) status = write_round(threads);
            call.first += round;
        } while (call.first < call.batch && status == GSPN_OK);
        if (status == GSPN_OK) status = write_projections(threads);
        return status;
    }

    // One worker's share of a round

    static void worker_task(const void* context, int64_t worker, char* memory) {
        const Backward& self = *static_cast<const Backward*>(context);
        const Call<A>& call = self.call;
        const Team& team = self.team;
        const int64_t part = worker % team.parts, among_blocks = worker / team.parts % team.blocks;
        const int64_t among_images = worker / team.parts / team.blocks;
        const int begin = int(call.directions * part / team.parts);
        const int end = int(call.directions * (part + 1) / team.parts);
        const int64_t first_block = call.blocks * among_blocks / team.blocks;
        const int64_t end_block = call.blocks * (among_blocks + 1) / team.blocks;

        A* const dw = self.dw + among_images * self.dw_size();
        if (call.first == 0)
            for (int i = begin; i < end; i++) {
                const int64_t from = self.dw_at(i, first_block), to = self.dw_at(i, end_block);
                fill_zero(dw + from, to - from);
            }
        for (int64_t image = among_images; image < call.count; image += team.images) {
            A* const dproxy = self.dproxy + ((worker % team.proxy_copies()) * call.count + image) * self.dproxy_size();
            fill_zero(dproxy, self.dproxy_size());
            self.dshared.clear_sums(among_blocks, call.first + image, begin, end);
            for (int64_t block = first_block; block < end_block; block++) {
                Scratch scratch(self, Carver{memory});
                if (team.parts > 1)
                    scratch.dx =
                        self.dx_parts + ((image * call.blocks + block) * team.parts + part) * call.packed_size();
                self.scan(Block{call.first + image, block, among_blocks, dw, dproxy, scratch}, begin, end);
            }
        }
    }

    // One block of one image, and where its gradients go
    struct Block {
        int64_t image, block, among_blocks;
        A *dw, *dproxy;
        Scratch scratch;
    };

    // The directions begin .. end - 1. Rows are packed and written as they are scanned where the direction allows.
    void scan(const Block& b, int begin, int end) const {
        const Scratch& scratch = b.scratch;
        const TileRegisters registers;
        const bool pack_whole = call.scans[begin].horizontal;
        const bool unpack_whole = call.scans[end - 1].horizontal;
        if (pack_whole)
            for (int64_t row = 0; row < call.height; row++) {
                call.pack_block_row(call.args.x, b.image, b.block, row, scratch.x);
                call.pack_block_row(call.args.grad_y, b.image, b.block, row, scratch.grad_y);
            }
        for (int i = begin; i < end; i++) {
            pack_projections(call, i, b.block, scratch.w);
            if constexpr (kTiles)
                pack_transposed_tiles(call.features.count, call.columns(i), call.logits(), scratch.w, scratch.wt_tiles);
            else transpose_projections(call.features, call.columns(i), scratch.w, scratch.wt);
            scale_logits(call, i, scratch.w);
            if constexpr (kTiles) pack_projection_tiles(call.tile_depth, call.columns(i), scratch.w, scratch.w_tiles);
            const Geometry& g = call.scans[i];
            const bool pack_here = i == begin && !pack_whole;
            const bool unpack_here = i == end - 1 && team.parts == 1 && !unpack_whole;
            const Output output = i > begin ? kAdd : call.skip && i == 0 ? kSetWithSkip : kSet;
            for (int64_t t = 0; t < g.lines; t++) {
                if (pack_here) call.pack_block_row(call.args.x, b.image, b.block, g.index(t), scratch.x);
                state_line(b, i, t, output);
            }
            fill_zero(scratch.message, g.places * L);
            fill_zero(scratch.sum, L);
            for (int64_t t = g.lines - 1; t >= 0; t--) {
                if (pack_here) call.pack_block_row(call.args.grad_y, b.image, b.block, g.index(t), scratch.grad_y);
                line_back(b, i, t, output);
                if (unpack_here) call.unpack_block_row(call.args.dx, b.image, b.block, g.index(t), scratch.dx);
            }
            if (call.args.dcenter)
                store_n(
                    static_cast<A*>(call.args.dcenter) + call.center_at(b.image, i, b.block), -load(scratch.sum),
                    call.lanes_of(b.block));
        }
        if (unpack_whole && team.parts == 1)
            for (int64_t row = 0; row < call.height; row++)
                call.unpack_block_row(call.args.dx, b.image, b.block, row, scratch.dx);
    }

    // The states of line t again
    void state_line(const Block& b, int i, int64_t t, Output output) const {
        with_weights<false>(call, i, t, [&](auto weights) {
            if (!keep) state_line<kNone, weights.value, false>(b, i, t);
            else if (output == kSetWithSkip) state_line<kSetWithSkip, weights.value, true>(b, i, t);
            else state_line<kSet, weights.value, true>(b, i, t);
        });
    }

    // MAPS: the output whose maps are projected
    template <int MAPS, int WEIGHTS, bool KEEP> void state_line(const Block& b, int i, int64_t t) const {
        const Geometry& g = call.scans[i];
        const int64_t at = g.offset(t, call.pitch * L, L), from = WEIGHTS == kNoWeights ? 0 : g.places * L;
        A* const h = b.scratch.h + t * g.places * L;
        A* const maps = b.scratch.maps + (KEEP ? t * kept_maps_of_line(g) : 0);
        forward_line<kNone, WEIGHTS, columns_of(MAPS, WEIGHTS), KEEP>(
            g.places, line_projection<WEIGHTS>(call, b.image, projections_of(b.scratch), i, t), maps,
            shared.line(b.image, i, t), h - from, h, call.center_of(b.image, i, b.block), b.scratch.x + at,
            b.scratch.dx + at, g.place_stride(call.pitch * L, L), ahead_of(call, g));
    }

    void line_back(const Block& b, int i, int64_t t, Output output) const {
        with_weights<false>(call, i, t, [&](auto weights) {
            with_output(output, [&](auto out) { line_back<out.value, weights.value>(b, i, t); });
        });
    }

    // Strip by strip: scan, and pass the gradients on
    template <int OUT, int WEIGHTS> void line_back(const Block& b, int i, int64_t t) const {
        constexpr int columns = columns_of(OUT, WEIGHTS);
        const Geometry& g = call.scans[i];
        const Scratch& s = b.scratch;
        const auto projection = line_projection<WEIGHTS>(call, b.image, projections_of(s), i, t);
        const SharedLine<A> weights = shared.line(b.image, i, t);
        const int64_t proxy_step = projection.proxy_step, features = call.features.count, w_step = call.columns(i) * L;
        const int64_t step = g.place_stride(call.pitch * L, L), at = g.offset(t, call.pitch * L, L);
        const int64_t row = call.width * call.features.lanes();
        const int64_t dproxy_step = g.place_stride(row, call.features.lanes());
        const A* const h = s.h + t * g.places * L;
        const A* const before = WEIGHTS == kNoWeights ? h : h - g.places * L;
        A* const dproxy = b.dproxy + g.offset(t, row, call.features.lanes());
        A* const dw = b.dw + dw_at(i, b.block) + call.template unused_columns<WEIGHTS>() * L;
        const int lanes = call.lanes_of(b.block);

        const Ahead ahead = ahead_of(call, g);
        const int64_t ahead_dproxy = ahead.map / L * call.features.lanes();
        Carried<VecOf<A>> carried = {};
        for (int64_t p = 0; p < g.places; p += kBackwardStrip) {
            const int64_t n = min(kBackwardStrip, g.places - p), q = at + p * step;
            if (ahead.map) {
                prefetch_places(s.x + q - ahead.map, step, n);
                prefetch_places(s.grad_y + q - ahead.map, step, n);
                prefetch_places(s.dx + q - ahead.map, step, n);
                prefetch_places(projection.proxy + p * proxy_step - ahead.proxy, proxy_step, n);
                prefetch_places(dproxy + p * dproxy_step - ahead_dproxy, dproxy_step, n);
            }
            A* const maps = s.maps + (keep ? t * kept_maps_of_line(g) + p * columns * L : 0);
            if (!keep) projection.template project_strip<columns>(p, n, maps);
            backward_strip<OUT, WEIGHTS>(
                n, p == 0, p + n == g.places, maps, weights.from(p), h + p * L, before + p * L, s.message + p * L,
                carried, s.x + q, s.grad_y + q, s.dmaps, s.differences, s.dx + q, step);
            if (lanes < L) clear_lanes(n * columns, lanes, s.dmaps);
            if constexpr (WEIGHTS == kSharedWeights) {
                if (lanes < L) clear_lanes(n, lanes, s.differences.prev), clear_lanes(n, lanes, s.differences.next);
                dshared.add(b.among_blocks, b.image, i, t, p, n, s.differences);
            }
            if constexpr (kTiles) {
                pass_on_tiles<OUT, WEIGHTS>(b, i, t, p, n, dproxy + p * dproxy_step, dproxy_step);
            } else {
                project_grad<columns>(n, projection.proxy + p * proxy_step, proxy_step, features, s.dmaps, dw, w_step);
                proxy_grad(
                    call.features, n, s.dmaps, columns, call.columns(i), s.wt, dproxy + p * dproxy_step, dproxy_step);
            }
        }
        store(s.sum, load(s.sum) + carried.sum);  // a sum of sums of lines: less rounding than one sum
    }

    // Packs the gradients of a strip, and passes those of its bundle on if they are complete (amx_gradients.h).
    template <int OUT, int WEIGHTS>
    void pass_on_tiles(const Block& b, int i, int64_t t, int64_t p, int64_t n, A* dproxy, int64_t dproxy_step) const {
        constexpr int columns = columns_of(OUT, WEIGHTS), logits = logit_columns(WEIGHTS);
        const Geometry& g = call.scans[i];
        const LineBundles bundles = call.bundles_of(g.horizontal);
        const int64_t line = g.index(t), bundle = line / bundles.together, first = bundle * bundles.together;
        const int64_t features = call.features.count, w_step = call.columns(i) * L;
        const GradientTiles<A>& gradients = b.scratch.gradients;
        const auto add = [&](auto all_columns, auto all_logits, int64_t at, int64_t from, int64_t pixels,
                             bool complete) {
            constexpr int all = all_columns.value, logits_ = all_logits.value;
            gradients.template pack<columns, logits, all>(at, n, b.scratch.dmaps, dproxy, dproxy_step);
            if (complete)
                gradients.template pass_on<all, logits_>(
                    pixels,
                    call.proxy_bundles_of(b.image, g.horizontal) + bundle * bundles.bundle_size(features) + from,
                    bundles.pitch(), features, b.dw + dw_at(i, b.block) + (call.columns(i) - all) * L, w_step,
                    b.scratch.wt_tiles, ceil_div(call.columns(i), 2));
        };
        if (bundles.together == 1) {
            const int64_t from = p / LineBundles::kMost * LineBundles::kMost, end = p + n;
            add(Known<columns>{}, Known<logits>{}, p - from, from, end - from,
                end == g.places || end - from == LineBundles::kMost);
        } else {
            const int64_t lines = min(bundles.together, g.lines - first);
            const bool complete = t == 0 || g.index(t - 1) / bundles.together != bundle;
            const int64_t at = (line - first) * bundles.line_pixels + p, pixels = lines * bundles.line_pixels;
            if constexpr (WEIGHTS == kNoWeights)  // other lines of the bundle have logits
                if (!call.shared)
                    return add(Known<columns + kNeighbours>{}, Known<kNeighbours>{}, at, 0, pixels, complete);
            add(Known<columns>{}, Known<logits>{}, at, 0, pixels, complete);
        }
    }

    // Adding up and writing

    int64_t write_round(int64_t threads) {
        const int64_t proxy_threads = threads_for(call.count * dproxy_size() * team.proxy_copies(), threads);
        int64_t status = gspn::parallel_for(
            call.count * call.height, proxy_threads, sizeof(A) * call.width * L, proxy_row_task, this);
        if (status == GSPN_OK && team.parts > 1)
            status = gspn::parallel_for(call.count * call.blocks, threads, 0, parts_task, this);
        return status;
    }

    int64_t write_projections(int64_t threads) {
        threads = threads_for(dw_size() * team.images, threads);
        return gspn::parallel_for(call.directions, threads, 0, projections_task, this);
    }

    static void proxy_row_task(const void* context, int64_t task, char* memory) {
        const Backward& self = *static_cast<const Backward*>(context);
        const Call<A>& call = self.call;
        const int64_t lanes = call.features.lanes(), size = call.count * self.dproxy_size();
        const int64_t image = call.first + task / call.height, row = task % call.height;
        A* const sum = self.dproxy + task * call.width * lanes;
        A* const packed = reinterpret_cast<A*>(memory);
        for (int64_t at = 0; at < call.width * lanes && self.team.proxy_copies() > 1; at += L) {
            VecOf<A> v = load(sum + at);
            for (int64_t copy = 1; copy < self.team.proxy_copies(); copy++) v = v + load(sum + copy * size + at);
            store(sum + at, v);
        }
        for (int64_t s = 0; s < call.features.count; s += L) {
            const int n = int(min(L, call.features.count - s));
            for (int64_t x = 0; x < call.width; x++)
                for (int c = 0; c < n; c++) packed[x * L + c] = call.features.sum_feature(sum + x * lanes, s + c);
            unpack_map_row(call.args.dtype, packed, L, call.args.dproxy, image, s, row, n, call.width);
        }
    }

    static void parts_task(const void* context, int64_t task, char*) {
        const Backward& self = *static_cast<const Backward*>(context);
        const Call<A>& call = self.call;
        A* const parts = self.dx_parts + task * self.team.parts * call.packed_size();
        call.sum_parts(call.args.dx, call.first + task / call.blocks, task % call.blocks, self.team.parts, parts);
    }

    // The gradients of one direction's projections: added up over the workers that had images of their own, then, of
    // the logits, over the channels of a group
    static void projections_task(const void* context, int64_t task, char*) {
        const Backward& self = *static_cast<const Backward*>(context);
        const Call<A>& call = self.call;
        const int i = int(task);
        self.sum_copies(self.dw + self.dw_at(i, 0), self.dw_at(i, call.blocks) - self.dw_at(i, 0));
        self.dshared.write(i);
        for (int packed = 0; packed < call.columns(i); packed++)
            for (int64_t block = 0; block < call.blocks; block++) {
                const Column column = call.column_at(packed);
                const A* from = self.dw + self.dw_at(i, block) + packed * L;
                const int64_t step = call.columns(i) * L, features = call.features.count;
                if (column < kNeighbours && call.args.groups < call.channels)
                    self.add_to_groups(from, step, i, column, block);
                else
                    unpack_row(
                        from, step, call.dprojection(i, column, block * L), features, 1, call.lanes_of(block),
                        features);
            }
    }

    void sum_copies(A* sum, int64_t size) const {
        for (int64_t copy = 1; copy < team.images; copy++) {
            const A* from = sum + copy * dw_size();
            for (int64_t at = 0; at < size; at += L) store(sum + at, load(sum + at) + load(from + at));
        }
    }

    void add_to_groups(const A* from, int64_t step, int i, int column, int64_t block) const {
        const int64_t per_group = call.channels / call.args.groups;
        for (int64_t c = 0; c < call.lanes_of(block); c++) {
            const int64_t channel = block * L + c;
            A* to = call.dprojection(i, column, channel);
            for (int64_t s = 0; s < call.features.count; s++)
                to[s] = (channel % per_group ? to[s] : 0) + from[s * step + c];
        }
    }
};

}  // namespace
}  // namespace GSPN_NS
