// CHECK_ARGUMENT checks what a caller can get wrong; Python raises ValueError. CHECK_INVARIANT checks what only a bug
// in this folder can break; Python raises RuntimeError. Both are on in release builds too.
#pragma once

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
