// The row operation on the CPU, compiled once per instruction set (rows_*.cpp).
//
// A row is swept from memory once, for the softmax sums of its tiles, and again from the cache: for the divergences whose
// sum does not follow from those (common/divergence.h), and for the gradient. A sweep takes blocks that lie in L1. Sums are
// float for a few terms, then double; blocks make pieces, and pieces are joined in their order, so that no result
// depends on the number of threads. Rows are shared out among threads, or the pieces of one row when there are fewer
// rows than threads.
#pragma once
#include "../common/divergence.h"
#include "row.h"

namespace hkdfast {
namespace HKDFAST_ISA {

// The words of a row, as a divergence wants them, from logits of student and teacher.
struct Words {
  Rate rate;
  float scale, peak_q, peak_p, share_q, share_p;
  float shift;  // gap between the two log-sums
  bool floored;
  float floor;  // of log p, as a logit of the teacher less its peak

  Words(const Sums& q, const Sums& p, double scale, double floor)
      : rate(scale), scale(static_cast<float>(scale)), peak_q(q.origin()), peak_p(p.origin()),
        share_q(static_cast<float>(1 / q.sum)), share_p(static_cast<float>(1 / p.sum)),
        shift(static_cast<float>(p.log_sum() - q.log_sum())), floored(floor > -INFINITY),
        floor(static_cast<float>((floor + p.log_sum()) / scale)) {}

  HKDFAST_HD Lanes q(Lanes x) const { return exp_(x - peak_q, rate) * share_q; }
  HKDFAST_HD Word<Lanes> operator()(Lanes x, Lanes y) const {
    Lanes to_p = y - peak_p;
    if (floored) to_p = select(x > -INFINITY, larger(to_p, all(floor)), to_p);
    return {exp_(to_p, rate) * share_p, q(x), (to_p - (x - peak_q)) * scale - shift};
  }
};

// One row of each metric, in the order of METRICS in hkdfast/ops/objective.py.
struct Metrics {
  double divergence, cross_entropy, student_entropy, teacher_entropy, confidence, contrast_weight, agreement;
};

inline void write(const Rows& rows, std::int64_t row, double loss, Metrics metrics) {
  rows.loss[row] = static_cast<float>(loss);
  if (!rows.metrics) return;
  float* to = rows.metrics + row;
  const double of[] = {metrics.divergence,      metrics.cross_entropy, metrics.student_entropy,
                       metrics.teacher_entropy, metrics.confidence,    metrics.contrast_weight, metrics.agreement};
  for (double x : of) {
    *to = static_cast<float>(x);
    to += rows.n;
  }
}

// Loss, metrics and gradient of one row.
template <class Divergence>
struct Distillation {
  static constexpr Mean mean = Divergence::mean;

  Row r;
  const Divergence divergence;
  const Objective& o = r.o;
  const Rows& rows = r.rows;
  const double scale = 1 / o.temperature;
  const bool hard = rows.labels && (o.hard_weight != 0 || rows.metrics), hard_apart = hard && scale != 1;
  // with the floor p is another distribution than that of its sums
  const bool short_cut = mean != Mean::none && o.teacher_floor == -INFINITY;
  Sums q, p, q_at_1;
  Total total{};
  double sum_q = 0;  // of the rounded q: not 1, and the gradient must add up to 0 for all that

  Distillation(Row r, Divergence divergence) : r(r), divergence(divergence) {}

  bool labeled() const { return hard && rows.labels[r.row] >= 0; }

  void run() {
    if (rows.labels && rows.labels[r.row] == o.ignore_index) {
      write(rows, r.row, 0, {});
      return zero_gradient();
    }
    if (o.purified) r.purify();
    gather();
    const Words words(q, p, scale, o.teacher_floor);
    short_cut ? follow(words) : add_up(words);
    report();
    if (!rows.grad.data) return;
    const float weight = rows.weight ? rows.weight[r.row] : 1.f;
    without_gradient(rows.loss[r.row], weight) ? zero_gradient() : write_gradient(words, weight);
  }

