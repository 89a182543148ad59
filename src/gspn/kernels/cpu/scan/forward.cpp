// line_scan and gated_scan, forward, for one instruction set.
#include "scan/tasks.h"

namespace GSPN_NS {
int64_t scan_forward(const GspnScanArgs& args) { return run_scan_of_any_type<false>(args); }
}  // namespace GSPN_NS
