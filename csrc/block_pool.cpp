#include "block_pool.h"

#include <numeric>

#include "check.h"

namespace internvl_rt {
namespace {

std::size_t checked_size(std::int32_t num_blocks) {
  CHECK_ARGUMENT(num_blocks > 0, "num_blocks: expected at least 1, got ", num_blocks);
  return static_cast<std::size_t>(num_blocks);
}

}  // namespace

BlockPool::BlockPool(std::int32_t num_blocks)
    : next_(checked_size(num_blocks)), first_free_(0), num_free_(num_blocks) {
  std::iota(next_.begin(), next_.end(), 1);
  next_.back() = kEnd;
}

std::int32_t BlockPool::allocate() {
  CHECK_INVARIANT(num_free_ > 0, "allocate on an empty pool");
  const std::int32_t block = first_free_;
  auto& next = next_[static_cast<std::size_t>(block)];
  first_free_ = next;
  next = kInUse;
  --num_free_;
  return block;
}

void BlockPool::free(std::int32_t block) {
  auto& next = next_.at(static_cast<std::size_t>(block));
  CHECK_INVARIANT(next == kInUse, "block ", block, " is freed twice");
  next = first_free_;
  first_free_ = block;
  ++num_free_;
}

void BlockPool::check_invariants() const {
  std::int32_t on_list = 0;
  for (std::int32_t block = first_free_; block != kEnd; block = next_[static_cast<std::size_t>(block)]) {
    CHECK_INVARIANT(block >= 0 && block < num_blocks(), "the free list leads to block ", block);
    CHECK_INVARIANT(++on_list <= num_free_, "the free list is longer than its counter ", num_free_);
  }
  CHECK_INVARIANT(on_list == num_free_, "the free list holds ", on_list, " blocks, its counter says ", num_free_);

  std::int32_t not_in_use = 0;
  for (const std::int32_t next : next_) not_in_use += next != kInUse;
  CHECK_INVARIANT(not_in_use == num_free_, not_in_use, " blocks are not in use, ", num_free_, " are on the free list");
}

}  // namespace internvl_rt
