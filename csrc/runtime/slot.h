// What is known of an op overload on a backend: how its arguments are read, what its key is made of, and the table of its
// variants.
//
// A hit takes no lock: a table gets new entries while it is read, and one that is full is replaced by one of twice the size and
// stays for its readers, so a reader never waits. Tables and slots are never freed.
#pragma once

#include <jitk/abi.h>  // Entry

#include "key_rule.h"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

namespace {

#define JITK_MAX_SLOTS 16384  // (op overload, backend) pairs; also for the assembler, and MAX_SLOTS of dispatcher.py
constexpr int32_t kMaxSlots = JITK_MAX_SLOTS;
constexpr int32_t kMaxArguments = 32;
constexpr int32_t kMaxResults = 8;
constexpr int32_t kMaxKeyParts = 16;

struct Argument {
  char kind;  // a letter of export.h; O for a tensor that the caller gives as the place of a result
  bool optional;
  bool written;
  bool reusable;  // read, but a written argument may take its place (overlap.h)
  bool returned;  // an output that the schema returns
  bool passed;    // to the C++ function; a value that is a template argument is not
  int32_t place;  // among the values: those that are passed come first
  std::string name;
  std::vector<std::string> words;  // the choices of a str; the first items of a list of tensors as errors name them: "xs[0]"

  const char* item_name(size_t at) const { return at < words.size() ? words[at].c_str() : name.c_str(); }
};

// What the C++ function makes.
struct Result {
  char kind;      // T, or L for a list of tensors
  bool optional;  // may be None
  std::string name;
};

struct KeyPart {
  enum What { kDType, kSize, kDim, kValue } what;
  int32_t argument;
  int64_t dim;
  int32_t first_rule, rules;  // of the slot's
};

struct Variant {
  std::vector<int64_t> key;
  jitk::Entry entry;  // null: no kernel can serve this key here, so the op's reference does
};

// Half of its cells at most are taken, so that a search ends at an empty one.
struct Table {
  explicit Table(size_t size) : mask(size - 1), cells(size) {}
  size_t mask;
  std::vector<std::atomic<const Variant*>> cells;
};

uint64_t hash(const int64_t* key, int32_t count) {
  uint64_t state = 0x9e3779b97f4a7c15u;
  for (int32_t i = 0; i < count; ++i) {
    state = (state ^ static_cast<uint64_t>(key[i])) * 0xff51afd7ed558ccdu;
    state ^= state >> 32;
  }
  return state;
}

// Held by whoever changes a table or registers a kernel, and by a fork: the child finds all of it whole, and PyTorch's own lock
// for registrations free.
std::mutex changes;

struct Slot {
  int64_t asks = 0;       // what jitk::_build knows it by
  std::string name;       // jitk::silu_and_mul.out
  std::string reference;  // jitk::_reference_silu_and_mul_out
  bool on_cuda = false;
  bool writes = false;
  bool writes_lists = false;
  std::vector<Argument> arguments;
  std::vector<KeyPart> key;
  std::vector<KeyRule> rules;
  std::vector<Result> results;  // of the C++ function
  int32_t made = 0;             // how many these are
  bool plain = true;            // all of them are tensors, and none may be None
  int32_t outputs = 0;          // those of them that it takes as Output&, behind its arguments
  int32_t returned = 0;         // arguments that the schema returns, behind the results
  int32_t passed = 0;           // values that the C++ function takes

  std::atomic<Table*> table{new Table(2)};
  std::atomic<uint64_t> forgotten{0};  // how often
  size_t variants = 0;

  int32_t key_size() const { return static_cast<int32_t>(key.size()) + 1; }

  const Variant* find(const int64_t* wanted) const {
    const Table& now = *table.load(std::memory_order_acquire);
    for (size_t at = hash(wanted, key_size());; ++at) {
      const Variant* variant = now.cells[at & now.mask].load(std::memory_order_acquire);
      if (variant == nullptr || memcmp(variant->key.data(), wanted, sizeof(int64_t) * static_cast<size_t>(key_size())) == 0)
        return variant;
    }
  }

  // The first entry for a key stays: a thread that lost a race uses the winner's. What was asked for before the table was
  // `forgotten` once more serves its call alone.
  jitk::Entry add(const int64_t* wanted, jitk::Entry entry, uint64_t asked_at) {
    const std::lock_guard<std::mutex> lock(changes);
    if (asked_at != forgotten.load(std::memory_order_relaxed)) return entry;
    if (const Variant* known = find(wanted)) return known->entry;
    Table* now = table.load(std::memory_order_relaxed);
    if (2 * (variants + 1) > now->mask + 1) {
      auto* grown = new Table(2 * (now->mask + 1));  // those before are never freed: together they are smaller than it
      for (const auto& cell : now->cells) {
        if (const Variant* one = cell.load(std::memory_order_relaxed)) insert(*grown, one);
      }
      table.store(now = grown, std::memory_order_release);
    }
    insert(*now, new Variant{{wanted, wanted + key_size()}, entry});
    ++variants;
    return entry;
  }

  // Every key is asked for again.
  void forget() {
    const std::lock_guard<std::mutex> lock(changes);
    forgotten.fetch_add(1, std::memory_order_relaxed);
    variants = 0;
    table.store(new Table(2), std::memory_order_release);
  }

 private:
  void insert(Table& into, const Variant* variant) const {
    size_t at = hash(variant->key.data(), key_size());
    while (into.cells[at & into.mask].load(std::memory_order_relaxed) != nullptr) ++at;
    into.cells[at & into.mask].store(variant, std::memory_order_release);
  }
};

std::atomic<Slot*> slots[kMaxSlots];

}  // namespace
