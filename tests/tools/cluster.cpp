// The GPU's row loop on the CPU: csrc/cuda/row_loop.h with a ThreadContext of fibers, one for each thread of a cluster. Between two
// meetings of threads the scheduler picks who runs at random; copies arrive at random, late, over memory filled with NaN;
// so what relies on a missing barrier or wait goes wrong. `without` takes one of them away, to prove that.
#undef _FORTIFY_SOURCE
#include <setjmp.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/cuda/plan_binding.h"
#include "../../csrc/cuda/row_loop.h"

namespace hkdfast {
namespace generic {

struct Unmet : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void require(bool holds, const char* what) {
  if (!holds) throw Unmet(what);
}

struct Fiber {
  jmp_buf at;
  ucontext_t begun;
  std::unique_ptr<char[]> stack;
  std::function<void()> run;
  bool done = false;
};

class Scheduler {
 public:
  static constexpr std::size_t stack_bytes = 128 << 10;

  explicit Scheduler(unsigned seed) : random_(seed) {}

  void start(std::function<void()> run, bool late) {
    fibers_.emplace_back(new Fiber);
    Fiber& f = *fibers_.back();
    f.run = std::move(run);
    f.stack.reset(new char[stack_bytes]);
    getcontext(&f.begun);
    f.begun.uc_stack.ss_sp = f.stack.get(), f.begun.uc_stack.ss_size = stack_bytes;
    makecontext(&f.begun, &Scheduler::enter, 0);
    (late ? late_ : ready_).push_back(&f);
  }
  // Those that are late begin after so many turns of the arrivals.
  void begin_late(int turns) {
    later([=] {
      if (turns) return begin_late(turns - 1);
      for (Fiber* f : late_) wake(f);
      late_.clear();
    });
  }

  // Until all are done. Arrivals are things that happen at some time.
  void run() {
    current_scheduler = this;
    std::size_t live = fibers_.size();
    while (live) {
      if (!arrivals_.empty() && (ready_.empty() || random_() % 64 < std::min<std::size_t>(arrivals_.size(), 16))) {
        const std::size_t i = random_() % arrivals_.size();
        std::swap(arrivals_[i], arrivals_.back());
        const auto arrival = arrivals_.back();
        arrivals_.pop_back();
        arrival();
        continue;
      }
      require(!ready_.empty(), "all threads wait: some barrier is never met");
      const std::size_t i = random_() % ready_.size();
      std::swap(ready_[i], ready_.back());
      current_ = ready_.back();
      ready_.pop_back();
      if (!_setjmp(home_)) {
        if (current_->run)
          setcontext(&current_->begun);
        else
          _longjmp(current_->at, 1);
      }
      if (failure_) std::rethrow_exception(failure_);
      if (current_->done) --live;
    }
    while (!arrivals_.empty()) arrivals_.back()(), arrivals_.pop_back();
  }

  Fiber* current() const { return current_; }
  void wake(Fiber* f) { ready_.push_back(f); }
  void sleep() {
    if (!_setjmp(current_->at)) _longjmp(home_, 1);
  }
  void yield() {
    wake(current_);
    sleep();
  }
  void later(std::function<void()> arrival) { arrivals_.push_back(std::move(arrival)); }

 private:
  static void enter() {
    Scheduler& s = *current_scheduler;
    Fiber& f = *s.current_;
    const auto run = std::move(f.run);
    f.run = nullptr;
    try {
      run();
    } catch (...) {
      s.failure_ = std::current_exception();
    }
    f.done = true;
    _longjmp(s.home_, 1);
  }

  static Scheduler* current_scheduler;
  std::mt19937 random_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> ready_, late_;
  std::vector<std::function<void()>> arrivals_;
  std::exception_ptr failure_;
  Fiber* current_ = nullptr;
  jmp_buf home_;
};
Scheduler* Scheduler::current_scheduler;

struct Meeting {
  int expected = 0, come = 0;
  std::vector<Fiber*> waiting;

