// Moving rows of pixels between maps of any strides and the packed form that the kernels work on: for each pixel one
// vector with the values of (up to) as many channels as it has lanes.
#pragma once
#include "common.h"

namespace GSPN_NS {
namespace {

template <class T> GSPN_INLINE void store_packed(Acc<T>* to, VecOf<T> v, int width) {
    if (width == kLanes<T>) store(to, v);
    else store_n(to, v, width);
}

// Pixels of many channels are too far apart for the hardware's prefetching.
constexpr int64_t kPixelsAhead = 16;

// Channels lie side by side (channels_last): one load for each pixel.
template <class T>
void pack_adjacent_channels(const T* from, int64_t column, int n, int width, int64_t pixels, Acc<T>* to, int64_t step) {
    if (n == kLanes<T>)
        for (int64_t i = 0; i < pixels; i++) {
            prefetch(from + (i + kPixelsAhead) * column);
            store(to + i * step, load(from + i * column));
        }
    else
        for (int64_t i = 0; i < pixels; i++) store_packed<T>(to + i * step, load_n(from + i * column, n), width);
}

// Pixels lie side by side (channels_first): squares of lanes x lanes are transposed in registers.
template <class T>
void pack_adjacent_pixels(const T* from, int64_t channel, int n, int width, int64_t pixels, Acc<T>* to, int64_t step) {
    constexpr int L = kLanes<T>;
    for (int64_t i = 0; i < pixels; i += L) {
        const int m = int(min(L, pixels - i));
        VecOf<T> square[L];
        for (int c = 0; c < L; c++) {
            if (c >= n) square[c] = VecOf<T>{};
            else if (m == L) square[c] = load(from + c * channel + i);
            else square[c] = load_n(from + c * channel + i, m);
        }
        transpose(square);
        for (int j = 0; j < m; j++) store_packed<T>(to + (i + j) * step, square[j], width);
    }
}

// n channels (at most the lanes) of a row of pixels, `step` elements apart in `to`; of every pixel `width` lanes are
// written, those beyond n with 0.
template <class T>
__attribute__((noinline)) void pack_row(
    const T* from, int64_t channel, int64_t column, int n, int width, int64_t pixels, Acc<T>* to, int64_t step) {
    if (channel == 1 || n == 1) return pack_adjacent_channels(from, column, n, width, pixels, to, step);
    if (column == 1) return pack_adjacent_pixels(from, channel, n, width, pixels, to, step);
    for (int64_t i = 0; i < pixels; i++)
        for (int c = 0; c < width; c++) to[i * step + c] = c < n ? load_one(from + c * channel + i * column) : 0;
}

// The way back; `from` holds whole vectors, `step` elements apart, one for each pixel.
template <class T>
__attribute__((noinline)) void unpack_row(
    const Acc<T>* from, int64_t step, T* to, int64_t channel, int64_t column, int n, int64_t pixels) {
    constexpr int L = kLanes<T>;
    if (channel == 1) {
        if (n == L)
            for (int64_t i = 0; i < pixels; i++) {
                prefetch_write(to + (i + kPixelsAhead) * column);
                store(to + i * column, load(from + i * step));
            }
        else
            for (int64_t i = 0; i < pixels; i++) store_n(to + i * column, load(from + i * step), n);
    } else if (column == 1) {
        for (int64_t i = 0; i < pixels; i += L) {
            const int m = int(min(L, pixels - i));
            VecOf<T> square[L];
            for (int j = 0; j < L; j++) square[j] = load(from + (i + (j < m ? j : 0)) * step);
            transpose(square);
            for (int c = 0; c < n; c++) {
                if (m == L) store(to + c * channel + i, square[c]);
                else store_n(to + c * channel + i, square[c], m);
            }
        }
    } else {
        for (int64_t i = 0; i < pixels; i++)
            for (int c = 0; c < n; c++) store_one(to + c * channel + i * column, from[i * step + c]);
    }
}

// The same for a row of a map whose type is known at run time: all that depends on it is here, so that the kernels
// are compiled for two accumulator types instead of four data types.

template <class T> GSPN_INLINE T* row_of(const GspnView& map, int64_t image, int64_t channel, int64_t row) {
    return static_cast<T*>(map.data) + image * map.batch + channel * map.channel + row * map.row;
}

template <class A>
void pack_map_row(
    int64_t dtype, const GspnView& map, int64_t image, int64_t channel, int64_t row, int n, int width, int64_t pixels,
    A* to, int64_t step) {
    const auto pack = [&](auto* first) { pack_row(first, map.channel, map.column, n, width, pixels, to, step); };
    if constexpr (sizeof(A) == 8) pack(row_of<const double>(map, image, channel, row));
    else if (dtype == GSPN_BFLOAT16) pack(row_of<const bf16>(map, image, channel, row));
    else if (dtype == GSPN_FLOAT16) pack(row_of<const fp16>(map, image, channel, row));
    else pack(row_of<const float>(map, image, channel, row));
}

template <class A>
void unpack_map_row(
    int64_t dtype, const A* from, int64_t step, const GspnView& map, int64_t image, int64_t channel, int64_t row, int n,
    int64_t pixels) {
    const auto unpack = [&](auto* first) { unpack_row(from, step, first, map.channel, map.column, n, pixels); };
    if constexpr (sizeof(A) == 8) unpack(row_of<double>(map, image, channel, row));
    else if (dtype == GSPN_BFLOAT16) unpack(row_of<bf16>(map, image, channel, row));
    else if (dtype == GSPN_FLOAT16) unpack(row_of<fp16>(map, image, channel, row));
    else unpack(row_of<float>(map, image, channel, row));
}

}  // namespace
}  // namespace GSPN_NS
