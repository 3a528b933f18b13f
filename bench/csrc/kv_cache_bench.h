// What the two halves of the driver share: the cases that are measured, and the check that nothing allocates memory.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace internvl_rt::bench {

// One operation: prepare() restores the state before it and is not measured, run() is.
class Case {
 public:
  virtual ~Case() = default;
  virtual void prepare() {}
  virtual void run() = 0;
};

struct Benchmark {
  const char* name;
  const char* unit;         // "ns", "us" or "ms"
  std::int64_t work;        // divides the time of one run(): blocks, or 1
  std::int64_t repetitions;
  std::function<std::unique_ptr<Case>()> build;
};

std::vector<Benchmark> benchmarks();

// Runs random operations on a warm cache; prints the first one that allocates memory and returns false.
bool check_allocations(std::uint32_t seed, std::int64_t num_operations);

}  // namespace internvl_rt::bench
