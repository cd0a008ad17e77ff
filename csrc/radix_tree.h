// RadixTree: which sequences of tokens have their keys and values in which slots of a KV cache.
//
//   radix::RadixTree tree(16, 1);                          pages of 16 tokens
//   radix::Match match = tree.match(tokens, nullptr);
//   tree.insert(tokens, slots, nullptr, 0);
//
// An edge's label, which its lower node holds, is a run of tokens and as many values, a multiple of the page size long. Nodes
// are numbers; the children of all of them are in one hash table, by parent and first page. A handle is a node's number and how
// often that number was given away before, so that one of a node that is gone is known as such.
//
// Nothing here knows Python, and nothing locks: the module's binding does. What is wrong is an exception of <stdexcept>, and
// then the tree holds what it held. Its parts: radix_tree.cpp, the shape and the calls;
// radix_tree_evict.cpp; radix_tree_look.cpp; radix_tree_snapshot.cpp.
#pragma once

#include <cstddef>        // size_t
#include <cstdint>        // int32_t and its kin
#include <functional>     // function
#include <memory>         // unique_ptr
#include <string>         // names of spaces
#include <unordered_map>  // spaces by name
#include <vector>         // nodes, queues

namespace radix {

using Handle = uint64_t;  // the number of a node below, its generation above

constexpr int64_t kLargestPage = 1 << 20;

enum class Policy { lru, lfu };
constexpr int kPolicies = 2;

// Writes the numbers from an index on, so many; throws if one is not from 0 to 2^31 - 1.
using Writer = std::function<void(int64_t from, int64_t count, int32_t* to)>;

// Tokens where their owner has them, in 32 or in 64 bits each. They are compared there, and read as a whole only if they have to
// be kept: a cache that is full of long prompts waits for memory more than for anything else.
struct Tokens {
  const void* data;
  int64_t size;
  bool is_wide;
  Writer write;
};

struct Match {
  Handle node;
  int64_t length;
};

// A leaf that was evicted: its tokens, then its values.
struct Freed {
  std::unique_ptr<int32_t[]> label;
  int64_t size;
};

// What is known of a node, for those who look at the whole tree. The pointers are good until the tree changes.
struct Seen {
  Handle node;
  Handle parent;
  const int32_t* tokens;
  const int32_t* values;
  int64_t size;
  const std::string* extra_key;  // null for none
  uint64_t used;
  uint64_t hits;
  uint32_t locks;  // of the node and of those below it
  bool is_leaf;
};

// Room for so many, made in ever larger steps, so that what is added later needs no memory.
template <typename Item>
void make_room(std::vector<Item>& items, size_t count) {
  if (items.capacity() < count) items.reserve(2 * count);
}

// Asks for ints that are in memory, but not in the CPU's cache: it fetches ahead by itself, but not beyond a page of 4 KiB, and
// only after it has waited for the first of one. It is no harm if they are not there.
inline void prefetch(const int32_t* from, int64_t count) {
  constexpr int64_t kLine = 16;
  for (int64_t line = 0; line < count; line += kLine) __builtin_prefetch(from + line);
}

class RadixTree {
 public:
  // `salt` makes the handles and the table of this tree unlike those of others.
  RadixTree(int64_t page_size, uint64_t salt);
  RadixTree(const RadixTree&) = delete;
  RadixTree& operator=(const RadixTree&) = delete;
  ~RadixTree();

  // The longest prefix that is here, by whole pages. Its nodes have been used now; a node in which it ends is split.
  Match match(const Tokens& tokens, const std::string* extra_key);
  // The values of the path from the root to the node, of a length that `match` told.
  void read_values(Handle node, int64_t length, int32_t* to) const;
  // Adds what is not here, by whole pages, and returns how long the prefix is that was. Of what is added, `values` is asked
  // for the values. Nodes that end behind the first `counted` tokens are hit once more.
  int64_t insert(const Tokens& tokens, const Writer& values, const std::string* extra_key, int64_t counted);
  // Removes leaves that nobody has locked until `wanted` tokens went, or none is left; appends them to `freed`.
  void evict(int64_t wanted, Policy policy, std::vector<Freed>& freed);
  void lock(Handle node);
  void unlock(Handle node);
  void reset();

