// Reads ops.txt, the table of a folder that deployment.py wrote. Each field is matched in full against what it may be, and the
// plans against their schemas: a call reads its arguments as the plan says. What does not fit is an error with the file, the
// line and the field, before anything is defined.
//
//   jitk 1
//   then for each op, in this order:
//   op NAMESPACE SCHEMA                              one for each overload
//   slot NAMESPACE OVERLOAD CPU|CUDA                 then its plan, as plan.h has it:
//     arg KIND[?][!][=][<][>] NAME [CHOICE,...]
//     key ARGUMENT dtype|size|dim|value DIM [RULE,...]
//     output T|L[?] NAME
//     results COUNT
//     asked PLACEHOLDER                              what a word of the key is, as people read it
//     kernel FILE ENTRY ARCH WORD,... LABEL          without the indentation
#pragma once

#include <algorithm>  // all_of
#include <charconv>   // from_chars
#include <cstdint>
#include <cstdio>  // snprintf
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>  // pair
#include <vector>

namespace table {

constexpr size_t kMaxBytes = size_t{16} << 20;  // a kernel takes about 150
constexpr size_t kMaxLine = size_t{64} << 10;
constexpr size_t kMaxName = 255;

struct Kernel {
  std::string file;  // in the folder
  std::string entry;
  std::string arch;            // x86-64-v3, 9.0a
  std::vector<int64_t> words;  // of the key, without its leading device
  std::string label;
};

struct Parameter {
  char kind;  // a letter of export.h
  bool optional, written, passed, keyword_only;
  std::string name, alias;
  size_t choices;
};

struct Key {
  size_t argument;
  std::string what;
  bool derived;  // by rules
};

struct Op {
  std::string ns, schema, overload;
  std::vector<Parameter> parameters;
  std::vector<std::string> results;   // T or L, and ? behind one that may be None
  std::vector<std::string> returned;  // aliases
};

struct Slot {
  std::string ns, overload, dispatch_key, plan;
  std::string signature;  // of the C++ function, in the letters of export.h
  std::vector<Key> keys;
  std::vector<std::string> asked;
  std::vector<Kernel> kernels;
};

struct Contents {
  std::vector<Op> ops;
  std::vector<Slot> slots;
};

// --- what a field may be -------------------------------------------------------------------------

inline bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
inline bool is_digit(char c) { return c >= '0' && c <= '9'; }
inline bool is_printable(char c) { return static_cast<unsigned char>(c) >= 0x20 && c != 0x7f; }

inline bool is_name(std::string_view text) {
  return !text.empty() && text.size() <= kMaxName && is_letter(text[0]) &&
         std::all_of(text.begin(), text.end(), [](char c) { return is_letter(c) || is_digit(c); });
}

inline bool is_overload(std::string_view text) {
  const size_t dot = text.find('.');
  return is_name(text.substr(0, dot)) && (dot == text.npos || is_name(text.substr(dot + 1)));
}

inline bool is_library(std::string_view text) {
  const bool plain =
      std::all_of(text.begin(), text.end(), [](char c) { return is_letter(c) || is_digit(c) || c == '.' || c == '-'; });
  return plain && text.size() > 3 && text.size() <= 255 && text[0] != '.' && text.substr(text.size() - 3) == ".so";
}

inline bool is_cpu(std::string_view text) {
  if (text.substr(0, 6) != "x86-64") return false;
  text.remove_prefix(6);
  return text.empty() || (text.size() == 3 && text.substr(0, 2) == "-v" && text[2] >= '1' && text[2] <= '9');
}

inline bool is_gpu(std::string_view text) {
  if (!text.empty() && (text.back() == 'a' || text.back() == 'f')) text.remove_suffix(1);
  const size_t dot = text.find('.');
  return (dot == 1 || dot == 2) && text.size() == dot + 2 && text[0] >= '1' && text[0] <= '9' && is_digit(text[dot - 1]) &&
         is_digit(text[dot + 1]);
}

inline bool is_text(std::string_view text) { return !text.empty() && std::all_of(text.begin(), text.end(), is_printable); }

inline bool is_choice(std::string_view text) { return is_text(text) && text.find(' ') == text.npos; }

// A whole number as it is written by whoever writes one: no sign, zero or blank too many.
inline bool is_number(std::string_view text, int64_t least, int64_t most, int64_t* number) {
  const auto read = std::from_chars(text.data(), text.data() + text.size(), *number);
  return read.ec == std::errc() && std::to_string(*number) == text && *number >= least && *number <= most;
}

// A rule of key_rule.h.
inline bool is_rule(std::string_view text) {
  const std::string_view name = text.substr(0, 3);
  int64_t number = 0;
  if (text == "pow2") return true;
  return (name == "div" || name == "min" || name == "max") && text.size() > 3 &&
         is_number(text.substr(3), name == "div" ? 1 : 0, INT64_MAX, &number);
}

inline std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (size_t end; (end = text.find(separator)) != text.npos; text.remove_prefix(end + 1)) parts.push_back(text.substr(0, end));
  parts.push_back(text);
  return parts;
}

