// The row operation on the CPU, compiled once per instruction set (rows_*.cpp).
//
// A row is swept from memory once, for the softmax sums of all its tiles, and again from the cache: for the divergences
// whose sum does not follow from those (divergence.h), and for the gradient. A sweep takes blocks that lie in L1, turned
// into floats. Sums are float inside a block, double beyond; blocks make pieces, and pieces are joined in their order,
// so that no result depends on the number of threads. Rows are shared out among threads, or the pieces of one row when
// there are fewer rows than threads.
#pragma once
#include "divergence.h"
#include "law.h"
#include "tiles.h"
#include "sums.h"

namespace hkdfast {
namespace HKDFAST_ISA {

constexpr std::int64_t piece_words = 16384;

inline std::int64_t padded(std::int64_t vocab) { return (vocab + lanes - 1) / lanes * lanes; }
inline std::int64_t pieces(std::int64_t vocab) { return (vocab + piece_words - 1) / piece_words; }

// What a piece leaves behind.
struct Piece {
  Sums student, student_at_1, teacher, noisy;
  Total total{};
  double sum_q = 0;
};

template <class Run>
inline void each_piece(std::int64_t vocab, int threads, Run run) {
  const std::int64_t count = pieces(vocab);
  if (threads == 1) {
    for (std::int64_t i = 0; i < count; ++i) run(i, i * piece_words, least((i + 1) * piece_words, vocab));
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < count; ++i) run(i, i * piece_words, least((i + 1) * piece_words, vocab));
}

template <class Run>
inline void each_block(std::int64_t begin, std::int64_t end, Run run) {
  for (; begin < end; begin += block_words) run(begin, static_cast<int>(least(block_words, end - begin)));
}

// One row on its way through the sweeps.
struct Row {
  static std::int64_t scratch(std::int64_t vocab, bool purified) {
    return pieces(vocab) * static_cast<std::int64_t>(sizeof(Piece)) + ((purified ? 2 : 1) * padded(vocab) * 4);
  }

  const Objective& o;
  const Rows& rows;
  std::int64_t row;
  int threads;  // that share the row
  Piece* piece;
  float* slopes;    // (vocab,) kept from the sweep that sums them
  float* purified;  // (vocab,) the teacher's contrast, kept from the first sweep that needs it
  Source student, teacher, noisy;
  Contrast contrast{};
  double confidence = 0, a = 0;
  bool pending;  // the teacher has yet to be purified

  Row(const Objective& o, const Rows& rows, std::int64_t row, int threads, void* scratch)
      : o(o), rows(rows), row(row), threads(threads), piece(static_cast<Piece*>(scratch)),
        slopes(reinterpret_cast<float*>(piece + pieces(rows.vocab))), purified(slopes + padded(rows.vocab)), student{rows.student, o.student},
        teacher{rows.teacher, o.teacher}, noisy{rows.noisy, o.noisy},
        pending(o.purified) {
    if (o.difference) teacher.base = noisy.base = &rows.student;
  }

  std::int64_t label() const { return rows.labels ? (rows.labels[row] < 0 ? 0 : rows.labels[row]) : rows.vocab; }

  // Logit of the label's word; NaN without one, or for one beyond the vocabulary.
  float label_logit(const Source& source) const {
    Block buffer;
    return label() < rows.vocab ? source.logits(row, label(), 1, buffer).one(0) : NAN;
  }

  template <class Of>
  Sums joined(double scale, Of of) const {
    Sums all;
    for (std::int64_t i = 0; i < pieces(rows.vocab); ++i) all.join(of(piece[i]), scale);
    return all;
  }

