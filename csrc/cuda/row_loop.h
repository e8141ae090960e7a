// The row operation by a cluster of thread blocks that holds a row in its shared memory, so that logits are read from
// global memory once. A ThreadContext is what a thread knows of its surroundings: device.h has the GPU's,
// tests/tools/cluster.cpp one that runs on a CPU.
//
// 1. softmax sums of every tile; 2. with a law those of the contrast, whose weight the first sweep found; 3. the sum of the
// terms, unless it follows from those; 4. the gradient. Between sweeps one reduction over the cluster. Of plain tiles a sweep
// leaves in shared memory, in the place of what is not read again, what the next ones would compute once more.
//
// Each step has a class, which adds to the one before: RowLogits (row_logits.h), RowSums, RowContrast, RowCompare,
// RowGradient, RowDistill, RowLoop.
#pragma once
#include "row_distill.h"

namespace hkdfast {
namespace HKDFAST_ISA {

template <class ThreadContext, class Divergence, Kind KIND, bool PURIFIED>
class RowLoop : RowDistill<ThreadContext, Divergence, KIND, PURIFIED> {
  using Base = RowDistill<ThreadContext, Divergence, KIND, PURIFIED>;
  using Base::decode, Base::distill, Base::distills, Base::labeled, Base::leader, Base::measured, Base::purify, Base::writer;
  using Base::label_logit, Base::ring_, Base::row_, Base::stored, Base::task_, Base::thread_;
  using typename Base::W;

 public:
  HKDFAST_HD RowLoop(ThreadContext& thread, const Task& task, Divergence divergence) : Base(thread, task, divergence) {}

  // A block may leave when it has done its rows: it has waited for all that others send to it.
  HKDFAST_HD void rows() {
    for (row_ = thread_.cluster(); row_ < task_.n; row_ += thread_.clusters()) {
      if (ignored(task_, row_))
        blank();
      else
        row();
    }
  }

 private:
  HKDFAST_HD void row() {
    const bool by_label = leader() && task_.labels;
    float student_label = 0, clean_label = 0;
    if constexpr (distills)
      if (by_label && labeled()) student_label = label_logit(task_.student, task_.student_logits, false);
    if (PURIFIED && by_label && task_.law.confidence == Confidence::target)
      clean_label = label_logit(task_.teacher, task_.teacher_logits, task_.difference);
    SoftmaxTriple branches;
    if constexpr (PURIFIED) purify(clean_label, branches);
    if constexpr (distills)
      distill(student_label);
    else
      decode();
  }

  HKDFAST_HD void blank() {
    if (writer() && task_.loss) {
      task_.loss[row_] = 0;
      for (int i = 0; measured() && i < 7; ++i) task_.metrics[i * task_.n + row_] = 0;
    }
    if (task_.grad.data && !task_.accumulate) ring_.template each_step<W::step>([out = stored()](int base) { out.store(base, W()); });
  }
};

// Calls run with the instance for a task: its Kind, and whether there is a law.
template <class Divergence, class Run>
auto with_kind(const Task& task, bool purified, Divergence, Run run) {
  const auto with_law = [&](auto kind) {
    return purified ? run(kind, std::true_type()) : run(kind, std::false_type());
  };
  if constexpr (std::is_same_v<Divergence, Decode>) {
    return run(std::integral_constant<Kind, Kind::any>(), std::true_type());
  } else {
    switch (kind_of(task)) {
      case Kind::narrow: return with_law(std::integral_constant<Kind, Kind::narrow>());
      case Kind::wide: return with_law(std::integral_constant<Kind, Kind::wide>());
      default: return with_law(std::integral_constant<Kind, Kind::any>());
    }
  }
}

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
