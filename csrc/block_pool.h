// The physical blocks of the KV cache: who refers to them, and which can be handed out next.
//
// A block id indexes the B dimension of every layer's k_cache_BGPC and v_cache_BGPC. A block is in one place: on the
// fresh list (nothing of value in it), on the cached list (a published prefix that nobody uses right now, so it may be
// evicted), in use by sequences, or deferred (unused, but a step of the device may still read or write it). Fresh blocks
// are last in, first out: the one that was just freed is warm in caches and backed by the OS. Cached blocks are evicted
// in the order in which they came. Both lists run through one flat array, so every operation is O(1) and allocates
// nothing.
#pragma once

#include <cstdint>
#include <vector>

namespace internvl_rt {

enum class Place : std::uint8_t { kFresh, kCached, kUsed, kDeferred };
enum class Content : std::uint8_t {
  kPrivate,    // its sequence may write it, if it is the only one
  kPending,    // final; will be published when its step is complete
  kPublished,  // in the prefix index
};

struct Block {
  std::int32_t previous = -1;
  std::int32_t next = -1;
  std::int32_t references = 0;
  std::uint32_t generation = 0;  // how often it was allocated, or taken back while it was deferred
  std::int64_t busy_until = 0;   // the step that makes the latest copy from or to it
  std::int32_t copy_of = -1;     // source of a copy to it that has not been taken yet
  Place place = Place::kFresh;
  Content content = Content::kPrivate;
};

class BlockPool {
 public:
  explicit BlockPool(std::int32_t num_blocks);

  std::int32_t num_blocks() const noexcept { return num_blocks_; }
  std::int32_t num_fresh() const noexcept { return num_fresh_; }
  std::int32_t num_cached() const noexcept { return num_cached_; }
  std::int32_t num_deferred() const noexcept { return num_deferred_; }
  std::int32_t num_available() const noexcept { return num_fresh_ + num_cached_; }
  Block& operator[](std::int32_t block) { return blocks_[static_cast<std::size_t>(block)]; }
  const Block& operator[](std::int32_t block) const { return blocks_[static_cast<std::size_t>(block)]; }
  bool writable(std::int32_t block) const {
    return (*this)[block].references == 1 && (*this)[block].content == Content::kPrivate;
  }

  // The published block that the next allocate() takes, to be removed from the index first; -1: it takes a fresh one.
  std::int32_t next_eviction() const noexcept;
  std::int32_t allocate();          // with one reference, private; the caller has seen num_available() > 0
  void ref(std::int32_t block);     // of a used block, or a published one
  bool unref(std::int32_t block);   // true: that was the last reference, the block is deferred
  void put_back(std::int32_t block);  // a deferred block, to the list that its content asks for
  void forget_cached();             // cached blocks become fresh ones

  void check_invariants() const;

 private:
  std::int32_t fresh_list() const noexcept { return num_blocks_; }  // the lists' ends are two further entries
  std::int32_t cached_list() const noexcept { return num_blocks_ + 1; }
  void link_after(std::int32_t before, std::int32_t block);
  void unlink(std::int32_t block);
  std::int32_t check_list(std::int32_t list, Place place) const;

  std::vector<Block> blocks_;
  std::int32_t num_blocks_;
  std::int32_t num_fresh_;
  std::int32_t num_cached_ = 0;
  std::int32_t num_deferred_ = 0;
};

}  // namespace internvl_rt
