// The bookkeeping of the paged KV cache: which block holds which token of which sequence, and which blocks hold a
// prefix that other sequences may reuse. The memory of the blocks belongs to torch. This class hands out block ids,
// fills the index buffers that the kernels read, and lists the blocks that the device must copy.
//
//   PagedKVCache cache({.num_blocks = 1024, .block_size = 64});
//   cache.admit(7, prompt, 0);              // returns how many leading tokens are cached; nullopt: there is no space
//   cache.append({7}, {200});               // gives slots to the next 200 tokens
//   const auto step = cache.fill_step(...); // writes the block table, slots and lengths of this step
//   cache.publish({7}, {200});              // says that these tokens are final, so others may reuse their full blocks
//   cache.complete(step);                   // says that the device has written them; from now on others find them
//   cache.release(7);
//
// fill_step() numbers the steps, and complete() says that steps have ended on the device. A block that is released
// while a step may still read or write it is handed out only after that step. A published block can be matched only
// after the steps that compute its tokens and those before them, and never if one of these steps failed. One thread at
// a time may use the object; there are no locks. A wrong argument throws std::invalid_argument, a bug in this folder
// std::runtime_error. After a wrong argument, and when admit() or append() reports that there is no space, nothing has
// changed.
#pragma once

#include <array>
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
  std::int32_t watermark_blocks = 0;  // so many blocks stay free at admission, for sequences that run already
  bool events = false;                // whether drain_events() has something to return
  std::int32_t hash_bits = 128;       // tests take fewer, to provoke collisions
  // The key of the hash. By default it is random. Processes that are given one key find the same prompt under the same
  // digests; whoever sends prompts must not know it.
  std::optional<Hash128> hash_key = std::nullopt;
  // How many tokens a token sees in the layers that have a window, itself the last. These layers then have blocks and a
  // table of their own; a block that left the window is freed. 0: no layer has a window.
  std::int32_t window = 0;
};

// A prompt as the prefix index sees it.
struct Prompt {
  std::span<const std::int32_t> token_ids;
  std::span<const Picture> pictures;  // in order, without overlaps, inside the prompt
  // All else that the keys and values depend on (model, dtypes, rotary rule, adapter, tenant), as one string that is
  // different for every combination. Without it the sequence finds no prefix and publishes none.
  std::optional<std::span<const std::uint8_t>> identity;
  // At most so many leading tokens are taken from the cache, for a caller who needs the logits of the tokens after
  // them. By default all tokens but the last may come from the cache.
  std::int64_t max_cached = std::numeric_limits<std::int64_t>::max();
};

// What a step says of one table of each sequence.
struct TableBuffers {
  std::span<std::int32_t> block_table_SN;  // [rows, table_width]; -1 after a row's last block and before its window
  std::span<std::int32_t> slot_T;          // block * block_size + offset of each new token; -1 after the last
};

// The buffers of one step. Rows from seq_ids.size() on are padding: they get length 0, no new tokens, and -1 as blocks.
struct StepBuffers {
  std::span<const std::int32_t> seq_ids;         // [S]; each sequence occurs at most once
  std::span<const std::int32_t> num_new_tokens;  // [S]; the step computes so many of the tokens that were appended last
  std::span<std::int32_t> query_start_S1;        // [rows + 1]; prefix sums of num_new_tokens
  std::span<std::int32_t> seq_len_S;             // [rows]; the lengths, new tokens included
  std::int64_t table_width;                      // N
  std::array<TableBuffers, 2> tables;            // the second one is for layers with a window, if there are any
  // The split plan of decode attention: it cuts the rows with exactly one new token into work items. Both are empty if
  // no plan is wanted.
  std::span<std::int32_t> split_start_S1;  // [rows + 1]; a row's items are those from start[row] to start[row + 1] - 1
  std::span<std::int32_t> split_W3;        // [W, 3]; (row, first block, end block) of each item; -1 after the last
};

// A block that the device must copy before the next step. All copies of a list may be made at once.
struct BlockCopy {
  std::int32_t source;
  std::int32_t destination;
};

struct CacheStats {
  std::int64_t num_blocks, num_free, num_cached, num_used, num_deferred;  // the last four add up to num_blocks
  std::int64_t num_sequences;
  std::int64_t queried_tokens, hit_tokens;  // summed over all admissions so far
  std::int64_t num_evictions, num_copies;
};

class PagedKVCache {
 public:
  explicit PagedKVCache(const CacheOptions& options);

