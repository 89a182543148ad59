// propagate and its gradients for one instruction set (GSPN_NS, GSPN_LANES): chooses the data type.
#include "propagate_backward.h"
#include "propagate_forward.h"

namespace GSPN_NS {
namespace {

template <class T> int64_t forward(const GspnPropagateArgs& args, bool measure) {
    Plan<T> plan(args);
    Forward<T> forward(plan);
    return measure ? forward.scratch_bytes(forward.round_images()) : forward.run();
}

template <class T> int64_t backward(const GspnPropagateArgs& args, bool measure) {
    Plan<T> plan(args);
    Backward<T> backward(plan);
    return measure ? backward.scratch_bytes(backward.round_images()) : backward.run();
}

template <class T> int64_t run(const GspnPropagateArgs& args, bool is_backward, bool measure) {
    return is_backward ? backward<T>(args, measure) : forward<T>(args, measure);
}

int64_t run_dtype(const GspnPropagateArgs& args, bool is_backward, bool measure) {
    switch (args.dtype) {
        case GSPN_FLOAT32: return run<float>(args, is_backward, measure);
        case GSPN_BFLOAT16: return run<bf16>(args, is_backward, measure);
        case GSPN_FLOAT16: return run<fp16>(args, is_backward, measure);
        case GSPN_FLOAT64: return run<double>(args, is_backward, measure);
        default: return GSPN_BAD_ARGUMENT;
    }
}

}  // namespace

int64_t propagate(const GspnPropagateArgs& args) { return run_dtype(args, false, false); }
int64_t propagate_backward(const GspnPropagateArgs& args) { return run_dtype(args, true, false); }

// Bytes of scratch of a call with these arguments, over all threads
int64_t propagate_scratch(const GspnPropagateArgs& args) { return run_dtype(args, args.backward != 0, true); }

}  // namespace GSPN_NS
