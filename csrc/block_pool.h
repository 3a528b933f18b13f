// The physical blocks of the KV cache: which are free, which are in use.
//
// A block id indexes the B dimension of every layer's k_cache_BGPC and v_cache_BGPC. The free blocks form an intrusive
// last-in-first-out list in one flat array, so allocate and free are O(1), touch one entry and never allocate memory,
// and a block that was just freed (warm in caches, already backed by the OS) is the next one handed out.
#pragma once

#include <cstdint>
#include <vector>

namespace internvl_rt {

class BlockPool {
 public:
  explicit BlockPool(std::int32_t num_blocks);

  std::int32_t num_blocks() const noexcept { return static_cast<std::int32_t>(next_.size()); }
  std::int32_t num_free() const noexcept { return num_free_; }
  bool is_free(std::int32_t block) const { return next_.at(static_cast<std::size_t>(block)) != kInUse; }

  std::int32_t allocate();        // the caller has seen num_free() > 0
  void free(std::int32_t block);  // the caller owns the block

  void check_invariants() const;

 private:
  static constexpr std::int32_t kEnd = -1;
  static constexpr std::int32_t kInUse = -2;

  std::vector<std::int32_t> next_;  // per block: the free block after it, kEnd, or kInUse
  std::int32_t first_free_;
  std::int32_t num_free_;
};

}  // namespace internvl_rt
