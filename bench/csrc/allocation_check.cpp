// Checks that the bookkeeping allocates no memory once it has served requests for a while: malloc may take a lock or
// cause a page fault, and all requests would wait for it.
//
// The warm-up makes every vector of the cache as large as the following operations can need it. Then the program runs
// random operations, and counts the calls of operator new and delete during each of them.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>

#include "kv_cache_bench.h"
#include "paged_kv_cache.h"

namespace {

std::int64_t num_heap_calls = 0;

void* counted_malloc(std::size_t size) {
  ++num_heap_calls;
  if (void* memory = std::malloc(std::max<std::size_t>(size, 1))) return memory;
  throw std::bad_alloc();
}

void* counted_malloc(std::size_t size, std::align_val_t alignment) {
  ++num_heap_calls;
  const auto unit = static_cast<std::size_t>(alignment);
  if (void* memory = std::aligned_alloc(unit, (size + unit - 1) / unit * unit)) return memory;
  throw std::bad_alloc();
}

void counted_free(void* memory) noexcept {
  ++num_heap_calls;
  std::free(memory);
}

}  // namespace

// The other forms of operator new and delete (arrays, nothrow) call these.
void* operator new(std::size_t size) { return counted_malloc(size); }
void* operator new(std::size_t size, std::align_val_t alignment) { return counted_malloc(size, alignment); }
void operator delete(void* memory) noexcept { counted_free(memory); }
void operator delete(void* memory, std::size_t) noexcept { counted_free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { counted_free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { counted_free(memory); }

namespace internvl_rt::bench {
namespace {

constexpr std::int32_t kBlockSize = 16;
constexpr std::int32_t kMaxLength = 512;  // tokens of a sequence
constexpr std::int32_t kBlocksEach = kMaxLength / kBlockSize;
constexpr std::int32_t kMaxSequences = 16;
constexpr std::int32_t kNumBlocks = 400;  // less than all sequences need at full length, so admissions fail at times
constexpr std::int32_t kMaxPictures = 4;
constexpr std::int32_t kNumFamilies = 4;  // prompts of one family have a common prefix
constexpr std::int32_t kMaxInFlight = 8;  // steps

constexpr std::array<std::int32_t, 1> kOne = {1}, kSampled = {5};  // token; the id of every sampled token

using Ints = std::vector<std::int32_t>;

std::size_t as_size(std::int64_t value) { return static_cast<std::size_t>(value); }

struct Mirror {  // what the caller of the cache has to know about a sequence
  std::int32_t seq_id = -1;
  std::int32_t length = 0, computed = 0, known = 0;
  std::int64_t last_step = 0;  // that computes tokens of it
  std::int32_t first = 0;      // token that the latest step computed: a rollback may go back so far
};

class Steady {
 public:
  Steady(std::uint32_t seed, std::int32_t window)
      : window_(window),
        cache_({.num_blocks = window > 0 ? 2 * kNumBlocks : kNumBlocks, .block_size = kBlockSize, .window = window}),
        random_(seed) {
    for (Ints& family : families_) {
      family.resize(kMaxLength);
      for (std::int32_t& id : family) id = draw(0, 99);
    }
    prompt_.reserve(kMaxLength);
    pictures_.reserve(kMaxPictures);
    for (Ints* rows : {&seq_ids_, &num_tokens_}) rows->reserve(kMaxSequences);
  }

  void warm_up() {
    // In each round some sequences take all blocks of the pool, the others have none. So every queue has to hold all
    // blocks at some time, and every entry a sequence of full length. All blocks of a sequence wait for all steps in
    // flight, since each of these computes a token of the first block.
    for (std::int32_t round = 0; round < kMaxSequences; ++round) {
      const std::int32_t num_long = kNumBlocks / kBlocksEach;
      for (std::int32_t i = 0; i < kMaxSequences; ++i) {  // in each round other entries hold the long ones
        const bool is_long = (i + round) % kMaxSequences < num_long;
        start(i, is_long ? kMaxLength : 0, is_long ? kMaxLength : 0);
      }
      for (std::int32_t ahead = kMaxInFlight - 1; ahead >= 0; --ahead) {
        for (Mirror& s : sequences_) {
          if (s.known == 0) continue;
          const std::int32_t num_tokens = ahead > 0 ? 1 : s.known - s.length;
          cache_.append({&s.seq_id, 1}, {&num_tokens, 1});
          s.length += num_tokens;
        }
        step();
      }
      collect(false);
      for (const Mirror& s : sequences_) num_tokens_.push_back(std::min(s.computed, s.known));
      cache_.publish(seq_ids_, num_tokens_);
      complete(0);
      for (std::int32_t family = 0; family < kNumFamilies; ++family) cache_.match(describe(family, kMaxLength));
      for (Mirror& s : sequences_) {
        cache_.release(s.seq_id);
        s.seq_id = -1;
      }
      step();
      complete(0);
    }
    for (int list = 0; list < 2; ++list) warm_up_copies();  // the cache has two lists, which it uses in turn
    warm_up_frees();
    warm_ = true;
  }

  // Runs one random operation and returns its name.
  const char* one() {
    const std::int32_t kind = draw(0, 99);
    Mirror& s = sequences_[as_size(draw(0, kMaxSequences - 1))];
    if (s.seq_id < 0) {
      admit(s);
      return "admit";
    }
    if (kind < 20) return append_one_each();
    if (kind < 30) return append(s);
    if (kind < 55) {
      take_copies();
      if (last_step_ - completed_ == kMaxInFlight) complete(kMaxInFlight - 1);
      step();
      return "take_copies, complete and fill_step";
    }
    if (kind < 70) {
      complete(draw(0, 3), draw(0, 15) == 0);
      return "complete";
    }
    if (kind < 80) return publish();
    if (kind < 85) return fork(s);
    if (kind < 89) return rollback(s);
    if (kind < 99) {
      counted([&] { cache_.release(s.seq_id); });
      s.seq_id = -1;
      return "release";
    }
    counted([&] { cache_.reset(); });
    return "reset";
  }

  std::int64_t num_counted() const { return num_counted_; }
  CacheStats stats() const { return cache_.stats(); }
  void check_invariants() const { cache_.check_invariants(); }

 private:
  std::int32_t draw(std::int32_t low, std::int32_t high) {
    return low + static_cast<std::int32_t>(random_() % static_cast<std::uint32_t>(high - low + 1));
  }
  template <class Operation>
  void counted(Operation operation) {
    const std::int64_t before = num_heap_calls;
    operation();
    num_counted_ += num_heap_calls - before;
  }

  // Makes a list of copies that is longer than any later one: each fork wants to write the block that it shares.
  void warm_up_copies() {
    start(0, kBlockSize / 2, kBlockSize / 2);
    Mirror& s = sequences_[0];
    cache_.append({&s.seq_id, 1}, {&s.known, 1});
    s.length = s.known;
    for (std::int32_t i = 0; i < kNumBlocks / 2; ++i, ++next_id_) {
      cache_.fork(s.seq_id, next_id_);
      cache_.append({&next_id_, 1}, kOne);
      cache_.release(next_id_);
    }
    take_copies();
    step();
    cache_.release(s.seq_id);
    s.seq_id = -1;
    complete(0);
  }

  // Lets blocks wait for a step more often than in any later operation: they are matched and released while they wait.
  void warm_up_frees() {
    for (std::int32_t i = 0; i < 2 * kMaxInFlight * kNumBlocks / kBlocksEach; ++i) {
      if (!start(0, kMaxLength, 0)) throw std::runtime_error("the warm-up finds no room");
      Mirror& s = sequences_[0];
      const std::int32_t num_tokens = s.known - s.length;
      cache_.append({&s.seq_id, 1}, {&num_tokens, 1});
      s.length = s.known;
      step();
      if (i == 0) {
        cache_.publish({&s.seq_id, 1}, {&s.known, 1});
        complete(0);
        step();
      }
      cache_.release(s.seq_id);
      s.seq_id = -1;
    }
    complete(0);
  }

  // Makes a prompt with the prefix of a family and with as many pictures as fit into it.
  Prompt describe(std::int32_t family, std::int32_t length) {
    prompt_.assign(families_[as_size(family)].begin(), families_[as_size(family)].begin() + length);
    if (warm_ && length > 0 && draw(0, 1) == 0) prompt_[as_size(draw(0, length - 1))] = 100;
    pictures_.clear();
    for (std::int32_t i = 0; i < kMaxPictures && 24 * (i + 1) <= length; ++i) {
      Picture& picture = pictures_.emplace_back(Picture{24 * i, 20, {}});
      picture.digest.fill(static_cast<std::uint8_t>(family));
    }
    return {.token_ids = prompt_, .pictures = pictures_, .identity = {{}}};
  }
  bool start(std::int32_t place, std::int32_t length, std::int32_t num_reserved) {
    const Prompt prompt = describe(place % kNumFamilies, length);
    std::optional<std::int64_t> cached;
    counted([&] { cached = cache_.admit(next_id_, prompt, num_reserved); });
    if (!cached) return false;
    const auto num_cached = static_cast<std::int32_t>(*cached);
    sequences_[as_size(place)] = {next_id_++, num_cached, num_cached, length, 0, num_cached};
    return true;
  }
  void admit(Mirror& s) {
    const std::int32_t length = draw(0, kMaxLength);
    start(static_cast<std::int32_t>(&s - sequences_.data()), length, draw(0, 1) * length);
  }

  // Writes the ids of the running sequences into seq_ids_; with_room: only of some that can grow.
  void collect(bool with_room) {
    seq_ids_.clear();
    num_tokens_.clear();
    for (const Mirror& s : sequences_)
      if (s.seq_id >= 0 && (!with_room || (s.length < kMaxLength && draw(0, 3) > 0))) seq_ids_.push_back(s.seq_id);
  }
  Mirror& of(std::int32_t seq_id) { return *std::ranges::find(sequences_, seq_id, &Mirror::seq_id); }

  // Appends one token to each sequence, as a decode step does, and adds its id.
  const char* append_one_each() {
    collect(true);
    num_tokens_.assign(seq_ids_.size(), 1);
    bool appended = false;
    counted([&] { appended = cache_.append(seq_ids_, num_tokens_); });
    if (!appended) return "append";
    for (const std::int32_t seq_id : seq_ids_) {
      Mirror& s = of(seq_id);
      if (s.known >= ++s.length) continue;
      counted([&] { cache_.extend(seq_id, kSampled); });
      ++s.known;
    }
    return "append and extend";
  }
  // Appends the tokens of a chunk of the prompt, or some tokens behind the prompt.
  const char* append(Mirror& s) {
    const std::int32_t num_tokens = draw(0, kMaxLength - s.length);
    bool appended = false;
    counted([&] { appended = cache_.append({&s.seq_id, 1}, {&num_tokens, 1}); });
    if (!appended) return "append";
    s.length += num_tokens;
    if (s.known >= s.length) return "append";
    const auto missing = std::span<const std::int32_t>(families_[0]).first(as_size(s.length - s.known));
    counted([&] { cache_.extend(s.seq_id, missing); });
    s.known = s.length;
    return "append and extend";
  }
  void step() {
    collect(false);
    for (const std::int32_t seq_id : seq_ids_) {
      Mirror& s = of(seq_id);
      num_tokens_.push_back(s.length - s.computed);
      if (s.computed < s.length) {
        s.last_step = last_step_ + 1;
        s.first = s.computed;
      }
      s.computed = s.length;
    }
    counted([&] {
      last_step_ = cache_.fill_step({.seq_ids = seq_ids_,
                                     .num_new_tokens = num_tokens_,
                                     .query_start_S1 = query_start_S1_,
                                     .seq_len_S = seq_len_S_,
                                     .table_width = kBlocksEach,
                                     .tables = {{{block_table_SN_, slot_T_}, {window_table_SN_, window_slot_T_}}},
                                     .split_start_S1 = split_start_S1_,
                                     .split_W3 = split_W3_});
    });
  }
  // Says that all steps but the last `lag` have ended, as if the device were so many steps behind. If they have failed,
  // all sequences that have tokens in steps in flight end.
  void complete(std::int64_t lag, bool failed = false) {
    const std::int64_t before = completed_;
    completed_ = std::max(completed_, last_step_ - lag);
    counted([&] { cache_.complete(completed_, failed); });
    for (Mirror& s : sequences_) {
      if (!failed || s.seq_id < 0 || s.last_step <= before) continue;
      counted([&] { cache_.release(s.seq_id); });
      s.seq_id = -1;
    }
  }
  const char* publish() {
    collect(false);
    for (const std::int32_t seq_id : seq_ids_) num_tokens_.push_back(std::min(of(seq_id).computed, of(seq_id).known));
    counted([&] { cache_.publish(seq_ids_, num_tokens_); });
    return "publish";
  }
  void take_copies() {
    counted([&] { cache_.take_copies(); });
  }
  const char* fork(const Mirror& s) {
    const auto place = std::ranges::find(sequences_, -1, &Mirror::seq_id);
    if (place == sequences_.end() || s.computed < s.length) return "nothing";  // no step could compute shared tokens
    counted([&] { cache_.fork(s.seq_id, next_id_); });
    *place = s;
    place->seq_id = next_id_++;
    return "fork";
  }
  const char* rollback(Mirror& s) {
    const std::int32_t num_tokens = draw(0, window_ > 0 ? s.length - s.first : s.length);
    counted([&] { cache_.rollback(s.seq_id, num_tokens); });
    s.length -= num_tokens;
    s.computed = std::min(s.computed, s.length);
    s.known = std::min(s.known, s.length);
    return "rollback";
  }

  std::int32_t window_;
  PagedKVCache cache_;
  std::mt19937 random_;
  std::array<Ints, kNumFamilies> families_;
  std::array<Mirror, kMaxSequences> sequences_;
  Ints prompt_, seq_ids_, num_tokens_;
  std::vector<Picture> pictures_;
  Ints query_start_S1_ = Ints(kMaxSequences + 1), seq_len_S_ = Ints(kMaxSequences);
  Ints block_table_SN_ = Ints(kMaxSequences * kBlocksEach), slot_T_ = Ints(kMaxSequences * kMaxLength);
  Ints window_table_SN_ = block_table_SN_, window_slot_T_ = slot_T_;
  Ints split_start_S1_ = Ints(kMaxSequences + 1), split_W3_ = Ints(3 * 4 * kMaxSequences);
  std::int32_t next_id_ = 0;
  std::int64_t last_step_ = 0, completed_ = 0, num_counted_ = 0;
  bool warm_ = false;
};

}  // namespace

bool check_allocations(std::uint32_t seed, std::int64_t num_operations, std::int32_t window) {
  Steady steady(seed, window);
  steady.warm_up();
  const std::int64_t warm = steady.num_counted();
  for (std::int64_t i = 0; i < num_operations; ++i) {
    const char* name = steady.one();
    if (i % 1024 == 0) steady.check_invariants();
    if (const std::int64_t num_calls = steady.num_counted() - warm; num_calls > 0) {
      std::fprintf(stderr, "%s: %lld call(s) of operator new or delete, in operation %lld of seed %u\n", name,
                   static_cast<long long>(num_calls), static_cast<long long>(i), seed);
      return false;
    }
  }
  steady.check_invariants();
  const CacheStats stats = steady.stats();
  std::printf(
      "{\"operations\": %lld, \"heap_calls\": 0, \"warm_up_heap_calls\": %lld, \"hit_tokens\": %lld, "
      "\"evictions\": %lld, \"copies\": %lld}\n",
      static_cast<long long>(num_operations), static_cast<long long>(warm), static_cast<long long>(stats.hit_tokens),
      static_cast<long long>(stats.num_evictions), static_cast<long long>(stats.num_copies));
  return true;
}

}  // namespace internvl_rt::bench
