// The row loop for x86-64-v4: AVX-512.
#include <omp.h>

#include "../common/objective.h"

#ifdef HKDFAST_X86
#include <immintrin.h>

// After the headers of the library: what those define inline the linker shares with the baseline.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define HKDFAST_ISA avx512
#define HKDFAST_LANES 16
#include "rows.h"
#ifdef __clang__
#pragma clang attribute pop
#endif

const hkdfast::Loops hkdfast::avx512_loops = hkdfast::avx512::loops;
#endif
