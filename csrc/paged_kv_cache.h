// Which block holds which token of which sequence, and which blocks hold a prefix that others may reuse. The bytes
// themselves belong to torch; this class hands out block ids, fills the index buffers that the kernels read, and lists
// the block copies that the device must make.
//
//   PagedKVCache cache({.num_blocks = 1024, .block_size = 64});
//   cache.admit(7, prompt, 0);              // how many leading tokens are in the cache already; nullopt: no space
//   cache.append({7}, {200});               // slots for the next 200 tokens
//   const auto step = cache.fill_step(...); // block table, slots and lengths of this step
//   cache.publish({7}, {200});              // others may reuse these tokens' full blocks ...
//   cache.complete(step);                   // ... now that the device has written them
//   cache.release(7);
//
// Steps are numbered by fill_step and end with complete(). A block that is released while a step may still read or
// write it waits for that step; a published block can be matched only after its step. One thread at a time may use
// the object; there are no locks. A wrong argument throws std::invalid_argument, a bug in here std::runtime_error.
// After a wrong argument, and when admit or append reports that there is no space, nothing has changed.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "block_pool.h"
#include "fence_queue.h"
#include "flat_map.h"
#include "prefix_index.h"

namespace internvl_rt {

struct CacheOptions {
  std::int32_t num_blocks = 0;
  std::int32_t block_size = 0;        // tokens
  std::int32_t watermark_blocks = 0;  // kept free at admission, for the growth of those that run
  bool events = false;                // whether drain_events has something to tell
  std::int32_t hash_bits = 128;       // fewer only in tests that provoke collisions
};

// A prompt as the prefix index sees it.
struct Prompt {
  std::span<const std::int32_t> token_ids;
  std::span<const Picture> pictures;  // in order, apart, inside the prompt
  // All else that the keys and values depend on (model, dtypes, rotary rule, adapter, tenant), as one string in which
  // no two different values look the same. Without it the sequence neither matches nor publishes.
  std::optional<std::span<const std::uint8_t>> identity;
  // At most so many leading tokens are taken from the cache: whoever wants the logits of a prompt's tokens has to compute
  // them from the first wanted one on. By default all but the last one.
  std::int64_t max_cached = std::numeric_limits<std::int64_t>::max();
};

// One step's buffers. Rows beyond seq_ids.size() are padding: length 0, no new tokens, table -1.
struct StepBuffers {
  std::span<const std::int32_t> seq_ids;         // [S], each sequence at most once
  std::span<const std::int32_t> num_new_tokens;  // [S], the last so many appended tokens are computed in this step
  std::span<std::int32_t> query_start_S1;        // [rows + 1], prefix sums of num_new_tokens
  std::span<std::int32_t> seq_len_S;             // [rows], length including the new tokens
  std::span<std::int32_t> block_table_SN;        // [rows, table_width], -1 behind the last used block
  std::int64_t table_width;                      // N
  std::span<std::int32_t> slot_T;                // block * block_size + offset per new token, -1 behind the last
  // How decode attention is split, over the rows with exactly one new token; both empty: no plan is wanted.
  std::span<std::int32_t> split_start_S1;  // [rows + 1], a row's splits are items [start[row], start[row + 1])
  std::span<std::int32_t> split_W3;        // [W, 3], (row, first block, end block) of each item, -1 behind the last
};

// To be made before the next step; all copies of a list may be made at once.
struct BlockCopy {
  std::int32_t source;
  std::int32_t destination;
};

struct CacheStats {
  std::int64_t num_blocks, num_fresh, num_cached, num_used, num_deferred;  // the last four add up to the first
  std::int64_t num_sequences;
  std::int64_t queried_tokens, hit_tokens;  // of all admissions so far
  std::int64_t num_evictions, num_copies;
};

class PagedKVCache {
 public:
  explicit PagedKVCache(const CacheOptions& options);

  // Tokens of the longest published prefix in whole blocks: at most the prompt's length - 1, so that a token is left to
  // compute, and at most max_cached. O(matched blocks).
  std::int64_t match(const Prompt& prompt) const;
  // Starts a sequence whose first tokens, as many as match() says, are in the cache already; returns that number, which
  // is the sequence's length. Room for num_reserved tokens in all is taken at once. nullopt: no space above the
  // watermark (which counts only while other sequences are here). O(blocks).
  std::optional<std::int64_t> admit(std::int64_t seq_id, const Prompt& prompt, std::int64_t num_reserved);
  // Slots for the next num_tokens[i] tokens of each sequence; beyond the reservation it takes further blocks. Blocks that
  // are shared or published are replaced, not written: the live part of the last one is copied (see take_copies).
  // false: no space for all of them, and none has got anything. O(new blocks).
  bool append(std::span<const std::int32_t> seq_ids, std::span<const std::int32_t> num_tokens);
  // The ids of tokens behind those already known: publish needs them.
  void extend(std::int64_t seq_id, std::span<const std::int32_t> token_ids);
  // The first num_tokens[i] tokens of each sequence are final: their full blocks can be matched once the latest step
  // is complete. They must have been in a step, with known ids. Where equal content is published already, that stays.
  void publish(std::span<const std::int32_t> seq_ids, std::span<const std::int32_t> num_tokens);
  // A second sequence with the same tokens, known ids and published prefix; all live blocks are shared, reserved room is
  // not. The parent's latest step may still run: what either appends is copied and written in a later one. O(blocks).
  void fork(std::int64_t seq_id, std::int64_t new_seq_id);
  // Forgets the last num_tokens tokens and every known id behind them; their room stays reserved.
  void rollback(std::int64_t seq_id, std::int64_t num_tokens);
  // Ends the sequence; its blocks return when the latest step is complete, the tail to be evicted first. O(blocks).
  void release(std::int64_t seq_id);

