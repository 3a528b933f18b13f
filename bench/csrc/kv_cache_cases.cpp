// The operations that are measured. The free blocks are in random order, as after hours of service. In a new pool they
// are in ascending order, so that lists would be faster than they are in practice.
#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <random>
#include <stdexcept>
#include <utility>

#include "kv_cache_bench.h"
#include "paged_kv_cache.h"

namespace internvl_rt::bench {
namespace {

constexpr std::int32_t kNumBlocks = 65'536;
constexpr std::int32_t kBlockSize = 64;
constexpr std::int32_t kBatch = 256;           // so many sequences decode in one step
constexpr std::int32_t kContext = 2'048;       // they are about so long, in tokens
constexpr std::int32_t kTableWidth = 64;       // blocks in a row of the block table, for 4,096 tokens
constexpr std::int32_t kManyBlocks = 4'096;    // in cases whose time is given for one block
constexpr std::int32_t kLongBlocks = 64;       // blocks of one long sequence of 4,096 tokens
constexpr std::int32_t kPromptLength = 3'392;  // 13 tiles of 256 tokens, and 64 tokens of text

using Ints = std::vector<std::int32_t>;

std::size_t as_size(std::int64_t value) { return static_cast<std::size_t>(value); }

void expect(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

// --- blocks alone --------------------------------------------------------------------------------------------------

struct Blocks : Case {
  Blocks() : pool(kNumBlocks), order(as_size(kNumBlocks)), taken(as_size(kManyBlocks)) {
    std::iota(order.begin(), order.end(), 0);
    std::ranges::shuffle(order, std::mt19937(1));
    for (std::int32_t i = 0; i < kNumBlocks; ++i) pool.allocate();
    for (const std::int32_t block : order) free(block);
    allocate_all();
    std::ranges::shuffle(taken, std::mt19937(2));
  }
  void allocate_all() {
    for (std::int32_t& block : taken) block = pool.allocate();
  }
  void free(std::int32_t block) {
    pool.unref(block);
    pool.put_back(block);
  }
  void free_all() {
    for (const std::int32_t block : taken) free(block);
  }
  BlockPool pool;
  Ints order, taken;
};

struct Allocate : Blocks {
  void prepare() override { free_all(); }
  void run() override { allocate_all(); }
};

struct Free : Blocks {
  void prepare() override {
    if (std::exchange(first, false)) return;
    allocate_all();
  }
  void run() override { free_all(); }
  bool first = true;
};

// --- whole sequences -----------------------------------------------------------------------------------------------

struct Cached : Case {
  Cached() : cache({.num_blocks = kNumBlocks, .block_size = kBlockSize}) {
    // 256 sequences grow by one block at a time, in random order, until the pool is full. So the blocks that they give
    // back afterwards are in random order.
    std::mt19937 random(1);
    for (std::int32_t seq_id = 0; seq_id < kBatch; ++seq_id) cache.admit(seq_id, {}, 0);
    for (std::int32_t i = 0; i < kNumBlocks; ++i)
      expect(append(static_cast<std::int32_t>(random() % kBatch), kBlockSize), "the pool is full too early");
    for (std::int32_t seq_id = 0; seq_id < kBatch; ++seq_id) cache.release(seq_id);
  }

  bool append(std::int32_t seq_id, std::int32_t num_tokens) { return cache.append({&seq_id, 1}, {&num_tokens, 1}); }
  // Fills a step in which one sequence of `length` tokens computes the last `num_tokens` of them.
  std::int64_t step(std::int32_t seq_id, std::int32_t length, std::int32_t num_tokens) {
    const std::int64_t num_columns = (length + kBlockSize - 1) / kBlockSize;
    one_table.resize(std::max(one_table.size(), as_size(num_columns)));
    one_slot_T.resize(std::max(one_slot_T.size(), as_size(num_tokens)));
    return cache.fill_step({.seq_ids = {&seq_id, 1},
                            .num_new_tokens = {&num_tokens, 1},
                            .query_start_S1 = one_query_start,
                            .seq_len_S = one_seq_len,
                            .table_width = num_columns,
                            .tables = {{{std::span(one_table).first(as_size(num_columns)),
                                         std::span(one_slot_T).first(as_size(num_tokens))},
                                        {}}},
                            .split_start_S1 = {},
                            .split_W3 = {}});
  }
  void publish(std::int32_t seq_id, std::int32_t num_tokens) { cache.publish({&seq_id, 1}, {&num_tokens, 1}); }

  // Makes all calls of one prompt's prefill, from admission to the end of its step. Returns how many of its tokens were
  // cached.
  std::int64_t prefill(std::int32_t seq_id, const Prompt& prompt) {
    const auto length = static_cast<std::int32_t>(prompt.token_ids.size());
    const auto cached = cache.admit(seq_id, prompt, length);
    expect(cached.has_value(), "no space for a prompt");
    const auto num_new = static_cast<std::int32_t>(length - *cached);
    expect(append(seq_id, num_new), "no space for a reserved token");
    const std::int64_t number = step(seq_id, length, num_new);
    publish(seq_id, length);
    cache.complete(number);
    return *cached;
  }
  // Fills the pool with cached blocks, as a busy server does: from now on a block must be evicted before it is handed
  // out.
  void fill_with_cached_blocks() {
    for (std::int32_t i = 0; i < kNumBlocks / kManyBlocks; ++i) leave_cached(-1 - i, kManyBlocks);
    expect(cache.stats().num_cached == kNumBlocks, "some block is not cached");
  }
  void leave_cached(std::int32_t first_token, std::int64_t num_blocks) {
    token_ids.assign(as_size(num_blocks * kBlockSize), 7);
    token_ids[0] = first_token;
    prefill(kBatch, text_prompt());
    cache.release(kBatch);
  }
  Prompt text_prompt() const { return {.token_ids = token_ids, .pictures = {}, .identity = {{}}}; }

  PagedKVCache cache;
  Ints token_ids;
  Ints one_query_start = Ints(2), one_seq_len = Ints(1), one_table, one_slot_T;
};

// One sequence takes many blocks from a pool in which all blocks are cached.
struct Evict : Cached {
  Evict() { fill_with_cached_blocks(); }
  void prepare() override {
    if (cache.num_sequences() == 0) return;
    cache.release(0);
    leave_cached(next_token++, kManyBlocks);
  }
  void run() override { cache.admit(0, {}, std::int64_t{kManyBlocks} * kBlockSize); }
  std::int32_t next_token = 0;
};

// There is one sequence of 64 blocks. Its token ids are known, and the step that computes them is complete.
struct Long : Cached {
  Long() { token_ids.assign(as_size(kLongBlocks * kBlockSize), 7); }
  void start() {
    ++token_ids[0];
    cache.admit(0, text_prompt(), std::ssize(token_ids));
    append(0, length());
    cache.complete(step(0, length(), length()));
  }
  std::int32_t length() const { return static_cast<std::int32_t>(token_ids.size()); }
};

struct Publish : Long {
  void prepare() override {
    if (cache.num_sequences() > 0) cache.release(0);
    start();
  }
  void run() override { publish(0, length()); }
};

struct Match : Long {
  Match() {
    start();
    publish(0, length());
    token_ids.push_back(1);  // because a match leaves at least one token to compute
    expect(cache.match(text_prompt()) == kLongBlocks * kBlockSize, "the prompt is not cached");
  }
  void run() override { cache.match(text_prompt()); }
};

struct Release : Long {
  void prepare() override {
    start();
    publish(0, length());
  }
  void run() override { cache.release(0); }
};

struct Fork : Long {
  Fork() { start(); }
  void prepare() override {
    if (cache.num_sequences() > 1) cache.release(1);
  }
  void run() override { cache.fork(0, 1); }
};

// --- prompts with pictures -----------------------------------------------------------------------------------------

struct Admission : Cached {
  static constexpr std::int32_t kNumPictures = 13, kTileTokens = 256;
  explicit Admission(bool everything_is_cached) {
    if (everything_is_cached) fill_with_cached_blocks();
    std::mt19937 random(3);
    token_ids.assign(as_size(kPromptLength), 7);
    for (std::int32_t i = 0; i < kNumPictures; ++i) {
      Picture& picture = pictures.emplace_back(Picture{32 + i * kTileTokens, kTileTokens, {}});
      for (std::uint8_t& byte : picture.digest) byte = static_cast<std::uint8_t>(random());
    }
  }
  Prompt prompt() const { return {.token_ids = token_ids, .pictures = pictures, .identity = {{}}}; }
  std::vector<Picture> pictures;
};

struct AdmitCold : Admission {
  AdmitCold() : Admission(false) {}
  void prepare() override {
    if (cache.num_sequences() > 0) cache.release(0);
    ++token_ids[0];
  }
  void run() override { cache.admit(0, prompt(), kPromptLength); }
};

struct AdmitWarm : Admission {
  AdmitWarm() : Admission(false) { prefill(0, prompt()); }
  void prepare() override { cache.release(0); }
  void run() override { cache.admit(0, prompt(), kPromptLength); }
};

// All calls of a prefill, in a pool where every block must be evicted first.
struct PrefillCold : Admission {
  PrefillCold() : Admission(true) {}
  void prepare() override {
    if (cache.num_sequences() > 0) cache.release(0);
    ++token_ids[0];
  }
  void run() override { prefill(0, prompt()); }
};

// --- steps of a batch that decodes ---------------------------------------------------------------------------------

// How many of the 256 sequences need a new block in the step: 4 (one in block_size), or all.
enum class Crossing { kSome, kAll };

struct Decode : Cached {
  explicit Decode(Crossing crossing) : crossing(crossing), seq_ids(as_size(kBatch)), ones(as_size(kBatch), 1) {
    std::iota(seq_ids.begin(), seq_ids.end(), 0);
    lengths = seq_ids;
    fill_with_cached_blocks();
  }
  // The sequences grow in each step. So the batch is started anew every 64 steps, or before each step if all sequences
  // need a new block in it.
  void restart_when_due() {
    if (crossing == Crossing::kSome && num_steps++ % kBlockSize != 0) return;
    const bool again = cache.num_sequences() > 0;
    for (const std::int32_t seq_id : seq_ids) {
      if (again) cache.release(seq_id);
      const std::int32_t length = crossing == Crossing::kAll ? kContext : kContext - kBlockSize + seq_id % kBlockSize;
      token_ids.assign(as_size(length), 7);
      token_ids[0] = next_token++;  // so that no sequence finds the blocks of another
      prefill(seq_id, text_prompt());
      lengths[as_size(seq_id)] = length;
    }
  }
  void append_one_each() { cache.append(seq_ids, ones); }
  std::int64_t fill(bool with_splits) {
    return cache.fill_step({.seq_ids = seq_ids,
                            .num_new_tokens = ones,
                            .query_start_S1 = query_start_S1,
                            .seq_len_S = seq_len_S,
                            .table_width = kTableWidth,
                            .tables = {{{table, slot_T}, {}}},
                            .split_start_S1 = with_splits ? std::span(split_start_S1) : std::span<std::int32_t>(),
                            .split_W3 = with_splits ? std::span(split_W3) : std::span<std::int32_t>()});
  }
  void finish() {
    for (const std::int32_t seq_id : seq_ids) cache.extend(seq_id, sampled);
    for (std::int32_t& length : lengths) ++length;
    cache.publish(seq_ids, lengths);
  }
  Crossing crossing;
  Ints seq_ids, ones, lengths, sampled = Ints(1);
  Ints query_start_S1 = Ints(kBatch + 1), seq_len_S = Ints(kBatch), table = Ints(kBatch * kTableWidth);
  Ints slot_T = Ints(kBatch), split_start_S1 = Ints(kBatch + 1), split_W3 = Ints(3 * 2 * kBatch);
  std::int64_t num_steps = 0;
  std::int32_t next_token = 0;
};

struct Append : Decode {
  using Decode::Decode;
  void prepare() override { restart_when_due(); }
  void run() override { append_one_each(); }
};

struct FillStep : Decode {
  FillStep(Crossing crossing, bool with_splits) : Decode(crossing), with_splits(with_splits) {}
  void prepare() override {
    restart_when_due();
    append_one_each();
  }
  void run() override { last = fill(with_splits); }
  bool with_splits;
  std::int64_t last = 0;
};

// All calls that the scheduler makes for one step.
struct DecodeStep : Decode {
  using Decode::Decode;
  void prepare() override { restart_when_due(); }
  void run() override {
    append_one_each();
    const std::int64_t number = fill(true);
    finish();
    cache.complete(number);
  }
};

// -------------------------------------------------------------------------------------------------------------------

struct Construct : Case {
  void prepare() override { cache.reset(); }
  void run() override { cache.emplace(CacheOptions{.num_blocks = kNumBlocks, .block_size = kBlockSize}); }
  std::optional<PagedKVCache> cache;
};

template <class Measured, auto... arguments>
std::unique_ptr<Case> build() {
  return std::make_unique<Measured>(arguments...);
}

}  // namespace

std::vector<Benchmark> benchmarks() {
  return {
      {"allocate_block", "ns", kManyBlocks, 1'000, build<Allocate>},
      {"free_block", "ns", kManyBlocks, 1'000, build<Free>},
      {"evict_block", "ns", kManyBlocks, 200, build<Evict>},
      {"publish_block", "ns", kLongBlocks, 2'000, build<Publish>},
      {"match_block", "ns", kLongBlocks, 2'000, build<Match>},
      {"release_4096", "us", 1, 2'000, build<Release>},
      {"fork_4096", "us", 1, 2'000, build<Fork>},
      {"admit_3392_cold", "us", 1, 2'000, build<AdmitCold>},
      {"admit_3392_warm", "us", 1, 2'000, build<AdmitWarm>},
      {"prefill_3392_cold", "us", 1, 2'000, build<PrefillCold>},
      {"append_256", "us", 1, 2'000, build<Append, Crossing::kSome>},
      {"append_256_border", "us", 1, 200, build<Append, Crossing::kAll>},
      {"fill_step_256", "us", 1, 2'000, build<FillStep, Crossing::kSome, false>},
      {"fill_step_256_border", "us", 1, 200, build<FillStep, Crossing::kAll, false>},
      {"fill_step_256_splits", "us", 1, 2'000, build<FillStep, Crossing::kSome, true>},
      {"decode_step_256", "us", 1, 2'000, build<DecodeStep, Crossing::kSome>},
      {"decode_step_256_border", "us", 1, 200, build<DecodeStep, Crossing::kAll>},
      {"construct_65536", "ms", 1, 50, build<Construct>},
  };
}

}  // namespace internvl_rt::bench