  void wait(Scheduler& s) {
    if (++come < expected) {
      waiting.push_back(s.current());
      s.sleep();
      return;
    }
    come = 0;
    for (Fiber* f : waiting) s.wake(f);
    waiting.clear();
    s.yield();
  }
};

struct Warp {
  Meeting meeting;
  double box[warp_lanes];
  int fences[warp_lanes] = {}, copies = 0;
};

struct Barrier {  // as the 8 bytes of an mbarrier whose phase takes one arrival
  std::int32_t bytes;
  std::int16_t come, phase;

  void settle() {
    if (come && bytes == 0) come = 0, phase ^= 1;
  }
};

struct Block {
  std::vector<std::uint64_t> shared;  // of the alignment that is asked for, no more: see ThreadContext::at
  Meeting meeting;
  std::vector<Warp> warps;
};

struct Cluster {
  Scheduler scheduler;
  const Task& task;
  std::string without;
  Meeting meeting;
  std::vector<Block> blocks;

  Cluster(const Task& task, unsigned seed, const std::string& without) : scheduler(seed), task(task), without(without) {
    const Plan& plan = task.plan;
    blocks.resize(plan.cluster);
    meeting.expected = plan.cluster * plan.warps * warp_lanes;
    for (Block& b : blocks) {
      b.shared.assign(plan.bytes / 8 + 3, ~0ull);  // NaN in every format
      b.meeting.expected = plan.warps * warp_lanes;
      b.warps.resize(plan.warps);
      for (Warp& w : b.warps) w.meeting.expected = warp_lanes;
    }
  }
};

class FiberThread {
 public:
  FiberThread(Cluster& all, int cluster, int clusters, int block, int warp, int lane)
      : all_(all), cluster_(cluster), clusters_(clusters), block_(block), warp_(warp), lane_(lane) {}

  int lane() const { return lane_; }
  int warp() const { return warp_; }
  int warps() const { return all_.task.plan.warps; }
  int block() const { return block_; }
  int blocks() const { return all_.task.plan.cluster; }
  int cluster() const { return cluster_; }
  int clusters() const { return clusters_; }

  template <class T>
  T& at(int offset) const {
    require(offset >= 0 && offset + static_cast<int>(sizeof(T)) <= all_.task.plan.bytes, "beyond shared memory");
    require(offset % alignof(T) == 0, "misaligned access to shared memory");
    return *reinterpret_cast<T*>(base(block_) + offset);
  }

  float largest(float x) const {
    share(x);
    for (int i = 0; i < warp_lanes; ++i) x = fmaxf(x, static_cast<float>(mine().box[i]));
    meet();
    return x;
  }
  int smallest(int x) const {
    share(x);
    for (int i = 0; i < warp_lanes; ++i) x = std::min(x, static_cast<int>(mine().box[i]));
    meet();
    return x;
  }
  float of_lane_that(bool has, float x) const {
    share(has);
    int lane = 0;
    while (lane < warp_lanes && !mine().box[lane]) ++lane;
    require(lane < warp_lanes, "no lane has it");
    meet();
    share(x);
    x = static_cast<float>(mine().box[lane]);
    meet();
    return x;
  }
  double of_lane(double x, int lane) const {
    share(x);
    x = mine().box[lane];
    meet();
    return x;
  }
  template <int count>
  void sum(double (&x)[count], const bool (&wanted)[count], int width) const {
    require(width > 0 && width <= warp_lanes && !(width & (width - 1)), "not a power of two of lanes");
    for (int i = 0; i < count; ++i)
      for (int distance = width / 2; wanted[i] && distance; distance /= 2) {
        share(x[i]);
        x[i] += mine().box[lane_ ^ distance];
        meet();
      }
  }

