// The C interface between cpu.py and the kernels.
//
// Every argument block is a flat sequence of 64-bit words, packed by Python's struct.pack("q...") and passed as bytes:
// much cheaper than filling a ctypes structure, immutable, and so safe to use from several threads.
#pragma once
#include <stdint.h>

#define GSPN_ABI_VERSION 6

enum GspnDtype { GSPN_FLOAT32 = 0, GSPN_BFLOAT16 = 1, GSPN_FLOAT16 = 2, GSPN_FLOAT64 = 3 };
enum GspnIsa { GSPN_ISA_BEST = -1, GSPN_ISA_PORTABLE = 0, GSPN_ISA_AVX2 = 1, GSPN_ISA_AVX512 = 2, GSPN_ISA_AMX = 3 };
enum GspnDirection { GSPN_RIGHT = 0, GSPN_DOWN = 1, GSPN_LEFT = 2, GSPN_UP = 3 };
enum GspnStatus { GSPN_OK = 0, GSPN_NO_MEMORY = 1, GSPN_BAD_ARGUMENT = 2 };

// A tensor: where it lies and its strides in elements. A tensor without some of these axes has stride 0 there.
// "channel" is the group axis of the weights; "neighbour" is the axis of size 3 (previous, same, next place).
struct GspnView {
    void* data;
    int64_t batch, direction, channel, neighbour, row, column;
};

// line_scan and gated_scan. The state is double for double maps, else float. In line_scan weights are used as they are
// and of the state's type, dx is of the maps'. In gated_scan weights are logits of the maps' type, and dx, in which
// the directions are summed, is of the state's. dweights is of the state's type if channels share weights, in whose
// gradients they are summed, else of the weights'.
struct GspnScanArgs {
    int64_t isa, threads;
    int64_t gated;  // 1: gated_scan, 0: line_scan
    int64_t dtype;  // GspnDtype of the maps
    int64_t batch, directions, channels, groups, height, width;
    int64_t segment;  // lines between two resets of the state; 0: never
    int64_t direction[4];
    GspnView x, gate, weights, h;
    GspnView grad_h, dx, dgate, dweights;  // backward only
};

// propagate: the projection-fused propagation.
//
//     y = sum over d of (output_proj[d] proxy) * h_d + (skip_proj proxy) * x
//     h_d[p,t] = wl h_d[p-1,t-1] + wm h_d[p,t-1] + wr h_d[p+1,t-1] + (input_proj[d] proxy)[p,t] x[p,t] - center[d]
//
// with wl, wm, wr the normalised sigmoids of weight_proj[d] proxy. The line that starts a segment has the gated input
// alone, without the earlier states and without center. Nothing of the size of the projected maps is ever
// written: they live in the first-level cache, a strip of pixels at a time.
//
// Maps have the type `dtype` (their views' direction and neighbour strides are not used). Projections, center and their
// gradients are contiguous float (double where dtype is GSPN_FLOAT64). Gradients are overwritten, never added to.
//
// With `merge`, forward only, the projections are those of a layer, of the type `projections` (double where dtype is
// GSPN_FLOAT64, else not): skip_proj is (D,C,S), and output_proj[d] and skip_proj[d] are multiplied by merger[d], or by
// 1/D without merger; with `average`, output_proj[d] is also divided by the lines of a segment.
//
// Forward, the weights of 16-bit maps are only as exact as they need: to 7.5e-5, but they sum to 1 to the last place.
struct GspnPropagateArgs {
    int64_t isa, threads;
    int64_t backward;                   // for propagate_scratch only
    int64_t dtype;                      // GspnDtype
    int64_t batch, channels, features;  // features: channels of the proxy
    int64_t groups, height, width;
    int64_t segment;    // lines between two resets of the state; 0: never
    int64_t workspace;  // bytes of scratch that more threads may not exceed; 0: 256 MiB
    int64_t directions, direction[4];
    int64_t merge, average;
    int64_t projections;  // GspnDtype
    const void* merger;   // (D) or null
    GspnView x, proxy;
    GspnView y;                                                    // forward only
    GspnView grad_y, dx, dproxy;                                   // backward only
    const void* weight_proj;                                       // (D,3,G,S), D directions, S features
    const void *input_proj, *output_proj;                          // (D,C,S)
    const void* skip_proj;                                         // (C,S) or null
    const void* center;                                            // (B,D,C) or null
    void *dweight_proj, *dinput_proj, *doutput_proj, *dskip_proj;  // backward only
    void* dcenter;                                                 // backward only
};

// The gradient of the weight (C,1,kernel,kernel) of a depthwise convolution with stride 1 that keeps the size of the
// map, so with padding kernel/2. Maps have the type `dtype` and channels that lie side by side; the kernel is 5 or 7.
// dweight is contiguous float (double where dtype is GSPN_FLOAT64), and is overwritten, never added to.
struct GspnDepthwiseArgs {
    int64_t isa, threads;
    int64_t dtype;  // GspnDtype
    int64_t batch, channels, height, width, kernel;
    GspnView x, grad_y;
    void* dweight;
};
