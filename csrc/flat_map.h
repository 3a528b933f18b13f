// A hash map from small keys to non-negative int32 values, in one array that is at most half full. A key is looked for
// from its home on, entry by entry (linear probing). To erase a key, the entries after it are moved up (backward-shift
// deletion), so no markers of deleted keys are left. Memory is allocated only when the map grows.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "hash.h"

namespace internvl_rt {

inline std::uint64_t spread(const Hash128& key) { return key.low; }  // the key is a hash already
// Fibonacci hashing: the high bits of the product depend on all bits of the key, so they are mixed into the low ones.
inline std::uint64_t spread(std::int64_t key) {
  const std::uint64_t product = static_cast<std::uint64_t>(key) * 0x9e3779b97f4a7c15;
  return product ^ (product >> 32);
}

template <class Key>
class FlatMap {
 public:
  explicit FlatMap(std::int64_t expected_size = 4) { entries_.resize(capacity_for(expected_size)); }

  std::int64_t size() const noexcept { return size_; }

  // Returns the key's value, or -1 if the key is not in the map.
  std::int32_t find(const Key& key) const {
    for (std::size_t place = home(key);; place = after(place)) {
      const Entry& entry = entries_[place];
      if (entry.value < 0 || entry.key == key) return entry.value;
    }
  }

  // The key must not be in the map.
  void insert(const Key& key, std::int32_t value) {
    if (2 * (size_ + 1) > std::ssize(entries_)) grow();
    place(key, value);
    ++size_;
  }

  // The key must be in the map.
  void erase(const Key& key) {
    std::size_t hole = home(key);
    while (!(entries_[hole].value >= 0 && entries_[hole].key == key)) {
      CHECK_INVARIANT(entries_[hole].value >= 0, "a key that is erased is not in the map");
      hole = after(hole);
    }
    // Each entry after the hole moves into it, unless the hole is before that entry's home, where it could not be
    // found.
    for (std::size_t next = after(hole); entries_[next].value >= 0; next = after(next)) {
      const std::size_t distance_home = (next - home(entries_[next].key)) & mask();
      if (distance_home >= ((next - hole) & mask())) {
        entries_[hole] = entries_[next];
        hole = next;
      }
    }
    entries_[hole].value = -1;
    --size_;
  }

  void clear() noexcept {
    for (Entry& entry : entries_) entry.value = -1;
    size_ = 0;
  }

 private:
  struct Entry {
    Key key{};
    std::int32_t value = -1;
  };

  static std::size_t capacity_for(std::int64_t size) { return std::bit_ceil(2 * static_cast<std::size_t>(size) + 2); }
  std::size_t mask() const noexcept { return entries_.size() - 1; }
  std::size_t home(const Key& key) const noexcept { return static_cast<std::size_t>(spread(key)) & mask(); }
  std::size_t after(std::size_t place) const noexcept { return (place + 1) & mask(); }

  void place(const Key& key, std::int32_t value) {
    std::size_t place = home(key);
    while (entries_[place].value >= 0) place = after(place);
    entries_[place] = {key, value};
  }

  void grow() {
    std::vector<Entry> old(2 * entries_.size());
    old.swap(entries_);
    for (const Entry& entry : old)
      if (entry.value >= 0) place(entry.key, entry.value);
  }

  std::vector<Entry> entries_;
  std::int64_t size_ = 0;
};

}  // namespace internvl_rt
