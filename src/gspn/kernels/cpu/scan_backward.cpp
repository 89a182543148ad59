#include "api.h"

namespace GSPN_NS {
int64_t scan_backward(const GspnScanArgs&) { return GSPN_BAD_ARGUMENT; }
}  // namespace GSPN_NS
