// The projection-fused propagation: its arguments and entry points. Plain C types: this file is included by the
// dispatcher as well as by each instruction set's translation unit.
//
//     y = sum over d of (output_proj[d] proxy) * h_d + (skip_proj proxy) * x
//     h_d[p,t] = wl h_d[p-1,t-1] + wm h_d[p,t-1] + wr h_d[p+1,t-1] + (input_proj[d] proxy)[p,t] x[p,t]
//
// with wl, wm, wr the normalised sigmoids of weight_proj[d] proxy. Nothing of the size of the projected maps is ever
// written: they live a strip of pixels at a time in the first-level cache.
#pragma once
#include <stdint.h>

enum GspnDtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Maps are of type `dtype`, with element strides for (B, C or S, H, W). Projections and their gradients are contiguous
// float (double where dtype is kFloat64). Gradients are overwritten, never added to.
struct GspnPropagate {
    const void *x, *proxy, *grad_y;     // grad_y: backward only
    void *y, *grad_x, *grad_proxy;      // y: forward only; grad_x, grad_proxy: backward only
    const void *weight_proj;            // (D,3,G,S)
    const void *input_proj;             // (D,C,S)
    const void *output_proj;            // (D,C,S)
    const void *skip_proj;              // (C,S) or null
    void *grad_weight_proj, *grad_input_proj, *grad_output_proj, *grad_skip_proj;  // backward only
    int64_t x_strides[4], proxy_strides[4], grad_y_strides[4], y_strides[4], grad_x_strides[4], grad_proxy_strides[4];
    int64_t B, C, S, H, W;
    int64_t G;                          // groups: channel c has the weights of group c * G / C
    int64_t D;                          // number of directions, 1 to 4
    int64_t segment;                    // lines; 0 is global
    int64_t workspace;                  // bytes of scratch not to exceed (fewer threads run instead); 0 is 256 MiB
    int32_t directions[4];              // 0 right, 1 down, 2 left, 3 up: where the scan travels
    int32_t dtype;                      // GspnDtype
    int32_t threads;
};

// Declares the entry points of one instruction set. Both kernels return 0, or 1 when memory ran out (nothing is then
// written). propagate_scratch: bytes of scratch that a call with these arguments takes; only sizes are read.
#define GSPN_DECLARE_PROPAGATE(ns)                                        \
    namespace ns {                                                        \
    int propagate(const GspnPropagate& args);                             \
    int propagate_backward(const GspnPropagate& args);                    \
    int64_t propagate_scratch(const GspnPropagate& args, bool backward);  \
    }