  // Clean and disturbed branch at temperature 1: the law's weight and the constants of the contrast.
  void purify() {
    const Law& law = o.law;
    const bool by_entropy = law.confidence == Confidence::entropy;
    each_piece(rows.vocab, threads, [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
      piece[i] = Piece();
      each_block(begin, end, [&](std::int64_t at, int n) {
        Block x, y;
        const Floats clean = teacher.logits(row, at, n, x);
        by_entropy ? add<true>(piece[i].teacher, clean, n, at, 1) : add(piece[i].teacher, clean, n, at, 1);
        add(piece[i].noisy, noisy.logits(row, at, n, y), n, at, 1);
      });
    });
    const Sums clean = joined(1, [](const Piece& p) { return p.teacher; });
    const Sums disturbed = joined(1, [](const Piece& p) { return p.noisy; });
    const double log_clean = clean.log_sum(), log_noisy = disturbed.log_sum();
    if (law.confidence == Confidence::max_prob)
      confidence = 1 / clean.sum;
    else if (law.confidence == Confidence::target)
      confidence = exp(static_cast<double>(label_logit(teacher)) - clean.peak - log_clean);
    else
      confidence = rows.vocab == 1 ? 1 : 1 - clean.entropy(1) / log(static_cast<double>(rows.vocab));
    a = disturbed.sum == disturbed.sum ? purification(law, confidence, rows.alpha ? rows.alpha[row] : 0) : NAN;

    contrast.a = static_cast<float>(a), contrast.extrapolate = law.mode == Mode::extrapolate;
    contrast.clean_peak = clean.origin(), contrast.noisy_peak = disturbed.origin();
    // without a single noisy word every word stands alone, and their common constant is free
    contrast.alone = disturbed.sum == 0 ? 0.f : static_cast<float>(a * (contrast.extrapolate * log_clean - log_noisy));
    contrast.least = -INFINITY;
    if (law.plausibility == 0) return;
    contrast.least = static_cast<float>(log(law.plausibility));
    contrast.outside = law.outside == Outside::drop ? -INFINITY : static_cast<float>(-log_clean);
    if (law.outside == Outside::drop) return;

    // the words of the set share their clean mass by their purified odds
    each_piece(rows.vocab, threads, [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
      Sums mass, odds;
      each_block(begin, end, [&](std::int64_t at, int n) {
        Block x, y;
        const Floats c = teacher.logits(row, at, n, x), d = noisy.logits(row, at, n, y);
        each_lanes(n, [&](int k) {
          const Lanes own = c(k) - contrast.clean_peak, other = d(k) - contrast.noisy_peak;
          const auto in = own >= contrast.least;
          store(x.words + k, select(in, own, all(-INFINITY)));
          store(y.words + k, select(in, contrast.odds(own, other), all(-INFINITY)));
        });
        add(mass, {x.words}, n, at, 1);
        add(odds, {y.words}, n, at, 1);
      });
      piece[i].teacher = mass, piece[i].noisy = odds;
    });
    const double mass = joined(1, [](const Piece& p) { return p.teacher; }).lse(1);
    const double odds = joined(1, [](const Piece& p) { return p.noisy; }).lse(1);
    contrast.inside = static_cast<float>(mass - log_clean - odds);
  }

  // The contrast of a block, left in the row's scratch.
  Floats purified_logits(std::int64_t at, int n, Block& buffer) const {
    const Floats c = teacher.logits(row, at, n, buffer);
    Block other;
    const Floats d = noisy.logits(row, at, n, other);
    float* z = purified + at;
    const Contrast contrast = this->contrast;
    each_lanes(n, [=](int k) {
      store(z + k, contrast(c(k) - contrast.clean_peak, d(k) - contrast.noisy_peak));
    });
    return {z};
  }

  // From here on the purified row is the teacher.
  void take_purified() {
    if (pending) teacher = {{purified, Dtype::float32, 0}, {}, nullptr};
    pending = false;
  }

  // Calls run with the logits of student and teacher in a block.
  template <class Run>
  inline void with_logits(std::int64_t begin, int n, Run run) const {
    if (!pending && student.direct(n, Dtype::bfloat16) && teacher.direct(n, Dtype::bfloat16)) {
      run(Bfloats{at<std::uint16_t>(student.tile, row, begin)}, Bfloats{at<std::uint16_t>(teacher.tile, row, begin)});
    } else {
      Block x, y;
      run(student.logits(row, begin, n, x), pending ? purified_logits(begin, n, y) : teacher.logits(row, begin, n, y));
    }
  }
};

// The words of a row, as a divergence wants them, from logits of student and teacher.
struct Words {
  Rate rate;
  float scale, peak_q, peak_p, share_q, share_p;
  float shift;  // gap between the two log-sums
  bool floored;
  float floor;  // of log p, as a logit of the teacher less its peak

