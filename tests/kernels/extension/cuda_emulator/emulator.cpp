#include "emulator.h"

#include <cstdlib>
#include <memory>
#include <stdexcept>

namespace emulator {

Fiber* current = nullptr;
dim3 block, grid, threads;

namespace {

constexpr size_t STACK = 256 * 1024;
constexpr int GUARD = 256;  // bytes after the shared memory that must stay as they are
constexpr unsigned char POISON = 0xff;

std::vector<unsigned char> shared;
unsigned char* p_shared = nullptr;
int64_t shared_bytes = 0;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<std::unique_ptr<unsigned char[]>> stacks;
std::vector<Warp> warps;
unsigned block_generation = 0, block_arrived = 0, alive = 0;
std::function<void()> body;
jmp_buf scheduler;
const char* running = "";
// What hardware leaves open goes one way in some blocks and the other way in others.
bool backwards = false;  // from the last warp and lane to the first
bool eager = false;      // cp.async arrives at once, not when it is waited for
unsigned blocks_run = 0;

void arrive(const Copy& copy) {
  std::memset(copy.to, 0, copy.size);
  std::memcpy(copy.to, copy.from, copy.bytes);
}

// A fiber's life: a thread of every block that is run, again and again.
void enter() {
  for (;;) {
    body();
    current->done = true;
    if (_setjmp(current->state) == 0) _longjmp(scheduler, 1);
  }
}

void suspend(const unsigned* generation) {
  current->waits_for = generation;
  current->seen = *generation;
  if (_setjmp(current->state) == 0) _longjmp(scheduler, 1);
}

// Until it waits or ends.
void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

bool ready(const Fiber& fiber) {
  return !fiber.done && (fiber.waits_for == nullptr || *fiber.waits_for != fiber.seen);
}

void check_shared(const void* p, int bytes, const char* what) {
  const unsigned char* address = static_cast<const unsigned char*>(p);
  if (address < p_shared || address + bytes > p_shared + shared_bytes)
    fail(std::string(what) + " outside of the shared memory");
  if ((address - p_shared) % bytes != 0)
    fail(std::string(what) + " of " + std::to_string(bytes) + " bytes is not aligned");
}

void run_block(int count) {
  for (auto& warp : warps) warp = Warp();
  block_arrived = 0;
  alive = count;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.index = dim3(i, 0, 0);
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.pending.clear();
    fiber.groups.clear();
  }
  while (alive > 0) {
    bool any = false;
    for (int w = 0; w < count / 32; ++w) {
      const int warp = backwards ? count / 32 - 1 - w : w;
      for (bool again = true; again;) {
        again = false;
        for (int l = 0; l < 32; ++l) {
          Fiber& fiber = *fibers[warp * 32 + (backwards ? 31 - l : l)];
          if (!ready(fiber)) continue;
          fiber.waits_for = nullptr;
          resume(fiber);
          any = again = true;
          if (fiber.done) --alive;
        }
      }
    }
    if (!any) fail("every thread waits for another one");
  }
}

float half_of(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}

float bfloat16_of(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

float toward_zero(double x) {
  const float rounded = static_cast<float>(x);
  return std::fabs(rounded) > std::fabs(x) ? std::nextafterf(rounded, 0.0f) : rounded;
}

// mma.m16n8k16 as PTX's documentation gives it, element by element: a_i, b_i and c_i of a lane are
// numbered from the low half of the first register on. The products are added at once, and the sum
// is truncated, as tensor cores do.
void multiply(Warp& warp, float (*number)(uint16_t)) {
  static float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    const uint32_t* in = warp.in[lane];
    for (int i = 0; i < 8; ++i) {
      const uint16_t bits = static_cast<uint16_t>(in[i / 2] >> (i % 2 * 16));
      const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
      const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[row][column] = number(bits);
    }
    for (int i = 0; i < 4; ++i) {
      const uint16_t bits = static_cast<uint16_t>(in[4 + i / 2] >> (i % 2 * 16));
      b[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = number(bits);
    }
    for (int i = 0; i < 4; ++i)
      std::memcpy(&c[i < 2 ? group : group + 8][in_group * 2 + (i & 1)], in + 6 + i, 4);
  }
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      double sum = c[row][column];
      for (int k = 0; k < 16; ++k) sum += double{a[row][k]} * b[k][column];
      c[row][column] = toward_zero(sum);
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      std::memcpy(&warp.out[lane][i], &c[(lane >> 2) + (i < 2 ? 0 : 8)][lane % 4 * 2 + (i & 1)], 4);
}

uint16_t element(const void* p_row, int column) {
  uint16_t x;
  std::memcpy(&x, static_cast<const unsigned char*>(p_row) + 2 * column, 2);
  return x;
}

void read_matrices(Warp& warp, bool transposed) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      uint32_t both[2];
      for (int j = 0; j < 2; ++j) {
        const int row = transposed ? lane % 4 * 2 + j : lane / 4;
        const int column = transposed ? lane / 4 : lane % 4 * 2 + j;
        both[j] = element(warp.rows[8 * i + row], column);
      }
      warp.out[lane][i] = both[0] | both[1] << 16;
    }
}

