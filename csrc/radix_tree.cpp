#include "radix_tree.h"

#include <algorithm>  // min
#include <cstring>    // memcpy, memcmp
#include <stdexcept>  // what is thrown
#include <utility>    // move

namespace radix {
namespace {

constexpr size_t kFewest = 16;

uint64_t mixed(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a ^ 0x9e3779b97f4a7c15) * (b ^ 0xd1b54a32d192ed03);
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// How many tokens are equal from the start: runs of them, of which the compiler makes vectors, and then one by one. Labels are
// mostly not in the CPU's cache, and are asked for ahead; so is what stands as far behind each token as `values` says, unless
// that is 0.
template <typename Token>
int64_t common(const int32_t* label, const Token* tokens, int64_t size, int64_t values) {
  constexpr int64_t kRun = 64, kAhead = 1024;
  prefetch(label, std::min(size, kAhead));
  int64_t at = 0;
  for (; size - at >= kRun; at += kRun) {
    prefetch(label + at + kAhead, kRun);
    if (values != 0) prefetch(label + at + values, kRun);
    Token differ = 0;
    for (int64_t index = at; index < at + kRun; ++index) differ |= Token{label[index]} ^ tokens[index];
    if (differ != 0) break;
  }
  while (at < size && label[at] == tokens[at]) ++at;
  return at;
}

int64_t common(const int32_t* label, const Tokens& tokens, int64_t at, int64_t size, int64_t values) {
  if (tokens.is_wide) return common(label, static_cast<const int64_t*>(tokens.data) + at, size, values);
  return common(label, static_cast<const int32_t*>(tokens.data) + at, size, values);
}

std::unique_ptr<int32_t[]> label_of(const int32_t* tokens, const int32_t* values, int64_t size) {
  std::unique_ptr<int32_t[]> made(new int32_t[static_cast<size_t>(2 * size)]);
  std::memcpy(made.get(), tokens, static_cast<size_t>(size) * sizeof(int32_t));
  std::memcpy(made.get() + size, values, static_cast<size_t>(size) * sizeof(int32_t));
  return made;
}

}  // namespace

RadixTree::RadixTree(int64_t page_size, uint64_t salt) : page_size_(page_size), salt_(salt) {
  if (page_size < 1 || page_size > kLargestPage) {
    throw std::invalid_argument("page_size must be from 1 to " + std::to_string(kLargestPage) + ", got " +
                                std::to_string(page_size));
  }
  page_.resize(static_cast<size_t>(page_size));
  table_.assign(kFewest, kNone);
  spaces_.emplace_back();
  nodes_.emplace_back();
  nodes_[kRoot].generation = static_cast<uint32_t>(salt_);
}

RadixTree::~RadixTree() = default;

// --- handles --------------------------------------------------------------------------------------

uint32_t RadixTree::node_of(Handle handle) const {
  const uint32_t node = static_cast<uint32_t>(handle);
  if (node >= nodes_.size() || nodes_[node].generation != handle >> 32 || (node != kRoot && nodes_[node].parent == kNone)) {
    throw std::invalid_argument("the node is not in this tree: it was evicted, or the tree was reset, or it is another tree's");
  }
  return node;
}

uint32_t RadixTree::new_node() {
  if (!free_.empty()) {
    const uint32_t node = free_.back();
    free_.pop_back();
    return node;
  }
  if (nodes_.size() >= kNone) throw std::length_error("a tree holds no more than 2^32 - 1 nodes");
  make_room(free_, nodes_.size() + 1);  // for free_node
  nodes_.emplace_back();
  nodes_.back().generation = static_cast<uint32_t>(salt_);
  return static_cast<uint32_t>(nodes_.size() - 1);
}

// A number whose generations are used up is not given away again.
void RadixTree::free_node(uint32_t node) {
  const uint32_t generation = nodes_[node].generation + 1;
  nodes_[node] = Node();
  nodes_[node].generation = generation;
  if (generation != static_cast<uint32_t>(salt_)) free_.push_back(node);
}

// --- the table of edges ---------------------------------------------------------------------------

uint32_t RadixTree::hash_of(uint32_t parent, uint32_t space, const int32_t* page) const {
  uint64_t hash = mixed(salt_ ^ parent, parent == kRoot ? space : 0);
  int64_t at = 0;
  for (; at + 2 <= page_size_; at += 2) {
    uint64_t two;
    std::memcpy(&two, page + at, sizeof(two));
    hash = mixed(hash, two);
  }
  if (at < page_size_) hash = mixed(hash, static_cast<uint32_t>(page[at]));
  return static_cast<uint32_t>(hash ^ hash >> 32);
}

uint32_t RadixTree::find(uint32_t parent, uint32_t space, const int32_t* page) const {
  const uint32_t hash = hash_of(parent, space, page);
  const size_t mask = table_.size() - 1;
  for (size_t place = hash & mask; table_[place] != kNone; place = (place + 1) & mask) {
    const Node& node = nodes_[table_[place]];
    if (node.hash == hash && node.parent == parent && node.space == space &&
        std::memcmp(node.label.get(), page, static_cast<size_t>(page_size_) * sizeof(int32_t)) == 0) {
      return table_[place];
    }
  }
  return kNone;
}

// Room for one more node in the table and the queues, so that what follows cannot fail.
void RadixTree::reserve_edge() {
  for (int policy = 0; policy < kPolicies; ++policy) {
    if (is_queued_[policy]) make_room(queues_[policy], most_queued(count_ + 1) + 1);
  }
  if (static_cast<size_t>(count_ + 1) * 2 <= table_.size()) return;
  std::vector<uint32_t> larger(table_.size() * 2, kNone);
  table_.swap(larger);
  for (uint32_t node : larger) {
    if (node != kNone) add_edge(node);
  }
}

void RadixTree::add_edge(uint32_t node) {
  const size_t mask = table_.size() - 1;
  size_t place = nodes_[node].hash & mask;
  while (table_[place] != kNone) place = (place + 1) & mask;
  table_[place] = node;
}

size_t RadixTree::place_of(uint32_t node) const {
  const size_t mask = table_.size() - 1;
  size_t place = nodes_[node].hash & mask;
  while (table_[place] != node) place = (place + 1) & mask;
  return place;
}

// What stands behind the gap and could stand in it moves there, so that no search ends too early.
void RadixTree::remove_edge(uint32_t node) {
  const size_t mask = table_.size() - 1;
  size_t gap = place_of(node);
  for (size_t place = (gap + 1) & mask; table_[place] != kNone; place = (place + 1) & mask) {
    const size_t home = nodes_[table_[place]].hash & mask;
    if (((place - home) & mask) >= ((place - gap) & mask)) {
      table_[gap] = table_[place];
      gap = place;
    }
  }
  table_[gap] = kNone;
}

// --- spaces ---------------------------------------------------------------------------------------

// kNone if the tree holds nothing of the key.
uint32_t RadixTree::space_of(const std::string* extra_key) const {
  if (extra_key == nullptr) return 0;
  const auto found = space_by_name_.find(*extra_key);
  return found == space_by_name_.end() ? kNone : found->second;
}

uint32_t RadixTree::make_space(const std::string* extra_key) {
  const uint32_t known = space_of(extra_key);
  if (known != kNone) return known;
  uint32_t space;
  if (free_spaces_.empty()) {
    make_room(free_spaces_, spaces_.size() + 1);
    space = static_cast<uint32_t>(spaces_.size());
    spaces_.emplace_back();
    free_spaces_.push_back(space);
  }
  space = free_spaces_.back();
  spaces_[space].name = *extra_key;
  space_by_name_.emplace(*extra_key, space);
  free_spaces_.pop_back();
  return space;
}

void RadixTree::release_space(uint32_t space) {
  if (space == 0 || spaces_[space].children > 0) return;
  space_by_name_.erase(spaces_[space].name);
  spaces_[space] = Space();
  free_spaces_.push_back(space);
}

// --- the shape of the tree ------------------------------------------------------------------------

uint32_t RadixTree::add_leaf(uint32_t parent, uint32_t space, std::unique_ptr<int32_t[]> label, int64_t size) {
  reserve_edge();
  const uint32_t leaf = new_node();
  Node& node = nodes_[leaf];
  node.label = std::move(label);
  node.size = size;
  node.parent = parent;
  node.space = space;
  node.used = clock_;
  node.hash = hash_of(parent, space, node.label.get());  // of the copy: the caller's memory may be another thread's too
  node.elder = nodes_[parent].youngest;
  (node.elder == kNone ? nodes_[parent].eldest : nodes_[node.elder].younger) = leaf;
  nodes_[parent].youngest = leaf;
  if (parent == kRoot) ++spaces_[space].children;
  ++count_;
  add_edge(leaf);
  evictable_ += size;
  return leaf;
}

// The first `at` tokens become a node above this one, which keeps its handle, its locks and its children. Returns the new one.
uint32_t RadixTree::split(uint32_t lower, int64_t at) {
  const int64_t rest = nodes_[lower].size - at;
  const int32_t* label = nodes_[lower].label.get();
  std::unique_ptr<int32_t[]> first = label_of(label, label + nodes_[lower].size, at);
  std::unique_ptr<int32_t[]> second = label_of(label + at, label + nodes_[lower].size + at, rest);
  reserve_edge();
  const uint32_t upper = new_node();
  Node& above = nodes_[upper];
  Node& below = nodes_[lower];
  table_[place_of(lower)] = upper;
  above.label = std::move(first);
  above.size = at;
  above.hash = below.hash;
  above.parent = below.parent;
  above.space = below.space;
  above.used = below.used;
  above.hits = below.hits;
  above.locks = below.locks;
  above.elder = below.elder;
  above.younger = below.younger;
  above.eldest = above.youngest = lower;
  (above.elder == kNone ? nodes_[above.parent].eldest : nodes_[above.elder].younger) = upper;
  (above.younger == kNone ? nodes_[above.parent].youngest : nodes_[above.younger].elder) = upper;
  below.label = std::move(second);
  below.size = rest;
  below.parent = upper;
  below.elder = below.younger = kNone;
  below.hash = hash_of(upper, below.space, below.label.get());
  ++count_;
  add_edge(lower);
  return upper;
}

void RadixTree::remove_leaf(uint32_t leaf) {
  const Node& node = nodes_[leaf];
  const uint32_t parent = node.parent;
  remove_edge(leaf);
  (node.elder == kNone ? nodes_[parent].eldest : nodes_[node.elder].younger) = node.younger;
  (node.younger == kNone ? nodes_[parent].youngest : nodes_[node.younger].elder) = node.elder;
  evictable_ -= node.size;
  --count_;
  if (parent == kRoot) {
    --spaces_[node.space].children;
    release_space(node.space);
  }
  free_node(leaf);
}

// Goes down as far as the tokens do, and splits the node in which they part; `step` is called with each node. Returns the last.
// `reads_values`: the caller will, of all these nodes.
template <typename Step>
uint32_t RadixTree::walk(const Tokens& tokens, uint32_t space, bool reads_values, int64_t& length, const Step& step) {
  const int64_t size = tokens.size / page_size_ * page_size_;
  uint32_t node = kRoot;
  length = 0;
  while (space != kNone && length < size) {
    uint32_t child = find(node, space, page_at(tokens, length));
    if (child == kNone) break;
    const int64_t most = std::min(nodes_[child].size, size - length);
    const int64_t same = common(nodes_[child].label.get(), tokens, length, most, reads_values ? nodes_[child].size : 0) /
                         page_size_ * page_size_;
    if (same == 0) break;  // a wide token is out of range, or somebody writes the tokens meanwhile
    const bool ends = same < nodes_[child].size;
    if (ends) child = split(child, same);
    length += same;
    nodes_[child].used = clock_;
    step(child);
    node = child;
    if (ends) break;
  }
  return node;
}

// What is out of range in it leads to a page that is another, as `common` finds out.
const int32_t* RadixTree::page_at(const Tokens& tokens, int64_t at) {
  if (!tokens.is_wide) return static_cast<const int32_t*>(tokens.data) + at;
  const int64_t* wide = static_cast<const int64_t*>(tokens.data) + at;
  for (int64_t index = 0; index < page_size_; ++index) {
    page_[static_cast<size_t>(index)] = static_cast<int32_t>(wide[index]);
  }
  return page_.data();
}

// --- what callers do ------------------------------------------------------------------------------

Match RadixTree::match(const Tokens& tokens, const std::string* extra_key) {
  ++clock_;
  int64_t length;
  const uint32_t node = walk(tokens, space_of(extra_key), true, length, [](uint32_t) {});
  return {handle(node), length};
}

void RadixTree::read_values(Handle handle, int64_t length, int32_t* to) const {
  for (uint32_t at = node_of(handle); at != kRoot; at = nodes_[at].parent) {
    const Node& node = nodes_[at];
    length -= node.size;
    std::memcpy(to + length, node.label.get() + node.size, static_cast<size_t>(node.size) * sizeof(int32_t));
  }
}

int64_t RadixTree::insert(const Tokens& tokens, const Writer& values, const std::string* extra_key, int64_t counted) {
  ++clock_;
  const int64_t size = tokens.size / page_size_ * page_size_;
  if (size == 0) return 0;
  const uint32_t space = make_space(extra_key);
  int64_t length;
  int64_t passed = 0;
  try {
    const uint32_t node = walk(tokens, space, false, length, [&](uint32_t child) {
      passed += nodes_[child].size;
      if (passed > counted) ++nodes_[child].hits;
    });
    if (length < size) {
      const int64_t rest = size - length;
      std::unique_ptr<int32_t[]> label(new int32_t[static_cast<size_t>(2 * rest)]);
      tokens.write(length, rest, label.get());
      values(length, rest, label.get() + rest);
      const uint32_t leaf = add_leaf(node, space, std::move(label), rest);
      nodes_[leaf].hits = size > counted ? 1 : 0;
      offer(leaf);
    }
  } catch (...) {
    release_space(space);
    throw;
  }
  return length;
}

void RadixTree::lock(Handle handle) {
  const uint32_t node = node_of(handle);
  if (node == kRoot) return;
  for (uint32_t at = node; at != kRoot; at = nodes_[at].parent) {
    if (nodes_[at].locks == UINT32_MAX) throw std::overflow_error("the node is locked 2^32 - 1 times");
  }
  for (uint32_t at = node; at != kRoot; at = nodes_[at].parent) {
    if (nodes_[at].locks++ == 0) {
      evictable_ -= nodes_[at].size;
      protected_ += nodes_[at].size;
    }
  }
  ++nodes_[node].own_locks;
}

void RadixTree::unlock(Handle handle) {
  const uint32_t node = node_of(handle);
  if (node == kRoot) return;
  if (nodes_[node].own_locks == 0) throw std::invalid_argument("the node is not locked: each unlock belongs to one lock of it");
  --nodes_[node].own_locks;
  for (uint32_t at = node; at != kRoot; at = nodes_[at].parent) {
    if (--nodes_[at].locks == 0) {
      evictable_ += nodes_[at].size;
      protected_ -= nodes_[at].size;
    }
  }
  offer(node);  // those above it have a child
}

void RadixTree::reset() {
  free_.reserve(nodes_.size());
  const std::vector<uint32_t> fresh(kFewest, kNone);
  for (uint32_t node = 0; node < nodes_.size(); ++node) {
    if (node != kRoot && nodes_[node].parent != kNone) free_node(node);
  }
  const uint32_t generation = nodes_[kRoot].generation + 1;
  nodes_[kRoot] = Node();
  nodes_[kRoot].generation = generation;
  table_ = fresh;
  spaces_.resize(1);
  spaces_[0].children = 0;
  free_spaces_.clear();
  space_by_name_.clear();
  for (int policy = 0; policy < kPolicies; ++policy) {
    queues_[policy].clear();
    is_queued_[policy] = false;
  }
  evictable_ = protected_ = count_ = 0;
}

}  // namespace radix
