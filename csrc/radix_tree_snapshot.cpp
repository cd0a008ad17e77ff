// A RadixTree as bytes, and back. Numbers are little-endian, of 64 bits where nothing else is said:
//
//   page size, clock, count of extra keys, of nodes, of tokens
//   each extra key: its length, its text in UTF-8
//   each node, parents first: its parent (0 is the root, 1 the first node), its extra key (0 is none), used, hits, size
//   the tokens of all nodes, then their values, in 32 bits each
//
// Locks are not among it: those who held them are gone. What is read is believed only as far as it was checked: whatever the
// bytes are, `load` makes a whole tree or throws. Whether they are those that were written, a checksum says, which is the
// caller's to keep.

#include <cstring>    // memcpy
#include <stdexcept>  // invalid_argument
#include <utility>    // move

#include "radix_tree.h"

namespace radix {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers are written as they are in memory");

constexpr uint64_t kRow = 5 * sizeof(uint64_t);   // of a node
constexpr uint64_t kLargest = uint64_t{1} << 62;  // so that what is counted on does not run over

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("the snapshot of a RadixTree is damaged: ") + what);
}

class Reader {
 public:
  Reader(const char* data, size_t size) : data_(data), left_(size) {}

  const char* take(uint64_t size) {
    require(size <= left_, "it ends too early");
    const char* here = data_;
    data_ += size;
    left_ -= size;
    return here;
  }

  uint64_t number() {
    uint64_t value;
    std::memcpy(&value, take(sizeof(value)), sizeof(value));
    require(value <= kLargest, "a number is too large");
    return value;
  }

  // How many there are of what takes at least so many bytes each.
  uint64_t count(uint64_t bytes) {
    const uint64_t value = number();
    require(value <= left_ / bytes, "it ends too early");
    return value;
  }

  size_t left() const { return left_; }

 private:
  const char* data_;
  size_t left_;
};

std::unique_ptr<int32_t[]> read_tokens(Reader& from, uint64_t count) {
  std::unique_ptr<int32_t[]> made(new int32_t[count]);
  std::memcpy(made.get(), from.take(count * sizeof(int32_t)), count * sizeof(int32_t));
  for (uint64_t index = 0; index < count; ++index) require(made[index] >= 0, "a token or value is negative");
  return made;
}

void append(std::string& to, uint64_t value) { to.append(reinterpret_cast<const char*>(&value), sizeof(value)); }

void append(std::string& to, const int32_t* tokens, int64_t size) {
  to.append(reinterpret_cast<const char*>(tokens), static_cast<size_t>(size) * sizeof(int32_t));
}

}  // namespace

std::string RadixTree::save() const {
  const std::vector<Seen> all = nodes();
  std::unordered_map<const std::string*, uint64_t> numbers_of_keys;
  std::vector<uint64_t> numbers(nodes_.size());
  std::string keys, rows;
  for (const Seen& seen : all) {
    uint64_t key = 0;
    if (seen.extra_key != nullptr) {
      const auto [found, is_new] = numbers_of_keys.emplace(seen.extra_key, numbers_of_keys.size() + 1);
      key = found->second;
      if (is_new) {
        append(keys, seen.extra_key->size());
        keys += *seen.extra_key;
      }
    }
    numbers[static_cast<uint32_t>(seen.node)] = rows.size() / kRow + 1;
    const uint64_t row[] = {numbers[static_cast<uint32_t>(seen.parent)], key, seen.used, seen.hits,
                            static_cast<uint64_t>(seen.size)};
    static_assert(sizeof(row) == kRow);
    for (uint64_t value : row) append(rows, value);
  }
  std::string data;
  data.reserve(5 * sizeof(uint64_t) + keys.size() + rows.size() + static_cast<size_t>(total()) * 2 * sizeof(int32_t));
  append(data, static_cast<uint64_t>(page_size_));
  append(data, clock_);
  append(data, numbers_of_keys.size());
  append(data, all.size());
  append(data, static_cast<uint64_t>(total()));
  data += keys;
  data += rows;
  for (const Seen& seen : all) append(data, seen.tokens, seen.size);
  for (const Seen& seen : all) append(data, seen.values, seen.size);
  return data;
}

std::unique_ptr<RadixTree> RadixTree::load(const char* data, size_t size, uint64_t salt) {
  Reader from(data, size);
  const uint64_t page_size = from.number();
  require(page_size >= 1 && page_size <= kLargestPage, "its page size is none");
  std::unique_ptr<RadixTree> tree(new RadixTree(static_cast<int64_t>(page_size), salt));
  tree->clock_ = from.number();
  const uint64_t keys = from.count(sizeof(uint64_t));
  const uint64_t count = from.count(kRow);
  const uint64_t total = from.count(2 * sizeof(int32_t));
  for (uint64_t key = 0; key < keys; ++key) {
    const uint64_t length = from.number();
    const std::string name(from.take(length), length);
    require(tree->space_of(&name) == kNone, "an extra key is there twice");
    tree->make_space(&name);  // numbered as they come
  }
  require(from.left() == count * kRow + total * 2 * sizeof(int32_t), "it is of another length");
  Reader rows(from.take(count * kRow), count * kRow);
  const std::unique_ptr<int32_t[]> tokens = read_tokens(from, total);
  const std::unique_ptr<int32_t[]> values = read_tokens(from, total);
  uint64_t at = 0;
  for (uint64_t number = 1; number <= count; ++number) {  // of the new tree's nodes, too
    const uint64_t parent = rows.number(), key = rows.number(), used = rows.number(), hits = rows.number(),
                   length = rows.number();
    require(parent < number && key <= keys && used <= tree->clock_, "a node is impossible");
    require(length > 0 && length % page_size == 0 && length <= total - at, "a node has an impossible size");
    const uint32_t above = static_cast<uint32_t>(parent), space = static_cast<uint32_t>(key);
    require(above == kRoot || tree->nodes_[above].space == space, "a node has another extra key than its parent");
    require(above == kRoot || tree->nodes_[above].used >= used, "a node was used without its parent");
    require(tree->find(above, space, tokens.get() + at) == kNone, "a node is there twice");
    std::unique_ptr<int32_t[]> label(new int32_t[2 * length]);
    std::memcpy(label.get(), tokens.get() + at, length * sizeof(int32_t));
    std::memcpy(label.get() + length, values.get() + at, length * sizeof(int32_t));
    const uint32_t leaf = tree->add_leaf(above, space, std::move(label), static_cast<int64_t>(length));
    tree->nodes_[leaf].used = used;
    tree->nodes_[leaf].hits = hits;
    at += length;
  }
  require(at == total, "it has tokens of no node");
  for (uint64_t key = 1; key <= keys; ++key) require(tree->spaces_[key].children > 0, "an extra key has no nodes");
  return tree;
}

}  // namespace radix
