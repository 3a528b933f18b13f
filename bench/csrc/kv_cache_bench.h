// Declares what main() calls: the list of operations that are measured, and the check that none allocates memory.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace internvl_rt::bench {

// One operation that is measured. prepare() restores the state before it and is not measured; run() is.
class Case {
 public:
  virtual ~Case() = default;
  virtual void prepare() {}
  virtual void run() = 0;
};

struct Benchmark {
  const char* name;
  const char* unit;   // "ns", "us" or "ms"
  std::int64_t work;  // the time of one run() is divided by it: a number of blocks, or 1
  std::int64_t repetitions;
  std::function<std::unique_ptr<Case>()> build;
};

std::vector<Benchmark> benchmarks();

// Runs random operations after a warm-up. If one allocates memory, it prints that operation's name and returns false.
bool check_allocations(std::uint32_t seed, std::int64_t num_operations, std::int32_t window);

}  // namespace internvl_rt::bench
