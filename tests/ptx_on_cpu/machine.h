// Runs translated PTX: grids of blocks, clusters of them, warp by warp.
//
// A warp runs a basic block at a time for the lanes whose next block is the lowest, so lanes that diverged meet again.
#pragma once
#include <random>

#include "runtime.h"

namespace ptx {

struct Parameter {
  uint32_t offset, bytes;
};
using Function = void (*)(Warp&, const uint32_t* operands);

// A kernel: Program of translate.py.
struct Kernel {
  std::vector<Function> functions;
  std::vector<uint32_t> code, blocks;
  std::vector<uint64_t> constants;
  std::string texts;
  std::vector<Parameter> parameters;
  uint32_t registers, static_shared, matrix_registers;

  void run(Warp& w) const {
    for (;;) {
      const int next = w.begin();
      if (next == kFinished) return;
      const uint32_t* const end = code.data() + blocks[next + 1];
      for (const uint32_t* at = code.data() + blocks[next]; at != end; at += 3 + at[2]) {
        w.doing = texts.data() + at[1];
        functions[at[0]](w, at + 3);
      }
      if (w.waits || w.yields) return;
    }
  }
};
inline std::map<std::string, Kernel> kernels;
inline std::vector<Range> memory;  // what kernels may touch

// Blocks run one after the other, those of a cluster together; when all that are there only wait, more join.
// seed 0: warps in order; 1: in reverse; any other: shuffled at each turn.
struct Launch : Grid {
  const Kernel& kernel;
  Dim3 grid, size;
  uint32_t shared;
  std::string parameters;
  uint32_t seed, cluster;
  std::shared_ptr<Launch> previous;  // which may still run: until griddepcontrol.wait

  std::vector<std::unique_ptr<Block>> present;
  std::mt19937 random;
  uint64_t begun = 0;
  int idle = 0;

  Launch(const std::string& name, Dim3 grid_, Dim3 size_, uint32_t shared_, std::string parameters_, uint32_t seed_,
         uint32_t cluster_ = 1, std::shared_ptr<Launch> previous_ = nullptr)
      : kernel(kernels.at(name)),
        grid(grid_),
        size(size_),
        shared(shared_),
        parameters(std::move(parameters_)),
        seed(seed_),
        cluster(cluster_),
        previous(std::move(previous_)),
        random(seed_) {
    memory = ptx::memory;
  }
  uint64_t blocks() const { return uint64_t(grid.x) * grid.y * grid.z; }
  bool ended() const { return begun == blocks() && present.empty(); }

