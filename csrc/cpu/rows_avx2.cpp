// The row loop for x86-64-v3: AVX2 and FMA.
#include <omp.h>

#include "../common/objective.h"

#ifdef HKDFAST_X86
#include <immintrin.h>

// After the headers of the library: what those define inline the linker shares with the baseline.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define HKDFAST_ISA avx2
#define HKDFAST_LANES 8
#include "rows.h"
#ifdef __clang__
#pragma clang attribute pop
#endif

const hkdfast::Loops hkdfast::avx2_loops = hkdfast::avx2::loops;
#endif
