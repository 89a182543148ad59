// Weights that all channels share (groups = 1). They are made once for each pixel and direction, before the scans, and
// a scan broadcasts them. Backward, a scan only adds up over the channels what their gradients are made of
// (Differences); what comes before that, back to the proxy and to the projections, again happens once for each pixel.
//
// In both passes a pixel has one row of logits, of all scans: logit k of scan i is the lane 3 i + k. To be normalised
// they are transposed, so that the lanes are pixels.
#pragma once
#include "propagate/call.h"
#include "scan/weights.h"

namespace GSPN_NS {
namespace {

template <class A> struct SharedWeights {
    static constexpr int L = kLanes<A>;
    static constexpr int kMostLogits = 4 * kNeighbours;
    static constexpr int kColumns = (kMostLogits + L - 1) / L;  // vectors of a pixel's logits
    static constexpr int kRow = kColumns * L;

    const Call<A>& call;
    A* w = nullptr;        // packed projections of the logits: [features][row of logits]
    A* weights = nullptr;  // [image of the round][scan][neighbour][row][column], rows at the pitch of packed blocks

    explicit SharedWeights(const Call<A>& c) : call(c) {}

    void carve(Carver& carver, int64_t images) {
        if (!call.shared) return;
        w = carver.take<A>(call.features.count * kRow);
        weights = carver.take<A>(images * call.directions * kNeighbours * plane());
    }

    int64_t plane() const { return call.height * call.pitch; }
    int logits() const { return call.directions * kNeighbours; }
    A* plane_of(int64_t image, int i) const {
        return weights + ((image - call.first) * call.directions + i) * kNeighbours * plane();
    }

    SharedLine<A> line(int64_t image, int i, int64_t t) const {
        if (!call.shared) return {nullptr, 0, 0};
        const Geometry& g = call.scans[i];
        return {plane_of(image, i) + g.offset(t, call.pitch, 1), g.place_stride(call.pitch, 1), plane()};
    }

    // Once a call
    void pack() const {
        if (!call.shared) return;
        const int64_t features = call.features.count;
        fill_zero(w, features * kRow);
        for (int j = 0; j < logits(); j++) {
            const A* const from = call.projection(j / kNeighbours, j % kNeighbours, 0);
            for (int64_t s = 0; s < features; s++) w[s * kRow + j] = from[s];
        }
    }

    // Once a round
    int64_t make(int64_t threads) const {
        if (!call.shared) return GSPN_OK;
        threads = threads_for(call.count * call.pixels * (call.features.count + kRow), threads);
        return gspn::parallel_for(call.count * call.height, threads, 0, row_task, this);
    }

    static void row_task(const void* context, int64_t task, char*) {
        const SharedWeights& self = *static_cast<const SharedWeights*>(context);
        const Call<A>& call = self.call;
        const int64_t image = call.first + task / call.height, row = task % call.height;
        A lanes[kRow * L];
        for (int64_t p = 0; p < call.width; p += L) {
            const int n = int(min(L, call.width - p));
            self.project_pixels(image, row, p, n, lanes);
            for (int i = 0; i < call.directions; i++) {
                const Triple<VecOf<A>> made = form_weights<kLogits>(logits_of(lanes, i), self.edges(i, row, p));
                A* const to = self.plane_of(image, i) + row * call.pitch + p;
                store_n(to, made.prev, n);
                store_n(to + self.plane(), made.same, n);
                store_n(to + 2 * self.plane(), made.next, n);
            }
        }
    }

    // The logits of n <= L pixels of a row of an image: [logit][pixel]
    void project_pixels(int64_t image, int64_t row, int64_t p, int n, A* lanes) const {
        A maps[L * kRow];
        const int64_t step = call.proxy_column();
        const A* const proxy = call.proxy_of(image) + row * call.proxy_row() + p * step;
        project<kColumns>(n, proxy, step, call.features.count, w, kRow, maps);
        pack_row(maps, kRow, 1, n, L, logits(), lanes, L);
    }
    static Triple<VecOf<A>> logits_of(const A* lanes, int i) {
        const A* const from = lanes + i * kNeighbours * L;
        return {load(from), load(from + L), load(from + 2 * L)};
    }

    // Of the pixels from p on in a row, for scan i
    Edges<VecOf<A>> edges(int i, int64_t row, int64_t p) const {
        const Geometry& g = call.scans[i];
        if (g.horizontal) return edges_of_place<VecOf<A>>(row, g.places);
        return edges_of_places<true, VecOf<A>>(p, g.places);
    }
};

// The way back, for a team of workers. Sums of differences have a copy for each worker among blocks, those of the
// projections one for each worker; copies are added up in order.
template <class A> struct SharedGradients {
    typedef SharedWeights<A> Weights;
    static constexpr int L = kLanes<A>, kRow = Weights::kRow, kStrip = 32;
    static constexpr int kDifferences = 2;

    const Call<A>& call;
    const Weights& weights;
    int64_t copies = 0, workers = 0;
    A* sums = nullptr;  // [copy][image of the round][scan][prev, next][line][place], lines as they lie in the map
    A* dw = nullptr;    // [worker][features][row of logits]
    A* wt = nullptr;    // transposed projections, see Features
    A* dproxy = nullptr;

    explicit SharedGradients(const Weights& w) : call(w.call), weights(w) {}

    void carve(Carver& carver, int64_t images, int64_t copies_, int64_t workers_) {
        if (!call.shared) return;
        copies = copies_, workers = workers_;
        sums = carver.take<A>(copies * images * image_size());
        dw = carver.take<A>(workers * dw_size());
        wt = carver.take<A>(call.features.rows() * kRow);
    }

    int64_t image_size() const { return call.directions * kDifferences * call.pixels; }
    int64_t dw_size() const { return call.features.count * kRow; }
    A* sums_of(int64_t copy, int64_t image, int i) const {
        return sums + (copy * call.count + image - call.first) * image_size() + i * kDifferences * call.pixels;
    }

    // Once a call
    void prepare() const {
        if (!call.shared) return;
        transpose_projections(call.features, Weights::kColumns, weights.w, wt);
        fill_zero(dw, workers * dw_size());
    }

    void clear_sums(int64_t copy, int64_t image, int begin, int end) const {
        if (call.shared) fill_zero(sums_of(copy, image, begin), (end - begin) * kDifferences * call.pixels);
    }

    // The differences of n places from p on, of one block of channels
    void add(int64_t copy, int64_t image, int i, int64_t t, int64_t p, int64_t n, const Differences<A>& from) const {
        const Geometry& g = call.scans[i];
        A* const to = sums_of(copy, image, i) + g.index(t) * g.places + p;
        add_lane_sums(from.prev, n, to);
        add_lane_sums(from.next, n, to + call.pixels);
    }
    // to[i] += sum of the lanes of vector i
    static void add_lane_sums(const A* vectors, int64_t n, A* to) {
        for (int64_t i = 0; i < n; i += L) {
            const int count = int(min(L, n - i));
            VecOf<A> v[L];
            for (int j = 0; j < L; j++) v[j] = load(vectors + (i + (j < count ? j : 0)) * L);
            const VecOf<A> sum = sums_of_lanes(v);
            store_n(to + i, load_n(to + i, count) + sum, count);
        }
    }

    // Once a round: adds to the gradients of the proxy, [image of the round][row][column][lanes of the features]
    int64_t pass_on(A* to) {
        if (!call.shared) return GSPN_OK;
        dproxy = to;
        const int64_t bytes = int64_t(sizeof(A)) * call.width * kRow;
        return gspn::parallel_for(workers, workers, bytes, worker_task, this);
    }

    static void worker_task(const void* context, int64_t worker, char* memory) {
        const SharedGradients& self = *static_cast<const SharedGradients*>(context);
        const int64_t rows = self.call.count * self.call.height;
        for (int64_t row = rows * worker / self.workers; row < rows * (worker + 1) / self.workers; row++)
            self.pass_on_row(row, reinterpret_cast<A*>(memory), self.dw + worker * self.dw_size());
    }

    void pass_on_row(int64_t row_of_round, A* dlogits, A* dw_) const {
        const int64_t image = call.first + row_of_round / call.height, row = row_of_round % call.height;
        const int64_t step = call.proxy_column(), lanes = call.features.lanes();
        const A* const proxy = call.proxy_of(image) + row * call.proxy_row();
        for (int64_t p = 0; p < call.width; p += L) logits_back(image, row, p, dlogits + p * kRow);
        clear_starts(row, dlogits);
        for (int64_t p = 0; p < call.width; p += kStrip) {
            const int64_t n = min(kStrip, call.width - p);
            const A* const from = dlogits + p * kRow;
            project_grad<Weights::kColumns>(n, proxy + p * step, step, call.features.count, from, dw_, kRow);
            proxy_grad(
                call.features, n, from, Weights::kColumns, Weights::kColumns, wt,
                dproxy + (row_of_round * call.width + p) * lanes, lanes);
        }
    }

    // The gradients of the logits of the pixels from p on, at most L: [pixel][row of logits]
    void logits_back(int64_t image, int64_t row, int64_t p, A* dlogits) const {
        typedef VecOf<A> V;
        const int n = int(min(L, call.width - p));
        A lanes[kRow * L];
        weights.project_pixels(image, row, p, n, lanes);
        for (int i = 0; i < call.directions; i++) {
            const Edges<V> edges = weights.edges(i, row, p);
            const Slopes<V> slopes = normalise_with_slopes(Weights::logits_of(lanes, i), edges);
            // up to a number that all three have in common, and which has no influence
            const Triple<V> dweights = {difference(image, i, 0, row, p, n), V{}, difference(image, i, 1, row, p, n)};
            const Triple<V> d = weight_gradient<kLogits>(dweights, slopes, edges);
            A* const to = lanes + i * kNeighbours * L;
            store(to, d.prev), store(to + L, d.same), store(to + 2 * L, d.next);
        }
        fill_zero(lanes + weights.logits() * L, (kRow - weights.logits()) * L);
        for (int c = 0; c < Weights::kColumns; c++) pack_row(lanes + c * L * L, L, 1, L, L, n, dlogits + c * L, kRow);
    }

    VecOf<A> difference(int64_t image, int i, int which, int64_t row, int64_t p, int n) const {
        const Geometry& g = call.scans[i];
        VecOf<A> sum{};
        for (int64_t copy = 0; copy < copies; copy++) {
            const A* const from = sums_of(copy, image, i) + which * call.pixels;
            if (!g.horizontal) {
                sum = sum + load_n(from + row * g.places + p, n);
            } else {
                A column[L] = {};
                gather(from + p * g.places + row, g.places, n, column);
                sum = sum + load(column);
            }
        }
        return sum;
    }

    // Lines that start a segment have no weights.
    void clear_starts(int64_t row, A* dlogits) const {
        for (int i = 0; i < call.directions; i++) {
            const Geometry& g = call.scans[i];
            const auto clear = [&](int64_t column) {
                fill_zero(dlogits + column * kRow + i * kNeighbours, kNeighbours);
            };
            if (g.horizontal)
                for (int64_t t = 0; t < g.lines; t += g.segment) clear(g.index(t));
            else if (g.starts_segment(g.index(row)))  // index is its own inverse
                for (int64_t column = 0; column < call.width; column++) clear(column);
        }
    }

    // Once a call: the gradients of the projections of the logits of scan i
    void write(int i) const {
        if (!call.shared) return;
        for (int k = 0; k < kNeighbours; k++) {
            A* const to = call.dprojection(i, k, 0);
            for (int64_t s = 0; s < call.features.count; s++) {
                A sum = 0;
                for (int64_t worker = 0; worker < workers; worker++)
                    sum += dw[worker * dw_size() + s * kRow + i * kNeighbours + k];
                to[s] = sum;
            }
        }
    }
};

}  // namespace
}  // namespace GSPN_NS