  // Fills the buffers and numbers the step: 1, 2, ... Checks every argument before the first write.
  // O(rows * N + tokens); no memory allocation in the steady state.
  std::int64_t fill_step(const StepBuffers& step);
  // All steps up to this one have ended on the device. `failed`: not well, so that nothing which waited for them to be
  // published ever will be; the sequences in them, and what was forked from these since, are the caller's to release.
  void complete(std::int64_t step, bool failed = false);
  // The copies that append asked for since the last call; valid until the next call.
  std::span<const BlockCopy> take_copies();

  // Forgets every published prefix; sequences go on.
  void reset();
  // What happened to the index since the last call; see PrefixEvent. Empty without CacheOptions::events.
  std::vector<PrefixEvent> drain_events() { return index_.drain_events(); }

  CacheStats stats() const;
  std::int32_t num_available_blocks() const noexcept { return pool_.num_available(); }  // fresh or evictable
  std::int32_t num_blocks() const noexcept { return pool_.num_blocks(); }
  std::int32_t block_size() const noexcept { return options_.block_size; }
  std::int64_t num_sequences() const noexcept { return ids_.size(); }
  std::int64_t num_steps() const noexcept { return num_steps_; }  // the number of the latest

  // Recomputes all bookkeeping from scratch; for tests and debugging. O(num_blocks + tokens).
  void check_invariants() const;

 private:
  struct Sequence {
    std::int64_t seq_id = -1;           // -1: the entry is vacant
    std::int64_t length = 0;            // tokens with slots
    std::int64_t num_in_steps = 0;      // tokens that some step has computed or computes
    std::int64_t room = 0;              // slots behind length, in its block, known to be writable
    bool matches = false;               // has an identity
    std::uint64_t last_seen = 0;        // the batch call that saw it last: finds a sequence listed twice
    std::vector<std::int32_t> blocks;   // token t lives in blocks[t / block_size]; may reach beyond length
    std::vector<std::int32_t> token_ids;
    std::vector<Picture> pictures;
    std::vector<Hash128> digests;  // [0] of the root, [i + 1] of block i; one for each block matched or published
    std::int64_t num_published() const noexcept { return std::ssize(digests) - 1; }  // blocks
  };
  struct BlockVersion {  // stale once the block has been handed out, or taken back into use
    std::int32_t block;
    std::uint32_t generation;
  };

  const Sequence& find(std::int64_t seq_id) const;
  Sequence& find(std::int64_t seq_id);
  template <class Describe>
  Sequence& start(std::int64_t seq_id, std::int64_t num_blocks, Describe describe);
  void vacate(Sequence& sequence);
  void check_new(std::int64_t seq_id) const;
  void check_prompt(const Prompt& prompt) const;
  void find_batch(std::span<const std::int32_t> seq_ids);
  void check_step(const StepBuffers& step);
  void fill_split_plan(const StepBuffers& step) const;

  std::int64_t blocks_for(std::int64_t num_tokens) const noexcept;
  std::int64_t num_blocks_to_append(const Sequence& sequence, std::int64_t num_tokens) const;
  void append_unchecked(Sequence& sequence, std::int64_t num_tokens);
  void publish_next_block(Sequence& sequence);
  BlockVersion version_of(std::int32_t block) const { return {block, pool_[block].generation}; }
  bool is_current(const BlockVersion& v) const { return pool_[v.block].generation == v.generation; }
  void make_matchable(std::int32_t block);
  void drain_publications();
  void drain_frees();
  std::int32_t allocate();
  void unref(std::int32_t block, std::int64_t fence);
  void copy(std::int32_t source, std::int32_t destination);

  CacheOptions options_;
  BlockPool pool_;
  PrefixIndex index_;
  FlatMap<std::int64_t> ids_;  // seq_id -> place in sequences_
  std::vector<Sequence> sequences_;
  std::vector<std::int32_t> vacant_;
  FenceQueue<BlockVersion> publications_;
  FenceQueue<BlockVersion> frees_;  // blocks whose last reference is gone
  std::int64_t num_steps_ = 0;
  std::int64_t num_completed_ = 0;
  std::vector<BlockCopy> copies_, taken_copies_;
  std::vector<Sequence*> batch_;  // scratch of the batch calls
  std::uint64_t num_batches_ = 0;
  mutable std::vector<std::int32_t> matched_;      // scratch of match: the blocks,
  mutable std::vector<Hash128> matched_digests_;  // and the digests from the root on
  std::int64_t queried_tokens_ = 0, hit_tokens_ = 0, num_evictions_ = 0, num_copies_ = 0;
};

}  // namespace internvl_rt
