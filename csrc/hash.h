// SipHash-2-4 with 128 bits of output (Aumasson and Bernstein, 2012) over 64-bit words. It is a keyed hash: somebody
// who does not know the key cannot construct two prompts of the same hash.
#pragma once

#include <bit>
#include <cstdint>

namespace internvl_rt {

struct Hash128 {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
  bool operator==(const Hash128&) const = default;
};

class SipHash128 {
 public:
  explicit SipHash128(const Hash128& key)
      : v0_(key.low ^ 0x736f6d6570736575),
        v1_(key.high ^ 0x646f72616e646f6d ^ 0xee),
        v2_(key.low ^ 0x6c7967656e657261),
        v3_(key.high ^ 0x7465646279746573) {}

  void add(std::uint64_t word) {
    ++num_words_;
    compress(word);
  }
  void add(std::uint32_t low, std::uint32_t high) { add(low | static_cast<std::uint64_t>(high) << 32); }

  Hash128 finish() {
    compress((num_words_ * 8) << 56);  // the length in bytes modulo 256 is the last byte
    v2_ ^= 0xee;
    for (int i = 0; i < 4; ++i) round();
    const std::uint64_t low = v0_ ^ v1_ ^ v2_ ^ v3_;
    v1_ ^= 0xdd;
    for (int i = 0; i < 4; ++i) round();
    return {low, v0_ ^ v1_ ^ v2_ ^ v3_};
  }

 private:
  void compress(std::uint64_t word) {
    v3_ ^= word;
    round();
    round();
    v0_ ^= word;
  }

  void round() {
    v0_ += v1_;
    v1_ = std::rotl(v1_, 13) ^ v0_;
    v0_ = std::rotl(v0_, 32);
    v2_ += v3_;
    v3_ = std::rotl(v3_, 16) ^ v2_;
    v0_ += v3_;
    v3_ = std::rotl(v3_, 21) ^ v0_;
    v2_ += v1_;
    v1_ = std::rotl(v1_, 17) ^ v2_;
    v2_ = std::rotl(v2_, 32);
  }

  std::uint64_t v0_, v1_, v2_, v3_;
  std::uint64_t num_words_ = 0;
};

}  // namespace internvl_rt
