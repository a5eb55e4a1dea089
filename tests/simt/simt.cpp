// The executor: fibers that AddressSanitizer is told of, rendezvous, drawn orders, the log of launches.

#include "simt.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

Index thread, block, block_size, grid_size;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr unsigned kWarp = 32, kMaxWarps = 32;

// Where to go on: for __builtin_setjmp, which unlike swapcontext makes no system call, and which AddressSanitizer does
// not take for the end of all that is on the stack.
using Place = void* [5];

struct Fiber {
  Place place;
  ucontext_t start;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  unsigned shuffles = 0;
};

// The threads that can run, and how many wait for the others.
struct Warp {
  std::vector<unsigned> ready;
  unsigned first = 0, threads = 0, waiting = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
unsigned waiting_in_block, finished;
Place scheduler;
const void* scheduler_stack;
size_t scheduler_stack_size;
const std::function<void()>* body_of_block;
uint64_t slots[kMaxWarps][2][kWarp];
std::string log_of_launches;

std::mt19937_64& random_source() {
  static std::mt19937_64 source(std::getenv("VAEFAST_SIMT_SEED") ? std::atoll(std::getenv("VAEFAST_SIMT_SEED")) : 0);
  return source;
}

size_t draw(size_t limit) { return random_source()() % limit; }

// noipa: the two must not be in one function, nor the compiler see through the call
[[gnu::noipa]] void go_to(Place& to) { __builtin_longjmp(to, 1); }

[[gnu::noinline]] void jump(Place& from, Place& to) {
  if (__builtin_setjmp(from) == 0) go_to(to);
}

[[gnu::noinline]] void begin(Place& from, Fiber& f) {
  f.started = true;
  if (__builtin_setjmp(from) == 0) setcontext(&f.start);
}

void resume(Fiber& f) {
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, f.stack.get(), kStack);
  f.started ? jump(scheduler, f.place) : begin(scheduler, f);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void suspend() {
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, scheduler_stack, scheduler_stack_size);
  jump(fibers[thread.x]->place, scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_size);
}

// A fiber serves thread after thread: making one anew costs more than most threads do.
void entry() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  for (;;) {
    (*body_of_block)();
    ++finished;
    suspend();
  }
}

std::unique_ptr<Fiber> new_fiber() {
  auto f = std::make_unique<Fiber>();
  getcontext(&f->start);
  f->start.uc_stack.ss_sp = f->stack.get();
  f->start.uc_stack.ss_size = kStack;
  f->start.uc_link = nullptr;
  makecontext(&f->start, entry, 0);
  return f;
}

void let_go(Warp& w) {
  w.waiting = 0;
  for (unsigned t = 0; t < w.threads; ++t) w.ready.push_back(w.first + t);
}

// Any warp that can run; or, with an order to keep, the first in it, which so gets as far ahead of the others as the
// barriers allow.
Warp* choose(const std::vector<unsigned>& order, bool keep) {
  const size_t shift = keep ? 0 : draw(order.size());
  for (size_t k = 0; k < order.size(); ++k) {
    Warp& w = warps[order[(k + shift) % order.size()]];
    if (!w.ready.empty()) return &w;
  }
  return nullptr;
}

void run_block(unsigned threads) {
  warps.assign((threads + kWarp - 1) / kWarp, {});
  for (unsigned w = 0; w < warps.size(); ++w) {
    warps[w].first = w * kWarp;
    warps[w].threads = std::min(kWarp, threads - w * kWarp);
    let_go(warps[w]);
  }
  waiting_in_block = finished = 0;
  std::vector<unsigned> order(warps.size());
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_source());
  const bool keep = draw(2) == 0;
  while (Warp* w = choose(order, keep)) {
    std::swap(w->ready[draw(w->ready.size())], w->ready.back());
    thread.x = w->ready.back();
    w->ready.pop_back();
    resume(*fibers[thread.x]);
    if (w->waiting == w->threads) let_go(*w);
    if (waiting_in_block == threads) {
      waiting_in_block = 0;
      for (Warp& each : warps) let_go(each);
    }
  }
  if (finished == threads) return;
  fibers.clear();
  throw std::runtime_error("simt: a barrier that some threads of the block or warp never reach");
}

std::string name_of(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "?";
  std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr),
                                              std::free);
  return name ? name.get() : info.dli_sname;
}

}  // namespace

void block_barrier() {
  ++waiting_in_block;
  suspend();
}

void warp_barrier() {
  ++warps[thread.x / kWarp].waiting;
  suspend();
}

uint64_t* warp_slots() { return slots[thread.x / kWarp][fibers[thread.x]->shuffles++ % 2]; }

void run(const void* kernel, int64_t blocks, int threads, const std::function<void()>& body) {
  log_of_launches += std::to_string(blocks) + " " + std::to_string(threads) + " " + name_of(kernel) + "\n";
  while (fibers.size() < size_t(threads)) fibers.push_back(new_fiber());
  for (auto& fiber : fibers) fiber->shuffles = 0;
  body_of_block = &body;
  block_size.x = unsigned(threads);
  grid_size.x = unsigned(blocks);
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), int64_t(0));
  std::shuffle(order.begin(), order.end(), random_source());
  for (int64_t b : order) {
    block.x = unsigned(b);
    run_block(unsigned(threads));
  }
}

}  // namespace simt

// For Python: a line a launch since the log was cleared, "blocks threads kernel".
extern "C" const char* simt_log() { return simt::log_of_launches.c_str(); }
extern "C" void simt_clear_log() { simt::log_of_launches.clear(); }