// --- a schema ------------------------------------------------------------------------------------

class SchemaReader {
 public:
  explicit SchemaReader(std::string_view text) : left_(text) {}

  // Whether the text is a schema as signature.py writes it, from the first to the last letter.
  bool read(Op* op) {
    const size_t open = left_.find('(');
    op->overload = left_.substr(0, open);
    if (open == left_.npos || !is_overload(op->overload)) return false;
    left_.remove_prefix(open + 1);
    while (!take(")")) {
      if (!op->parameters.empty() && !take(", ")) return false;
      if (!starred_ && take("*")) {
        starred_ = true;
        if (!take(", ")) return false;
      }
      op->parameters.emplace_back();
      if (!parameter(&op->parameters.back())) return false;
      op->parameters.back().keyword_only = starred_;
    }
    if (!take(" -> ")) return false;
    if (!take("(")) return result(op) && left_.empty();
    for (bool first = true; !take(")"); first = false) {
      if ((!first && !take(", ")) || !result(op)) return false;
    }
    return left_.empty();
  }

 private:
  bool take(std::string_view text) {
    if (left_.substr(0, text.size()) != text) return false;
    left_.remove_prefix(text.size());
    return true;
  }

  bool name(std::string* name) {
    size_t size = 0;
    while (size < left_.size() && (is_letter(left_[size]) || is_digit(left_[size]))) ++size;
    *name = left_.substr(0, size);
    left_.remove_prefix(size);
    return is_name(*name);
  }

  bool parameter(Parameter* made) {
    // A list before what it is a list of, but for tensors, which may be written: "Tensor(a0!)[]".
    constexpr std::pair<std::string_view, char> kTypes[] = {{"Tensor", 'T'},  {"SymInt[]", 'l'},   {"SymInt", 'i'},
                                                            {"float[]", 'F'}, {"float", 'f'},      {"bool", 'b'},
                                                            {"str", 's'},     {"ScalarType", 'd'}, {"Device", 'D'}};
    *made = {'\0', false, false, true, false, "", "", 0};
    for (const auto& [type, kind] : kTypes) {
      if (made->kind == '\0' && take(type)) made->kind = kind;
    }
    if (made->kind == 'T' && take("(")) {
      made->written = true;
      if (!name(&made->alias) || !take("!)")) return false;
    }
    if (made->kind == 'T' && take("[]")) made->kind = 'L';
    made->optional = take("?");
    return made->kind != '\0' && take(" ") && name(&made->name) && (!take("=") || literal());
  }

