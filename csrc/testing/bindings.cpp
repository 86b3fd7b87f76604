// Host-side C++ that is no operator, for pytest: the heuristics. Built only with LORA_EXT_TEST_BUILD=1.
#include <pybind11/pybind11.h>

#if __has_include("kernels/heuristics.h")
#include "kernels/heuristics.h"
#endif

PYBIND11_MODULE(_testing, m) { m.doc() = "Host-side C++ of lora_ext, for the tests."; }
