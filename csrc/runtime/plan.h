// Reads plans: how the arguments of an overload are read and its key is made. variant.py writes them.
//
//   arg KIND[?][!][=][<][>] NAME [CHOICE,...]          for each argument
//   key ARGUMENT dtype|size|dim|value DIM [RULE,...]   for each placeholder; key_rule.h has the rules
//   output T|L[?] NAME                                 for each result that the C++ function takes as Output&
//   results COUNT                                      as many, or those that it returns
#pragma once

#include "slot.h"

#include <stdexcept>
#include <string>
#include <vector>

namespace {

[[gnu::cold]] std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t end; (end = text.find(separator, begin)) != std::string::npos; begin = end + 1)
    parts.push_back(text.substr(begin, end - begin));
  parts.push_back(text.substr(begin));
  return parts;
}

[[gnu::cold]] void read_argument(const std::vector<std::string>& words, Slot& slot) {
  const auto has = [&](char flag) { return words[1].find(flag) != std::string::npos; };
  Argument argument{words[1][0], has('?'), has('!'), has('='), has('>'), !has('<'), 0, words[2], {}};
  if (words.size() > 3) argument.words = split(words[3], ',');
  const int32_t named = argument.kind == 'L' ? 64 : 0;
  for (int32_t i = 0; i < named; ++i) argument.words.push_back(argument.name + "[" + std::to_string(i) + "]");
  slot.returned += argument.returned ? 1 : 0;
  slot.writes = slot.writes || argument.written;
  slot.writes_lists = slot.writes_lists || (argument.written && argument.kind == 'L');
  slot.arguments.push_back(std::move(argument));
}

[[gnu::cold]] void read_key(const std::vector<std::string>& words, Slot& slot) {
  const auto what = words[2] == "dtype"  ? KeyPart::kDType
                    : words[2] == "size" ? KeyPart::kSize
                    : words[2] == "dim"  ? KeyPart::kDim
                                         : KeyPart::kValue;
  const auto first = static_cast<int32_t>(slot.rules.size());
  if (words.size() > 4) {
    for (const std::string& rule : split(words[4], ',')) slot.rules.push_back(KeyRule::of(rule));
  }
  slot.key.push_back({what, std::stoi(words[1]), std::stoll(words[3]), first, static_cast<int32_t>(slot.rules.size()) - first});
}

[[gnu::cold]] void read_plan(const char* plan, Slot& slot) {
  for (const std::string& line : split(plan, '\n')) {
    const std::vector<std::string> words = split(line, ' ');
    if (words[0] == "arg") read_argument(words, slot);
    if (words[0] == "key") read_key(words, slot);
    if (words[0] == "output") {
      slot.results.push_back({words[1][0], words[1].find('?') != std::string::npos, words[2]});
      slot.plain = slot.plain && words[1] == "T";
      ++slot.outputs;
    }
    if (words[0] == "results") slot.results.resize(static_cast<size_t>(std::stoi(words[1])), {'T', false, "a result"});
  }
  slot.made = static_cast<int32_t>(slot.results.size());
  for (Argument& argument : slot.arguments) {
    if (argument.passed) argument.place = slot.passed++;
  }
  slot.passed += slot.outputs;
  int32_t place = slot.passed;
  for (Argument& argument : slot.arguments) {
    if (!argument.passed) argument.place = place++;
  }
  if (slot.arguments.size() > kMaxArguments || slot.key.size() > kMaxKeyParts || slot.made + slot.returned > kMaxResults) {
    throw std::runtime_error(slot.name + ": an op has at most " + std::to_string(kMaxArguments) + " arguments, " +
                             std::to_string(kMaxResults) + " results and " + std::to_string(kMaxKeyParts) + " placeholders");
  }
}

}  // namespace