  bool literal() {
    size_t size = 0;
    if (left_.substr(0, 1) == "\"" || left_.substr(0, 1) == "[") {
      size = left_.find(left_[0] == '"' ? '"' : ']', 1);
      if (size == left_.npos || !std::all_of(left_.begin(), left_.begin() + size, is_printable)) return false;
      ++size;
    } else {
      const auto belongs = [](char c) { return is_letter(c) || is_digit(c) || c == '.' || c == '+' || c == '-'; };
      while (size < left_.size() && belongs(left_[size])) ++size;
    }
    left_.remove_prefix(size);
    return size > 0;
  }

  bool result(Op* op) {
    if (!take("Tensor")) return false;
    if (!take("(")) {
      std::string kind = take("[]") ? "L" : "T";
      if (take("?")) kind += '?';
      op->results.push_back(kind);
      return op->returned.empty() && op->results.size() <= 64;
    }
    op->returned.emplace_back();
    return name(&op->returned.back()) && take("!)");
  }

  std::string_view left_;
  bool starred_ = false;
};

// --- lines ---------------------------------------------------------------------------------------

class Line {
 public:
  Line(const std::string& path, size_t number, std::string_view text) : path_(path), number_(number), left_(text) {}

  [[noreturn]] void fail(const std::string& why) const {
    throw std::runtime_error(path_ + ":" + std::to_string(number_) + ": " + why);
  }
  [[noreturn]] void fail(const char* field, std::string_view got, const std::string& expected) const {
    fail(std::string(field) + " is '" + shown(got) + "', expected " + expected);
  }
  void require(bool fits, const char* field, std::string_view got, const std::string& expected) const {
    if (!fits) fail(field, got, expected);
  }

  bool has_more() const { return !over_; }

  // Up to the next blank, or to the end of the line.
  std::string_view word(const char* field) {
    if (over_) fail(std::string(field) + " is missing");
    const size_t end = left_.find(' ');
    const std::string_view word = left_.substr(0, end);
    over_ = end == left_.npos;
    left_.remove_prefix(over_ ? left_.size() : end + 1);
    return word;
  }
  std::string_view rest(const char* field) {
    if (over_) fail(std::string(field) + " is missing");
    over_ = true;
    return left_;
  }
  void end() const {
    if (!over_) fail("'" + shown(left_) + "' stands behind the last field");
  }

  static std::string shown(std::string_view text) {
    const size_t most = 60;
    std::string made;
    for (const char c : text.substr(0, most)) {
      char escaped[5];
      snprintf(escaped, sizeof escaped, "\\x%02x", static_cast<unsigned char>(c));
      made += is_printable(c) ? std::string(1, c) : escaped;
    }
    return text.size() > most ? made + "..." : made;
  }

 private:
  const std::string& path_;
  size_t number_;
  std::string_view left_;
  bool over_ = false;
};

// --- the table -----------------------------------------------------------------------------------

class Reader {
 public:
  explicit Reader(const std::string& path) : path_(path) {}

  Contents read(std::string_view text) {
    const std::string_view version = text.substr(0, text.find('\n'));
    if (version != "jitk 1") throw std::runtime_error(path_ + " begins with '" + Line::shown(version) + "', expected 'jitk 1'");
    if (text.back() != '\n') throw std::runtime_error(path_ + " is cut short: its last line does not end");
    text.remove_suffix(1);
    const std::vector<std::string_view> lines = split(text, '\n');
    for (size_t i = 1; i < lines.size(); ++i) {
      Line line(path_, i + 1, lines[i]);
      if (lines[i].size() > kMaxLine) line.fail("the line has " + std::to_string(lines[i].size()) + " bytes");
      read(line, lines[i]);
    }
    finish(Line(path_, lines.size() + 1, ""));
    return std::move(contents_);
  }

