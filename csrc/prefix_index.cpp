#include "prefix_index.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <utility>

#include "check.h"

namespace internvl_rt {
namespace {

Hash128 random_key() {
  std::random_device device;
  const auto word = [&] { return static_cast<std::uint64_t>(device()) << 32 | device(); };
  return {word(), word()};
}

std::uint64_t mask_of(std::int32_t bits) {
  return bits >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << std::max(bits, 0)) - 1;
}

void add_bytes(SipHash128& state, std::span<const std::uint8_t> bytes) {
  for (std::size_t first = 0; first < bytes.size(); first += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + first, std::min<std::size_t>(8, bytes.size() - first));
    state.add(word);
  }
}

}  // namespace

PrefixIndex::PrefixIndex(std::int32_t num_blocks, std::int32_t block_size, std::int32_t hash_bits, bool events,
                         const std::optional<Hash128>& key)
    : block_size_(block_size),
      num_blocks_(num_blocks),
      low_mask_(mask_of(hash_bits)),
      high_mask_(mask_of(hash_bits - 64)),
      key_(key ? *key : random_key()),
      map_(num_blocks),
      descriptions_(static_cast<std::size_t>(num_blocks)),
      token_ids_(static_cast<std::size_t>(num_blocks) * static_cast<std::size_t>(block_size)),
      events_wanted_(events) {}

Hash128 PrefixIndex::root(std::span<const std::uint8_t> identity) const {
  SipHash128 state(key_);
  state.add(static_cast<std::uint32_t>(Field::kIdentity), static_cast<std::uint32_t>(identity.size()));
  add_bytes(state, identity);
  return state.finish();
}

Hash128 PrefixIndex::digest(const Hash128& parent, std::int64_t index, std::span<const std::int32_t> token_ids,
                            std::span<const Picture> pictures) const {
  SipHash128 state(key_);
  state.add(static_cast<std::uint32_t>(Field::kParent), 16);
  state.add(parent.low);
  state.add(parent.high);
  state.add(static_cast<std::uint32_t>(Field::kTokens), static_cast<std::uint32_t>(token_ids.size()));
  const auto id = [&](std::size_t i) { return static_cast<std::uint32_t>(token_ids[i]); };
  for (std::size_t i = 0; i + 1 < token_ids.size(); i += 2) state.add(id(i), id(i + 1));
  if (token_ids.size() % 2 != 0) state.add(id(token_ids.size() - 1), 0);

  const std::int64_t start = index * block_size_, end = start + std::ssize(token_ids);
  auto picture = std::ranges::partition_point(
      pictures, [&](const Picture& p) { return std::int64_t{p.start} + p.num_tokens <= start; });
  for (; picture != pictures.end() && picture->start < end; ++picture) {
    state.add(static_cast<std::uint32_t>(Field::kPicture), 32 + 4 + 4);
    add_bytes(state, picture->digest);
    state.add(static_cast<std::uint32_t>(picture->start - start), static_cast<std::uint32_t>(picture->num_tokens));
  }
  return state.finish();
}

Hash128 PrefixIndex::slot(const Hash128& hash) const { return {hash.low & low_mask_, hash.high & high_mask_}; }

std::span<const std::int32_t> PrefixIndex::tokens_of(std::int32_t block) const {
  const auto size = static_cast<std::size_t>(block_size_);
  return std::span(token_ids_).subspan(static_cast<std::size_t>(block) * size, size);
}

std::int32_t PrefixIndex::find(const Hash128& hash, std::span<const std::int32_t> token_ids) const {
  const std::int32_t block = map_.find(slot(hash));
  return block >= 0 && at(block).hash == hash && std::ranges::equal(tokens_of(block), token_ids) ? block : -1;
}

void PrefixIndex::describe(std::int32_t block, const Hash128& hash, const Hash128& parent,
                           std::span<const std::int32_t> token_ids) {
  descriptions_[static_cast<std::size_t>(block)] = {hash, parent};
  std::ranges::copy(token_ids, token_ids_.begin() + static_cast<std::ptrdiff_t>(block) * block_size_);
}

bool PrefixIndex::insert(std::int32_t block) {
  if (map_.find(slot(hash(block))) >= 0) return false;
  map_.insert(slot(hash(block)), block);
  note(PrefixEvent::Kind::kStored, block);
  return true;
}

void PrefixIndex::erase(std::int32_t block) {
  CHECK_INVARIANT(contains(block), "block ", block, " is not in the prefix index");
  map_.erase(slot(hash(block)));
  note(PrefixEvent::Kind::kRemoved, block);
}

void PrefixIndex::clear() {
  map_.clear();
  events_.clear();
  events_lost_ = false;
  if (events_wanted_) events_.push_back({PrefixEvent::Kind::kCleared, {}, {}, {}});
}

void PrefixIndex::note(PrefixEvent::Kind kind, std::int32_t block) {
  if (!events_wanted_ || events_lost_) return;
  if (std::ssize(events_) >=
      4 * std::int64_t{num_blocks_}) {  // nobody reads them, and the whole index is shorter by now
    events_.clear();
    events_lost_ = true;
    return;
  }
  PrefixEvent event{kind, hash(block), {}, {}};
  if (kind == PrefixEvent::Kind::kStored) {
    event.parent = at(block).parent;
    event.token_ids.assign(tokens_of(block).begin(), tokens_of(block).end());
  }
  events_.push_back(std::move(event));
}

std::vector<PrefixEvent> PrefixIndex::drain_events() {
  if (events_lost_) {
    events_lost_ = false;
    events_.push_back({PrefixEvent::Kind::kCleared, {}, {}, {}});
    for (std::int32_t block = 0; block < num_blocks_; ++block)
      if (contains(block)) note(PrefixEvent::Kind::kStored, block);
  }
  return std::exchange(events_, {});
}

}  // namespace internvl_rt