  // Returns the length, in tokens, of the longest published prefix in whole blocks. It is shorter than the prompt,
  // so that a token is left to compute, and at most max_cached. With a window, the blocks that the first token after it
  // sees in its window must be published too. O(matched blocks).
  std::int64_t match(const Prompt& prompt) const;
  // Returns the digests of the whole blocks that a prompt may take from the cache, cached or not, in order: those under
  // which drain_events() reports them. Without an identity there are none. O(tokens).
  std::vector<Hash128> digests(const Prompt& prompt) const;
  // Starts a sequence with the prefix that match() finds, and returns its length, which is then the sequence's length.
  // The sequence gets room for num_reserved tokens in all at once. nullopt: there is no space above the watermark; the
  // watermark counts only while there are other sequences. O(blocks).
  std::optional<std::int64_t> admit(std::int64_t seq_id, const Prompt& prompt, std::int64_t num_reserved);
  // Gives slots to the next num_tokens[i] tokens of each sequence, and takes further blocks where the room that was
  // reserved does not suffice. A block that is shared or published is not written but replaced; what it holds of
  // the sequence's last tokens is copied (see take_copies). false: there is no space for all of them, and nothing has
  // changed. O(new blocks).
  bool append(std::span<const std::int32_t> seq_ids, std::span<const std::int32_t> num_tokens);
  // Adds the ids of tokens after those that are known already. publish() needs them.
  void extend(std::int64_t seq_id, std::span<const std::int32_t> token_ids);
  // Says that the first num_tokens[i] tokens of each sequence are final: a full block of them can be matched once the
  // steps that compute its tokens and those before them are complete. The tokens must have been in a step that has not
  // failed, and their ids must be known. If a block of the same content is published already, that one is kept in the
  // index. A rollback that cut a picture ends what is published: see there. O(blocks * steps in flight).
  void publish(std::span<const std::int32_t> seq_ids, std::span<const std::int32_t> num_tokens);
  // Starts a second sequence with the same tokens, known ids and published prefix. The two share all blocks that hold
  // tokens, but no reserved room. The latest step of the parent may still run: what either sequence appends is copied
  // and written by a later step. O(blocks).
  void fork(std::int64_t seq_id, std::int64_t new_seq_id);
  // Takes the last num_tokens tokens back, with all known ids and pictures from there on. Their room stays reserved.
  // A picture that began before is cut: the tokens that are left of it may still be published, but what follows them,
  // which no prompt can ask for, is not. With a window it is refused if the next token would see a freed block; the
  // tokens of the sequence's latest step can always be taken back.
  void rollback(std::int64_t seq_id, std::int64_t num_tokens);
  // Ends the sequence. Its blocks become available when the latest step is complete, and not before those that were
  // freed earlier; its last ones are evicted first. What it has published can still be matched once its steps end.
  // O(blocks).
  void release(std::int64_t seq_id);

  // Fills the buffers and returns the number of the step: 1, 2, ... All arguments are checked before anything is
  // written. New tokens that came from the cache, that lie in a block which is published or which another sequence
  // shares, or that see a freed block, are refused. Blocks that left the window of a sequence's first new token are
  // freed. O(rows * N + tokens). It allocates no memory once its scratch vectors have grown.
  std::int64_t fill_step(const StepBuffers& step);
  // Says that all steps up to this one have ended on the device. `failed`: those that had not ended before have failed.
  // The tokens that they computed, and all later ones of these sequences and of their forks, count as if they had never
  // been in a step: they are not published, even by a sequence that is released already. The caller may release the
  // sequences, or compute the tokens again; with a window only if they see no freed block.
  void complete(std::int64_t step, bool failed = false);
  // Returns the copies that append() has listed since the last call. The list is valid until the next call.
  std::span<const BlockCopy> take_copies();

  // Removes every published prefix from the index. The sequences are not affected.
  void reset();
  // Returns the changes of the prefix index since the last call, or nothing without CacheOptions::events. Somebody who
  // routes requests between replicas can know from them which replica holds a prefix.
  std::vector<PrefixEvent> drain_events() { return index_.drain_events(); }

  CacheStats stats() const;
  std::int32_t num_available_blocks() const noexcept { return pool_.num_available(); }  // free or cached
  std::int32_t num_blocks() const noexcept { return pool_.num_blocks(); }
  std::int32_t block_size() const noexcept { return options_.block_size; }
  std::int32_t window() const noexcept { return options_.window; }  // 0: none
  std::int64_t num_sequences() const noexcept { return ids_.size(); }
  std::int64_t num_steps() const noexcept { return num_steps_; }  // the number of the latest step

  // Recomputes all bookkeeping and throws std::runtime_error where it differs; for tests and debugging.
  // O(num_blocks + tokens).
  void check_invariants() const;

