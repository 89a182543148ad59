#include "propagate_api.h"

namespace GSPN_NS {
int64_t propagate(const GspnPropagateArgs&) { return GSPN_BAD_ARGUMENT; }
int64_t propagate_backward(const GspnPropagateArgs&) { return GSPN_BAD_ARGUMENT; }
}  // namespace GSPN_NS
