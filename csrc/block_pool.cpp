#include "block_pool.h"

#include "check.h"

namespace internvl_rt {

BlockPool::BlockPool(std::int32_t num_blocks)
    : blocks_(static_cast<std::size_t>(num_blocks) + 2), num_blocks_(num_blocks), num_free_(num_blocks) {
  for (const std::int32_t list : {free_list(), cached_list()}) (*this)[list].previous = (*this)[list].next = list;
  for (std::int32_t block = num_blocks - 1; block >= 0; --block) link_after(free_list(), block);
}

std::int32_t BlockPool::next_eviction() const noexcept {
  return num_free_ > 0 || num_cached_ == 0 ? -1 : (*this)[cached_list()].next;
}

std::int32_t BlockPool::allocate() {
  CHECK_INVARIANT(num_available() > 0, "allocate on an empty pool");
  std::int32_t& count = num_free_ > 0 ? num_free_ : num_cached_;
  const std::int32_t block = (*this)[num_free_ > 0 ? free_list() : cached_list()].next;
  unlink(block);
  --count;
  Block& b = (*this)[block];
  b.references = 1;
  ++b.generation;
  b.place = Place::kUsed;
  b.content = Content::kPrivate;
  return block;
}

void BlockPool::ref(std::int32_t block) {
  Block& b = (*this)[block];
  if (b.references++ > 0) return;
  CHECK_INVARIANT(b.content == Content::kPublished, "block ", block, " is taken back into use but holds nothing");
  if (b.place == Place::kCached) {
    unlink(block);
    --num_cached_;
  } else {
    ++b.generation;  // so the entry in PagedKVCache::frees_ that would put it back is stale
    --num_deferred_;
  }
  b.place = Place::kUsed;
}

bool BlockPool::unref(std::int32_t block) {
  Block& b = (*this)[block];
  CHECK_INVARIANT(b.references > 0, "block ", block, " loses a reference that it does not have");
  if (--b.references > 0) return false;
  b.place = Place::kDeferred;
  ++num_deferred_;
  return true;
}

void BlockPool::put_back(std::int32_t block) {
  Block& b = (*this)[block];
  CHECK_INVARIANT(b.place == Place::kDeferred, "block ", block, " is put back twice");
  --num_deferred_;
  if (b.content == Content::kPublished) {
    b.place = Place::kCached;
    link_after((*this)[cached_list()].previous, block);
    ++num_cached_;
  } else {
    b.place = Place::kFree;
    b.content = Content::kPrivate;
    link_after(free_list(), block);
    ++num_free_;
  }
}

void BlockPool::forget_cached() {
  while (num_cached_ > 0) {
    const std::int32_t block = (*this)[cached_list()].next;
    unlink(block);
    --num_cached_;
    Block& b = (*this)[block];
    b.content = Content::kPrivate;
    b.place = Place::kFree;
    link_after(free_list(), block);
    ++num_free_;
  }
}

void BlockPool::link_after(std::int32_t before, std::int32_t block) {
  const std::int32_t next = (*this)[before].next;
  (*this)[block].previous = before;
  (*this)[block].next = next;
  (*this)[before].next = block;
  (*this)[next].previous = block;
}

void BlockPool::unlink(std::int32_t block) {
  const Block& b = (*this)[block];
  (*this)[b.previous].next = b.next;
  (*this)[b.next].previous = b.previous;
}

std::int32_t BlockPool::check_list(std::int32_t list, Place place) const {
  std::int32_t length = 0;
  for (std::int32_t at = list, next = (*this)[at].next; next != list; at = next, next = (*this)[at].next) {
    CHECK_INVARIANT(next >= 0 && next < num_blocks_, "a list of blocks leads to block ", next);
    CHECK_INVARIANT((*this)[next].previous == at, "block ", next, " does not lead back to ", at);
    CHECK_INVARIANT((*this)[next].place == place, "block ", next, " is on a list but its place is another");
    CHECK_INVARIANT(++length <= num_blocks_, "a list of blocks has a cycle");
  }
  return length;
}

void BlockPool::check_invariants() const {
  CHECK_INVARIANT(check_list(free_list(), Place::kFree) == num_free_, "num_free is not ", num_free_);
  CHECK_INVARIANT(check_list(cached_list(), Place::kCached) == num_cached_, "num_cached is not ", num_cached_);
  std::int32_t num_free = 0, num_cached = 0, num_deferred = 0;
  for (std::int32_t block = 0; block < num_blocks_; ++block) {
    const Block& b = (*this)[block];
    num_free += b.place == Place::kFree;
    num_cached += b.place == Place::kCached;
    num_deferred += b.place == Place::kDeferred;
    CHECK_INVARIANT((b.place == Place::kUsed) == (b.references > 0), "block ", block, " has ", b.references,
                    " references in the wrong place");
    CHECK_INVARIANT(b.place != Place::kFree || b.content == Content::kPrivate, "free block ", block, " has content");
    CHECK_INVARIANT(b.place != Place::kCached || b.content == Content::kPublished, "cached block ", block,
                    " is not published");
  }
  CHECK_INVARIANT(num_free == num_free_ && num_cached == num_cached_, "a block is lost from its list");
  CHECK_INVARIANT(num_deferred == num_deferred_, "num_deferred is not ", num_deferred);
}

}  // namespace internvl_rt
