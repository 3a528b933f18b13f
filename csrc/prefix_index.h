// Which published block holds which prefix.
//
// A block is known by a keyed 128-bit chain: the digest of its parent, its token ids, and every picture that overlaps it
// (content digest, place, size), each part typed and with its length in front. The root is the digest of the identity:
// all else that keys and values depend on. On a hit the whole digest and the token ids are compared. The key is random
// and never leaves the process.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "flat_map.h"
#include "hash.h"

namespace internvl_rt {

struct Picture {
  std::int32_t start;  // first token
  std::int32_t num_tokens;
  std::array<std::uint8_t, 32> digest;
};

// Enough to rebuild the index elsewhere: stored blocks name their parent (the first one of a prompt the root).
struct PrefixEvent {
  enum class Kind { kStored, kRemoved, kCleared } kind;
  Hash128 hash, parent;
  std::vector<std::int32_t> token_ids;
};

class PrefixIndex {
 public:
  PrefixIndex(std::int32_t num_blocks, std::int32_t block_size, std::int32_t hash_bits, bool events);

  Hash128 root(std::span<const std::uint8_t> identity) const;
  // Of block number `index` of a prompt; `token_ids` are that block's, `pictures` the whole prompt's, in order. The one
  // function that both storing and looking up go through.
  Hash128 digest(const Hash128& parent, std::int64_t index, std::span<const std::int32_t> token_ids,
                 std::span<const Picture> pictures) const;

  // The published block with this digest and these token ids, or -1.
  std::int32_t find(const Hash128& hash, std::span<const std::int32_t> token_ids) const;
  // What a block holds, kept until it is described anew; it cannot be found yet.
  void describe(std::int32_t block, const Hash128& hash, const Hash128& parent, std::span<const std::int32_t> token_ids);
  // Makes a described block findable; false: another one of the same digest is, and stays.
  bool insert(std::int32_t block);
  void erase(std::int32_t block);
  void clear();

  std::int64_t size() const noexcept { return map_.size(); }
  bool contains(std::int32_t block) const { return map_.find(slot(at(block).hash)) == block; }
  const Hash128& hash(std::int32_t block) const { return at(block).hash; }
  std::vector<PrefixEvent> drain_events();

 private:
  struct Description {
    Hash128 hash, parent;
  };
  enum class Field : std::uint32_t { kIdentity = 1, kParent, kTokens, kPicture };

  const Description& at(std::int32_t block) const { return descriptions_[static_cast<std::size_t>(block)]; }
  std::span<const std::int32_t> tokens_of(std::int32_t block) const;
  Hash128 slot(const Hash128& hash) const;  // the part that is looked up; the whole is compared
  void note(PrefixEvent::Kind kind, std::int32_t block);

  std::int32_t block_size_;
  std::int32_t num_blocks_;
  std::uint64_t low_mask_, high_mask_;
  Hash128 key_;
  FlatMap<Hash128> map_;
  std::vector<Description> descriptions_;  // by block
  std::vector<std::int32_t> token_ids_;    // block_size for each block
  bool events_wanted_;
  bool events_lost_ = false;  // too many: the next drain tells the whole index instead
  std::vector<PrefixEvent> events_;
};

}  // namespace internvl_rt
