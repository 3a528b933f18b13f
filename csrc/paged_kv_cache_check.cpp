// The check of all invariants of PagedKVCache: it recomputes what the other files keep up to date.
#include <algorithm>
#include <span>
#include <vector>

#include "check.h"
#include "paged_kv_cache.h"

namespace internvl_rt {

void PagedKVCache::check_invariants() const {
  pool_.check_invariants();
  std::vector<std::int32_t> references(as_size(num_blocks()));
  std::int64_t num_occupied = 0;
  for (const Sequence& sequence : sequences_) {
    if (sequence.seq_id < 0) continue;
    ++num_occupied;
    CHECK_INVARIANT(&find(sequence.seq_id) == &sequence, "sequence ", sequence.seq_id, " is not found under its id");
    CHECK_INVARIANT(sequence.num_freed <= num_unseen(sequence.length), "sequence ", sequence.seq_id, " of ",
                    sequence.length, " tokens has freed ", sequence.num_freed, " blocks");
    CHECK_INVARIANT(sequence.num_in_steps <= sequence.length, "sequence ", sequence.seq_id, " ran ahead of its slots");
    CHECK_INVARIANT(sequence.num_matched <= sequence.num_in_steps, "sequence ", sequence.seq_id, " lost a prefix");
    const std::int64_t most = std::min(sequence.num_in_steps, sequence.cut);
    CHECK_INVARIANT(!sequence.matches || sequence.num_published() * block_size() <= most, "sequence ", sequence.seq_id,
                    " published more than ", most, " tokens");
    std::int64_t step = 0, first = -1;
    for (const Write& write : sequence.writes) {
      CHECK_INVARIANT(write.step > step && write.first > first && write.first < sequence.num_in_steps, "sequence ",
                      sequence.seq_id, " takes step ", write.step, " for the last one to write token ", write.first);
      step = write.step;
      first = write.first;
    }
    for (std::size_t table = 0; table < num_tables(); ++table) {
      const auto& blocks = sequence.tables[table];
      CHECK_INVARIANT(blocks_for(sequence.length) <= std::ssize(blocks), "sequence ", sequence.seq_id, " of ",
                      sequence.length, " tokens holds only ", blocks.size(), " blocks");
      for (std::int64_t i = 0; i < std::ssize(blocks); ++i) {
        const bool is_freed = table == kWindow && i < sequence.num_freed;
        CHECK_INVARIANT((blocks[as_size(i)] < 0) == is_freed, "sequence ", sequence.seq_id, " freed the wrong blocks");
        if (!is_freed) ++references.at(as_size(blocks[as_size(i)]));
      }
      const std::int64_t end = sequence.length + sequence.room;
      for (std::int64_t position = sequence.length; position < end; position += block_size())
        CHECK_INVARIANT(pool_.writable(blocks.at(as_size(position / block_size()))), "sequence ", sequence.seq_id,
                        " takes a block for writable that is not");
    }
    Hash128 parent = sequence.matches ? sequence.digests.at(0) : Hash128{};
    for (std::int64_t i = 0; sequence.matches && i < sequence.num_published(); ++i) {
      const auto token_ids = std::span(sequence.token_ids).subspan(as_size(i * block_size()), as_size(block_size()));
      const Hash128 hash = index_.digest(parent, i, token_ids, sequence.pictures);
      CHECK_INVARIANT(hash == sequence.digests[as_size(i + 1)], "a digest of sequence ", sequence.seq_id, " is stale");
      for (std::size_t table = 0; table < num_tables(); ++table) {
        const std::int32_t block = sequence.tables[table][as_size(i)];
        const Hash128 expected = table == kWindow ? in_window(hash) : hash;
        CHECK_INVARIANT(block < 0 || pool_[block].content == Content::kPrivate || index_.hash(block) == expected,
                        "block ", block, " is published with a digest that its owner does not have");
      }
      parent = hash;
    }
  }
  CHECK_INVARIANT(num_occupied == num_sequences(), "num_sequences is not ", num_occupied);
  CHECK_INVARIANT(num_occupied + std::ssize(vacant_) == std::ssize(sequences_), "a vacant entry is lost");

  std::int64_t num_published = 0, num_pending = 0, num_deferred = 0;
  for (std::int32_t block = 0; block < num_blocks(); ++block) {
    const Block& b = pool_[block];
    CHECK_INVARIANT(b.references == references[as_size(block)], "block ", block, " counts ", b.references,
                    " references, ", references[as_size(block)], " sequences hold it");
    const bool published = b.content == Content::kPublished;
    CHECK_INVARIANT(published == index_.contains(block) || b.content == Content::kPending, "block ", block,
                    " and the prefix index disagree");
    num_published += published;
    num_pending += b.content == Content::kPending;
    num_deferred += b.place == Place::kDeferred;
  }
  CHECK_INVARIANT(num_published == index_.size(), "the prefix index holds blocks that are not published");
  for (const Publication& publication : publications_) {
    CHECK_INVARIANT(publication.step > num_completed_ && pool_[publication.block].content == Content::kPending,
                    "block ", publication.block, " waits for step ", publication.step, " to be published");
    num_pending -= publication.is_last;
  }
  CHECK_INVARIANT(num_pending == 0, "a pending block waits for no step, or for more than one last step");
  std::vector<bool> waiting(as_size(num_blocks()));
  std::int64_t num_waiting = 0;
  frees_.for_each([&](const BlockVersion& version) {
    if (!is_current(version)) return;
    const std::int32_t block = version.block;
    CHECK_INVARIANT(pool_[block].place == Place::kDeferred && !waiting[as_size(block)], "block ", block,
                    " waits twice, or is not deferred");
    waiting[as_size(block)] = true;
    ++num_waiting;
  });
  CHECK_INVARIANT(num_deferred == num_waiting, num_deferred, " blocks are deferred, ", num_waiting, " wait for a step");
}

}  // namespace internvl_rt
