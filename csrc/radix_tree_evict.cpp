// What goes first. Every leaf that may be evicted is in a heap, for each policy that somebody has asked for, as it was when it was
// put there. What was used since is put back when its turn comes: a use costs nothing then, and most never have a turn.

#include <algorithm>  // heaps, min
#include <utility>    // move

#include "radix_tree.h"

namespace radix {
namespace {

constexpr int64_t kRead = 4096;  // values of a leaf that are asked for when it goes: nobody has read them for long

}  // namespace

bool RadixTree::Queued::operator<(const Queued& other) const {
  if (hits != other.hits) return hits > other.hits;
  return used != other.used ? used > other.used : node > other.node;
}

bool RadixTree::is_evictable(uint32_t node) const {
  return node != kRoot && nodes_[node].locks == 0 && nodes_[node].eldest == kNone;
}

RadixTree::Queued RadixTree::queued_now(uint32_t node, int policy) const {
  const Node& now = nodes_[node];
  return {policy == static_cast<int>(Policy::lfu) ? now.hits : 0, now.used, node, now.generation};
}

// Queues the node if it may be evicted, for each policy that somebody has asked for.
void RadixTree::offer(uint32_t node) {
  if (!is_evictable(node)) return;
  for (int policy = 0; policy < kPolicies; ++policy) {
    const uint8_t bit = static_cast<uint8_t>(1 << policy);
    if (!is_queued_[policy] || (nodes_[node].queued & bit) != 0) continue;
    std::vector<Queued>& queue = queues_[policy];
    if (queue.size() >= most_queued(count_)) {
      const auto is_gone = [&](const Queued& queued) { return nodes_[queued.node].generation != queued.generation; };
      queue.erase(std::remove_if(queue.begin(), queue.end(), is_gone), queue.end());
      std::make_heap(queue.begin(), queue.end());
    }
    queue.push_back(queued_now(node, policy));
    nodes_[node].queued |= bit;
    std::push_heap(queue.begin(), queue.end());
  }
}

void RadixTree::fill_queue(int policy) {
  const uint8_t bit = static_cast<uint8_t>(1 << policy);
  std::vector<Queued> queue;
  make_room(queue, most_queued(count_) + 1);
  for (uint32_t node = 1; node < nodes_.size(); ++node) {
    nodes_[node].queued &= static_cast<uint8_t>(~bit);
    if (nodes_[node].parent == kNone || !is_evictable(node)) continue;
    queue.push_back(queued_now(node, policy));
    nodes_[node].queued |= bit;
  }
  std::make_heap(queue.begin(), queue.end());
  queues_[policy].swap(queue);
  is_queued_[policy] = true;
}

void RadixTree::evict(int64_t wanted, Policy by, std::vector<Freed>& freed) {
  const int policy = static_cast<int>(by);
  if (wanted > 0 && !is_queued_[policy]) fill_queue(policy);
  std::vector<Queued>& queue = queues_[policy];
  int64_t went = 0;
  while (went < wanted && !queue.empty()) {
    const Queued first = queue.front();
    const uint32_t leaf = first.node;
    const bool is_gone = nodes_[leaf].generation != first.generation;
    const Queued now = queued_now(leaf, policy);
    const bool is_due = !is_gone && is_evictable(leaf) && now.hits == first.hits && now.used == first.used;
    if (is_due) {
      const int64_t size = nodes_[leaf].size;
      freed.push_back({nullptr, size});  // which may fail, and nothing below
      prefetch(nodes_[leaf].label.get() + size, std::min<int64_t>(size, kRead));
    }
    std::pop_heap(queue.begin(), queue.end());
    queue.pop_back();
    if (is_gone) continue;
    nodes_[leaf].queued &= static_cast<uint8_t>(~(1 << policy));
    if (!is_due) {
      offer(leaf);  // used since: its turn is later; or locked, or with children
      continue;
    }
    const uint32_t parent = nodes_[leaf].parent;
    went += nodes_[leaf].size;
    freed.back().label = std::move(nodes_[leaf].label);
    remove_leaf(leaf);
    offer(parent);
  }
}

}  // namespace radix