 private:
  struct Write {
    std::int64_t step;
    std::int64_t first;  // the step was the last one to write the tokens from here on, up to those of the next Write
  };
  struct Sequence {
    std::int64_t seq_id = -1;       // -1: no sequence uses this entry
    std::int64_t length = 0;        // the number of tokens with slots
    std::int64_t num_matched = 0;   // the number of tokens that came from the cache
    std::int64_t num_in_steps = 0;  // the number of tokens that a step has computed or computes, if none has failed
    std::int64_t room = 0;          // the number of slots after the last token that are known to be writable
    std::int64_t cut = kNoCut;      // the first token that is not of a picture which a rollback has cut
    bool matches = false;           // whether it has an identity
    std::uint64_t last_seen = 0;    // the latest batch call that named it; so a sequence named twice is noticed
    // Entry t / block_size of a table is the block of token t; there may be more than tokens need. The second table is
    // that of the layers with a window: its first num_freed entries are -1, as no later token sees these blocks.
    std::array<std::vector<std::int32_t>, 2> tables;
    std::int64_t num_freed = 0;
    std::vector<Write> writes;  // of all steps in flight, and maybe of some that are complete
    std::vector<std::int32_t> token_ids;
    std::vector<Picture> pictures;
    std::vector<Hash128> digests;  // digests[0] is the root, digests[i + 1] that of block i, if matched or published
    std::int64_t num_published() const noexcept { return std::ssize(digests) - 1; }  // blocks
  };
  struct Publication {  // a pending block has one for each step in flight that its content depends on
    std::int64_t step;
    std::int32_t block;
    bool is_last;  // whether the block waits for no later step
  };
  struct BlockVersion {  // it is stale once the block has been handed out again, or taken back into use
    std::int32_t block;
    std::uint32_t generation;
  };
  static constexpr std::int64_t kNoCut = std::numeric_limits<std::int64_t>::max();
  static constexpr std::size_t kAll = 0, kWindow = 1;  // the tables of a sequence

  const Sequence& find(std::int64_t seq_id) const;
  Sequence& find(std::int64_t seq_id);
  template <class Describe>
  Sequence& start(std::int64_t seq_id, std::int64_t num_blocks, Describe describe);
  void vacate(Sequence& sequence);
  void check_new(std::int64_t seq_id) const;
  void check_prompt(const Prompt& prompt) const;
  void find_batch(std::span<const std::int32_t> seq_ids);
  void check_step(const StepBuffers& step);
  void check_new_tokens(const Sequence& sequence, std::int32_t num_new, std::int64_t num_blocks) const;
  void fill_table(const StepBuffers& step, std::size_t table) const;
  void fill_split_plan(const StepBuffers& step) const;

  std::int64_t num_cachable(const Prompt& prompt) const noexcept;  // whole blocks that may come from the cache
  std::span<const std::int32_t> tokens_of(const Prompt& prompt, std::int64_t index) const noexcept;
  std::int64_t blocks_for(std::int64_t num_tokens) const noexcept;
  std::size_t num_tables() const noexcept { return options_.window > 0 ? 2 : 1; }
  std::int64_t num_unseen(std::int64_t token) const noexcept;
  std::int64_t first_computable(const Sequence& sequence) const noexcept;
  void free_unseen(Sequence& sequence, std::int64_t first);
  std::int64_t num_blocks_to_append(const Sequence& sequence, std::int64_t num_tokens) const;
  void append_unchecked(Sequence& sequence, std::int64_t num_tokens);
  void publish_next_block(Sequence& sequence);
  void wait_for_steps(const Sequence& sequence, std::int64_t end, std::int32_t block);
  BlockVersion version_of(std::int32_t block) const { return {block, pool_[block].generation}; }
  bool is_current(const BlockVersion& v) const { return pool_[v.block].generation == v.generation; }
  void forget_tokens(Sequence& sequence, std::int64_t first);
  void forget_steps(std::int64_t last);
  void make_matchable(std::int32_t block);
  void drain_frees();
  std::int32_t allocate();
  void unref(std::int32_t block, std::int64_t fence);
  void copy(std::int32_t source, std::int32_t destination);

  CacheOptions options_;
  BlockPool pool_;
  PrefixIndex index_;
  FlatMap<std::int64_t> ids_;  // maps a seq_id to an index of sequences_
  std::vector<Sequence> sequences_;
  std::vector<std::int32_t> vacant_;
  std::vector<Publication> publications_;  // in the order of publish()
  FenceQueue<BlockVersion> frees_;         // deferred blocks
  std::int64_t num_steps_ = 0;
  std::int64_t num_completed_ = 0;
  std::vector<BlockCopy> copies_, taken_copies_;
  std::vector<Sequence*> batch_;  // scratch: the sequences that a call names
  std::uint64_t num_batches_ = 0;
  // Scratch: the blocks that match() has found for each table, then the root and the digests of the first ones.
  mutable std::array<std::vector<std::int32_t>, 2> matched_;
  mutable std::vector<Hash128> matched_digests_;
  std::int64_t queried_tokens_ = 0, hit_tokens_ = 0, num_evictions_ = 0, num_copies_ = 0;
};

}  // namespace internvl_rt