 private:
  void read(Line& line, std::string_view text) {
    const std::string_view what = line.word("the kind of line");
    constexpr std::string_view kOrder[] = {"op", "slot", "arg", "key", "output", "results", "asked", "kernel"};
    const size_t stage = static_cast<size_t>(std::find(std::begin(kOrder), std::end(kOrder), what) - std::begin(kOrder));
    line.require(stage < 8, "the kind of line", what, "op, slot, arg, key, output, results, asked or kernel");
    if (stage <= 1) {
      finish(line);
      stage == 0 ? op(line) : slot(line);
      return;
    }
    if (op_ == nullptr) line.fail("'" + std::string(what) + "' stands before any slot");
    if (stage < stage_) line.fail("'" + std::string(what) + "' stands behind a line '" + std::string(kOrder[stage_]) + "'");
    if (stage > 5 && stage_ < 5) line.fail("'" + std::string(what) + "' stands before the line 'results'");
    if (stage == 5 && stage_ == 5) line.fail("'results' is there twice");
    stage_ = stage;
    if (stage <= 5) slot_().plan += (slot_().plan.empty() ? "" : "\n") + std::string(text);
    stage == 2   ? argument(line)
    : stage == 3 ? key(line)
    : stage == 4 ? output(line)
    : stage == 5 ? results(line)
    : stage == 6 ? asked(line)
                 : kernel(line);
  }

  Slot& slot_() { return contents_.slots.back(); }

  // The slot before this line must be whole.
  void finish(const Line& line) {
    if (op_ == nullptr) return;
    const std::string who = op_->ns + "::" + op_->overload;
    if (stage_ < 5) line.fail("the slot of " + who + " is cut short: it has no line 'results'");
    if (slot_().asked.size() != slot_().keys.size()) {
      line.fail("the slot of " + who + " has " + std::to_string(slot_().asked.size()) + " lines 'asked' for " +
                std::to_string(slot_().keys.size()) + " lines 'key'");
    }
    op_ = nullptr;
  }

  void op(Line& line) {
    Op made{};
    made.ns = line.word("NAMESPACE");
    line.require(is_name(made.ns), "NAMESPACE", made.ns, "a name");
    made.schema = line.rest("SCHEMA");
    line.require(SchemaReader(made.schema).read(&made), "SCHEMA", made.schema, "one as deploy writes it");
    if (find(made.ns, made.overload) != nullptr) line.fail(made.ns + "::" + made.overload + " is there twice");
    contents_.ops.push_back(made);
  }

  const Op* find(std::string_view ns, std::string_view overload) const {
    for (const Op& op : contents_.ops) {
      if (op.ns == ns && op.overload == overload) return &op;
    }
    return nullptr;
  }

  void slot(Line& line) {
    Slot made;
    made.ns = line.word("NAMESPACE");
    line.require(is_name(made.ns), "NAMESPACE", made.ns, "a name");
    made.overload = line.word("OVERLOAD");
    line.require(is_overload(made.overload), "OVERLOAD", made.overload, "a name, or two with a dot between");
    made.dispatch_key = line.word("DEVICE");
    line.require(made.dispatch_key == "CPU" || made.dispatch_key == "CUDA", "DEVICE", made.dispatch_key, "CPU or CUDA");
    line.end();
    const Op* op = find(made.ns, made.overload);
    if (op == nullptr) line.fail("no line 'op' defines " + made.ns + "::" + made.overload);
    for (const Slot& other : contents_.slots) {
      if (other.ns == made.ns && other.overload == made.overload && other.dispatch_key == made.dispatch_key)
        line.fail("the slot of " + made.ns + "::" + made.overload + " on " + made.dispatch_key + " is there twice");
    }
    contents_.slots.push_back(made);
    parameters_ = op->parameters;
    described_ = *op;
    op_ = &described_;
    stage_ = 1;
    arguments_ = 0;
    outputs_ = 0;
  }

