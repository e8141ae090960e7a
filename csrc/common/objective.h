// What the binding hands to the loops: plain memory, no Python, nothing compiled for one instruction set.
// Names are those of hkdfast/ops/objective.py and hkdfast/ops/reference.py, which say what they mean.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

namespace hkdfast {

enum class Dtype { float32, bfloat16, float16 };

struct Tile {            // (n, vocab), unit stride along the vocabulary; data is null if there is no such tile
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  std::int64_t stride = 0;  // elements from one row to the next
};

struct Transform {
  float scale = 1;
  float softcap = 0;  // 0: none
};

enum class Schedule { constant, linear, gate, per_row };
enum class Confidence { max_prob, entropy, target };
enum class Mode { extrapolate, subtract };
enum class Outside { clean, drop };

struct Law {
  Schedule schedule = Schedule::constant;
  Confidence confidence = Confidence::max_prob;
  double alpha = 1, threshold = 0.5, plausibility = 0;
  Mode mode = Mode::extrapolate;
  Outside outside = Outside::clean;  // of the plausibility set
};

struct Objective {
  std::string divergence;
  float beta = 0.5f;
  double temperature = 1, soft_weight = 1, hard_weight = 0, teacher_floor = -INFINITY;
  std::int64_t ignore_index = -100;
  bool difference = false, accumulate = false, purified = false;  // purified: there is a law
  Transform student, teacher, noisy;
  Law law;
};

struct Rows {
  std::int64_t n = 0, vocab = 0;
  Tile student, teacher, noisy, grad;        // contrast: teacher is the clean branch, grad the output
  const float* alpha = nullptr;              // (n,)
  const std::int64_t* labels = nullptr;      // (n,)
  const float* weight = nullptr;             // (n,)
  float* loss = nullptr;                     // (n,)
  float* metrics = nullptr;                  // (len(METRICS), n)
  int threads = 1;
  void* scratch = nullptr;  // threads times scratch_each bytes
  std::int64_t scratch_each = 0;
};

// The two operations of a backend as one instruction set has them.
struct Loops {
  bool (*rows)(const Objective&, const Rows&);  // false if no divergence has that name
  void (*contrast)(const Objective&, const Rows&);
  std::int64_t (*scratch)(std::int64_t vocab, bool purified);  // bytes for each thread
};

extern const Loops baseline_loops;
#if defined(__x86_64__) && defined(__GNUC__)
#define HKDFAST_X86
extern const Loops avx2_loops, avx512_loops;
#endif

}  // namespace hkdfast
