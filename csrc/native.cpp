// pyfastpeft._native: what this build and this CPU can do, without torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/limits.h"

namespace py = pybind11;

namespace {

std::string isa() {
  const pf::Kernels* k = pf::kernels();
  if (k == nullptr) throw py::value_error("PYFASTPEFT_CPU_ISA names an instruction set this machine does not have");
  return k->name;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cuda"] = PF_CUDA_VERSION;
  return info;
}

py::dict limits(int threads) {
  if (threads < 1 || threads > 1024) throw py::value_error("threads must lie in [1, 1024]");
  pf::Limits found;
  {
    py::gil_scoped_release release;
    found = pf::measure_limits(threads);
  }
  const auto known = [](double rate) { return rate < 0 ? std::optional<double>() : rate; };
  py::dict out;
  out["read_gb_s"] = found.read_gb_s;
  out["fp32_gflop_s"] = found.fp32_gflop_s;
  out["bf16_gflop_s"] = known(found.bf16_gflop_s);
  out["int8_gop_s"] = known(found.int8_gop_s);
  return out;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "What this build and this CPU can do.";
  m.def("build_info", &build_info, "Compiler, and the CUDA toolkit the GPU kernels were built with ('' without).");
  m.def("cpu_features", &pf::cpu_features, "Instruction-set extensions this CPU has, of those that matter here.");
  m.def("available_isas", &pf::available_isas, "Instruction sets the CPU kernels can run on here, best first.");
  m.def("isa", &isa, "The instruction set chosen at start (see PYFASTPEFT_CPU_ISA).");
  m.def("limits", &limits, py::arg("threads"),
        "What `threads` threads reach together now: reading memory (huge pages where the system gives them), fp32 "
        "multiply-adds, vdpbf16ps, vpdpbusd; None where this CPU lacks the instruction. Takes about a second.");
}
