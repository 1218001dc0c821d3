// The choice of instruction set: made once, from the CPU and PYFASTPEFT_CPU_ISA; can be changed by name.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace pf {

// Names this build and this CPU can run, best first.
std::vector<std::string> available_isas();
// Instruction-set extensions this CPU has, of those that the choice asks for.
std::vector<std::string> cpu_features();
// The kernels in use. Null when PYFASTPEFT_CPU_ISA names something this machine cannot run.
const Kernels* kernels();
// Returns false, and changes nothing, when `name` is not available.
bool set_isa(const char* name);

}  // namespace pf
