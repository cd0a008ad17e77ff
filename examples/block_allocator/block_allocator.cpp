// The blocks of a paged KV cache that are free, those that are taken, and by how many sequences.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>  // std::vector as a list

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

class BlockAllocator {
 public:
  explicit BlockAllocator(int64_t blocks) {
    if (blocks < 0) throw std::invalid_argument("blocks must not be negative, got " + std::to_string(blocks));
    uses_.resize(static_cast<size_t>(blocks));
    for (int64_t block = blocks; block-- > 0;) free_.push_back(block);
  }

  std::vector<int64_t> allocate(int64_t count) {
    if (count < 0) throw std::invalid_argument("count must not be negative, got " + std::to_string(count));
    if (count > free()) {
      throw std::runtime_error(std::to_string(count) + " blocks were asked for, and " + std::to_string(free()) + " are free");
    }
    std::vector<int64_t> taken(free_.rbegin(), free_.rbegin() + count);
    free_.resize(free_.size() - static_cast<size_t>(count));
    for (int64_t block : taken) uses_[static_cast<size_t>(block)] = 1;
    return taken;
  }

  // For a second sequence with the same prefix.
  void share(const std::vector<int64_t>& blocks) {
    for (int64_t block : blocks) check(block);
    for (int64_t block : blocks) ++uses_[static_cast<size_t>(block)];
  }

  void release(const std::vector<int64_t>& blocks) {
    for (int64_t block : blocks) {
      check(block);
      if (--uses_[static_cast<size_t>(block)] == 0) free_.push_back(block);
    }
  }

  int64_t free() const { return static_cast<int64_t>(free_.size()); }

 private:
  void check(int64_t block) const {
    if (block < 0 || block >= static_cast<int64_t>(uses_.size()) || uses_[static_cast<size_t>(block)] == 0) {
      throw std::invalid_argument("block " + std::to_string(block) + " is not taken");
    }
  }

  std::vector<int64_t> free_;  // the next one last
  std::vector<int32_t> uses_;
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  pybind11::class_<BlockAllocator>(m, "BlockAllocator")
      .def(pybind11::init<int64_t>(), pybind11::arg("blocks"))
      .def("allocate", &BlockAllocator::allocate, pybind11::arg("count"))
      .def("share", &BlockAllocator::share, pybind11::arg("blocks"))
      .def("release", &BlockAllocator::release, pybind11::arg("blocks"))
      .def_property_readonly("free", &BlockAllocator::free);
}
