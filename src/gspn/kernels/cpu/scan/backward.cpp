// line_scan and gated_scan, backward, for one instruction set.
#include "scan/tasks.h"

namespace GSPN_NS {
int64_t scan_backward(const GspnScanArgs& args) { return run_scan_of_any_type<true>(args); }
}  // namespace GSPN_NS
