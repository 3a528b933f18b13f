// The blocks of the KV cache: how many sequences hold each of them, and which one is handed out next.
//
// A block id indexes the B dimension of every layer's k_cache_BGPC and v_cache_BGPC. Each block is in exactly one
// place:
//   free      It holds nothing that anybody could use. The block that was freed last is handed out first, because its
//             memory is most likely still in the processor's caches and already backed by the operating system.
//   cached    It holds a published prefix that no sequence uses at the moment. Without a free block, the block that
//             has been cached longest is evicted.
//   used      At least one sequence holds it.
//   deferred  No sequence holds it, but a step of the device may still read or write it.
// The lists of free and of cached blocks are linked through the entries of one array, so every operation is O(1) and
// allocates no memory.
#pragma once

#include <cstdint>
#include <vector>

namespace internvl_rt {

enum class Place : std::uint8_t { kFree, kCached, kUsed, kDeferred };
enum class Content : std::uint8_t {
  kPrivate,    // a sequence may write it, if no other sequence holds it
  kPending,    // its tokens are final; it is published when the steps that compute them are complete
  kPublished,  // it is in the prefix index
};

struct Block {
  std::int32_t previous = -1;
  std::int32_t next = -1;
  std::int32_t references = 0;
  std::uint32_t generation = 0;  // counts how often it was allocated, or taken back while it was deferred
  std::int64_t busy_until = 0;   // the latest step that makes a copy from or to it
  std::int32_t copy_of = -1;     // the source of a copy to it that take_copies() has not handed out yet; -1: none
  Place place = Place::kFree;
  Content content = Content::kPrivate;
};

class BlockPool {
 public:
  explicit BlockPool(std::int32_t num_blocks);

  std::int32_t num_blocks() const noexcept { return num_blocks_; }
  std::int32_t num_free() const noexcept { return num_free_; }
  std::int32_t num_cached() const noexcept { return num_cached_; }
  std::int32_t num_deferred() const noexcept { return num_deferred_; }
  std::int32_t num_available() const noexcept { return num_free_ + num_cached_; }
  Block& operator[](std::int32_t block) { return blocks_[static_cast<std::size_t>(block)]; }
  const Block& operator[](std::int32_t block) const { return blocks_[static_cast<std::size_t>(block)]; }
  bool writable(std::int32_t block) const {
    return (*this)[block].references == 1 && (*this)[block].content == Content::kPrivate;
  }

  // The published block that the next allocate() takes; the caller has to remove it from the prefix index first.
  // -1: the next allocate() takes a free block.
  std::int32_t next_eviction() const noexcept;
  // Hands out a block, which is then private and has one reference. num_available() must be above 0.
  std::int32_t allocate();
  // Adds a reference. The block must be used or published.
  void ref(std::int32_t block);
  // Takes a reference away; true: it was the last one, and the block is deferred now.
  bool unref(std::int32_t block);
  // Moves a deferred block to the list of cached blocks if it is published, else to the list of free ones.
  void put_back(std::int32_t block);
  // Makes all cached blocks free.
  void forget_cached();

  void check_invariants() const;

 private:
  // Two further entries of the array are the heads of the two circular lists.
  std::int32_t free_list() const noexcept { return num_blocks_; }
  std::int32_t cached_list() const noexcept { return num_blocks_ + 1; }
  void link_after(std::int32_t before, std::int32_t block);
  void unlink(std::int32_t block);
  std::int32_t check_list(std::int32_t list, Place place) const;

  std::vector<Block> blocks_;
  std::int32_t num_blocks_;
  std::int32_t num_free_;
  std::int32_t num_cached_ = 0;
  std::int32_t num_deferred_ = 0;
};

}  // namespace internvl_rt
