// What is in a RadixTree, for those who look at all of it.

#include <algorithm>  // is_heap
#include <cstring>    // memcpy
#include <stdexcept>  // logic_error

#include "radix_tree.h"

namespace radix {

void RadixTree::path(Handle handle, std::vector<int32_t>& tokens, std::vector<int32_t>& values) const {
  const uint32_t node = node_of(handle);
  int64_t length = 0;
  for (uint32_t at = node; at != kRoot; at = nodes_[at].parent) length += nodes_[at].size;
  tokens.resize(static_cast<size_t>(length));
  values.resize(static_cast<size_t>(length));
  read_values(handle, length, values.data());
  for (uint32_t at = node; at != kRoot; at = nodes_[at].parent) {
    length -= nodes_[at].size;
    std::memcpy(tokens.data() + length, nodes_[at].label.get(), static_cast<size_t>(nodes_[at].size) * sizeof(int32_t));
  }
}

std::vector<Seen> RadixTree::nodes() const {
  std::vector<Seen> seen;
  seen.reserve(static_cast<size_t>(count_));
  uint32_t at = nodes_[kRoot].eldest;
  while (at != kNone) {
    const Node& node = nodes_[at];
    const std::string* name = node.space == 0 ? nullptr : &spaces_[node.space].name;
    seen.push_back({handle(at), handle(node.parent), node.label.get(), node.label.get() + node.size, node.size, name, node.used,
                    node.hits, node.locks, node.eldest == kNone});
    if (node.eldest != kNone) {
      at = node.eldest;
      continue;
    }
    while (at != kRoot && nodes_[at].younger == kNone) at = nodes_[at].parent;
    at = at == kRoot ? kNone : nodes_[at].younger;
  }
  return seen;
}

std::vector<std::string> RadixTree::extra_keys() const {
  std::vector<std::string> names;
  for (const auto& [name, space] : space_by_name_) names.push_back(name);
  return names;
}

int64_t RadixTree::bytes() const {
  size_t held = sizeof(*this) + nodes_.capacity() * sizeof(Node) + (free_.capacity() + table_.capacity()) * sizeof(uint32_t);
  for (const std::vector<Queued>& queue : queues_) held += queue.capacity() * sizeof(Queued);
  for (const Space& space : spaces_) held += 2 * (sizeof(Space) + space.name.capacity());
  return static_cast<int64_t>(held) + total() * 2 * static_cast<int64_t>(sizeof(int32_t));
}

void RadixTree::check() const {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::logic_error(std::string("RadixTree: ") + what);
  };
  int64_t evictable = 0, held = 0, count = 0;
  std::vector<uint64_t> locks(nodes_.size());
  std::vector<int64_t> children(spaces_.size());
  std::vector<int64_t> queued[kPolicies];
  for (int policy = 0; policy < kPolicies; ++policy) {
    queued[policy].resize(nodes_.size());
    for (const Queued& each : queues_[policy]) queued[policy][each.node] += each.generation == nodes_[each.node].generation;
  }
  for (const Seen& seen : nodes()) {
    const uint32_t at = static_cast<uint32_t>(seen.node);
    const Node& node = nodes_[at];
    ++count;
    (node.locks == 0 ? evictable : held) += node.size;
    require(node.size > 0 && node.size % page_size_ == 0, "a label is no multiple of the page size");
    require(node.hash == hash_of(node.parent, node.space, node.label.get()), "a hash is not that of its page");
    require(find(node.parent, node.space, node.label.get()) == at, "a node is not where its page leads to");
    require(node.parent == kRoot || nodes_[node.parent].space == node.space, "a node is of another space than its parent");
    require(node.parent == kRoot || nodes_[node.parent].used >= node.used, "a node was used without its parent");
    require(node.used <= clock_, "a node was used in the future");
    for (int64_t index = 0; index < 2 * node.size; ++index) require(node.label[index] >= 0, "a token or value is negative");
    for (uint32_t above = at; node.own_locks > 0 && above != kRoot; above = nodes_[above].parent) {
      locks[above] += node.own_locks;
    }
    if (node.parent == kRoot) ++children[node.space];
    for (int policy = 0; policy < kPolicies; ++policy) {
      const bool is_queued = (node.queued >> policy & 1) != 0;
      require(!is_queued_[policy] || !is_evictable(at) || is_queued, "a node that may be evicted is not queued");
      require(queued[policy][at] == int64_t{is_queued}, "a node is not queued once");
    }
  }
  require(count == count_ && evictable == evictable_ && held == protected_, "the sizes are not those of the nodes");
  for (uint32_t at = 1; at < nodes_.size(); ++at) require(locks[at] == nodes_[at].locks, "locks are not those of the path");
  size_t edges = 0;
  for (uint32_t node : table_) edges += node != kNone;
  require(edges == static_cast<size_t>(count_) && edges * 2 <= table_.size(), "the table holds other edges");
  for (size_t space = 0; space < spaces_.size(); ++space) {
    require(children[space] == spaces_[space].children, "a space has other children");
    require(space == 0 || children[space] == 0 || space_by_name_.at(spaces_[space].name) == space, "a space has another name");
  }
  require(space_by_name_.size() + free_spaces_.size() + 1 == spaces_.size(), "a space without nodes is kept");
  for (const std::vector<Queued>& queue : queues_) require(std::is_heap(queue.begin(), queue.end()), "a queue is out of order");
}

}  // namespace radix
