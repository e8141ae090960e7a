// One row of the tiles in pieces and blocks, and its teacher's purification.
#pragma once
#include "../common/contrast_rule.h"
#include "sums.h"
#include "tiles.h"

namespace hkdfast {
namespace HKDFAST_ISA {

constexpr std::int64_t piece_words = 16384;

inline std::int64_t padded(std::int64_t vocab) { return (vocab + lanes - 1) / lanes * lanes; }
inline std::int64_t pieces(std::int64_t vocab) { return (vocab + piece_words - 1) / piece_words; }

// What a piece of a row leaves behind.
struct Piece {
  Sums student, student_at_1, teacher, noisy;
  Total total{};
  double sum_q = 0;
};

// Calls run(number, begin, end) for the pieces of a row, on so many threads.
template <class Run>
inline void each_piece(std::int64_t vocab, int threads, Run run) {
  const std::int64_t count = pieces(vocab);
  if (threads == 1) {
    for (std::int64_t i = 0; i < count; ++i) run(i, i * piece_words, smaller_of((i + 1) * piece_words, vocab));
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < count; ++i) run(i, i * piece_words, smaller_of((i + 1) * piece_words, vocab));
}

// Calls run(begin, n) for the blocks of a piece.
template <class Run>
inline void each_block(std::int64_t begin, std::int64_t end, Run run) {
  for (; begin < end; begin += block_words) run(begin, static_cast<int>(smaller_of(block_words, end - begin)));
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
        slopes(reinterpret_cast<float*>(piece + pieces(rows.vocab))), purified(slopes + padded(rows.vocab)),
        student{rows.student, o.student}, teacher{rows.teacher, o.teacher}, noisy{rows.noisy, o.noisy},
        pending(o.purified) {
    if (o.difference) teacher.base = noisy.base = &rows.student;
  }

  std::int64_t label() const { return rows.labels ? (rows.labels[row] < 0 ? 0 : rows.labels[row]) : rows.vocab; }

  // Logit of the label's word; NaN without one, or for one beyond the vocabulary.
  float label_logit(const Source& source) const {
    Block buffer;
    return label() < rows.vocab ? source.logits(row, label(), 1, buffer).one(0) : NAN;
  }

  // Asks for the blocks after this one.
  void prefetch(const Source& one, const Source& other, std::int64_t begin, std::int64_t end) const {
    if (begin < end) one.prefetch(row, begin, end), other.prefetch(row, begin, end);
  }

  // The sums of the row from those of its pieces.
  template <class Of>
  Sums joined(double scale, Of of) const {
    Sums all;
    for (std::int64_t i = 0; i < pieces(rows.vocab); ++i) all.join(of(piece[i]), scale);
    return all;
  }

  // Clean and noisy branch at temperature 1: the law's weight and the constants of the contrast.
  void purify() {
    const Law& law = o.law;
    const bool by_entropy = law.confidence == Confidence::entropy;
    each_piece(rows.vocab, threads, [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
      piece[i] = Piece();
      each_block(begin, end, [&](std::int64_t at, int n) {
        prefetch(teacher, noisy, at + n, end);
        Block x, y;
        const Floats clean = teacher.logits(row, at, n, x);
        by_entropy ? add<true>(piece[i].teacher, clean, n, at, 1) : add(piece[i].teacher, clean, n, at, 1);
        add(piece[i].noisy, noisy.logits(row, at, n, y), n, at, 1);
      });
    });
    const Sums clean = joined(1, [](const Piece& p) { return p.teacher; });
    const Sums noisy_sums = joined(1, [](const Piece& p) { return p.noisy; });
    const double log_clean = clean.log_sum(), log_noisy = noisy_sums.log_sum();
    if (law.confidence == Confidence::max_prob)
      confidence = 1 / clean.sum;
    else if (law.confidence == Confidence::target)
      confidence = exp(static_cast<double>(label_logit(teacher)) - clean.peak - log_clean);
    else
      confidence = rows.vocab == 1 ? 1 : 1 - clean.entropy(1) / log(static_cast<double>(rows.vocab));
    a = noisy_sums.sum == noisy_sums.sum ? contrast_weight(law, confidence, rows.alpha ? rows.alpha[row] : 0) : NAN;

    contrast.a = static_cast<float>(a), contrast.extrapolate = law.mode == Mode::extrapolate;
    contrast.clean_peak = clean.origin(), contrast.noisy_peak = noisy_sums.origin();
    // without a single noisy token there is no contrast to compare with, and the common constant is free
    contrast.clean_only_offset = noisy_sums.sum == 0 ? 0.f : static_cast<float>(a * (contrast.extrapolate * log_clean - log_noisy));
    contrast.min_clean = -INFINITY;
    if (law.plausibility == 0) return;
    contrast.min_clean = static_cast<float>(log(law.plausibility));
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
          const auto in = own >= contrast.min_clean;
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

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