  void sync_warp() const { has("sync_warp") ? meet() : all_.scheduler.yield(); }
  void sync_block() const { has("sync_block") ? all_.blocks[block_].meeting.wait(all_.scheduler) : all_.scheduler.yield(); }
  void sync_cluster() const { has("sync_cluster") ? all_.meeting.wait(all_.scheduler) : all_.scheduler.yield(); }

  void send(int block, const std::uint64_t* from, int barrier) const {
    const std::int64_t offset = reinterpret_cast<const char*>(from) - base(block_);
    const std::uint64_t part = *from;
    char* const to = base(block) + offset;
    Barrier* const there = reinterpret_cast<Barrier*>(base(block) + barrier);
    all_.scheduler.later([=] {
      memcpy(to, &part, 8);
      there->bytes -= 8;
      there->settle();
    });
  }
  void expect_sends(int barrier, int bytes) const {
    Barrier& b = at<Barrier>(barrier);
    require(b.come == 0, "a reduction begun before the one before it is over");
    b.bytes += bytes, b.come = 1;
    b.settle();
  }
  void wait_for_sends(int barrier, std::uint32_t parity) const {
    if (has("wait_for_sends")) wait(barrier, parity);
  }

  void init(int barrier) const { at<Barrier>(barrier) = {0, 0, 0}; }
  void publish_barriers() const {}
  void fence_before_copies() const {
    if (has("fence")) ++mine().fences[lane_];
  }
  void expect(int barrier, int bytes) const {
    const int copies = ++mine().copies;
    for (int fences : mine().fences) require(fences >= copies, "a copy without a fence of every lane");
    Barrier& b = at<Barrier>(barrier);
    require(b.come == 0, "a slot filled twice");
    b.bytes += bytes, b.come = 1;
    b.settle();
  }
  void copy(int to, const char* from, int bytes, int barrier) const {
    require(to % 16 == 0 && reinterpret_cast<std::uintptr_t>(from) % 16 == 0 && bytes % 16 == 0 && bytes > 0,
            "a bulk copy takes whole 16 bytes");
    require(inside(all_.task.student, from, bytes) || inside(all_.task.teacher, from, bytes) ||
                inside(all_.task.noisy, from, bytes),
            "a copy from outside the tensor");
    char* const target = &at<char>(to);
    at<char>(to + bytes - 1);
    memset(target, 0xff, bytes);
    Barrier* const b = &at<Barrier>(barrier);
    all_.scheduler.later([=] {
      memcpy(target, from, bytes);
      b->bytes -= bytes;
      b->settle();
    });
  }
  void wait(int barrier, std::uint32_t parity) const {
    if (!has("wait")) return;
    for (int times = 0; static_cast<std::uint32_t>(at<Barrier>(barrier).phase) == parity; ++times) {
      require(times < 100000, "a wait that never ends");
      all_.scheduler.yield();
    }
  }

 private:
  bool has(const char* part) const { return all_.without != part; }
  char* base(int block) const {
    const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(all_.blocks[block].shared.data());
    return reinterpret_cast<char*>((begin + 15) & ~std::uintptr_t(15));
  }
  Warp& mine() const { return all_.blocks[block_].warps[warp_]; }
  void meet() const { mine().meeting.wait(all_.scheduler); }
  void share(double x) const {
    mine().box[lane_] = x;
    meet();
  }
  bool inside(const Tile& tile, const char* from, int bytes) const {
    if (!tile.data) return false;
    const char* begin = static_cast<const char*>(tile.data);
    return from >= begin && from + bytes <= begin + ((all_.task.n - 1) * tile.stride + all_.task.vocab) * size_of(tile.dtype);
  }

