// The operators on CUDA. The kernels lie in a library of their own, beside this one, which is opened when the first of
// them is called; torch's CUDA half is looked up the same way, so that this library also loads where torch has none.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <unistd.h>

#include <string>

#include "cuda_operands.h"

namespace {

using namespace pf::cuda;

struct Libraries {
  Kernels kernels{};
  AOTITorchError (*current_stream)(int32_t, void**) = nullptr;
  std::string missing;  // why none of this can be used, if so
};

template <class Fn>
bool find(void* library, const char* name, Fn& fn) {
  return library != nullptr && (fn = reinterpret_cast<Fn>(dlsym(library, name))) != nullptr;
}

bool find_kernels(void* library, Kernels& k) {
  return find(library, "pf_linear_4bit_most_rows", k.most_rows) &&
         find(library, "pf_linear_4bit_workspace", k.workspace) && find(library, "pf_linear_4bit", k.linear) &&
         find(library, "pf_dequantize_4bit", k.dequantize) && find(library, "pf_quantize_4bit", k.quantize) &&
         find(library, "pf_dynamic_map", k.dynamic_map) && find(library, "pf_cuda_error", k.error) &&
         find(library, "pf_cuda_version", k.version) && find(library, "pf_cuda_architectures", k.architectures);
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

Libraries open_libraries() {
  Libraries found;
  Dl_info self;
  dladdr(reinterpret_cast<const void*>(&open_libraries), &self);
  const std::string path = self.dli_fname;
  const std::string beside = path.substr(0, path.rfind('/') + 1) + "libpyfastpeft_cuda.so";
  if (access(beside.c_str(), F_OK) != 0) {
    found.missing = "pyfastpeft was built without CUDA kernels";
    return found;
  }
  void* kernels = dlopen(beside.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (kernels == nullptr) {
    found.missing = dlerror();
    return found;
  }
  void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
  int (*driver_version)(int*) = nullptr;
  int version = 0;
  if (!find_kernels(kernels, found.kernels))
    found.missing = beside + " is of another version than the operators";
  else if (!find(torch, "aoti_torch_get_current_cuda_stream", found.current_stream))
    found.missing = "this torch has no CUDA";
  else if (!find(driver, "cuDriverGetVersion", driver_version))
    found.missing = "NVIDIA's driver is not installed";
  else if (driver_version(&version) != 0 || version / 1000 < found.kernels.version() / 1000)
    found.missing = "NVIDIA's driver serves CUDA " + version_text(version) + " at most; the kernels were built with " +
                    version_text(found.kernels.version());
  return found;
}

const Libraries& libraries() {
  static const Libraries found = open_libraries();
  return found;
}

const Libraries& usable_libraries() {
  STD_TORCH_CHECK(libraries().missing.empty(), "pyfastpeft on CUDA: ", libraries().missing);
  return libraries();
}

// Makes the device of a tensor the current one while it lives.
struct Place {
  const Kernels& kernels;
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

  explicit Place(const Tensor& t) : Place(t.get_device_index()) {}
  explicit Place(int32_t device) : kernels(usable_libraries().kernels), guard(device) {
    TORCH_ERROR_CODE_CHECK(libraries().current_stream(device, &stream));
  }
};

// Why the kernels cannot serve a GPU of this compute capability; empty where they can.
std::string cuda_missing(int64_t major, int64_t minor) {
  if (!libraries().missing.empty()) return libraries().missing;
  const std::string built = libraries().kernels.architectures();
  if (major == 9 ? built.find("9.0a") != std::string::npos : major >= 8) return "";
  return "the GPU has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
         ", the CUDA kernels were built for " + built;
}

int64_t linear_4bit_cuda_rows(int64_t device, int64_t format, int64_t n, int64_t k, int64_t blocksize, bool nested,
                              ScalarType dtype) {
  check_format(format, blocksize);
  const Place place(static_cast<int32_t>(device));
  const int code = dtype == ScalarType::BFloat16 ? pf::kBFloat16
                   : dtype == ScalarType::Half   ? pf::kFloat16
                                                 : pf::kFloat32;
  // Of the tensors it only matters which of them there are, and that the codes are aligned.
  alignas(16) static const float here = 0;
  PfWeight w{};
  w.codes = reinterpret_cast<const uint8_t*>(&here);
  if (nested) {
    w.scale8 = w.codes;
    w.absmax2 = w.offset = w.dynamic_map = &here;
  } else {
    w.scale = &here;
  }
  if (format == pf::kINT4) w.zero = &here;
  w.n = n;
  w.k = k;
  w.blocksize = static_cast<int32_t>(blocksize);
  w.format = static_cast<int32_t>(format);
  return place.kernels.most_rows(&w, code);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyfastpeft, m) {
  m.def("linear_4bit_cuda(Tensor x, " PF_WEIGHT
        ", Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? scaling, "
        "Tensor? rank_scale, Tensor? slots, float factor, Tensor(a!) y) -> ()");
  m.def("quantize_4bit_cuda(Tensor w, int format, int blocksize) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dequantize_4bit_cuda(Tensor codes, Tensor scale, Tensor? zero, int format, int blocksize, int[] shape, "
      "ScalarType dtype) -> Tensor");
  m.def("dequantize_rows(" PF_WEIGHT ", int k, int row0, Tensor(a!) out) -> ()");
  m.def(
      "linear_4bit_cuda_rows(int device, int format, int n, int k, int blocksize, bool nested, "
      "ScalarType dtype) -> int");
  m.def("cuda_missing(int major, int minor) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CUDA, m) {
  m.impl("linear_4bit_cuda", TORCH_BOX(&Operators<Place>::linear_4bit));
  m.impl("dequantize_rows", TORCH_BOX(&Operators<Place>::dequantize_rows));
  m.impl("dequantize_4bit_cuda", TORCH_BOX(&Operators<Place>::dequantize_4bit));
  m.impl("quantize_4bit_cuda", TORCH_BOX(&Operators<Place>::quantize_4bit));
}

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CompositeExplicitAutograd, m) {
  m.impl("linear_4bit_cuda_rows", TORCH_BOX(&linear_4bit_cuda_rows));
  m.impl("cuda_missing", TORCH_BOX(&cuda_missing));
}