  void argument(Line& line) {
    if (arguments_ == parameters_.size()) line.fail("the schema has only " + std::to_string(arguments_) + " arguments");
    Parameter& wanted = parameters_[arguments_++];
    const std::string_view kind = line.word("KIND");
    const auto is_returned = [&] {
      return std::find(op_->returned.begin(), op_->returned.end(), wanted.alias) != op_->returned.end() && wanted.written;
    };
    // The flags are in this order; what the schema says of an argument its plan says too.
    std::string_view flags = kind.substr(kind.empty() ? 0 : 1);
    const auto take = [&](char flag) {
      const bool has = !flags.empty() && flags[0] == flag;
      if (has) flags.remove_prefix(1);
      return has;
    };
    const bool optional = take('?'), written = take('!'), reusable = take('='), is_template = take('<'), returned = take('>');
    // A tensor that takes the place of a result is the C++ function's output.
    const char letter = wanted.kind == 'T' && wanted.written && wanted.keyword_only && op_->results.empty() ? 'O' : wanted.kind;
    const bool fits = !kind.empty() && (kind[0] == wanted.kind || kind[0] == letter) && optional == wanted.optional &&
                      written == wanted.written && (!reusable || (wanted.kind == 'T' && !written)) &&
                      returned == is_returned() && flags.empty();
    line.require(fits, "KIND", kind, "that of the schema's '" + wanted.name + "'");
    wanted.passed = !is_template;
    wanted.kind = kind[0];
    const std::string_view name = line.word("NAME");
    line.require(name == wanted.name, "NAME", name, "'" + wanted.name + "' as in the schema");
    if (line.has_more()) {
      const std::string_view choices = line.word("CHOICES");
      const std::vector<std::string_view> each = split(choices, ',');
      const bool fit = wanted.kind == 's' && std::all_of(each.begin(), each.end(), is_choice);
      line.require(fit, "CHOICES", choices, "words of a str with commas between");
      wanted.choices = each.size();
    }
    line.end();
  }

  void key(Line& line) {
    Key made{};
    int64_t number = 0;
    const std::string_view argument = line.word("ARGUMENT");
    const int64_t last = static_cast<int64_t>(arguments_) - 1;
    line.require(is_number(argument, 0, last, &number), "ARGUMENT", argument, "0 to " + std::to_string(last));
    made.argument = static_cast<size_t>(number);
    const Parameter& of = parameters_[made.argument];
    made.what = line.word("WHAT");
    const bool of_tensor = made.what == "dtype" || made.what == "size" || made.what == "dim";
    const bool has_value = of.kind == 'i' || of.kind == 'b' || (of.kind == 's' && of.choices > 0);
    const bool fits =
        of_tensor ? of.kind == 'T' || (of.kind == 'd' && made.what == "dtype") : made.what == "value" && has_value;
    line.require(fits, "WHAT", made.what, "dtype, size or dim of a tensor, or value of an int, a bool or a str with choices");
    const std::string_view dim = line.word("DIM");
    const int64_t most = made.what == "size" ? 64 : 0;
    line.require(is_number(dim, -most, most, &number), "DIM", dim, most == 0 ? "0" : "-64 to 64");
    if (line.has_more()) {
      const std::string_view rules = line.word("RULES");
      const std::vector<std::string_view> each = split(rules, ',');
      const bool countable = made.what == "size" || (made.what == "value" && of.kind == 'i');
      line.require(countable && std::all_of(each.begin(), each.end(), is_rule), "RULES", rules,
                   "pow2, div16, min4 or max256 of a size or an int, with commas between");
      made.derived = true;
    }
    line.end();
    slot_().keys.push_back(made);
  }

  void output(Line& line) {
    if (outputs_ == op_->results.size()) line.fail("the schema has only " + std::to_string(outputs_) + " results");
    const std::string& wanted = op_->results[outputs_++];
    const std::string_view kind = line.word("KIND");
    line.require(kind == wanted, "KIND", kind, wanted + " as in the schema");
    const std::string_view name = line.word("NAME");
    line.require(is_name(name), "NAME", name, "a name");
    line.end();
  }