  // The first sweep: softmax sums.
  void gather() {
    each_piece(rows.vocab, r.threads, [this](std::int64_t i, std::int64_t begin, std::int64_t end) {
      Piece part;
      each_block(begin, end, [&](std::int64_t at, int n) {
        r.prefetch(r.student, r.teacher, at + n, end);
        r.with_logits(at, n, [&](auto x, auto y) {
          if (rows.metrics)
            add<true, mean>(part.student, part.teacher, x, y, n, at, scale);
          else
            add<false, mean>(part.student, part.teacher, x, y, n, at, scale);
        });
        if (hard_apart) {
          Block x;
          add(part.student_at_1, r.student.logits(r.row, at, n, x), n, at, 1);
        }
      });
      r.piece[i] = part;
    });
    r.take_purified();
    q = r.joined(scale, [](const Piece& part) { return part.student; });
    p = r.joined(scale, [](const Piece& part) { return part.teacher; });
    q_at_1 = hard_apart ? r.joined(1, [](const Piece& part) { return part.student_at_1; }) : q;
  }

  // The sums of value and slope, where they follow from the first sweep.
  void follow(const Words& words) {
    sum_q = words.share_q * q.sum;
    if constexpr (mean != Mean::none) {
      const double gap = mean == Mean::gap_under_p ? p.gap / p.sum : q.gap / q.sum;
      const double of_peaks = static_cast<double>(p.peak) - q.peak;
      total = divergence.total((gap - of_peaks) * scale - (p.log_sum() - q.log_sum()));
    }
    if (mean == Mean::gap_under_p) total.slope = sum_q - words.share_p * p.sum;
  }

  // The same where they do not: a second sweep, which keeps the slopes.
  void add_up(const Words& words) {
    each_piece(rows.vocab, r.threads, [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
      Sum value, slope, share;
      each_block(begin, end, [&](std::int64_t at, int n) {
        r.with_logits(at, n, [&, words, slopes = r.slopes + at](auto x, auto y) {
          each_lanes(
              n,
              [&](int k) {
                const Word<Lanes> w = words(x(k), y(k));
                const Term<Lanes> term = divergence(w);
                value.add(term.value), slope.add(term.slope), share.add(w.q);
                store(slopes + k, term.slope);
              },
              [&] { value.fold(), slope.fold(), share.fold(); });
        });
      });
      r.piece[i].total = {value.total(), slope.total()};
      r.piece[i].sum_q = share.total();
    });
    for (std::int64_t i = 0; i < pieces(rows.vocab); ++i) {
      const Piece& part = r.piece[i];
      total.value += part.total.value, total.slope += part.total.slope, sum_q += part.sum_q;
    }
  }

  void report() {
    // a divergence is never negative; near 0 the sum of its rounded terms can be
    double soft = total.value < 0 ? 0 : total.value;
    // a NaN among the logits is one in these, whatever a divergence selects; they are 0 if every word is masked
    if (!(q.sum > 0) || !(p.sum > 0)) soft = NAN;
    const double cross = labeled() ? q_at_1.lse(1) - r.label_logit(r.student) : 0;
    const double confidence = o.purified ? r.confidence : 1 / p.sum;
    write(rows, r.row, o.soft_weight * soft + (o.hard_weight != 0 ? o.hard_weight * cross : 0),
          {soft, cross, q.entropy(scale), p.entropy(scale), confidence, r.a, q.top == p.top ? 1. : 0.});
  }

  void zero_gradient() const {
    const Block zeros = {};
    if (rows.grad.data && !o.accumulate)
      each_block(0, rows.vocab, [&](std::int64_t at, int n) { store(rows.grad, r.row, at, n, zeros.words); });
  }

