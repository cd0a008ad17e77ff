// Text for errors, built without <string> and <sstream>: together they would double the time that a small kernel compiles.
//
//   Message text;
//   text << "expected " << dtype << " on " << device << ", got " << shape;
//
// Left out: formatting. Whatever does not fit into kCapacity is cut.
#pragma once

#include <jitk/abi.h>  // DLDataType, DLDevice, IntList

#include <cstring>      // strlen, memcpy
#include <type_traits>  // one operator<< for all integers

// Code for errors is compiled into every variant and runs once in a while: small and out of line, it costs the least to
// compile.
#define JITK_COLD [[gnu::noinline, gnu::cold]]

namespace jitk {
namespace host {

class Message {
 public:
  static constexpr size_t kCapacity = 3072;

  JITK_COLD Message() { text_[0] = '\0'; }

  const char* text() const { return text_; }
  size_t size() const { return size_; }

  JITK_COLD Message& append(const char* text, size_t length) {
    if (length > kCapacity - size_) length = kCapacity - size_;
    memcpy(text_ + size_, text, length);
    size_ += length;
    text_[size_] = '\0';
    return *this;
  }

  JITK_COLD Message& pad_to(size_t column, size_t line_start) {
    while (size_ < line_start + column && size_ < kCapacity) append(" ", 1);
    return *this;
  }

  JITK_COLD Message& operator<<(const char* text) { return text == nullptr ? *this << "(null)" : append(text, strlen(text)); }
  JITK_COLD Message& operator<<(char character) { return append(&character, 1); }
  Message& operator<<(bool value) { return *this << (value ? "true" : "false"); }
  Message& operator<<(const Message& other) { return append(other.text_, other.size_); }

  template <typename Int, typename std::enable_if<std::is_integral<Int>::value || std::is_enum<Int>::value, int>::type = 0>
  Message& operator<<(Int value) {
    return append_integer(static_cast<uint64_t>(value),
                          static_cast<int64_t>(value) < 0 && static_cast<Int>(-1) < static_cast<Int>(1));
  }

  // Six significant digits: enough to recognise a value, and no <cstdio>.
  JITK_COLD Message& operator<<(double value) {
    if (value != value) return *this << "nan";
    if (value < 0) return *this << '-' << -value;
    if (value > 1.7976931348623157e308) return *this << "inf";
    int exponent = 0;
    if (value != 0) {
      for (; value >= 1e6; value /= 10) ++exponent;
      for (; value < 1e5; value *= 10) --exponent;
    }
    uint64_t digits = static_cast<uint64_t>(value + 0.5);
    while (digits != 0 && digits % 10 == 0) {
      digits /= 10;
      ++exponent;
    }
    if (exponent >= 0 && exponent < 7) {
      for (; exponent > 0; --exponent) digits *= 10;
      return append_integer(digits, false);
    }
    char reversed[24];
    int count = 0;
    for (uint64_t rest = digits; rest != 0; rest /= 10) reversed[count++] = static_cast<char>('0' + rest % 10);
    const int point = count + exponent;  // digits before the decimal point
    if (exponent < 0 && point > -5) {
      if (point <= 0) *this << "0.";
      for (int zeros = point; zeros < 0; ++zeros) *this << '0';
      for (int i = count - 1; i >= 0; --i) {
        *this << reversed[i];
        if (i == count - point && i != 0) *this << '.';
      }
      return *this;
    }
    *this << reversed[count - 1];
    if (count > 1) *this << '.';
    for (int i = count - 2; i >= 0; --i) *this << reversed[i];
    return *this << 'e' << (point - 1);
  }
  Message& operator<<(float value) { return *this << static_cast<double>(value); }

  JITK_COLD Message& operator<<(IntList list) {
    *this << '[';
    for (int64_t i = 0; i < list.size(); ++i) {
      if (i > 0) *this << ", ";
      *this << list[i];
    }
    return *this << ']';
  }

  JITK_COLD Message& operator<<(DLDataType dtype) {
    switch (dtype.code) {
      case kDLInt: *this << "int"; break;
      case kDLUInt: *this << "uint"; break;
      case kDLFloat: *this << "float"; break;
      case kDLBfloat: *this << "bfloat"; break;
      case kDLComplex: *this << "complex"; break;
      case kDLBool: return *this << "bool";
      case kDLFloat8_e4m3fn: return *this << "float8_e4m3fn";
      case kDLFloat8_e4m3fnuz: return *this << "float8_e4m3fnuz";
      case kDLFloat8_e5m2: return *this << "float8_e5m2";
      case kDLFloat8_e5m2fnuz: return *this << "float8_e5m2fnuz";
      case kDLFloat8_e8m0fnu: return *this << "float8_e8m0fnu";
      case kDLFloat4_e2m1fn: return *this << "float4_e2m1fn";
      default:
        return *this << "dtype(code " << static_cast<int32_t>(dtype.code) << ", bits " << static_cast<int32_t>(dtype.bits)
                     << ')';
    }
    return *this << static_cast<int32_t>(dtype.bits);
  }

  JITK_COLD Message& operator<<(DLDevice device) {
    switch (device.device_type) {
      case kDLCPU: return *this << "cpu";
      case kDLCUDA: *this << "cuda"; break;
      case kDLCUDAHost: return *this << "cuda_host";
      case kDLMetal: *this << "mps"; break;
      case kDLROCM: *this << "hip"; break;
      case kDLOneAPI: *this << "xpu"; break;
      default: *this << "device(type " << static_cast<int32_t>(device.device_type) << ')';
    }
    return device.device_id < 0 ? *this : *this << ':' << device.device_id;
  }

 private:
  JITK_COLD Message& append_integer(uint64_t value, bool negative) {
    char digits[24];
    int at = sizeof(digits);
    if (negative) value = 0 - value;
    do {
      digits[--at] = static_cast<char>('0' + value % 10);
      value /= 10;
    } while (value != 0);
    if (negative) digits[--at] = '-';
    return append(digits + at, sizeof(digits) - at);
  }

  size_t size_ = 0;
  char text_[kCapacity + 1];
};

}  // namespace host
}  // namespace jitk
