// What Python names by a number.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "tensors.h"

namespace pf::tensors {

// Things under small numbers, which are given again after a release.
template <class T>
class Numbered {
 public:
  int64_t add(std::shared_ptr<T> thing) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) {
      things_.push_back(std::move(thing));
      return static_cast<int64_t>(things_.size());
    }
    const int64_t number = free_.back();
    free_.pop_back();
    things_[number - 1] = std::move(thing);
    return number;
  }
  std::shared_ptr<T> find(int64_t number, const char* what) {
    const std::lock_guard<std::mutex> lock(mutex_);
    STD_TORCH_CHECK(holds(number), what, " is ", number, "; it must be held and not released");
    return things_[number - 1];
  }
  void release(int64_t number) {
    std::shared_ptr<T> last;  // freed after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!holds(number)) return;
    last.swap(things_[number - 1]);
    free_.push_back(number);
  }

 private:
  bool holds(int64_t number) const {
    return number > 0 && number <= static_cast<int64_t>(things_.size()) && things_[number - 1] != nullptr;
  }
  std::mutex mutex_;
  std::vector<std::shared_ptr<T>> things_;
  std::vector<int64_t> free_;
};

}  // namespace pf::tensors
