// The part of PagedKVCache that concerns steps of the device: it fills their buffers, makes blocks wait for them and
// lists copies.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "check.h"
#include "paged_kv_cache.h"

namespace internvl_rt {
namespace {

// One program of decode attention reads a whole row if the row has at most so many blocks.
constexpr std::int64_t kMaxUnsplitBlocks = 4;

constexpr const char *kTableNames[] = {"block_table_SN", "window_table_SN"},
                     *kSlotNames[] = {"slot_T", "window_slot_T"};

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Returns into how many splits a row of num_blocks blocks is cut, if no split of the batch should be longer than
// `longest` blocks. The split that finishes last adds up the results of all. If splits were shorter than
// sqrt(num_blocks / 8) blocks, adding up would take longer than shorter splits save.
std::int64_t num_splits(std::int64_t num_blocks, std::int64_t longest) {
  if (num_blocks <= kMaxUnsplitBlocks) return num_blocks > 0 ? 1 : 0;
  const auto shortest = static_cast<std::int64_t>(std::ceil(std::sqrt(static_cast<double>(num_blocks) / 8)));
  return ceil_div(num_blocks, std::max(longest, shortest));
}

}  // namespace

std::int64_t PagedKVCache::fill_step(const StepBuffers& step) {
  check_step(step);
  const std::size_t num_rows = step.seq_len_S.size();
  std::size_t num_tokens = 0;
  for (std::size_t row = 0; row < num_rows; ++row) {
    step.query_start_S1[row] = static_cast<std::int32_t>(num_tokens);
    if (row >= batch_.size()) {
      step.seq_len_S[row] = 0;
      continue;
    }
    Sequence& sequence = *batch_[row];
    step.seq_len_S[row] = static_cast<std::int32_t>(sequence.length);
    num_tokens += as_size(step.num_new_tokens[row]);
    const std::int64_t first = sequence.length - step.num_new_tokens[row];
    if (first == sequence.length || first > sequence.num_in_steps) continue;  // a token before them is not computed
    sequence.num_in_steps = sequence.length;
    std::erase_if(sequence.writes, [&](const Write& w) { return w.step <= num_completed_ || w.first >= first; });
    sequence.writes.push_back({.step = num_steps_ + 1, .first = first});
    free_unseen(sequence, first);
  }
  step.query_start_S1[num_rows] = static_cast<std::int32_t>(num_tokens);
  for (std::size_t table = 0; table < num_tables(); ++table) fill_table(step, table);
  if (!step.split_start_S1.empty()) fill_split_plan(step);
  return ++num_steps_;
}

// Writes the blocks of all rows, and the slots of their new tokens.
void PagedKVCache::fill_table(const StepBuffers& step, std::size_t table) const {
  const auto [block_table_SN, slot_T] = step.tables[table];
  auto slot_out = slot_T.begin();
  for (std::size_t row = 0; row < step.seq_len_S.size(); ++row) {
    const auto table_N = block_table_SN.subspan(row * as_size(step.table_width), as_size(step.table_width));
    auto end = table_N.begin();
    if (row < batch_.size()) {
      const Sequence& sequence = *batch_[row];
      const auto& blocks = sequence.tables[table];
      end = std::copy_n(blocks.begin(), blocks_for(sequence.length), end);
      std::int64_t position = sequence.length - step.num_new_tokens[row];
      while (position < sequence.length) {  // one block in each turn
        const std::int64_t index = position / block_size();
        const std::int64_t stop = std::min(sequence.length, (index + 1) * block_size());
        std::int32_t slot =
            blocks[as_size(index)] * block_size() + static_cast<std::int32_t>(position - index * block_size());
        for (; position < stop; ++position) *slot_out++ = slot++;
      }
    }
    std::fill(end, table_N.end(), -1);
  }
  std::fill(slot_out, slot_T.end(), -1);
}

// The blocks at the beginning of a sequence that a token, given by its place, and those after it do not see in a
// window.
std::int64_t PagedKVCache::num_unseen(std::int64_t token) const noexcept {
  return options_.window == 0 ? 0 : std::max<std::int64_t>(0, token - options_.window + 1) / block_size();
}

// The first token that a step can still compute: those before it see blocks that are freed.
std::int64_t PagedKVCache::first_computable(const Sequence& sequence) const noexcept {
  return sequence.num_freed == 0 ? 0 : sequence.num_freed * block_size() + options_.window - 1;
}

// Frees the blocks that the tokens from `first` on do not see in a window. Steps that were made before may read them.
void PagedKVCache::free_unseen(Sequence& sequence, std::int64_t first) {
  for (const std::int64_t end = num_unseen(first); sequence.num_freed < end; ++sequence.num_freed)
    unref(std::exchange(sequence.tables[kWindow][as_size(sequence.num_freed)], -1), num_steps_);
}

void PagedKVCache::check_step(const StepBuffers& step) {
  const std::size_t num_rows = step.seq_len_S.size();
  const std::size_t num_sequences = step.seq_ids.size();
  CHECK_ARGUMENT(copies_.empty(), "take_copies: expected to be called before the step, ", copies_.size(),
                 " block copies are waiting");
  check_size("num_new_tokens", step.num_new_tokens.size(), num_sequences);
  CHECK_ARGUMENT(num_rows >= num_sequences, "seq_len_S: expected at least ", num_sequences,
                 " rows (one per sequence), got ", num_rows);
  check_size("query_start_S1", step.query_start_S1.size(), num_rows + 1);
  for (std::size_t table = 0; table < num_tables(); ++table)
    check_size(kTableNames[table], step.tables[table].block_table_SN.size(), num_rows * as_size(step.table_width));

  find_batch(step.seq_ids);
  std::int64_t num_tokens = 0, num_decodes = 0;
  for (std::size_t row = 0; row < num_sequences; ++row) {
    const Sequence& sequence = *batch_[row];
    const std::int32_t num_new = step.num_new_tokens[row];
    CHECK_ARGUMENT(num_new >= 0 && num_new <= sequence.length, "num_new_tokens: expected 0 to ", sequence.length,
                   " (the length of sequence ", sequence.seq_id, "), got ", num_new);
    const std::int64_t num_blocks = blocks_for(sequence.length);
    check_new_tokens(sequence, num_new, num_blocks);
    CHECK_ARGUMENT(num_blocks <= step.table_width, "block_table_SN: expected at least ", num_blocks,
                   " columns for the ", sequence.length, " tokens of sequence ", sequence.seq_id, ", got ",
                   step.table_width);
    num_tokens += num_new;
    num_decodes += num_new == 1;
  }
  for (std::size_t table = 0; table < num_tables(); ++table)
    CHECK_ARGUMENT(as_size(num_tokens) <= step.tables[table].slot_T.size(), kSlotNames[table], ": expected at least ",
                   num_tokens, " entries (the new tokens of this step), got ", step.tables[table].slot_T.size());
  if (step.split_start_S1.empty() && step.split_W3.empty()) return;
  check_size("split_start_S1", step.split_start_S1.size(), num_rows + 1);
  CHECK_ARGUMENT(std::ssize(step.split_W3) / 3 >= num_decodes, "split_W3: expected at least ", num_decodes,
                 " rows (one per sequence with one new token), got ", step.split_W3.size() / 3);
}

// A step may write the sequence's last tokens only where nobody else reads them. The sequence's last token is in block
// number num_blocks - 1.
void PagedKVCache::check_new_tokens(const Sequence& sequence, std::int32_t num_new, std::int64_t num_blocks) const {
  const std::int64_t first = sequence.length - num_new;
  CHECK_ARGUMENT(first >= sequence.num_matched, "num_new_tokens: expected at most ",
                 sequence.length - sequence.num_matched, " (of the ", sequence.length, " tokens of sequence ",
                 sequence.seq_id, ", ", sequence.num_matched, " came from the cache), got ", num_new);
  if (num_new == 0) return;
  CHECK_ARGUMENT(first >= first_computable(sequence), "num_new_tokens: expected at most ",
                 sequence.length - first_computable(sequence), " (the tokens of sequence ", sequence.seq_id,
                 " before those see freed blocks), got ", num_new);
  for (std::size_t table = 0; table < num_tables(); ++table) {
    std::int64_t i = num_blocks - 1;
    while (i * block_size() > first) --i;
    for (; i < num_blocks; ++i)
      CHECK_ARGUMENT(pool_.writable(sequence.tables[table][as_size(i)]), "num_new_tokens: expected tokens in blocks ",
                     "that sequence ", sequence.seq_id, " alone holds and that are not published, got ", num_new,
                     ", and the block of token ", std::max(first, i * block_size()),
                     " is shared or published; roll back from there on and append the tokens again");
  }
}

// The rule and its reasons are in kernels/_split_plan.py: there are as many splits as programs that the device runs at
// the same time, the splits of a row are equally long, and none is so short that adding up costs more than it saves.
void PagedKVCache::fill_split_plan(const StepBuffers& step) const {
  const std::size_t num_rows = step.seq_len_S.size();
  const auto num_blocks_of = [&](std::size_t row) {
    const bool is_decode = row < batch_.size() && step.num_new_tokens[row] == 1;
    return is_decode ? blocks_for(batch_[row]->length) : 0;
  };
  const auto total = [&](std::int64_t longest) {
    std::int64_t sum = 0;
    for (std::size_t row = 0; row < batch_.size(); ++row) sum += num_splits(num_blocks_of(row), longest);
    return sum;
  };
  const std::int64_t num_items = std::ssize(step.split_W3) / 3;
  const std::int64_t resident = std::max<std::int64_t>(1, num_items - std::ssize(step.seq_len_S) + 1);
  std::int64_t num_blocks = 0;
  for (std::size_t row = 0; row < batch_.size(); ++row) num_blocks += num_blocks_of(row);
  const std::int64_t even = std::max<std::int64_t>(1, ceil_div(num_blocks, resident));
  std::int64_t longest = even;
  if (total(2 * even) <= resident) {  // looks for the shortest splits that all run at the same time
    for (std::int64_t end = 2 * even; longest < end;) {
      const std::int64_t middle = (longest + end) / 2;
      if (total(middle) <= resident) {
        end = middle;
      } else {
        longest = middle + 1;
      }
    }
  }
  std::size_t item = 0;
  for (std::size_t row = 0; row < num_rows; ++row) {
    step.split_start_S1[row] = static_cast<std::int32_t>(item);
    const std::int64_t row_blocks = num_blocks_of(row);
    if (row_blocks == 0) continue;
    const std::int64_t length = ceil_div(row_blocks, num_splits(row_blocks, longest));
    for (std::int64_t first = 0; first < row_blocks; first += length, ++item) {
      step.split_W3[3 * item] = static_cast<std::int32_t>(row);
      step.split_W3[3 * item + 1] = static_cast<std::int32_t>(first);
      step.split_W3[3 * item + 2] = static_cast<std::int32_t>(std::min(first + length, row_blocks));
    }
  }
  step.split_start_S1[num_rows] = static_cast<std::int32_t>(item);
  std::ranges::fill(step.split_W3.subspan(3 * item), -1);
}

void PagedKVCache::complete(std::int64_t step, bool failed) {
  CHECK_ARGUMENT(step >= num_completed_ && step <= num_steps_, "step: expected ", num_completed_, " to ", num_steps_,
                 ", got ", step);
  if (failed) forget_steps(step);
  num_completed_ = step;
  // Blocks are published before deferred ones are put back, so that a block which is both goes to the cached list.
  for (const Publication& publication : publications_)
    if (publication.step <= step && publication.is_last) make_matchable(publication.block);
  std::erase_if(publications_, [&](const Publication& publication) { return publication.step <= step; });
  drain_frees();
}

// The steps in flight up to `last` have failed: what they wrote is lost, and all that was computed from it.
void PagedKVCache::forget_steps(std::int64_t last) {
  for (Sequence& sequence : sequences_) {
    const auto lost = std::ranges::find_if(
        sequence.writes, [&](const Write& write) { return write.step > num_completed_ && write.step <= last; });
    if (lost != sequence.writes.end()) forget_tokens(sequence, lost->first);
  }
  for (const Publication& publication : publications_)
    if (publication.step <= last) pool_[publication.block].content = Content::kPrivate;
  std::erase_if(publications_, [&](const Publication& p) { return pool_[p.block].content != Content::kPending; });
}

void PagedKVCache::make_matchable(std::int32_t block) {
  pool_[block].content = index_.insert(block) ? Content::kPublished : Content::kPrivate;
}

void PagedKVCache::drain_frees() {
  frees_.drain(num_completed_, [&](const BlockVersion& version) {
    if (is_current(version)) pool_.put_back(version.block);  // a stale one is used again
  });
}

std::int32_t PagedKVCache::allocate() {
  if (const std::int32_t evicted = pool_.next_eviction(); evicted >= 0) {
    index_.erase(evicted);
    ++num_evictions_;
  }
  return pool_.allocate();
}

void PagedKVCache::unref(std::int32_t block, std::int64_t fence) {
  if (!pool_.unref(block)) return;
  frees_.push(std::max(fence, pool_[block].busy_until), version_of(block));
  drain_frees();
}

void PagedKVCache::copy(std::int32_t source, std::int32_t destination) {
  ++num_copies_;
  // All copies of a list may be made at once. So a copy of a block that is itself still to be copied reads the
  // original, which nobody has written since.
  if (pool_[source].copy_of >= 0) source = pool_[source].copy_of;
  pool_[destination].copy_of = source;
  // Neither block may be handed out again before the next step has ended, since the copy is made with it.
  pool_[source].busy_until = pool_[destination].busy_until = num_steps_ + 1;
  copies_.push_back({source, destination});
}

std::span<const BlockCopy> PagedKVCache::take_copies() {
  for (const BlockCopy& copy : copies_) pool_[copy.destination].copy_of = -1;
  taken_copies_.swap(copies_);
  copies_.clear();
  return taken_copies_;
}

std::int64_t PagedKVCache::blocks_for(std::int64_t num_tokens) const noexcept {
  return num_tokens / block_size() + (num_tokens % block_size() != 0);
}

CacheStats PagedKVCache::stats() const {
  return {
      .num_blocks = num_blocks(),
      .num_free = pool_.num_free(),
      .num_cached = pool_.num_cached(),
      .num_used = num_blocks() - pool_.num_available() - pool_.num_deferred(),
      .num_deferred = pool_.num_deferred(),
      .num_sequences = num_sequences(),
      .queried_tokens = queried_tokens_,
      .hit_tokens = hit_tokens_,
      .num_evictions = num_evictions_,
      .num_copies = num_copies_,
  };
}

}  // namespace internvl_rt