  std::unique_ptr<Block> make_block(Dim3 id) {
    auto block = std::make_unique<Block>();
    block->id = id, block->grid = grid, block->size = size, block->seed = seed, block->of = this;
    block->parameters = parameters.data(), block->parameter_bytes = parameters.size();
    block->shared_bytes = kernel.static_shared + shared;
    block->held.assign(block->shared_bytes + 1024, '\xFF');  // NaN in every format
    block->shared_memory = block->held.data() + (-reinterpret_cast<uintptr_t>(block->held.data()) & 1023);
    if (kernel.matrix_registers > 0) block->async.assign(block->shared_bytes, '\xFF');
    const uint32_t threads = size.x * size.y * size.z;
    for (uint32_t i = 0; i < threads; ++i) {
      if (i % 32 == 0) {
        block->warps.push_back(std::make_unique<Warp>());
        Warp& w = *block->warps.back();
        w.block = block.get(), w.index = i / 32, w.matrix.resize(kernel.matrix_registers);
        w.constants = kernel.constants.data();
      }
      auto t = std::make_unique<Thread>();
      t->registers.assign(kernel.registers, ~uint64_t{0});
      t->id = {i % size.x, i / size.x % size.y, i / size.x / size.y}, t->lane = i % 32;
      block->warps.back()->threads.push_back(std::move(t));
    }
    return block;
  }
  void begin_cluster() {
    const auto together = std::make_shared<Cluster>();
    for (uint32_t rank = 0; rank < cluster; ++rank, ++begun) {
      const Dim3 id{uint32_t(begun % grid.x), uint32_t(begun / grid.x % grid.y), uint32_t(begun / grid.x / grid.y)};
      present.push_back(make_block(id));
      present.back()->cluster = together, present.back()->rank = rank;
      together->blocks.push_back(present.back().get());
    }
  }
  // To the end, or, while it holds, to where every block lets the next grid start.
  void run() {
    bool stuck = true;
    while (!ended()) {
      if (stuck && begun < blocks()) {
        begin_cluster();
      } else if (stuck && holds && std::all_of(present.begin(), present.end(), [](const auto& block) {
                   return block->lets_next_start;
                 })) {
        return;
      } else if (stuck && ++idle > 2000) {
        fail("deadlock: every warp waits");
      }
      stuck = true;
      for (auto& block : present) {
        std::vector<Warp*> order;
        for (auto& w : block->warps) order.push_back(w.get());
        if (seed == 1) std::reverse(order.begin(), order.end());
        if (seed > 1) std::shuffle(order.begin(), order.end(), random);
        for (Warp* w : order) {
          if (w->waits || w->finished()) continue;
          w->yields = false;
          try {
            kernel.run(*w);
          } catch (const std::exception& e) {
            fail(std::string(e.what()) + ", in warp " + std::to_string(w->index) + " of block " +
                 std::to_string(block->id.x) + "," + std::to_string(block->id.y) + "," + std::to_string(block->id.z) +
                 ": " + w->doing);
          }
          if (w->yields) continue;
          stuck = false, idle = 0;
          if (w->finished()) block->open_full(0, 0), block->cluster->open_full();
        }
      }
      std::erase_if(present, [](const auto& b) {
        const bool over = b->alive() == 0;
        if (over) b->cluster->blocks[b->rank] = nullptr;
        return over;
      });
      stuck |= present.empty();
    }
  }
  void finish() {
    holds = false;
    for (auto& block : present)
      for (auto& w : block->warps) w->waits &= !std::exchange(w->holds, false);
    run();
  }
  void wait_for_previous() override {
    if (previous != nullptr) previous->finish();
    previous = nullptr;
  }
};

}  // namespace ptx

extern "C" {
// A kernel under a name; in the place of what had it.
__attribute__((used, visibility("default"))) inline void ptx_kernel(
    const char* name, const ptx::Function* functions, uint64_t n_functions, const uint32_t* code, uint64_t words,
    const uint32_t* blocks, uint64_t n_blocks, const uint64_t* constants, uint64_t n_constants, const char* texts,
    uint64_t text_bytes, const ptx::Parameter* parameters, uint64_t n_parameters, const uint32_t* sizes) {
  ptx::kernels[name] = {{functions, functions + n_functions},
                        {code, code + words},
                        {blocks, blocks + n_blocks},
                        {constants, constants + n_constants},
                        {texts, text_bytes},
                        {parameters, parameters + n_parameters},
                        sizes[0],
                        sizes[1],
                        sizes[2]};
}
// What kernels may touch from now on.
__attribute__((used, visibility("default"))) inline void ptx_memory(const ptx::Range* ranges, uint64_t n) {
  ptx::memory = {ranges, ranges + n};
}
// `error` takes what went wrong, and is empty where nothing did.
__attribute__((used, visibility("default"))) inline void ptx_launch(const char* name, const uint32_t* grid,
                                                                    const uint32_t* size, uint32_t shared,
                                                                    const char* parameters, uint64_t parameter_bytes,
                                                                    uint32_t seed, char* error,
                                                                    uint64_t error_bytes) try {
  error[0] = 0;
  ptx::Launch launched(name, {grid[0], grid[1], grid[2]}, {size[0], size[1], size[2]}, shared,
                       {parameters, parameter_bytes}, seed);
  launched.finish();
} catch (const std::exception& e) {
  std::strncpy(error, e.what(), error_bytes - 1);
  error[error_bytes - 1] = 0;
}
}