  Cluster& all_;
  int cluster_, clusters_, block_, warp_, lane_;
};

struct Layout {
  int blocks, warps, clusters, shared_bytes;
  unsigned seed;
  std::string without;
};

template <class Divergence>
void run(const Task& task, bool purified, const Layout& layout, Divergence divergence) {
  with_kind(task, purified, divergence, [&](auto kind, auto law) {
    for (int cluster = 0; cluster < layout.clusters; ++cluster) {
      Cluster all(task, layout.seed + cluster, layout.without);
      const int late = (layout.seed + cluster) % task.plan.cluster;  // the others may send to this block before it begins
      for (int block = 0; block < task.plan.cluster; ++block)
        for (int warp = 0; warp < task.plan.warps; ++warp)
          for (int lane = 0; lane < warp_lanes; ++lane)
            all.scheduler.start([=, &all, &layout, &task] {
              FiberThread thread(all, cluster, layout.clusters, block, warp, lane);
              RowLoop<FiberThread, Divergence, kind, law>(thread, task, divergence).rows();
            }, block == late);
      all.scheduler.begin_late(2000);
      all.scheduler.run();
    }
    return true;
  });
}

Layout layout(py::handle from) {
  Layout to;
  hkdfast::read(from, "blocks", to.blocks), hkdfast::read(from, "warps", to.warps), hkdfast::read(from, "clusters", to.clusters);
  hkdfast::read(from, "shared_bytes", to.shared_bytes), hkdfast::read(from, "seed", to.seed);
  to.without = from.attr("without").cast<std::string>();
  return to;
}

void rows(py::handle objective_, py::handle student, py::handle teacher, py::handle noisy, std::uintptr_t alpha,
          std::uintptr_t labels, std::uintptr_t weight, std::uintptr_t loss, py::handle grad, std::uintptr_t metrics,
          std::int64_t n, std::int64_t vocab, py::handle layout_) {
  const Objective o = objective(objective_);
  const Layout l = layout(layout_);
  Rows rows;
  rows.n = n, rows.vocab = vocab;
  rows.student = tile(student), rows.teacher = tile(teacher), rows.noisy = tile(noisy), rows.grad = tile(grad);
  rows.alpha = pointer<const float>(alpha), rows.labels = pointer<const std::int64_t>(labels);
  rows.weight = pointer<const float>(weight);
  rows.loss = pointer<float>(loss), rows.metrics = pointer<float>(metrics);
  Task task = task_of(o, rows);
  task.plan = plan_for(task, l.shared_bytes, l.blocks, l.warps);
  if (!task.plan.cluster) throw py::value_error("the row does not fit");
  with_divergence(o.divergence.c_str(), o.beta, [&](auto divergence) {
    run(task, o.purified, l, divergence);
  });
}

void contrast(py::handle objective_, py::handle clean, py::handle noisy, std::uintptr_t alpha, std::uintptr_t labels,
              py::handle out, std::int64_t n, std::int64_t vocab, py::handle layout_) {
  const Objective o = objective(objective_);
  const Layout l = layout(layout_);
  Rows rows;
  rows.n = n, rows.vocab = vocab;
  rows.teacher = tile(clean), rows.noisy = tile(noisy), rows.grad = tile(out);
  rows.alpha = pointer<const float>(alpha), rows.labels = pointer<const std::int64_t>(labels);
  Task task = task_of(o, rows);
  task.plan = plan_for(task, l.shared_bytes, l.blocks, l.warps);
  if (!task.plan.cluster) throw py::value_error("the row does not fit");
  run(task, true, l, Decode());
}

int longest(const py::list& tiles, int shared_bytes, int largest_cluster) {
  return longest_row(task_with(tiles, 0), shared_bytes, largest_cluster);
}

}  // namespace generic
}  // namespace hkdfast

PYBIND11_MODULE(cluster, m) {
  py::register_exception<hkdfast::generic::Unmet>(m, "Unmet");
  m.def("rows", &hkdfast::generic::rows);
  m.def("contrast", &hkdfast::generic::contrast);
  using namespace pybind11::literals;
  m.def("plan", &hkdfast::plan_of, "tiles"_a, "vocab"_a, "request"_a, "block"_a, "sm"_a, "reserved"_a,
        "largest_cluster"_a = hkdfast::max_blocks);
  m.def("longest", &hkdfast::generic::longest);
}
