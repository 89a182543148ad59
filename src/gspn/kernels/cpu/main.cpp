// Entry points: choose the instruction set, run the tasks on threads, own the scratch memory.
#include "api.h"
#include "parallel.h"

#include <stdlib.h>
#include <sys/mman.h>

#ifdef GSPN_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#define GSPN_FOR_EACH_ISA(X) X(gspn_portable) X(gspn_avx2) X(gspn_avx512)
#else
#define GSPN_FOR_EACH_ISA(X) X(gspn_portable)
#endif
#define GSPN_DECLARE(isa)                                 \
    namespace isa {                                       \
    int64_t scan_forward(const GspnScanArgs&);            \
    int64_t scan_backward(const GspnScanArgs&);           \
    int64_t propagate(const GspnPropagateArgs&);          \
    int64_t propagate_backward(const GspnPropagateArgs&); \
    int64_t propagate_scratch(const GspnPropagateArgs&);  \
    int64_t depthwise_dweight(const GspnDepthwiseArgs&);  \
    }
GSPN_FOR_EACH_ISA(GSPN_DECLARE)
#ifdef GSPN_AMX
GSPN_DECLARE(gspn_amx)
#endif

namespace {

struct Kernels {
    int64_t (*scan_forward)(const GspnScanArgs&);
    int64_t (*scan_backward)(const GspnScanArgs&);
    int64_t (*propagate)(const GspnPropagateArgs&);
    int64_t (*propagate_backward)(const GspnPropagateArgs&);
    int64_t (*propagate_scratch)(const GspnPropagateArgs&);
    int64_t (*depthwise_dweight)(const GspnDepthwiseArgs&);
};
#define GSPN_TABLE(isa)                                               \
    {isa::scan_forward,       isa::scan_backward,     isa::propagate, \
     isa::propagate_backward, isa::propagate_scratch, isa::depthwise_dweight},
const Kernels kernels[] = {
    GSPN_FOR_EACH_ISA(GSPN_TABLE)
#ifdef GSPN_AMX
        {gspn_avx512::scan_forward, gspn_avx512::scan_backward, gspn_amx::propagate, gspn_amx::propagate_backward,
         gspn_amx::propagate_scratch, gspn_avx512::depthwise_dweight},
#endif
};

#ifdef GSPN_AMX
constexpr long kSupportedFeatures = 0x1021, kRequestFeature = 0x1023, kTileData = 18;  // of arch_prctl

bool has_amx() {
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16 | tile)) != (bf16 | tile)) return false;
    unsigned long features = 0;
    return syscall(SYS_arch_prctl, kSupportedFeatures, &features) == 0 && (features >> kTileData & 1);
}
#else
bool has_amx() { return false; }
#endif

int64_t find_best_isa() {
#ifdef GSPN_X86
    __builtin_cpu_init();
    unsigned a, b, c, d;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);  // which Clang 14 cannot be asked for
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !f16c) return GSPN_ISA_PORTABLE;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!avx512) return GSPN_ISA_AVX2;
    return has_amx() ? GSPN_ISA_AMX : GSPN_ISA_AVX512;
#else
    return GSPN_ISA_PORTABLE;
#endif
}

// Asked once
int64_t best_isa() {
    static const int64_t best = find_best_isa();
    return best;
}

// Null if this machine does not have the instruction set.
const Kernels* kernels_for(int64_t isa) {
    const int64_t best = best_isa();
    if (isa == GSPN_ISA_BEST) isa = best;
    return isa >= 0 && isa <= best ? &kernels[isa] : nullptr;
}

// ---- scratch -------------------------------------------------------------------------------------------------------

constexpr int64_t kKeepBytes = int64_t(64) << 20;  // a thread's larger buffers are given back at the end of the call
constexpr int64_t kPage = 4096, kHugePage = int64_t(2) << 20;
int64_t scratch_now = 0, scratch_peak = 0;  // bytes over all threads; atomic

