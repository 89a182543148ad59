#pragma once
#include "api.h"

struct GspnPropagateArgs {
  int64_t isa, threads;
};