  HKDFAST_HD Word<Lanes> operator()(Lanes x, Lanes y) const {
    const Lanes to_q = x - peak_q;
    Lanes to_p = y - peak_p;
    if (floored) to_p = select(x > -INFINITY, larger(to_p, all(floor)), to_p);
    return {exp_(to_p, rate) * share_p, exp_(to_q, rate) * share_q, (to_p - to_q) * scale - shift};
  }
};

// One row of each metric, in the order of METRICS in hkdfast/objective.py.
struct Metrics {
  double divergence, cross_entropy, student_entropy, teacher_entropy, confidence, purification, agreement;
};

inline void write_metrics(const Rows& rows, std::int64_t row, Metrics metrics) {
  const double of[] = {metrics.divergence,      metrics.cross_entropy, metrics.student_entropy,
                       metrics.teacher_entropy, metrics.confidence,    metrics.purification, metrics.agreement};
  float* to = rows.metrics + row;
  for (double x : of) {
    *to = static_cast<float>(x);
    to += rows.n;
  }
}

inline void ignore(const Rows& rows, std::int64_t row) {
  rows.loss[row] = 0;
  if (rows.metrics) write_metrics(rows, row, {});
}

inline void zero_grad(const Rows& rows, std::int64_t row) {
  const Block zeros = {};
  if (rows.grad.data)
    each_block(0, rows.vocab, [&](std::int64_t at, int n) { store(rows.grad, row, at, n, zeros.words); });
}

template <class Divergence>
inline void do_row(const Objective& o, const Rows& rows, std::int64_t row, int threads, void* scratch,
                   Divergence divergence) {
  if (rows.labels && rows.labels[row] == o.ignore_index) {
    ignore(rows, row);
    zero_grad(rows, row);
    return;
  }
  Row r(o, rows, row, threads, scratch);
  if (o.purified) r.purify();

  const double scale = 1 / o.temperature;
  const bool metrics = rows.metrics != nullptr, floored = o.floor > -INFINITY;
  const bool hard = rows.labels && (o.hard_weight != 0 || metrics), apart = hard && scale != 1;
  constexpr Mean mean = Divergence::mean;
  const bool short_cut = mean != Mean::none && !floored;  // the floor makes p another distribution than its sums tell

  each_piece(rows.vocab, threads, [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
    Piece part;
    each_block(begin, end, [&](std::int64_t at, int n) {
      if (at + n < end) {
        r.student.prefetch(row, at + n, end);
        r.teacher.prefetch(row, at + n, end);
      }
      r.with_logits(at, n, [&](auto x, auto y) {
        if (metrics)
          add<true, mean>(part.student, part.teacher, x, y, n, at, scale);
        else
          add<false, mean>(part.student, part.teacher, x, y, n, at, scale);
      });
      if (apart) {
        Block x;
        add(part.student_at_1, r.student.logits(row, at, n, x), n, at, 1);
      }
    });
    r.piece[i] = part;
  });
  r.take_purified();
  const Sums q = r.joined(scale, [](const Piece& p) { return p.student; });
  const Sums p = r.joined(scale, [](const Piece& p) { return p.teacher; });
  const Sums q1 = apart ? r.joined(1, [](const Piece& p) { return p.student_at_1; }) : q;

  Words words{Rate(scale),
              static_cast<float>(scale),
              q.origin(),
              p.origin(),
              static_cast<float>(1 / q.sum),
              static_cast<float>(1 / p.sum),
              static_cast<float>(p.log_sum() - q.log_sum()),
              floored,
              static_cast<float>((o.floor + p.log_sum()) / scale)};

  Total total{};
  double sum_q = words.share_q * q.sum;  // not 1, since the share is rounded; the gradient must add up to 0 for all that
  if (short_cut) {
    if constexpr (mean != Mean::none) {
      const double gap = mean == Mean::gap_under_p ? p.gap / p.sum : q.gap / q.sum;
      total = divergence.total(gap * scale - (p.lse(scale) - q.lse(scale)));
    }
    if (mean == Mean::gap_under_p) total.slope = sum_q - words.share_p * p.sum;
  } else {
    sum_q = 0;
    each_piece(rows.vocab, threads, [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
      Sum value, slope, share;
      each_block(begin, end, [&](std::int64_t at, int n) {
        r.with_logits(at, n, [&](auto x, auto y) {
          each_lanes(
              n,
              [&](int k) {
                const Word<Lanes> w = words(x(k), y(k));
                const Term<Lanes> term = divergence(w);
                value.add(term.value), slope.add(term.slope), share.add(w.q);
                store(r.slopes + at + k, term.slope);
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
  // a divergence is never negative; near 0 the sum of its rounded terms can be
  const double value = total.value < 0 ? 0 : total.value;
  const double target = hard ? static_cast<double>(r.label_logit(r.student)) - q1.peak - q1.log_sum() : 0;
  const double loss = o.soft_weight * value - (o.hard_weight != 0 ? o.hard_weight * target : 0);
  rows.loss[row] = static_cast<float>(loss);

  if (metrics) {
    if (!o.purified) r.confidence = 1 / p.sum;
    write_metrics(rows, row, {value, -target, q.entropy(scale), p.entropy(scale), r.confidence, r.a, q.top == p.top ? 1. : 0.});
  }
  if (!rows.grad.data) return;

  const float weight = rows.weight ? rows.weight[row] : 1.f;
  if (!(rows.loss[row] * weight - rows.loss[row] * weight == 0.f)) {  // infinite or NaN
    zero_grad(rows, row);
    return;
  }
  double mean_slope = total.slope / sum_q;
  if (short_cut && mean == Mean::gap_under_q) {
    // Where q is nearly 1 its gap and the mean gap are nearly equal and may be large: the gap of that word is taken off
    // both before either is rounded. This divergence's slope has no other use for p.
    Block buffer;
    words.peak_p = r.teacher.logits(row, q.top, 1, buffer).one(0);
    words.shift = 0;
    mean_slope = (words.peak_p - static_cast<double>(words.peak_q) - q.gap / q.sum) * scale;
  }
  const float mean_high = static_cast<float>(mean_slope), mean_low = static_cast<float>(mean_slope - mean_high);
  const float soft_by = static_cast<float>(o.soft_weight * weight * scale);
  const float hard_by = hard ? static_cast<float>(o.hard_weight * weight / q1.sum) : 0.f;
  each_piece(rows.vocab, threads, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
    each_block(begin, end, [&](std::int64_t at, int n) {
      Block grad;
      float* g = grad.words;
      // softmax Jacobian: d loss / d z = (slope - q * mean slope) / T
      const auto jacobian = [=](Lanes slope, Lanes share) {
        return fused(share, -mean_low, fused(share, -mean_high, slope)) * soft_by;
      };
      r.with_logits(at, n, [&](auto x, auto y) {
        if (short_cut)
          each_lanes(n, [=](int k) {
            const Word<Lanes> w = words(x(k), y(k));
            store(g + k, jacobian(divergence(w).slope, w.q));
          });
        else
          each_lanes(n, [=, slopes = r.slopes + at](int k) {
            store(g + k, jacobian(load(slopes + k), exp_(x(k) - words.peak_q, words.rate) * words.share_q));
          });
        if (hard_by != 0.f) {
          each_lanes(n, [=, peak = q1.origin()](int k) {
            store(g + k, fused(exp_(x(k) - peak, Rate(1)), hard_by, load(g + k)));
          });
          if (at <= r.label() && r.label() < at + n)
            g[r.label() - at] -= static_cast<float>(o.hard_weight * weight);
        }
        r.student.backward(x, n, g);
      });
      store(rows.grad, row, at, n, g);
    });
  });
}

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
      do_row(o, rows, row, threads, scratch, divergence);
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
        each_lanes(n, [&](int k) { store(out.words + k, (load(z + k) - peak) * static_cast<float>(scale) - log_sum); });
        store(rows.grad, row, at, n, out.words);
      });
    });
  });
}

constexpr Loops loops = {rows, contrast, Row::scratch};

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
