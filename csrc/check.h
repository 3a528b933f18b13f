// CHECK_ARGUMENT checks what a caller can get wrong; Python raises ValueError. CHECK_INVARIANT checks what only a bug
// in this folder can break; Python raises RuntimeError. Both are on in release builds too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace internvl_rt {

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace internvl_rt

#define CHECK_ARGUMENT(condition, ...)                                 \
  do {                                                                 \
    if (!(condition)) [[unlikely]]                                     \
      throw std::invalid_argument(::internvl_rt::concat(__VA_ARGS__)); \
  } while (false)

#define CHECK_INVARIANT(condition, ...)                                                   \
  do {                                                                                    \
    if (!(condition)) [[unlikely]]                                                        \
      throw std::runtime_error(::internvl_rt::concat("broken invariant: ", __VA_ARGS__)); \
  } while (false)

namespace internvl_rt {

inline void check_size(const char* name, std::size_t actual, std::size_t expected) {
  CHECK_ARGUMENT(actual == expected, name, ": expected size ", expected, ", got ", actual);
}

// Converts what was checked not to be negative.
inline std::size_t as_size(std::int64_t value) { return static_cast<std::size_t>(value); }

}  // namespace internvl_rt
