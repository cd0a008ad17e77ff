// Checks on the host whose text becomes the message of the Python exception, and the two loops-and-sizes words of every
// launcher.
//
//   RuntimeCheck(width % 2 == 0, "the last dimension of 'input' must be even, got ", width);
//   Panic("unsupported head_dim ", head_dim);
//   for (int32_t i : irange(3)) ...          div_ceil(tokens, 256)
//
// Left out: tensors (tensor.h) and CUDA status codes (launch.cuh).
#pragma once

#include <jitk/message.h>  // Message

#include <exception>  // std::exception, which a caller may catch

namespace jitk {
namespace host {

// Where a check stands in the kernel's source. Defaulted arguments of this type record the place of the call.
struct DebugInfo {
  const char* file;
  int32_t line;

  DebugInfo(const char* file_ = __builtin_FILE(), int32_t line_ = __builtin_LINE()) : file(file_), line(line_) {}
};

JITK_COLD inline Message& operator<<(Message& message, DebugInfo where) {
  // The name alone: the folder differs between machines, and the text of an error is the same everywhere.
  const char* name = where.file;
  for (const char* at = where.file; *at != '\0'; ++at) {
    if (*at == '/') name = at + 1;
  }
  return message << name << ':' << where.line;
}

class PanicError : public std::exception {
 public:
  explicit PanicError(const Message& message) : message_(message) {}
  const char* what() const noexcept override { return message_.text(); }

 private:
  Message message_;
};

template <typename... Args>
[[noreturn]] JITK_COLD void panic(DebugInfo where, const Args&... args) {
  Message message;
  if (sizeof...(args) == 0) message << "a check failed";
  (void)(message << ... << args);
  message << "\n  at " << where;
  throw PanicError(message);
}

// A struct, because only a constructor can take a pack and then the place of the call.
template <typename... Args>
struct RuntimeCheck {
  template <typename Condition>
  explicit RuntimeCheck(Condition&& condition, const Args&... args, DebugInfo where = {}) {
    if (__builtin_expect(!condition, 0)) panic(where, args...);
  }
  template <typename Condition>
  explicit RuntimeCheck(DebugInfo where, Condition&& condition, const Args&... args) {
    if (__builtin_expect(!condition, 0)) panic(where, args...);
  }
};
template <typename Condition, typename... Args>
explicit RuntimeCheck(Condition&&, const Args&...) -> RuntimeCheck<Args...>;
template <typename Condition, typename... Args>
explicit RuntimeCheck(DebugInfo, Condition&&, const Args&...) -> RuntimeCheck<Args...>;

template <typename... Args>
struct Panic {
  [[noreturn]] explicit Panic(const Args&... args, DebugInfo where = {}) { panic(where, args...); }
  [[noreturn]] explicit Panic(DebugInfo where, const Args&... args) { panic(where, args...); }
};
template <typename... Args>
explicit Panic(const Args&...) -> Panic<Args...>;
template <typename... Args>
explicit Panic(DebugInfo, const Args&...) -> Panic<Args...>;

template <typename T, typename U>
constexpr auto div_ceil(T a, U b) -> decltype(a / b) {
  return static_cast<decltype(a / b)>(a / b + (a % b != 0));
}

template <typename Int>
class IntRange {
 public:
  struct Iterator {
    Int value;
    constexpr Int operator*() const { return value; }
    constexpr Iterator& operator++() {
      ++value;
      return *this;
    }
    constexpr bool operator!=(Iterator other) const { return value < other.value; }
  };
  constexpr IntRange(Int begin, Int end) : begin_(begin), end_(end) {}
  constexpr Iterator begin() const { return {begin_}; }
  constexpr Iterator end() const { return {end_}; }

 private:
  Int begin_;
  Int end_;
};

template <typename Int>
constexpr IntRange<Int> irange(Int end) {
  return {Int{0}, end};
}
template <typename Int>
constexpr IntRange<Int> irange(Int begin, Int end) {
  return {begin, end};
}

}  // namespace host
}  // namespace jitk
