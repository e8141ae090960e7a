// How the words of a warp come into shared memory: a ring of slots that one warp fills, reads and frees by itself. While
// the last sweep over a row frees slots, the next row's chunks are already under way into them.
#pragma once
#include "cluster_reduce.h"
#include "../common/number_math.h"

namespace hkdfast {
namespace HKDFAST_ISA {

HKDFAST_HD bool ignored(const Task& task, std::int64_t row) {
  return task.skips && task.labels[row] == task.ignore_index;
}

template <class ThreadContext>
class Ring {
 public:
  // A cluster takes every clusters()-th row. Its blocks have met before any of them loads or sends.
  HKDFAST_HD Ring(ThreadContext& thread, const Task& task)
      : thread_(thread), task_(task), first_(thread.block() * thread.warps() + thread.warp()),
        all_warps_(thread.blocks() * thread.warps()) {
    const int chunks = task.plan.chunks;
    own_ = first_ < chunks ? (chunks - first_ - 1) / all_warps_ + 1 : 0;
    each_tile([&](const Tile& tile, int) {
      const int size = tile.dtype == Dtype::float32 ? 4 : 2;
      word_bytes_ += size;
      const std::uintptr_t places = reinterpret_cast<std::uintptr_t>(tile.data) |
                                    static_cast<std::uintptr_t>(tile.stride * size) |
                                    static_cast<std::uintptr_t>(task.vocab) * size;
      whole_ = whole_ && places % 16 == 0;
    });
    if (thread.lane() == 0) {
      for (int slot = 0; slot < task.plan.slots; ++slot) thread.init(barrier(slot));
      if (thread.warp() == 0)
        for (int turn = 0; turn < 2; ++turn) thread.init(come_at(turn));
    }
    thread.publish_barriers();
    thread.sync_cluster();
    next_row_ = live(thread.cluster());
    if (own_ == 0) next_row_ = task.n;
    for (int slot = 0; slot < task.plan.slots; ++slot) refill(slot);
  }

  // step(at, begin, word) for every step of the warp's chunks: where the slot begins in shared memory, the chunk's first
  // word, the step's offset from it. The first sweep over a row waits for its data, the last one frees the slots.
  template <bool first, bool last, int STEP, class Step>
  HKDFAST_HD void sweep(Step step) {
    const Plan& plan = task_.plan;
    int slot = slot_;
    std::uint32_t parity = parity_;
    for (int i = 0; i < own_; ++i) {
      if (first) {
        thread_.wait(barrier(slot), parity);
        thread_.sync_warp();  // words at a row's ends came by other lanes
      }
      const int begin = chunk_begin(i), at = slot_at(slot);
      const int words = task_.vocab - begin < plan.chunk ? task_.vocab - begin : plan.chunk;
      for (int word = 0; word < words; word += STEP) step(at, begin, word);
      if (last) refill(slot);
      if (++slot == plan.slots) slot = 0, parity ^= 1;
    }
    if (last) slot_ = slot, parity_ = parity;
  }

  // step(word) for the first word of every step of the warp, of a row that is not loaded.
  template <int STEP, class Step>
  HKDFAST_HD void each_step(Step step) const {
    for (int i = 0; i < own_; ++i)
      for (int word = 0; word < task_.plan.chunk && chunk_begin(i) + word < task_.vocab; word += STEP)
        step(chunk_begin(i) + word);
  }

 private:
  HKDFAST_HD int chunk_begin(int i) const { return (first_ + i * all_warps_) * task_.plan.chunk; }
  HKDFAST_HD int slot_at(int slot) const {
    return task_.plan.slots_at + (thread_.warp() * task_.plan.slots + slot) * task_.plan.slot_bytes;
  }
  HKDFAST_HD int barrier(int slot) const {
    return (sizeof(SharedMemory) + 127) / 128 * 128 + 8 * (thread_.warp() * task_.plan.slots + slot);
  }
  HKDFAST_HD std::int64_t live(std::int64_t row) const {
    while (row < task_.n && ignored(task_, row)) row += thread_.clusters();
    return row;
  }

  // What of a chunk of a tile comes by bulk copy: whole 16 bytes of global memory that lie inside the row.
  struct Bulk {
    const char *begin, *from, *to;  // of the chunk; of the copy, from == to for none
    int at;                         // of the chunk's first byte, from the slot: as far from 16 bytes as in global memory
  };