void exchange(Warp& warp) {
  for (int lane = 0; lane < 32; ++lane)
    warp.out[lane][0] = warp.in[lane ^ static_cast<int>(warp.in[lane][1])][0];
}

}  // namespace

void fail(const std::string& what) {
  // An exception cannot leave a fiber.
  std::fprintf(stderr, "%s, block %u %u, thread %u: %s\n", running, block.x, block.y,
               current == nullptr ? 0 : current->index.x, what.c_str());
  std::abort();
}

void multiply_half(Warp& warp) { multiply(warp, half_of); }
void multiply_bfloat16(Warp& warp) { multiply(warp, bfloat16_of); }

const char* last_kernel() { return running; }
unsigned char* shared_memory() { return p_shared; }
Warp& warp_of_current() { return warps[current->index.x / 32]; }
int lane_of_current() { return current->index.x % 32; }

void meet(const char* kind, void (*compute)(Warp&)) {
  Warp& warp = warp_of_current();
  if (warp.arrived == 0) warp.kind = kind;
  if (std::strcmp(warp.kind, kind) != 0)
    fail(std::string("one lane is at ") + kind + ", another one at " + warp.kind);
  if (++warp.arrived < 32) return suspend(&warp.generation);
  warp.arrived = 0;
  ++warp.generation;
  if (compute != nullptr) compute(warp);
}

void block_barrier() {
  if (++block_arrived < threads.x) return suspend(&block_generation);
  block_arrived = 0;
  ++block_generation;
}

void copy_async(void* to, const void* from, int size, int bytes) {
  check_shared(to, size, "cp.async");
  if (reinterpret_cast<uintptr_t>(from) % size != 0) fail("cp.async from an unaligned address");
  if (bytes < 0 || bytes > size) fail("cp.async of " + std::to_string(bytes) + " bytes");
  const Copy copy{to, from, size, bytes};
  if (eager) return arrive(copy);
  current->pending.push_back(copy);
}

void copy_commit() {
  current->groups.push_back(std::move(current->pending));
  current->pending.clear();
}

void copy_wait(int pending) {
  auto& groups = current->groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : groups.front()) arrive(copy);
    groups.erase(groups.begin());
  }
}

void ldmatrix_x4(uint32_t (&r)[4], const void* p_row, bool transposed) {
  check_shared(p_row, 16, "ldmatrix");
  Warp& warp = warp_of_current();
  warp.rows[lane_of_current()] = p_row;
  if (transposed) {
    meet("ldmatrix.trans", [](Warp& w) { read_matrices(w, true); });
  } else {
    meet("ldmatrix", [](Warp& w) { read_matrices(w, false); });
  }
  std::memcpy(r, warp.out[lane_of_current()], 16);
}

void run(
    const char* name, dim3 blocks, int count, int64_t bytes, std::function<void()> kernel) {
  running = name;
  if (blocks.x == 0 || blocks.y == 0 || blocks.y > 65535 || count < 32 || count > 1024 ||
      count % 32 != 0)
    throw std::runtime_error(std::string(name) + ": no GPU would launch this grid");
  grid = blocks;
  threads = dim3(count);
  body = std::move(kernel);
  warps.resize(count / 32);
  while (fibers.size() < static_cast<size_t>(count)) {
    stacks.emplace_back(new unsigned char[STACK]);
    fibers.push_back(std::make_unique<Fiber>());
    ucontext_t& start = fibers.back()->start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks.back().get();
    start.uc_stack.ss_size = STACK;
    makecontext(&start, enter, 0);
  }
  shared.resize(bytes + GUARD + 128);
  p_shared = shared.data() + (128 - reinterpret_cast<uintptr_t>(shared.data()) % 128);
  shared_bytes = bytes;
  for (unsigned y = 0; y < blocks.y; ++y)
    for (unsigned x = 0; x < blocks.x; ++x) {
      block = dim3(x, y, 0);
      std::fill(shared.begin(), shared.end(), POISON);
      backwards = blocks_run % 2 == 1;
      eager = blocks_run / 2 % 2 == 1;
      ++blocks_run;
      run_block(count);
      current = nullptr;
      for (const unsigned char* p = p_shared + bytes; p < shared.data() + shared.size(); ++p)
        if (*p != POISON) fail("wrote after the end of the shared memory");
    }
}

}  // namespace emulator

template <typename T>
static T shuffle(unsigned mask, T x, int bit) {
  using namespace emulator;
  if (mask != 0xffffffffu) fail("a shuffle among a part of the warp");
  Warp& warp = warp_of_current();
  std::memcpy(&warp.in[lane_of_current()][0], &x, 4);
  warp.in[lane_of_current()][1] = static_cast<uint32_t>(bit);
  meet("shuffle", exchange);
  std::memcpy(&x, &warp.out[lane_of_current()][0], 4);
  return x;
}

float __shfl_xor_sync(unsigned mask, float x, int bit) { return shuffle(mask, x, bit); }
int __shfl_xor_sync(unsigned mask, int x, int bit) { return shuffle(mask, x, bit); }
