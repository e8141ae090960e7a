// What a launch hands to a cluster of blocks, and how a row is laid out in its shared memory.
#pragma once
#include "../common/objective.h"
#include "../common/contrast_rule.h"

namespace hkdfast {

constexpr int warp_lanes = 32;
constexpr int step_words = 256;  // of a warp; the unit in which a row is dealt out
constexpr int max_blocks = 16, max_warps = 16;

// A row is cut into chunks, dealt out to the warps of the cluster in turn. A warp has its own ring of slots, each with
// room for a chunk of every tile: it alone fills, reads and frees them, so that no barrier of the block guards the data.
struct Plan {
  int cluster = 0;      // blocks of a cluster; 0: the row does not fit
  int blocks = 0;       // of a multiprocessor
  int warps = 0;        // of a block
  int chunk = 0;        // words
  int chunks = 0;       // of a row
  int slots = 0;        // of a warp
  int slot_bytes = 0;
  int tile_at[3] = {};  // of student, teacher, noisy in a slot
  int slots_at = 0;     // in shared memory
  int bytes = 0;        // of shared memory, for a block
};

struct Task {
  Tile student, teacher, noisy, grad;  // contrast: no student, grad is the output
  const float *alpha = nullptr, *weight = nullptr;
  const std::int64_t* labels = nullptr;
  float *loss = nullptr, *metrics = nullptr;
  std::int64_t n = 0, ignore_index = -100;
  int vocab = 0;
  float beta = 0.5f;
  double temperature = 1, soft_weight = 1, hard_weight = 0, teacher_floor = -INFINITY;
  bool difference = false, accumulate = false, skips = false;  // skips: a row whose label is ignore_index is none
  Transform student_logits, teacher_logits, noisy_logits;
  Law law;
  Plan plan;
};

// The softmax sums of some words of a row, with d = (x - peak) * scale.
struct Softmax {
  double sum = 0;     // of e^d
  double moment = 0;  // of d e^d
  double gap = 0;     // of (y - x) e^d, y - x the teacher's logit less the student's
  double sum_at_1 = 0;  // of e^(x - peak)
  float peak = -INFINITY;
  float other_at_peak = -INFINITY;  // the other side's logit at the peak's word
  int word = INT32_MAX;    // the first that has the peak
  int unused = 0;
};

struct SoftmaxTriple {
  Softmax side[3];  // student, teacher, noisy
};

// What a row's later sweeps need to know.
struct RowConstants {
  generic::Contrast contrast;
  float peak_q, peak_p, shift, floor;
  float share_q, share_p, share_q_low, share_p_low;  // 1 / sum in two floats
  float rest_q, rest_p, rest_gap, tilt;              // where a tilt is kept: bits beside the origins, the tilt taken off
  float slope, slope_low, soft_by, hard_by, peak_1, share_1;
  int blank;  // the row's gradient is 0
};

struct SharedMemory {
  RowConstants constants;
  SoftmaxTriple of_warp[max_warps];
  SoftmaxTriple of_block[2][max_blocks];  // in turn: a block may be a reduction ahead of one that still reads
  std::uint64_t come[2];                  // barriers: the records of the other blocks are in of_block
};

inline int size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline bool aligned(const Tile& tile) {
  return (reinterpret_cast<std::uintptr_t>(tile.data) | static_cast<std::uintptr_t>(tile.stride * size_of(tile.dtype))) % 16 == 0;
}

inline Task task_of(const Objective& o, const Rows& rows) {
  Task task;
  task.student = rows.student, task.teacher = rows.teacher, task.noisy = rows.noisy, task.grad = rows.grad;
  task.alpha = rows.alpha, task.weight = rows.weight, task.labels = rows.labels;
  task.loss = rows.loss, task.metrics = rows.metrics;
  task.n = rows.n, task.vocab = static_cast<int>(rows.vocab), task.ignore_index = o.ignore_index;
  task.beta = o.beta, task.temperature = o.temperature, task.teacher_floor = o.teacher_floor;
  task.soft_weight = o.soft_weight, task.hard_weight = o.hard_weight;
  task.difference = o.difference && rows.student.data;
  task.accumulate = o.accumulate;
  task.skips = rows.student.data && rows.labels;
  task.student_logits = o.student, task.teacher_logits = o.teacher, task.noisy_logits = o.noisy;
  task.law = o.law;
  return task;
}

// How a row is computed. The two fast kinds take aligned tiles whose numbers are logits, floor nothing, and use the GPU's
// approximate functions, for their gradient is rounded to 16 bits. narrow: all tiles are bfloat16, no label is learned from.
// wide: tiles are float32 and the gradient bfloat16, as with heads of bfloat16 models.
enum class Kind { any, narrow, wide };

inline Kind kind_of(const Task& task) {
  const Tile* tiles[] = {&task.student, &task.teacher, &task.noisy, &task.grad};
  const Transform* transforms[] = {&task.student_logits, &task.teacher_logits, &task.noisy_logits};
  bool narrow = !(task.labels && (task.hard_weight != 0 || task.metrics)), wide = task.grad.data;
  for (const Tile* tile : tiles) {
    if (!tile->data) continue;
    if (!aligned(*tile)) return Kind::any;
    const bool is_bf16 = tile->dtype == Dtype::bfloat16;
    narrow = narrow && is_bf16;
    wide = wide && (tile == &task.grad ? is_bf16 : tile->dtype == Dtype::float32);
  }
  for (const Transform* transform : transforms)
    if (transform->scale != 1.f || transform->softcap != 0.f) return Kind::any;
  if (task.difference || task.teacher_floor != -INFINITY) return Kind::any;
  return narrow ? Kind::narrow : wide ? Kind::wide : Kind::any;
}

inline int ceil_div(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }
inline int round_up(int a, int b) { return ceil_div(a, b) * b; }

}  // namespace hkdfast