  HKDFAST_HD Bulk bulk(const Tile& tile, int tile_at, int begin, int words) const {
    const int size = tile.dtype == Dtype::float32 ? 4 : 2;
    const std::uintptr_t row = reinterpret_cast<std::uintptr_t>(tile.data) +
                               static_cast<std::uintptr_t>(next_row_ * tile.stride * size),
                         row_end = row + static_cast<std::uintptr_t>(task_.vocab) * size,
                         own = row + static_cast<std::uintptr_t>(begin) * size, own_end = own + words * size, whole = 15;
    const std::uintptr_t down = own & ~whole, row_up = (row + whole) & ~whole;
    const std::uintptr_t up = (own_end + whole) & ~whole, row_down = row_end & ~whole;
    const std::uintptr_t from = down > row_up ? down : row_up, to = up < row_down ? up : row_down;
    return {reinterpret_cast<const char*>(own), reinterpret_cast<const char*>(from),
            reinterpret_cast<const char*>(to > from ? to : from), tile_at + static_cast<int>(own & whole)};
  }

  HKDFAST_HD void copy_ends(const Tile& tile, const Bulk& b, int slot_at, int words) {
    const int size = tile.dtype == Dtype::float32 ? 4 : 2;
    if (b.begin >= b.from && b.begin + words * size <= b.to) return;
    for (int word = thread_.lane(); word < words; word += warp_lanes) {
      const char* from = b.begin + word * size;
      if (from >= b.from && from < b.to) continue;
      if (size == 4)
        thread_.template at<float>(slot_at + b.at + 4 * word) = *reinterpret_cast<const float*>(from);
      else
        thread_.template at<std::uint16_t>(slot_at + b.at + 2 * word) = *reinterpret_cast<const std::uint16_t*>(from);
    }
  }

  HKDFAST_HD void mask(const Tile& tile, int at, int from, int to) {
    for (int word = from + thread_.lane(); word < to; word += warp_lanes) {
      if (tile.dtype == Dtype::float32)
        thread_.template at<float>(at + 4 * word) = -INFINITY;
      else
        thread_.template at<std::uint16_t>(at + 2 * word) = tile.dtype == Dtype::bfloat16 ? 0xff80 : 0xfc00;
    }
  }

  // The warp is done with what lies in the slot: the next chunk of its queue takes the place.
  HKDFAST_HD void refill(int slot) {
    if (next_row_ >= task_.n) return;
    const Plan& plan = task_.plan;
    const int begin = chunk_begin(next_chunk_), at = slot_at(slot);
    const int words = task_.vocab - begin < plan.chunk ? task_.vocab - begin : plan.chunk;
    thread_.fence_before_copies();  // what this lane stored or read there comes before what the copy engine writes
    thread_.sync_warp();
    if (whole_) {
      if (thread_.lane() == 0) {
        thread_.expect(barrier(slot), words * word_bytes_);
        each_tile([&](const Tile& tile, int tile_at) {
          const int size = tile.dtype == Dtype::float32 ? 4 : 2;
          const char* from = static_cast<const char*>(tile.data) + (next_row_ * tile.stride + begin) * size;
          thread_.copy(at + tile_at, from, words * size, barrier(slot));
        });
      }
    } else {
      refill_ragged(slot, at, begin, words);
    }
    if (words % step_words) {  // the last step reaches past the row's end: masked tokens
      const int end = (words + step_words - 1) / step_words * step_words;
      each_tile([&](const Tile& tile, int tile_at) { mask(tile, at + bulk(tile, tile_at, begin, words).at, words, end); });
    }
    if (++next_chunk_ == own_) {
      next_chunk_ = 0;
      next_row_ = live(next_row_ + thread_.clusters());
    }
  }

  HKDFAST_HD void refill_ragged(int slot, int at, int begin, int words) {
    if (thread_.lane() == 0) {
      int bytes = 0;
      each_tile([&](const Tile& tile, int tile_at) {
        const Bulk b = bulk(tile, tile_at, begin, words);
        bytes += static_cast<int>(b.to - b.from);
      });
      thread_.expect(barrier(slot), bytes);
      each_tile([&](const Tile& tile, int tile_at) {
        const Bulk b = bulk(tile, tile_at, begin, words);
        if (b.to > b.from)
          thread_.copy(at + b.at + static_cast<int>(b.from - b.begin), b.from, static_cast<int>(b.to - b.from), barrier(slot));
      });
    }
    each_tile([&](const Tile& tile, int tile_at) { copy_ends(tile, bulk(tile, tile_at, begin, words), at, words); });
  }

  template <class Run>
  HKDFAST_HD void each_tile(Run run) const {
    if (task_.student.data) run(task_.student, task_.plan.tile_at[0]);
    if (task_.teacher.data) run(task_.teacher, task_.plan.tile_at[1]);
    if (task_.noisy.data) run(task_.noisy, task_.plan.tile_at[2]);
  }

  ThreadContext& thread_;
  const Task& task_;
  int first_, all_warps_, own_;
  bool whole_ = true;   // every chunk of every tile is whole 16 bytes of global memory
  int word_bytes_ = 0;  // of all tiles
  int slot_ = 0;
  std::uint32_t parity_ = 0;
  std::int64_t next_row_ = 0;  // and chunk, to be loaded
  int next_chunk_ = 0;
};

}  // namespace HKDFAST_ISA
}  // namespace hkdfast
