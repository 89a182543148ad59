// What the kernels want of the system, defined in main.cpp. They themselves know nothing of threads.
#pragma once
#include <stdint.h>

namespace gspn {

// One task out of `tasks`; scratch is 64-byte aligned, not initialised, and this thread's alone until the task returns.
typedef void (*TaskBody)(const void* context, int64_t task, char* scratch);

// Runs every task once, on at most `threads` threads (on the calling one alone, without OpenMP, if one is enough).
// Scratch comes from a buffer of each thread that is kept between calls unless it is large. Returns a GspnStatus; if
// that is GSPN_NO_MEMORY, tasks may not have run.
int64_t parallel_for(int64_t tasks, int64_t threads, int64_t scratch_bytes, TaskBody body, const void* context);

// One buffer of the calling thread, 64-byte aligned, not initialised, for the whole of a call: the next call_buffer
// may move it. Null if there is no memory.
char* call_buffer(int64_t bytes);

// Gives large buffers back, of this thread and of those that parallel_for has used. Every entry point ends with it.
void end_call();

// Whether the system gives the tile registers of AMX to this process. The system is asked at the first call; from then
// on it refuses small stacks for signals.
bool tiles_permitted();

}  // namespace gspn
