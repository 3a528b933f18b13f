// Measures what the bookkeeping of the KV cache costs in C++, without Python. bench/kv_cache.py builds and runs it.
//
//   kv_cache_bench                                    prints the medians of all operations as JSON
//   kv_cache_bench --only NAME --repetitions N        measures one operation
//   kv_cache_bench --check-allocations [--operations N] [--seed N] [--window N]
//
// Time is measured around measured_region alone. So `valgrind --tool=callgrind --toggle-collect=measured_region` counts
// the instructions of an operation and nothing else.
#include "kv_cache_bench.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string_view>

using internvl_rt::bench::Benchmark;
using internvl_rt::bench::Case;

// A profiler looks for this function by its name, so it must not be inlined and has no namespace.
extern "C" [[gnu::noinline]] void measured_region(Case& operation) { operation.run(); }

namespace {

struct Options {
  std::string_view only;
  std::int64_t repetitions = 0;  // 0: each benchmark has a number of its own
  bool check_allocations = false;
  std::int64_t operations = 20'000;
  std::uint32_t seed = 1;
  std::int32_t window = 0;  // tokens; 0: none
};

[[noreturn]] void refuse(const char* what, std::string_view argument) {
  std::fprintf(stderr, "%s: %.*s\n", what, static_cast<int>(argument.size()), argument.data());
  std::exit(2);
}

template <class Number>
Number number(std::string_view text) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1) refuse("expected a positive number", text);
  return value;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view name = argv[i];
    if (name == "--check-allocations") {
      options.check_allocations = true;
      continue;
    }
    if (i + 1 == argc) refuse("unknown option, or one without its value", name);
    const std::string_view value = argv[++i];
    if (name == "--only") {
      options.only = value;
    } else if (name == "--repetitions") {
      options.repetitions = number<std::int64_t>(value);
    } else if (name == "--operations") {
      options.operations = number<std::int64_t>(value);
    } else if (name == "--seed") {
      options.seed = number<std::uint32_t>(value);
    } else if (name == "--window") {
      options.window = number<std::int32_t>(value);
    } else {
      refuse("unknown option", name);
    }
  }
  return options;
}

double nanoseconds_in(std::string_view unit) { return unit == "ms" ? 1e6 : unit == "us" ? 1e3 : 1.0; }

void measure(const Benchmark& benchmark, std::int64_t repetitions, bool first) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> times;
  times.reserve(static_cast<std::size_t>(repetitions));
  const auto operation = benchmark.build();
  for (std::int64_t i = 0; i < repetitions; ++i) {
    operation->prepare();
    const auto start = Clock::now();
    measured_region(*operation);
    times.push_back(std::chrono::duration<double, std::nano>(Clock::now() - start).count());
  }
  std::ranges::sort(times);
  const double scale = nanoseconds_in(benchmark.unit) * static_cast<double>(benchmark.work);
  std::printf(
      "%s  \"%s\": {\"unit\": \"%s\", \"median\": %.4g, \"lowest\": %.4g, \"highest\": %.4g, "
      "\"repetitions\": %lld, \"work\": %lld}",
      first ? "" : ",\n", benchmark.name, benchmark.unit, times[times.size() / 2] / scale, times.front() / scale,
      times.back() / scale, static_cast<long long>(repetitions), static_cast<long long>(benchmark.work));
}

int run(const Options& options) {
  if (options.check_allocations)
    return internvl_rt::bench::check_allocations(options.seed, options.operations, options.window) ? 0 : 1;
  bool first = true;
  std::printf("{\n");
  for (const Benchmark& benchmark : internvl_rt::bench::benchmarks()) {
    if (!options.only.empty() && options.only != benchmark.name) continue;
    measure(benchmark, options.repetitions > 0 ? options.repetitions : benchmark.repetitions, first);
    first = false;
  }
  std::printf("\n}\n");
  if (first) refuse("no benchmark of the name", options.only);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
