// Finds the published block that holds a given prefix of a prompt.
//
// A block is found by its digest, a keyed 128-bit hash of three things: the digest of the block before it in the prompt
// (its parent), its token ids, and every picture that overlaps it (digest of its content, place, size). Each part is
// hashed with its type and its length. The parent of a prompt's first block is the root: the digest of the identity,
// which is all else that keys and values depend on. A block is returned only if its whole digest and its token ids are
// equal to those that are looked for. The key of the hash is random and never leaves the process, unless the caller
// gives one.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
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

// Layers with a window keep the same tokens in blocks of their own, which are found by this digest in place of `hash`.
inline Hash128 in_window(const Hash128& hash) { return {hash.low ^ 1, hash.high}; }

// One change of the index. Somebody who reads all events in order can keep a copy of the index elsewhere.
struct PrefixEvent {
  // Of a stored block, `parent` is the digest of the block before it, or the root. `cleared` has no digests.
  enum class Kind { kStored, kRemoved, kCleared } kind;
  Hash128 hash, parent;
  std::vector<std::int32_t> token_ids;
};

class PrefixIndex {
 public:
  // key: of the hash; without one it is random.
  PrefixIndex(std::int32_t num_blocks, std::int32_t block_size, std::int32_t hash_bits, bool events,
              const std::optional<Hash128>& key);

  Hash128 root(std::span<const std::uint8_t> identity) const;
  // The digest of block number `index` of a prompt. `token_ids` are those of the block, `pictures` those of the whole
  // prompt, in order. Storing and looking up both call this function, so they cannot differ.
  Hash128 digest(const Hash128& parent, std::int64_t index, std::span<const std::int32_t> token_ids,
                 std::span<const Picture> pictures) const;

  // Returns the published block with this digest and these token ids, or -1.
  std::int32_t find(const Hash128& hash, std::span<const std::int32_t> token_ids) const;
  // Stores what a block holds, in place of what was stored for it before. find() does not return the block yet.
  void describe(std::int32_t block, const Hash128& hash, const Hash128& parent,
                std::span<const std::int32_t> token_ids);
  // From now on find() returns the block, which has been described. false: it returns another block of the same digest,
  // and goes on doing so.
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
  Hash128 slot(const Hash128& hash) const;  // the part of a digest that is the key in map_
  void note(PrefixEvent::Kind kind, std::int32_t block);

  std::int32_t block_size_;
  std::int32_t num_blocks_;
  std::uint64_t low_mask_, high_mask_;
  Hash128 key_;
  FlatMap<Hash128> map_;
  std::vector<Description> descriptions_;  // one for each block
  std::vector<std::int32_t> token_ids_;    // block_size ids for each block
  bool events_wanted_;
  bool events_lost_ = false;  // there were too many, so the next drain_events() lists the whole index instead
  std::vector<PrefixEvent> events_;
};

}  // namespace internvl_rt
