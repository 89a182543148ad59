// The gradient of the weight of a depthwise convolution with stride 1 that keeps the size of the map, for one
// instruction set:
//
//     dweight[c,ki,kj] = sum over images, i and j of grad_y[c,i,j] x[c,i+ki-K/2,j+kj-K/2]
//
// A task takes a block of as many channels as a vector has lanes, of a range of images. It packs the rows that it needs
// and adds up in three steps, so that no sum of floats has many terms: a row of the map in registers, some images in
// the first-level cache, then all of the range. The ranges are added up in their order. What lies outside the map
// adds nothing: not even NaN, where grad_y is infinite.
#include "maps.h"
#include "parallel.h"

namespace GSPN_NS {
namespace {

constexpr int64_t kPixelsPerSum = 512;    // after which a sum in the first-level cache is added to the range's
constexpr int64_t kThreadWork = 4000000;  // multiply-adds that are worth a thread of their own
constexpr int64_t kTasksPerThread = 4;

// sums[kj] += sum over j of g[j] x[j+kj-K/2], for packed rows g and x of the map
template <int K, class A> void add_row(const A* g, const A* x, int64_t width, A* sums) {
    typedef VecOf<A> V;
    constexpr int L = kLanes<A>, reach = K / 2;
    V sum[K] = {};
    const auto add_at_edge = [&](int64_t j, int64_t end) {
        for (; j < end; j++) {
            const V gj = load(g + j * L);
#pragma GCC unroll 7
            for (int k = 0; k < K; k++) {
                const int64_t at = j + k - reach;
                if (at >= 0 && at < width) sum[k] = fma(gj, load(x + at * L), sum[k]);
            }
        }
    };
    const int64_t first = min(reach, width), last = max(first, width - reach);
    add_at_edge(0, first);
    for (int64_t j = first; j < last; j++) {
        const V gj = load(g + j * L);
#pragma GCC unroll 7
        for (int k = 0; k < K; k++) sum[k] = fma(gj, load(x + (j + k - reach) * L), sum[k]);
    }
    add_at_edge(last, width);
#pragma GCC unroll 7
    for (int k = 0; k < K; k++) store(sums + k * L, load(sums + k * L) + sum[k]);
}

template <class A> using AddRow = void (*)(const A*, const A*, int64_t, A*);

template <class A> struct Job {
    static constexpr int L = kLanes<A>;

    const GspnDepthwiseArgs& args;
    AddRow<A> add_row;
    int64_t taps, blocks, ranges, threads;
    A* parts = nullptr;  // [range][block][tap][lane]

    Job(const GspnDepthwiseArgs& a, AddRow<A> add)
        : args(a), add_row(add), taps(a.kernel * a.kernel), blocks(ceil_div(a.channels, L)) {
        const int64_t work = a.batch * a.height * a.width * blocks * L * taps;
        threads = clamp(work / kThreadWork, 1, max(1, a.threads));
        ranges = threads == 1 ? 1 : clamp(ceil_div(kTasksPerThread * threads, blocks), 1, max(1, a.batch));
    }

    int64_t row_size() const { return args.width * L; }
    int64_t scratch_bytes() const { return ((args.kernel + 1) * row_size() + taps * L) * int64_t(sizeof(A)); }
    A* part(int64_t range, int64_t block) const { return parts + (range * blocks + block) * taps * L; }
    int lanes_of(int64_t block) const { return int(min(L, args.channels - block * L)); }

    void pack(const GspnView& map, int64_t image, int64_t block, int64_t row, A* to) const {
        const auto pack = [&](auto* from) {
            pack_adjacent_channels(from, map.column, lanes_of(block), L, args.width, to, L);
        };
        if constexpr (sizeof(A) == 8) pack(row_of<const double>(map, image, block * L, row));
        else if (args.dtype == GSPN_BFLOAT16) pack(row_of<const bf16>(map, image, block * L, row));
        else if (args.dtype == GSPN_FLOAT16) pack(row_of<const fp16>(map, image, block * L, row));
        else pack(row_of<const float>(map, image, block * L, row));
    }

    // Row r of x lies in place r % kernel of a ring, and makes way for row r + kernel.
    void add_image(int64_t image, int64_t block, A* g, A* ring, A* sums) const {
        const int64_t kernel = args.kernel, reach = kernel / 2;
        int64_t packed = 0;
        for (int64_t row = 0; row < args.height; row++) {
            pack(args.grad_y, image, block, row, g);
            for (; packed < min(row + reach + 1, args.height); packed++)
                pack(args.x, image, block, packed, ring + packed % kernel * row_size());
            for (int64_t from = max(0, row - reach); from < packed; from++)
                add_row(g, ring + from % kernel * row_size(), args.width, sums + (from - row + reach) * kernel * L);
        }
    }
};

template <class A> void add_range(const void* context, int64_t task, char* scratch) {
    const Job<A>& job = *static_cast<const Job<A>*>(context);
    const int64_t block = task % job.blocks, range = task / job.blocks, size = job.taps * job.L;
    const int64_t batch = job.args.batch, pixels = job.args.height * job.args.width;
    A* const sums = reinterpret_cast<A*>(scratch);
    A* const g = sums + size;
    A* const part = job.part(range, block);
    fill_zero(sums, size);
    fill_zero(part, size);
    int64_t pending = 0;
    for (int64_t image = range * batch / job.ranges, end = (range + 1) * batch / job.ranges; image < end; image++) {
        job.add_image(image, block, g, g + job.row_size(), sums);
        pending += pixels;
        if (pending < kPixelsPerSum && image + 1 < end) continue;
        for (int64_t at = 0; at < size; at += job.L) store(part + at, load(part + at) + load(sums + at));
        fill_zero(sums, size);
        pending = 0;
    }
}

template <class A> void sum_ranges(const void* context, int64_t block, char*) {
    const Job<A>& job = *static_cast<const Job<A>*>(context);
    const int64_t size = job.taps * job.L;
    A* const sum = job.part(0, block);
    for (int64_t range = 1; range < job.ranges; range++) {
        const A* const part = job.part(range, block);
        for (int64_t at = 0; at < size; at += job.L) store(sum + at, load(sum + at) + load(part + at));
    }
    A* const dweight = static_cast<A*>(job.args.dweight) + block * job.L * job.taps;
    for (int c = 0; c < job.lanes_of(block); c++)
        for (int64_t tap = 0; tap < job.taps; tap++) dweight[c * job.taps + tap] = sum[tap * job.L + c];
}

template <class A> int64_t run(const GspnDepthwiseArgs& args) {
    const AddRow<A> add = args.kernel == 5 ? add_row<5, A> : args.kernel == 7 ? add_row<7, A> : nullptr;
    if (!add || args.x.channel != 1 || args.grad_y.channel != 1) return GSPN_BAD_ARGUMENT;
    Job<A> job(args, add);
    job.parts =
        reinterpret_cast<A*>(gspn::call_buffer(job.ranges * job.blocks * job.taps * job.L * int64_t(sizeof(A))));
    if (!job.parts) return GSPN_NO_MEMORY;
    const int64_t status =
        gspn::parallel_for(job.ranges * job.blocks, job.threads, job.scratch_bytes(), add_range<A>, &job);
    return status ? status : gspn::parallel_for(job.blocks, job.threads, 0, sum_ranges<A>, &job);
}

}  // namespace

int64_t depthwise_dweight(const GspnDepthwiseArgs& args) {
    if (args.dtype < GSPN_FLOAT32 || args.dtype > GSPN_FLOAT64) return GSPN_BAD_ARGUMENT;
    return args.dtype == GSPN_FLOAT64 ? run<double>(args) : run<float>(args);
}

}  // namespace GSPN_NS
