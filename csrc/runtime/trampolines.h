// Plain function pointers, one for each slot: a boxed kernel of PyTorch's stable ABI is called without a closure, so it must
// know its number by itself.
#pragma once

#include "dispatch.h"

// Trampoline n is `dispatch(stack, n)`, in 16 bytes. As 16384 instantiations of a template they would take 10 s to compile.
extern "C" {
__attribute__((visibility("hidden"), used)) void jitk_dispatch(StableIValue* stack, int32_t number) { dispatch(stack, number); }
__attribute__((visibility("hidden"))) extern const char jitk_trampolines[];
}

#define JITK_TEXT(macro) JITK_TEXT_OF(macro)
#define JITK_TEXT_OF(text) #text

#if defined(__x86_64__)
#define JITK_TRAMPOLINE "movl $jitk_slot, %esi\n jmp jitk_dispatch\n"
#elif defined(__aarch64__)
#define JITK_TRAMPOLINE "mov w1, #jitk_slot\n b jitk_dispatch\n"
#else
#error "no trampolines for this processor: pass a number as the second argument and jump to jitk_dispatch"
#endif

asm(".pushsection .text\n"
    ".balign 16\n"
    ".hidden jitk_trampolines\n"
    ".globl jitk_trampolines\n"
    "jitk_trampolines:\n"
    ".cfi_startproc\n"
    ".set jitk_slot, 0\n"
    ".rept " JITK_TEXT(JITK_MAX_SLOTS) "\n"
    ".balign 16\n" JITK_TRAMPOLINE
    ".set jitk_slot, jitk_slot + 1\n"
    ".endr\n"
    ".cfi_endproc\n"
    ".popsection\n");

namespace {

using Trampoline = void (*)(StableIValue*, uint64_t, uint64_t);

Trampoline trampoline_of(int32_t number) { return reinterpret_cast<Trampoline>(jitk_trampolines + 16 * number); }

}  // namespace