  void results(Line& line) {
    const std::string_view count = line.word("COUNT");
    const std::string wanted = std::to_string(op_->results.size());
    line.require(count == wanted, "COUNT", count, wanted + " as in the schema");
    line.end();
    if (outputs_ != op_->results.size())
      line.fail("the slot has " + std::to_string(outputs_) + " lines 'output', and the schema " + wanted + " results");
    if (arguments_ != parameters_.size()) {
      line.fail("the slot has " + std::to_string(arguments_) + " arguments, and the schema " +
                std::to_string(parameters_.size()));
    }
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const bool in_key = std::any_of(slot_().keys.begin(), slot_().keys.end(),
                                      [&](const Key& key) { return key.argument == i && is_whole(key); });
      if (in_key == parameters_[i].passed)
        line.fail("'" + parameters_[i].name + "' must be passed or have its value in the key, and not both");
      if (parameters_[i].passed) slot_().signature += parameters_[i].kind + std::string(parameters_[i].optional ? "?" : "");
    }
    for (const std::string& result : op_->results) slot_().signature += result[0] == 'L' ? 'P' : 'O';
    slot_().signature += ">0";
  }

  // Whether a part of the key is all of its argument.
  bool is_whole(const Key& key) const {
    return !key.derived && (key.what == "value" || (key.what == "dtype" && parameters_[key.argument].kind == 'd'));
  }

  void asked(Line& line) {
    const std::string_view text = line.rest("PLACEHOLDER");
    line.require(is_text(text) && text.size() <= 2 * kMaxName, "PLACEHOLDER", text, "text");
    slot_().asked.emplace_back(text);
  }

  void kernel(Line& line) {
    Kernel made;
    made.file = line.word("FILE");
    line.require(is_library(made.file), "FILE", made.file, "the name of a .so file in this folder");
    made.entry = line.word("ENTRY");
    line.require(is_name(made.entry), "ENTRY", made.entry, "a name");
    made.arch = line.word("ARCH");
    const bool on_cpu = slot_().dispatch_key == "CPU";
    line.require(on_cpu ? is_cpu(made.arch) : is_gpu(made.arch), "ARCH", made.arch,
                 on_cpu ? "x86-64 or the like of x86-64-v3" : "the like of 8.0 or 9.0a");
    const std::string_view words = line.word("WORDS");
    const std::vector<std::string_view> each = words == "-" ? std::vector<std::string_view>() : split(words, ',');
    const size_t count = slot_().keys.size();
    bool fit = each.size() == count;
    for (size_t i = 0; fit && i < count; ++i) {
      made.words.push_back(0);
      fit = is_word(each[i], slot_().keys[i], &made.words.back());
    }
    line.require(fit, "WORDS", words, count == 0 ? "-" : "what the key's " + std::to_string(count) + " parts can be");
    made.label = line.rest("LABEL");
    line.require(is_text(made.label), "LABEL", made.label, "text");
    slot_().kernels.push_back(made);
  }

  bool is_word(std::string_view text, const Key& key, int64_t* word) const {
    const Parameter& of = parameters_[key.argument];
    const int64_t most = key.derived           ? INT64_MAX
                         : key.what == "dtype" ? 0xffff
                         : key.what == "dim"   ? 64
                         : of.kind == 'b'      ? 1
                         : of.kind == 's'      ? static_cast<int64_t>(of.choices) - 1
                                               : INT64_MAX;
    const int64_t least = of.kind == 'i' ? INT64_MIN + 1 : 0;
    return is_number(text, least, most, word) || (of.optional && is_number(text, INT64_MIN, INT64_MIN, word));
  }

  const std::string& path_;
  Contents contents_;
  // Of the slot whose lines are being read.
  Op described_;
  const Op* op_ = nullptr;
  std::vector<Parameter> parameters_;
  size_t stage_ = 0;
  size_t arguments_ = 0;
  size_t outputs_ = 0;
};

}  // namespace table