  // The last sweep.
  void write_gradient(Words words, float weight) const {
    double mean_slope = total.slope / sum_q;
    if (short_cut && mean == Mean::gap_under_q) {
      // Where q is nearly 1 its gap and the mean gap are nearly equal and may be large: the gap of that word is taken
      // off both before either is rounded. This divergence's slope has no other use for p.
      Block buffer;
      words.peak_p = r.teacher.logits(r.row, q.top, 1, buffer).one(0);
      words.shift = 0;
      mean_slope = (words.peak_p - static_cast<double>(words.peak_q) - q.gap / q.sum) * scale;
    }
    if (without_numbers(rows.loss[r.row], weight)) mean_slope = NAN;
    const float mean_high = static_cast<float>(mean_slope), mean_low = static_cast<float>(mean_slope - mean_high);
    const float soft_by = static_cast<float>(o.soft_weight * weight * scale);
    const float hard_by = labeled() ? static_cast<float>(o.hard_weight * weight) : 0.f;
    // softmax Jacobian: d loss / d z = (slope - q * mean slope) / T
    const auto jacobian = [=](Lanes slope, Lanes share) {
      return fused(share, -mean_low, fused(share, -mean_high, slope)) * soft_by;
    };
    each_piece(rows.vocab, r.threads, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
      each_block(begin, end, [&](std::int64_t at, int n) {
        Block grad;
        r.with_logits(at, n, [&](auto x, auto y) {
          float* g = grad.words;
          if (short_cut)
            each_lanes(n, [=, divergence = divergence](int k) {
              const Word<Lanes> w = words(x(k), y(k));
              store(g + k, jacobian(divergence(w).slope, w.q));
            });
          else
            each_lanes(n, [=, slopes = r.slopes + at](int k) {
              store(g + k, jacobian(load(slopes + k), words.q(x(k))));
            });
          if (hard_by != 0.f) add_hard(x, at, n, hard_by, g);
          r.student.backward(x, n, g);
        });
        if (o.accumulate) add_before(at, n, grad.words);
        store(rows.grad, r.row, at, n, grad.words);
      });
    });
  }

  // What the gradient holds already.
  void add_before(std::int64_t at, int n, float* g) const {
    Block before;
    read(rows.grad, r.row, at, n, before.words);
    for (int i = 0; i < n; ++i) g[i] += before.words[i];
  }

  // Cross entropy against the label, at temperature 1.
  template <class Logits>
  void add_hard(Logits x, std::int64_t at, int n, float by, float* g) const {
    const float peak = q_at_1.origin(), share = static_cast<float>(by / q_at_1.sum);
    each_lanes(n, [=](int k) { store(g + k, fused(exp_(x(k) - peak, Rate(1)), share, load(g + k))); });
    if (at <= r.label() && r.label() < at + n) g[r.label() - at] -= by;
  }
};

// Shares out rows among the threads, or each row among all of them if it is long and there are few.
template <class Run>
inline void each_row(const Rows& rows, Run run) {
  char* scratch = static_cast<char*>(rows.scratch);
  if (rows.n < rows.threads && pieces(rows.vocab) > 1) {
    for (std::int64_t row = 0; row < rows.n; ++row) run(row, rows.threads, scratch);
    return;
  }
  const std::int64_t chunk = 1 + piece_words / (rows.vocab + 1);  // of rows: a short one is not worth a turn
#pragma omp parallel num_threads(rows.threads)
  {
    char* own = scratch + omp_get_thread_num() * rows.scratch_each;
#pragma omp for schedule(dynamic, chunk)
    for (std::int64_t row = 0; row < rows.n; ++row) run(row, 1, own);
  }
}

inline bool rows(const Objective& o, const Rows& rows) {
  return with_divergence(o.divergence.c_str(), o.beta, [&](auto divergence) {
    each_row(rows, [&](std::int64_t row, int threads, void* scratch) {
      Distillation<decltype(divergence)>(Row(o, rows, row, threads, scratch), divergence).run();
    });
  });
}

inline void contrast(const Objective& o, const Rows& rows) {
  const double scale = 1 / o.temperature;
  each_row(rows, [&](std::int64_t row, int threads, void* scratch) {
    Row r(o, rows, row, threads, scratch);
    r.purify();
    each_piece(rows.vocab, threads, [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
      Sums part;
      each_block(begin, end, [&](std::int64_t at, int n) {
        Block buffer;
        add(part, r.purified_logits(at, n, buffer), n, at, scale);
      });
      r.piece[i] = Piece();
      r.piece[i].teacher = part;
    });
    const Sums p = r.joined(scale, [](const Piece& p) { return p.teacher; });
    const float peak = p.origin(), log_sum = static_cast<float>(p.log_sum());
    each_piece(rows.vocab, threads, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
      each_block(begin, end, [&](std::int64_t at, int n) {
        Block out;
        const float* z = r.purified + at;
        each_lanes(n, [&](int k) {
          store(out.words + k, (load(z + k) - peak) * static_cast<float>(scale) - log_sum);
        });
        store(rows.grad, row, at, n, out.words);
      });
    });
  });
}

constexpr Loops loops = {rows, contrast, Row::scratch};

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
