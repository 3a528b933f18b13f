// Which block holds which token of which sequence. The bytes themselves belong to torch; this class hands out block
// ids and fills the index buffers that the kernels read.
//
//   PagedKVCache cache(/*num_blocks=*/1024, /*block_size=*/64);
//   cache.admit(7, 300);       // sequence 7 will need room for 300 tokens; false: no space, nothing changed
//   cache.append(7, 300);      // its length is now 300
//   cache.fill_step(step);     // block table, slots and lengths for the tokens computed in this step
//   cache.release(7);
//
// One thread owns the object; there are no locks. A wrong argument throws std::invalid_argument, a bug in here
// std::runtime_error. After a wrong argument, and when admit or append return false, nothing has changed.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "block_pool.h"

namespace internvl_rt {

// One step's buffers. Rows beyond seq_ids.size() are padding: length 0, no new tokens, table -1.
struct StepBuffers {
  std::span<const std::int32_t> seq_ids;         // [S], each sequence at most once
  std::span<const std::int32_t> num_new_tokens;  // [S], the last so many appended tokens are computed in this step
  std::span<std::int32_t> query_start_S1;        // [rows + 1], prefix sums of num_new_tokens
  std::span<std::int32_t> seq_len_S;             // [rows], length including the new tokens
  std::span<std::int32_t> block_table_SN;        // [rows, table_width], -1 behind the last used block
  std::int64_t table_width;                      // N
  std::span<std::int32_t> slot_T;                // block * block_size + offset per new token, -1 behind the last
};

class PagedKVCache {
 public:
  PagedKVCache(std::int32_t num_blocks, std::int32_t block_size);

  // Starts a sequence of length 0 with room for num_tokens. O(blocks).
  bool admit(std::int64_t seq_id, std::int64_t num_tokens);
  // Makes the sequence num_tokens longer; beyond its reservation it takes further blocks. O(new blocks).
  bool append(std::int64_t seq_id, std::int64_t num_tokens);
  // Ends the sequence and frees its blocks. O(blocks).
  void release(std::int64_t seq_id);
  // Checks every argument before the first write. O(rows * N + tokens), no memory allocation in the steady state.
  void fill_step(const StepBuffers& step);

  std::int64_t length(std::int64_t seq_id) const { return find(seq_id).length; }
  std::int32_t num_free_blocks() const noexcept { return pool_.num_free(); }
  std::int32_t num_blocks() const noexcept { return pool_.num_blocks(); }
  std::int32_t block_size() const noexcept { return block_size_; }
  std::int64_t num_sequences() const noexcept { return static_cast<std::int64_t>(sequences_.size()); }

  // Recomputes all bookkeeping from scratch; for tests and debugging. O(num_blocks).
  void check_invariants() const;

 private:
  struct Sequence {
    std::int64_t length = 0;           // tokens
    std::vector<std::int32_t> blocks;  // token t lives in blocks[t / block_size]; may reach beyond length
    std::uint64_t last_step = 0;       // the fill_step call that saw it last: finds a sequence listed twice
  };

  const Sequence& find(std::int64_t seq_id) const;
  Sequence& find(std::int64_t seq_id);
  std::int64_t blocks_for(std::int64_t num_tokens) const noexcept;
  bool grow(std::vector<std::int32_t>& blocks, std::int64_t num_tokens);
  void check_step(const StepBuffers& step);

  BlockPool pool_;
  std::int32_t block_size_;
  std::unordered_map<std::int64_t, Sequence> sequences_;
  std::vector<const Sequence*> step_rows_;  // scratch of fill_step
  std::uint64_t num_steps_ = 0;
};

}  // namespace internvl_rt
