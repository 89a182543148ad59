// The arguments of the projection-fused propagation.
//
//     y = sum over d of (output_proj[d] proxy) * h_d + (skip_proj proxy) * x
//     h_d[p,t] = wl h_d[p-1,t-1] + wm h_d[p,t-1] + wr h_d[p+1,t-1] + (input_proj[d] proxy)[p,t] x[p,t]
//
// with wl, wm, wr the normalised sigmoids of weight_proj[d] proxy. Nothing of the size of the projected maps is ever
// written: they live in the first-level cache, a strip of pixels at a time.
#pragma once
#include "api.h"

// Maps have the type `dtype` (their views' direction and neighbour strides are not used). Projections and their
// gradients are contiguous float (double where dtype is GSPN_FLOAT64). Gradients are overwritten, never added to.
struct GspnPropagateArgs {
    int64_t isa, threads;
    int64_t backward;                           // for propagate_scratch only
    int64_t dtype;                              // GspnDtype
    int64_t batch, channels, features;          // features: channels of the proxy
    int64_t groups, height, width;
    int64_t segment;                            // lines between two resets of the state; 0: never
    int64_t workspace;                          // bytes of scratch that more threads may not exceed; 0: 256 MiB
    int64_t directions, direction[4];
    GspnView x, proxy;
    GspnView y;                                 // forward only
    GspnView grad_y, grad_x, grad_proxy;        // backward only
    const void *weight_proj;                    // (D,3,G,S), D directions, S features
    const void *input_proj, *output_proj;       // (D,C,S)
    const void *skip_proj;                      // (C,S) or null
    void *grad_weight_proj, *grad_input_proj, *grad_output_proj, *grad_skip_proj;  // backward only
};
