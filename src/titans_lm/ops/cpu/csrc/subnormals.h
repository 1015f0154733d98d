// Subnormal numbers count as zero while an object of this class lives, in its thread. Numbers below 1e-38 change no result
// in float32, but an x86 core takes a hundred times as long for them, and the gradients of a deep memory whose weights begin
// small are full of them.

#pragma once
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

class NoSubnormals {
#if defined(__SSE__)
    static constexpr unsigned ZEROS = 0x8040;  // of results, and of operands
    unsigned before = _mm_getcsr();

  public:
    NoSubnormals() { _mm_setcsr(before | ZEROS); }
    ~NoSubnormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    static constexpr unsigned long ZEROS = 1ul << 24;
    unsigned long before;

  public:
    NoSubnormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" ::"r"(before | ZEROS));
    }
    ~NoSubnormals() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#else
  public:
    NoSubnormals() {}
    ~NoSubnormals() {}
#endif
    NoSubnormals(const NoSubnormals&) = delete;
    NoSubnormals& operator=(const NoSubnormals&) = delete;
};