  // Tokens and values from the root to the node.
  void path(Handle node, std::vector<int32_t>& tokens, std::vector<int32_t>& values) const;
  // Every node but the root, a parent before its children, the eldest child first.
  std::vector<Seen> nodes() const;
  // Throws std::logic_error if something that always holds does not.
  void check() const;

  // The names of all extra keys.
  std::vector<std::string> extra_keys() const;

  std::string save() const;
  // Throws std::invalid_argument if the data is none that `save` wrote.
  static std::unique_ptr<RadixTree> load(const char* data, size_t size, uint64_t salt);

  int64_t page_size() const { return page_size_; }
  int64_t total() const { return evictable_ + protected_; }
  int64_t evictable() const { return evictable_; }
  int64_t protected_tokens() const { return protected_; }
  int64_t count() const { return count_; }
  // Of all that the tree holds, as far as it knows.
  int64_t bytes() const;

 private:
  static constexpr uint32_t kNone = UINT32_MAX;
  static constexpr uint32_t kRoot = 0;

  struct Node {
    std::unique_ptr<int32_t[]> label;  // tokens, then values
    int64_t size = 0;
    uint64_t used = 0;  // by the clock
    uint64_t hits = 0;
    uint32_t hash = 0;
    uint32_t generation = 0;
    uint32_t parent = kNone;  // of a number that is free: kNone
    uint32_t space = 0;
    uint32_t eldest = kNone, youngest = kNone;  // children
    uint32_t elder = kNone, younger = kNone;    // siblings
    uint32_t locks = 0;                         // of the node and of those below it
    uint32_t own_locks = 0;
    uint8_t queued = 0;  // a bit for each policy
  };
  struct Space {
    std::string name;
    int64_t children = 0;  // of the root
  };
  // A node that may be evicted, as it was when it was queued. Time and hits only grow, so it is never queued too late.
  struct Queued {
    uint64_t hits;
    uint64_t used;
    uint32_t node;
    uint32_t generation;
    bool operator<(const Queued& other) const;  // the top of a heap is the largest: the first to go
  };

  Handle handle(uint32_t node) const { return uint64_t{nodes_[node].generation} << 32 | node; }
  uint32_t node_of(Handle handle) const;
  bool is_evictable(uint32_t node) const;

  uint32_t hash_of(uint32_t parent, uint32_t space, const int32_t* page) const;
  uint32_t find(uint32_t parent, uint32_t space, const int32_t* page) const;
  void reserve_edge();
  void add_edge(uint32_t node);
  size_t place_of(uint32_t node) const;
  void remove_edge(uint32_t node);

  uint32_t new_node();
  void free_node(uint32_t node);
  uint32_t add_leaf(uint32_t parent, uint32_t space, std::unique_ptr<int32_t[]> label, int64_t size);
  uint32_t split(uint32_t node, int64_t at);
  void remove_leaf(uint32_t node);
  uint32_t space_of(const std::string* extra_key) const;
  uint32_t make_space(const std::string* extra_key);
  void release_space(uint32_t space);
  template <typename Step>
  uint32_t walk(const Tokens& tokens, uint32_t space, bool reads_values, int64_t& length, const Step& step);
  const int32_t* page_at(const Tokens& tokens, int64_t at);

  // Entries of a queue; beyond it most are of nodes that are gone.
  static size_t most_queued(int64_t count) { return 2 * static_cast<size_t>(count) + 64; }
  Queued queued_now(uint32_t node, int policy) const;
  void offer(uint32_t node);
  void fill_queue(int policy);

  int64_t page_size_;
  uint64_t salt_;
  uint64_t clock_ = 0;
  int64_t evictable_ = 0;
  int64_t protected_ = 0;
  int64_t count_ = 0;  // nodes but the root

  std::vector<int32_t> page_;  // one of wide tokens
  std::vector<Node> nodes_;
  std::vector<uint32_t> free_;
  std::vector<uint32_t> table_;  // of nodes by hash, open; a power of two, at most half full
  std::vector<Space> spaces_;    // the first is that of no extra key
  std::vector<uint32_t> free_spaces_;
  std::unordered_map<std::string, uint32_t> space_by_name_;
  std::vector<Queued> queues_[kPolicies];  // heaps
  bool is_queued_[kPolicies] = {};         // whether the policy was asked for yet
};

}  // namespace radix
