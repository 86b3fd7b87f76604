// Errors of the ops: raised before a launch, with the names and values that a caller needs to mend
// the call.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace lora_ext {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A function, not a macro: the message is built from values either way, and the condition says
// nothing to a user.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) {
    fail(parts...);
  }
}

}  // namespace lora_ext
