#include "paged_kv_cache.h"

#include <algorithm>
#include <limits>
#include <ranges>
#include <utility>

#include "check.h"

namespace internvl_rt {
namespace {

constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();

std::size_t as_size(std::int64_t value) { return static_cast<std::size_t>(value); }

std::int32_t checked_num_blocks(std::int32_t num_blocks, std::int32_t block_size) {
  CHECK_ARGUMENT(block_size > 0, "block_size: expected at least 1, got ", block_size);
  const std::int64_t num_slots = static_cast<std::int64_t>(num_blocks) * block_size;
  CHECK_ARGUMENT(num_slots <= kMaxInt32, "num_blocks * block_size: expected at most ", kMaxInt32,
                 " token slots (they are int32), got ", num_slots);
  return num_blocks;
}

void check_num_tokens(std::int64_t num_tokens) {
  CHECK_ARGUMENT(num_tokens >= 0, "num_tokens: expected at least 0, got ", num_tokens);
}

void check_size(const char* name, std::size_t actual, std::size_t expected) {
  CHECK_ARGUMENT(actual == expected, name, ": expected size ", expected, ", got ", actual);
}

}  // namespace

PagedKVCache::PagedKVCache(std::int32_t num_blocks, std::int32_t block_size)
    : pool_(checked_num_blocks(num_blocks, block_size)), block_size_(block_size) {}

bool PagedKVCache::admit(std::int64_t seq_id, std::int64_t num_tokens) {
  CHECK_ARGUMENT(seq_id >= 0 && seq_id <= kMaxInt32, "seq_id: expected 0 to ", kMaxInt32, ", got ", seq_id);
  CHECK_ARGUMENT(!sequences_.contains(seq_id), "sequence ", seq_id, " is already admitted");
  check_num_tokens(num_tokens);
  const auto entry = sequences_.try_emplace(seq_id).first;
  if (grow(entry->second.blocks, num_tokens)) return true;
  sequences_.erase(entry);
  return false;
}

bool PagedKVCache::append(std::int64_t seq_id, std::int64_t num_tokens) {
  Sequence& sequence = find(seq_id);
  check_num_tokens(num_tokens);
  // More than any pool holds; compared before it is added, since the sum of two int64 may overflow.
  if (num_tokens > kMaxInt32 || !grow(sequence.blocks, sequence.length + num_tokens)) return false;
  sequence.length += num_tokens;
  return true;
}

void PagedKVCache::release(std::int64_t seq_id) {
  const Sequence& sequence = find(seq_id);
  // Back to front, so that the next sequence gets the blocks in the order this one had them.
  for (const std::int32_t block : sequence.blocks | std::views::reverse) pool_.free(block);
  sequences_.erase(seq_id);
}

void PagedKVCache::fill_step(const StepBuffers& step) {
  check_step(step);
  const std::size_t num_rows = step.seq_len_S.size();
  std::size_t num_tokens = 0;
  for (std::size_t row = 0; row < num_rows; ++row) {
    step.query_start_S1[row] = static_cast<std::int32_t>(num_tokens);
    const auto table_N = step.block_table_SN.subspan(row * as_size(step.table_width), as_size(step.table_width));
    if (row >= step_rows_.size()) {
      step.seq_len_S[row] = 0;
      std::ranges::fill(table_N, -1);
      continue;
    }
    const Sequence& sequence = *step_rows_[row];
    step.seq_len_S[row] = static_cast<std::int32_t>(sequence.length);
    const auto end = std::copy_n(sequence.blocks.begin(), blocks_for(sequence.length), table_N.begin());
    std::fill(end, table_N.end(), -1);
    for (std::int64_t position = sequence.length - step.num_new_tokens[row]; position < sequence.length; ++position) {
      const std::int32_t block = sequence.blocks[as_size(position / block_size_)];
      step.slot_T[num_tokens++] = block * block_size_ + static_cast<std::int32_t>(position % block_size_);
    }
  }
  step.query_start_S1[num_rows] = static_cast<std::int32_t>(num_tokens);
  std::ranges::fill(step.slot_T.subspan(num_tokens), -1);
}

void PagedKVCache::check_step(const StepBuffers& step) {
  const std::size_t num_rows = step.seq_len_S.size();
  const std::size_t num_sequences = step.seq_ids.size();
  check_size("num_new_tokens", step.num_new_tokens.size(), num_sequences);
  CHECK_ARGUMENT(num_rows >= num_sequences, "seq_len_S: expected at least ", num_sequences,
                 " rows (one per sequence), got ", num_rows);
  check_size("query_start_S1", step.query_start_S1.size(), num_rows + 1);
  check_size("block_table_SN", step.block_table_SN.size(), num_rows * as_size(step.table_width));

  step_rows_.clear();
  ++num_steps_;
  std::int64_t num_tokens = 0;
  for (std::size_t row = 0; row < num_sequences; ++row) {
    const std::int32_t seq_id = step.seq_ids[row];
    Sequence& sequence = find(seq_id);
    CHECK_ARGUMENT(sequence.last_step != num_steps_, "seq_ids: sequence ", seq_id, " is listed twice");
    sequence.last_step = num_steps_;
    const std::int32_t num_new = step.num_new_tokens[row];
    CHECK_ARGUMENT(num_new >= 0 && num_new <= sequence.length, "num_new_tokens: expected 0 to ", sequence.length,
                   " (the length of sequence ", seq_id, "), got ", num_new);
    CHECK_ARGUMENT(blocks_for(sequence.length) <= step.table_width, "block_table_SN: expected at least ",
                   blocks_for(sequence.length), " columns for the ", sequence.length, " tokens of sequence ", seq_id,
                   ", got ", step.table_width);
    num_tokens += num_new;
    step_rows_.push_back(&sequence);
  }
  CHECK_ARGUMENT(as_size(num_tokens) <= step.slot_T.size(), "slot_T: expected at least ", num_tokens,
                 " entries (the new tokens of this step), got ", step.slot_T.size());
}

void PagedKVCache::check_invariants() const {
  pool_.check_invariants();
  std::vector<bool> owned(as_size(num_blocks()));
  std::int64_t num_owned = 0;
  for (const auto& [seq_id, sequence] : sequences_) {
    CHECK_INVARIANT(sequence.length >= 0 && blocks_for(sequence.length) <= std::ssize(sequence.blocks), "sequence ",
                    seq_id, " of ", sequence.length, " tokens holds only ", sequence.blocks.size(), " blocks");
    for (const std::int32_t block : sequence.blocks) {
      CHECK_INVARIANT(block >= 0 && block < num_blocks(), "sequence ", seq_id, " holds block ", block);
      CHECK_INVARIANT(!pool_.is_free(block), "block ", block, " of sequence ", seq_id, " is on the free list");
      CHECK_INVARIANT(!owned[as_size(block)], "block ", block, " of sequence ", seq_id, " has a second owner");
      owned[as_size(block)] = true;
      ++num_owned;
    }
  }
  CHECK_INVARIANT(num_owned + num_free_blocks() == num_blocks(), num_owned, " owned and ", num_free_blocks(),
                  " free blocks do not add up to ", num_blocks());
}

const PagedKVCache::Sequence& PagedKVCache::find(std::int64_t seq_id) const {
  const auto entry = sequences_.find(seq_id);
  CHECK_ARGUMENT(entry != sequences_.end(), "sequence ", seq_id, " is not admitted");
  return entry->second;
}

PagedKVCache::Sequence& PagedKVCache::find(std::int64_t seq_id) {
  return const_cast<Sequence&>(std::as_const(*this).find(seq_id));
}

std::int64_t PagedKVCache::blocks_for(std::int64_t num_tokens) const noexcept {
  return num_tokens / block_size_ + (num_tokens % block_size_ != 0);
}

// Extends `blocks` to cover num_tokens; false and no change when the pool cannot.
bool PagedKVCache::grow(std::vector<std::int32_t>& blocks, std::int64_t num_tokens) {
  const std::int64_t num_missing = blocks_for(num_tokens) - std::ssize(blocks);
  if (num_missing <= 0) return true;
  if (num_missing > pool_.num_free()) return false;
  // The only step that can throw comes first.
  blocks.resize(blocks.size() + as_size(num_missing));
  std::ranges::generate(blocks | std::views::drop(std::ssize(blocks) - num_missing), [&] { return pool_.allocate(); });
  return true;
}

}  // namespace internvl_rt
