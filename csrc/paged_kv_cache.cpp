#include "paged_kv_cache.h"

#include <algorithm>
#include <limits>
#include <ranges>
#include <utility>

#include "check.h"

namespace internvl_rt {
namespace {

constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();

const CacheOptions& checked(const CacheOptions& options) {
  CHECK_ARGUMENT(options.num_blocks > 0, "num_blocks: expected at least 1, got ", options.num_blocks);
  CHECK_ARGUMENT(options.block_size > 0, "block_size: expected at least 1, got ", options.block_size);
  CHECK_ARGUMENT(options.watermark_blocks >= 0 && options.watermark_blocks < options.num_blocks,
                 "watermark_blocks: expected 0 to ", options.num_blocks - 1, ", got ", options.watermark_blocks);
  CHECK_ARGUMENT(options.hash_bits >= 1 && options.hash_bits <= 128, "hash_bits: expected 1 to 128, got ",
                 options.hash_bits);
  CHECK_ARGUMENT(options.window >= 0, "window: expected at least 1 token, or 0 for none, got ", options.window);
  const std::int64_t num_slots = std::int64_t{options.num_blocks} * options.block_size;
  CHECK_ARGUMENT(num_slots <= kMaxInt32, "num_blocks * block_size: expected at most ", kMaxInt32,
                 " token slots (they are int32), got ", num_slots);
  return options;
}

void check_count(const char* name, std::int64_t count) {
  CHECK_ARGUMENT(count >= 0, name, ": expected at least 0, got ", count);
}

}  // namespace

PagedKVCache::PagedKVCache(const CacheOptions& options)
    : options_(checked(options)),
      pool_(options.num_blocks),
      index_(options.num_blocks, options.block_size, options.hash_bits, options.events, options.hash_key) {}

// --- the life of a sequence ---------------------------------------------------------------------------------------

std::int64_t PagedKVCache::match(const Prompt& prompt) const {
  check_prompt(prompt);
  for (auto& blocks : matched_) blocks.clear();
  matched_digests_.clear();
  if (!prompt.identity) return 0;
  matched_digests_.push_back(index_.root(*prompt.identity));
  const std::int64_t num_full = num_cachable(prompt);
  std::int64_t num_matched = 0, num_in_a_row = 0;  // num_in_a_row: of the last blocks, those that the window has too
  for (std::int64_t index = 0; index < num_full; ++index) {
    const auto token_ids = tokens_of(prompt, index);
    const Hash128 hash = index_.digest(matched_digests_.back(), index, token_ids, prompt.pictures);
    const std::int32_t block = index_.find(hash, token_ids);
    if (block < 0) break;
    matched_[kAll].push_back(block);
    matched_digests_.push_back(hash);
    if (num_tables() > 1) {
      matched_[kWindow].push_back(index_.find(in_window(hash), token_ids));
      num_in_a_row = matched_[kWindow].back() < 0 ? 0 : num_in_a_row + 1;
      if (num_in_a_row < index + 1 - num_unseen((index + 1) * block_size())) continue;
    }
    num_matched = index + 1;
  }
  for (std::size_t table = 0; table < num_tables(); ++table) matched_[table].resize(as_size(num_matched));
  matched_digests_.resize(as_size(num_matched) + 1);
  if (num_tables() > 1) std::fill_n(matched_[kWindow].begin(), num_unseen(num_matched * block_size()), -1);
  return num_matched * block_size();
}

std::vector<Hash128> PagedKVCache::digests(const Prompt& prompt) const {
  check_prompt(prompt);
  std::vector<Hash128> found;
  if (!prompt.identity) return found;
  Hash128 parent = index_.root(*prompt.identity);
  const std::int64_t num_full = num_cachable(prompt);
  found.reserve(as_size(num_full));
  for (std::int64_t index = 0; index < num_full; ++index)
    found.push_back(parent = index_.digest(parent, index, tokens_of(prompt, index), prompt.pictures));
  return found;
}

std::int64_t PagedKVCache::num_cachable(const Prompt& prompt) const noexcept {
  const std::int64_t most = std::min(std::ssize(prompt.token_ids) - 1, prompt.max_cached);
  return std::max<std::int64_t>(most, 0) / block_size();
}

std::span<const std::int32_t> PagedKVCache::tokens_of(const Prompt& prompt, std::int64_t index) const noexcept {
  return prompt.token_ids.subspan(as_size(index * block_size()), as_size(block_size()));
}

std::optional<std::int64_t> PagedKVCache::admit(std::int64_t seq_id, const Prompt& prompt, std::int64_t num_reserved) {
  check_new(seq_id);
  check_count("num_reserved", num_reserved);
  const std::int64_t num_matched = match(prompt);
  const std::int64_t num_blocks = blocks_for(std::max(num_matched, num_reserved));
  std::int64_t num_needed = 0;  // the blocks that are not available any more, once the sequence has them
  for (std::size_t table = 0; table < num_tables(); ++table) {
    num_needed += num_blocks - std::ssize(matched_[table]);
    for (const std::int32_t block : matched_[table]) num_needed += block >= 0 && pool_[block].place == Place::kCached;
  }
  const std::int64_t watermark = num_sequences() > 0 ? options_.watermark_blocks : 0;
  if (num_needed > pool_.num_available() - watermark) return std::nullopt;

  Sequence& sequence = start(seq_id, num_blocks, [&](Sequence& s) {
    s.token_ids.assign(prompt.token_ids.begin(), prompt.token_ids.end());
    s.pictures.assign(prompt.pictures.begin(), prompt.pictures.end());
    s.digests.assign(matched_digests_.begin(), matched_digests_.end());
  });
  sequence.matches = prompt.identity.has_value();
  sequence.length = sequence.num_matched = sequence.num_in_steps = num_matched;
  sequence.num_freed = num_unseen(num_matched);
  for (std::size_t table = 0; table < num_tables(); ++table) {
    for (const std::int32_t block : matched_[table]) {
      if (block >= 0) pool_.ref(block);
      sequence.tables[table].push_back(block);
    }
  }
  for (std::size_t table = 0; table < num_tables(); ++table)  // when all that matched is out of reach of evictions
    while (std::ssize(sequence.tables[table]) < num_blocks) sequence.tables[table].push_back(allocate());
  if (prompt.identity) {
    queried_tokens_ += std::ssize(prompt.token_ids);
    hit_tokens_ += num_matched;
  }
  return num_matched;
}

bool PagedKVCache::append(std::span<const std::int32_t> seq_ids, std::span<const std::int32_t> num_tokens) {
  check_size("num_tokens", num_tokens.size(), seq_ids.size());
  find_batch(seq_ids);
  std::int64_t num_blocks = 0;
  for (std::size_t i = 0; i < seq_ids.size(); ++i) {
    check_count("num_tokens", num_tokens[i]);
    num_blocks += num_blocks_to_append(*batch_[i], num_tokens[i]);
  }
  if (num_blocks > pool_.num_available()) return false;
  for (std::size_t i = 0; i < seq_ids.size(); ++i) append_unchecked(*batch_[i], num_tokens[i]);
  return true;
}

std::int64_t PagedKVCache::num_blocks_to_append(const Sequence& sequence, std::int64_t num_tokens) const {
  if (num_tokens <= sequence.room) return 0;
  const std::int64_t first = sequence.length / block_size();
  const std::int64_t end = blocks_for(sequence.length + num_tokens);
  std::int64_t count = 0;
  for (std::size_t table = 0; table < num_tables(); ++table) {
    const auto& blocks = sequence.tables[table];
    const std::int64_t num_present = std::min(end, std::ssize(blocks));
    count += end - std::max(first, num_present);
    for (std::int64_t i = first; i < num_present; ++i) count += !pool_.writable(blocks[as_size(i)]);
  }
  return count;
}

void PagedKVCache::append_unchecked(Sequence& sequence, std::int64_t num_tokens) {
  if (num_tokens <= sequence.room) {
    sequence.length += num_tokens;
    sequence.room -= num_tokens;
    return;
  }
  const std::int64_t first = sequence.length / block_size();
  const std::int64_t end = blocks_for(sequence.length + num_tokens);
  for (std::size_t table = 0; table < num_tables(); ++table) {
    auto& blocks = sequence.tables[table];
    blocks.reserve(as_size(end));
    for (std::int64_t i = first; i < end; ++i) {
      if (i == std::ssize(blocks)) {
        blocks.push_back(allocate());
        continue;
      }
      std::int32_t& block = blocks[as_size(i)];
      if (pool_.writable(block)) continue;
      const std::int32_t shared = std::exchange(block, allocate());
      if (i == first && sequence.length % block_size() != 0) copy(shared, block);
      unref(shared, num_steps_ + 1);  // the copy from it is made before the next step
    }
  }
  sequence.length += num_tokens;
  sequence.room = end * block_size() - sequence.length;
}

void PagedKVCache::extend(std::int64_t seq_id, std::span<const std::int32_t> token_ids) {
  auto& known = find(seq_id).token_ids;
  known.insert(known.end(), token_ids.begin(), token_ids.end());
}

void PagedKVCache::publish(std::span<const std::int32_t> seq_ids, std::span<const std::int32_t> num_tokens) {
  check_size("num_tokens", num_tokens.size(), seq_ids.size());
  find_batch(seq_ids);
  for (std::size_t i = 0; i < seq_ids.size(); ++i) {
    const Sequence& sequence = *batch_[i];
    const std::int64_t most = std::min(sequence.num_in_steps, std::ssize(sequence.token_ids));
    CHECK_ARGUMENT(num_tokens[i] >= 0 && num_tokens[i] <= most, "num_tokens: expected 0 to ", most, " (sequence ",
                   seq_ids[i], " has ", sequence.num_in_steps, " tokens in steps and ", sequence.token_ids.size(),
                   " known ids), got ", num_tokens[i]);
  }
  for (std::size_t i = 0; i < seq_ids.size(); ++i) {
    Sequence& sequence = *batch_[i];
    if (!sequence.matches) continue;
    const std::int64_t num_full = std::min<std::int64_t>(num_tokens[i], sequence.cut) / block_size();
    while (sequence.num_published() < num_full) publish_next_block(sequence);
  }
}

void PagedKVCache::publish_next_block(Sequence& sequence) {
  const std::int64_t index = sequence.num_published();
  const auto token_ids =
      std::span<const std::int32_t>(sequence.token_ids).subspan(as_size(index * block_size()), as_size(block_size()));
  const Hash128 parent = sequence.digests.back();
  const Hash128 hash = index_.digest(parent, index, token_ids, sequence.pictures);
  sequence.digests.push_back(hash);
  for (std::size_t table = 0; table < num_tables(); ++table) {
    const std::int32_t block = sequence.tables[table][as_size(index)];
    if (block < 0) continue;                                  // it has left the window, and is freed
    if (pool_[block].content != Content::kPrivate) continue;  // another sequence has published it, which shares it
    index_.describe(block, table == kWindow ? in_window(hash) : hash, parent, token_ids);
    wait_for_steps(sequence, (index + 1) * block_size(), block);
  }
}

// Publishes a block of a sequence's tokens before `end` when the steps are complete that compute these.
void PagedKVCache::wait_for_steps(const Sequence& sequence, std::int64_t end, std::int32_t block) {
  pool_[block].content = Content::kPending;
  const std::size_t num_others = publications_.size();
  for (const Write& write : sequence.writes)
    if (write.step > num_completed_ && write.first < end)
      publications_.push_back({.step = write.step, .block = block, .is_last = false});
  if (publications_.size() == num_others) {
    make_matchable(block);
  } else {
    publications_.back().is_last = true;
  }
}

void PagedKVCache::fork(std::int64_t seq_id, std::int64_t new_seq_id) {
  const std::int64_t num_live = blocks_for(find(seq_id).length);
  check_new(new_seq_id);
  Sequence& child = start(new_seq_id, num_live, [&](Sequence& s) {
    const Sequence& parent = find(seq_id);
    s.writes = parent.writes;
    s.token_ids = parent.token_ids;
    s.pictures = parent.pictures;
    s.digests = parent.digests;
  });
  Sequence& parent = find(seq_id);  // start() may have moved sequences_ to other memory
  child.length = parent.length;
  child.num_matched = parent.num_matched;
  child.num_in_steps = parent.num_in_steps;
  child.cut = parent.cut;
  child.matches = parent.matches;
  child.num_freed = parent.num_freed;
  for (std::size_t table = 0; table < num_tables(); ++table) {
    for (std::int64_t i = 0; i < num_live; ++i) {
      const std::int32_t block = parent.tables[table][as_size(i)];
      if (block >= 0) pool_.ref(block);
      child.tables[table].push_back(block);
    }
  }
  parent.room = 0;  // its last block is shared now
}

void PagedKVCache::rollback(std::int64_t seq_id, std::int64_t num_tokens) {
  Sequence& sequence = find(seq_id);
  CHECK_ARGUMENT(num_tokens >= 0 && num_tokens <= sequence.length, "num_tokens: expected 0 to ", sequence.length,
                 " (the length of sequence ", seq_id, "), got ", num_tokens);
  const std::int64_t first = first_computable(sequence);
  CHECK_ARGUMENT(sequence.length - num_tokens >= first, "num_tokens: expected at most ", sequence.length - first,
                 " (before token ", first, " of sequence ", seq_id, ", the next token would see freed blocks), got ",
                 num_tokens);
  sequence.length -= num_tokens;
  sequence.num_matched = std::min(sequence.num_matched, sequence.length);
  sequence.room = 0;
  if (std::ssize(sequence.token_ids) > sequence.length) sequence.token_ids.resize(as_size(sequence.length));
  auto& pictures = sequence.pictures;
  for (; !pictures.empty() && pictures.back().start >= sequence.length; pictures.pop_back()) sequence.cut = kNoCut;
  if (!pictures.empty() && std::int64_t{pictures.back().start} + pictures.back().num_tokens > sequence.length)
    sequence.cut = std::min(sequence.cut, sequence.length);
  forget_tokens(sequence, sequence.length);
}

// From the token `first` on, the sequence has nothing that a step has computed or computes.
void PagedKVCache::forget_tokens(Sequence& sequence, std::int64_t first) {
  sequence.num_in_steps = std::min(sequence.num_in_steps, first);
  while (!sequence.writes.empty() && sequence.writes.back().first >= first) sequence.writes.pop_back();
  const std::int64_t num_digests = std::min(std::ssize(sequence.digests), first / block_size() + 1);
  sequence.digests.resize(as_size(num_digests));
}

void PagedKVCache::release(std::int64_t seq_id) {
  Sequence& sequence = find(seq_id);
  // This allocates memory here, where a failure has changed nothing yet.
  frees_.reserve(std::ssize(sequence.tables[kAll]) + std::ssize(sequence.tables[kWindow]));
  // From the last block to the first: so the end of a prefix is evicted before its beginning, without which nobody
  // could find it, and the next sequence gets the free blocks in the order of this one. Those in the window go last,
  // because nothing of a longer prefix can be found without them.
  for (std::size_t table = 0; table < num_tables(); ++table)
    for (const std::int32_t block : sequence.tables[table] | std::views::reverse)
      if (block >= 0) unref(block, num_steps_);
  vacate(sequence);
}

void PagedKVCache::reset() {
  index_.clear();
  publications_.clear();
  pool_.forget_cached();
  for (std::int32_t block = 0; block < num_blocks(); ++block) pool_[block].content = Content::kPrivate;
  for (Sequence& sequence : sequences_)
    if (sequence.seq_id >= 0 && sequence.matches) sequence.digests.resize(1);
}

// --- finding and checking -----------------------------------------------------------------------------------------

const PagedKVCache::Sequence& PagedKVCache::find(std::int64_t seq_id) const {
  const std::int32_t place = ids_.find(seq_id);
  CHECK_ARGUMENT(place >= 0, "sequence ", seq_id, " is not admitted");
  return sequences_[as_size(place)];
}

PagedKVCache::Sequence& PagedKVCache::find(std::int64_t seq_id) {
  return const_cast<Sequence&>(std::as_const(*this).find(seq_id));
}

// Writes the sequences of a batch into batch_.
void PagedKVCache::find_batch(std::span<const std::int32_t> seq_ids) {
  batch_.clear();
  ++num_batches_;
  for (const std::int32_t seq_id : seq_ids) {
    Sequence& sequence = find(seq_id);
    CHECK_ARGUMENT(sequence.last_seen != num_batches_, "seq_ids: sequence ", seq_id, " is listed twice");
    sequence.last_seen = num_batches_;
    batch_.push_back(&sequence);
  }
}

void PagedKVCache::check_new(std::int64_t seq_id) const {
  CHECK_ARGUMENT(seq_id >= 0 && seq_id <= kMaxInt32, "seq_id: expected 0 to ", kMaxInt32, ", got ", seq_id);
  CHECK_ARGUMENT(ids_.find(seq_id) < 0, "sequence ", seq_id, " is already admitted");
}

void PagedKVCache::check_prompt(const Prompt& prompt) const {
  CHECK_ARGUMENT(std::ssize(prompt.token_ids) <= kMaxInt32, "token_ids: expected at most ", kMaxInt32, ", got ",
                 prompt.token_ids.size());
  check_count("max_cached", prompt.max_cached);
  std::int64_t end = 0;
  for (const Picture& picture : prompt.pictures) {
    CHECK_ARGUMENT(picture.num_tokens >= 1, "pictures: expected at least 1 token each, got ", picture.num_tokens);
    CHECK_ARGUMENT(picture.start >= end, "pictures: expected them in order and apart, got one at token ", picture.start,
                   " where the one before ends at ", end);
    end = std::int64_t{picture.start} + picture.num_tokens;
    CHECK_ARGUMENT(end <= std::ssize(prompt.token_ids), "pictures: expected them inside the ", prompt.token_ids.size(),
                   " tokens, got one up to ", end);
  }
}

// Gives the sequence a vacant entry. `describe` fills the entry's vectors: that allocates memory and may fail, so it
// comes before anything else has changed.
template <class Describe>
PagedKVCache::Sequence& PagedKVCache::start(std::int64_t seq_id, std::int64_t num_blocks, Describe describe) {
  if (vacant_.empty()) {
    vacant_.reserve(sequences_.size() + 1);  // so vacate() needs no memory and cannot fail
    sequences_.emplace_back();
    vacant_.push_back(static_cast<std::int32_t>(sequences_.size()) - 1);
  }
  Sequence& sequence = sequences_[as_size(vacant_.back())];
  for (std::size_t table = 0; table < num_tables(); ++table) {
    sequence.tables[table].clear();
    sequence.tables[table].reserve(as_size(num_blocks));
  }
  describe(sequence);
  ids_.insert(seq_id, vacant_.back());
  vacant_.pop_back();
  sequence.seq_id = seq_id;
  return sequence;
}

void PagedKVCache::vacate(Sequence& sequence) {
  ids_.erase(sequence.seq_id);
  vacant_.push_back(static_cast<std::int32_t>(&sequence - sequences_.data()));
  sequence.seq_id = -1;
  sequence.room = 0;
  sequence.cut = kNoCut;
  sequence.writes.clear();
}

}  // namespace internvl_rt
