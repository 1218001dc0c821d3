// main CASES RESULTS SEED RESIDENT MULTIPROCESSORS SHARED_BYTES FAULT CAPABILITY: calls csrc/cuda/api.h with the
// arguments in a file, in which a case is (int64) its operation, how many outputs, its stream (-1: unknown, below: a
// graph records it), how many numbers, the numbers, how many buffers, and of each its bytes (-1: a null pointer) and
// where in it the pointer points, and the bytes. After the call are written its status, how many memories are kept by
// then, how many bytes it set to zero, and the last `outputs` buffers. What is counted with must be as it was.
#include <algorithm>
#include <memory>

#include "api.h"
#include "emulator.h"

namespace {

FILE *in, *out;
int64_t number() {
  int64_t v;
  if (std::fread(&v, 8, 1, in) != 1) std::exit(0);
  return v;
}

struct Buffer {
  int64_t bytes = number(), offset = number();
  std::unique_ptr<unsigned char[]> data;
  Buffer() {
    if (bytes < 0) return;
    data.reset(new unsigned char[bytes]);
    if (std::fread(data.get(), 1, bytes, in) != static_cast<size_t>(bytes)) std::exit(4);
  }
  template <typename T>
  T* as() const {
    return data == nullptr ? nullptr : reinterpret_cast<T*>(data.get() + offset);
  }
};

}  // namespace

int main(int, char** arguments) {
  in = std::fopen(arguments[1], "rb");
  out = std::fopen(arguments[2], "wb");
  emulator::settings.seed = std::atoi(arguments[3]);
  emulator::settings.resident = std::atoi(arguments[4]);
  emulator::settings.multiprocessors = std::atoi(arguments[5]);
  emulator::settings.shared_bytes = std::atoi(arguments[6]);
  emulator::settings.fault = std::atoi(arguments[7]);
  emulator::settings.capability = std::atoi(arguments[8]);
  std::unique_ptr<unsigned char[]> workspace;
  for (;;) {
    const int64_t operation = number(), outputs = number();
    emulator::settings.stream = number();
    emulator::zeroed = {};
    std::vector<int64_t> v(number());
    for (int64_t& value : v) value = number();
    std::vector<Buffer> b(number());
    const auto weight = [&] {
      PfWeight w{};
      w.codes = b[0].as<uint8_t>(), w.scale = b[1].as<float>(), w.scale8 = b[2].as<uint8_t>();
      w.zero = b[3].as<float>(), w.absmax2 = b[4].as<float>(), w.offset = b[5].as<float>();
      w.dynamic_map = b[6].as<float>();
      w.n = v[0], w.k = v[1], w.blocksize = static_cast<int32_t>(v[2]), w.format = static_cast<int32_t>(v[3]);
      return w;
    };
    int64_t status = -1;
    if (operation == 0) {
      const PfWeight w = weight();
      const int64_t m = v[4], ldx = v[5];
      const int32_t dtype = static_cast<int32_t>(v[6]), bias_dtype = static_cast<int32_t>(v[7]);
      PfLora lora{};
      if (v.size() > 8) {
        lora.a = b[9].as<void>(), lora.b = b[10].as<void>(), lora.scaling = b[11].as<float>();
        lora.rank_scale = b[12].as<float>(), lora.rows = b[13].as<int64_t>();
        lora.factor = static_cast<float>(v[8]) / 1024;
        lora.a_dtype = static_cast<int32_t>(v[9]), lora.b_dtype = static_cast<int32_t>(v[10]);
        lora.rank = v[11], lora.slots = v[12], lora.a_slot_stride = v[13], lora.a_stride = v[14];
        lora.b_slot_stride = v[15], lora.b_stride = v[16], lora.b_column_stride = v[17];
      }
      const PfLora* branch = v.size() > 8 ? &lora : nullptr;
      const int64_t bytes = pf_linear_4bit_workspace(&w, branch, m);
      workspace.reset(new unsigned char[bytes]);
      std::memset(workspace.get(), 0xFF, bytes);
      status = pf_linear_4bit(&w, b[7].as<void>(), ldx, b[8].as<void>(), bias_dtype, branch, b.back().as<void>(), m,
                              dtype, workspace.get(), nullptr);
    } else if (operation == 1) {
      const PfWeight w = weight();
      status = pf_dequantize_4bit(&w, v[4], v[5], b.back().as<void>(), static_cast<int32_t>(v[6]), nullptr);
    } else {
      status =
          pf_quantize_4bit(b[0].as<void>(), static_cast<int32_t>(v[0]), v[1], static_cast<int32_t>(v[2]),
                           static_cast<int32_t>(v[3]), b[1].as<uint8_t>(), b[2].as<float>(), b[3].as<float>(), nullptr);
    }
    for (const emulator::Kept& kept : emulator::kept)
      if (!std::equal(kept.values.begin(), kept.values.end(), kept.memory.get()))
        emulator::fail("what is kept is not as it was");
    if (std::ranges::any_of(emulator::zeroed, [](unsigned char byte) { return byte != 0; }))
      emulator::fail("what was set to zero is not zero again");
    for (const int64_t value : {status, std::ssize(emulator::kept), std::ssize(emulator::zeroed)})
      std::fwrite(&value, 8, 1, out);
    for (size_t i = b.size() - outputs; i < b.size(); ++i)
      if (b[i].bytes >= 0) std::fwrite(b[i].data.get(), 1, b[i].bytes, out);
  }
}
