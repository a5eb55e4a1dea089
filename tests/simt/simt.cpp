// The executor: fibers (ucontext), rendezvous, shuffled orders.

#include "simt.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

namespace simt {

Index thread, block, block_size, grid_size;

namespace {

constexpr size_t kStack = 256 * 1024;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kDone;
};

std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t scheduler;
const std::function<void()>* body_of_block;
uint64_t slots[32][32];
int64_t launched = 0;

std::mt19937_64& random_source() {
  static std::mt19937_64 source(std::getenv("VAEFAST_SIMT_SEED") ? std::atoll(std::getenv("VAEFAST_SIMT_SEED")) : 0);
  return source;
}

void entry() {
  (*body_of_block)();
  fibers[thread.x]->state = State::kDone;
}

void wait(State state) {
  Fiber& self = *fibers[thread.x];
  self.state = state;
  swapcontext(&self.context, &scheduler);
}

// Lets the members go on if all of them wait for the same thing.
bool release(unsigned first, unsigned last, State state) {
  for (unsigned t = first; t < last; ++t) {
    if (fibers[t]->state != state) return false;
  }
  for (unsigned t = first; t < last; ++t) fibers[t]->state = State::kReady;
  return true;
}

void run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& f = *fibers[t];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = &scheduler;
    makecontext(&f.context, entry, 0);
    f.state = State::kReady;
  }
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  for (;;) {
    std::shuffle(order.begin(), order.end(), random_source());
    bool progress = false;
    for (unsigned t : order) {
      if (fibers[t]->state != State::kReady) continue;
      thread.x = t;
      swapcontext(&scheduler, &fibers[t]->context);
      progress = true;
    }
    if (std::all_of(order.begin(), order.end(), [](unsigned t) { return fibers[t]->state == State::kDone; })) return;
    for (unsigned w = 0; w < threads; w += 32) {
      progress |= release(w, std::min(threads, w + 32), State::kAtWarpBarrier);
    }
    progress |= release(0, threads, State::kAtBlockBarrier);
    if (!progress) throw std::runtime_error("simt: a barrier that some threads of the block or warp never reach");
  }
}

}  // namespace

void block_barrier() { wait(State::kAtBlockBarrier); }
void warp_barrier() { wait(State::kAtWarpBarrier); }
uint64_t* warp_slots() { return slots[thread.x / 32]; }
int64_t launches() { return launched; }

void run(int64_t blocks, int threads, const std::function<void()>& body) {
  ++launched;
  while (fibers.size() < size_t(threads)) fibers.push_back(std::make_unique<Fiber>());
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