void count_scratch(int64_t change) {
    const int64_t now = __atomic_add_fetch(&scratch_now, change, __ATOMIC_RELAXED);
    int64_t peak = __atomic_load_n(&scratch_peak, __ATOMIC_RELAXED);
    while (now > peak &&
           !__atomic_compare_exchange_n(&scratch_peak, &peak, now, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

// A buffer that grows and is kept: fresh memory costs a page fault for every page, often more than the kernel does.
class Buffer {
public:
    ~Buffer() { release(); }

    char* reserve(int64_t bytes) {
        if (bytes <= size_) return data_;
        release();
        const int64_t page = bytes >= 2 * kHugePage ? kHugePage : kPage, rounded = (bytes + page - 1) / page * page;
        void* data = nullptr;
        if (posix_memalign(&data, size_t(page), size_t(rounded)) != 0) return nullptr;
#ifdef MADV_HUGEPAGE
        if (page == kHugePage) madvise(data, size_t(rounded), MADV_HUGEPAGE);
#endif
        data_ = static_cast<char*>(data);
        size_ = rounded;
        count_scratch(size_);
        return data_;
    }

    void trim() {
        if (size_ > kKeepBytes) release();
    }

private:
    void release() {
        free(data_);
        count_scratch(-size_);
        data_ = nullptr;
        size_ = 0;
    }

    char* data_ = nullptr;
    int64_t size_ = 0;
};

thread_local Buffer task_buffer, whole_call_buffer;
thread_local int64_t threads_to_trim = 0;  // of the call that this thread is making

}  // namespace

namespace gspn {

bool tiles_permitted() {
#ifdef GSPN_AMX
    static const bool permitted = syscall(SYS_arch_prctl, kRequestFeature, kTileData) == 0;
    return permitted;
#else
    return false;
#endif
}

int64_t parallel_for(int64_t tasks, int64_t threads, int64_t scratch_bytes, TaskBody body, const void* context) {
    if (tasks <= 0) return GSPN_OK;
    if (threads > tasks) threads = tasks;
    if (scratch_bytes > kKeepBytes && threads > threads_to_trim) threads_to_trim = threads;
    if (threads <= 1) {
        char* scratch = task_buffer.reserve(scratch_bytes + 1);
        if (!scratch) return GSPN_NO_MEMORY;
        for (int64_t task = 0; task < tasks; task++) body(context, task, scratch);
        return GSPN_OK;
    }
    int64_t status = GSPN_OK;
#pragma omp parallel num_threads(int(threads))
    {
        char* scratch = task_buffer.reserve(scratch_bytes + 1);
        if (!scratch) __atomic_store_n(&status, int64_t(GSPN_NO_MEMORY), __ATOMIC_RELAXED);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            if (scratch) body(context, task, scratch);
        }
    }
    return status;
}

char* call_buffer(int64_t bytes) { return whole_call_buffer.reserve(bytes + 1); }

void end_call() {
    whole_call_buffer.trim();
    if (threads_to_trim <= 1) {
        task_buffer.trim();
    } else {
#pragma omp parallel num_threads(int(threads_to_trim))
        task_buffer.trim();
    }
    threads_to_trim = 0;
}

}  // namespace gspn

// ---- exported ------------------------------------------------------------------------------------------------------

#define GSPN_EXPORT extern "C" __attribute__((visibility("default")))

GSPN_EXPORT int64_t gspn_abi_version(void) { return GSPN_ABI_VERSION; }

GSPN_EXPORT int64_t gspn_best_isa(void) { return best_isa(); }

// The most scratch memory held at once since the last reset, in bytes, over all threads.
GSPN_EXPORT int64_t gspn_scratch_peak(int64_t reset) {
    const int64_t peak = __atomic_load_n(&scratch_peak, __ATOMIC_RELAXED);
    if (reset) __atomic_store_n(&scratch_peak, __atomic_load_n(&scratch_now, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
    return peak;
}

#define GSPN_ENTRY(name, Args)                          \
    GSPN_EXPORT int64_t gspn_##name(const Args* args) { \
        const Kernels* chosen = kernels_for(args->isa); \
        if (!chosen) return GSPN_BAD_ARGUMENT;          \
        const int64_t result = chosen->name(*args);     \
        gspn::end_call();                               \
        return result;                                  \
    }
GSPN_ENTRY(scan_forward, GspnScanArgs)
GSPN_ENTRY(scan_backward, GspnScanArgs)
GSPN_ENTRY(propagate, GspnPropagateArgs)
GSPN_ENTRY(propagate_backward, GspnPropagateArgs)
GSPN_ENTRY(propagate_scratch, GspnPropagateArgs)  // returns bytes
GSPN_ENTRY(depthwise_dweight, GspnDepthwiseArgs)
