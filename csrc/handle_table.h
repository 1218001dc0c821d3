// Objects that Python names by a number: see pyfastpeft/formats/handles.py.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "tensors.h"

// Of a function that Python calls past torch.
#define PF_C extern "C" __attribute__((visibility("default")))

namespace pf::tensors {

// Handles are small numbers from 1 on; a free one is given again.
template <class T>
class HandleTable {
 public:
  int64_t add(std::shared_ptr<T> object) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) {
      objects_.push_back(std::move(object));
      return static_cast<int64_t>(objects_.size());
    }
    const int64_t handle = free_.back();
    free_.pop_back();
    objects_[handle - 1] = std::move(object);
    return handle;
  }
  std::shared_ptr<T> find(int64_t handle, const char* what) {
    const std::lock_guard<std::mutex> lock(mutex_);
    STD_TORCH_CHECK(holds(handle), what, " is ", handle, "; it must be a handle that was not freed");
    return objects_[handle - 1];
  }
  void free(int64_t handle) {
    std::shared_ptr<T> last;  // freed after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!holds(handle)) return;
    last.swap(objects_[handle - 1]);
    free_.push_back(handle);
  }

 private:
  bool holds(int64_t handle) const {
    return handle > 0 && handle <= static_cast<int64_t>(objects_.size()) && objects_[handle - 1] != nullptr;
  }
  std::mutex mutex_;
  std::vector<std::shared_ptr<T>> objects_;
  std::vector<int64_t> free_;
};

}  // namespace pf::tensors
