// Runs translated kernels: every thread of a block is a fiber, one block at a time. And the CUDA runtime that the
// program is linked with in place of NVIDIA's: a launch looks the kernel up by its name and runs it to its end.
#include "ptxrun.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "runtime.h"

#ifdef PTXRUN_COUNT
#define PTXRUN_COUNTING(...) __VA_ARGS__
#else
#define PTXRUN_COUNTING(...)
#endif

namespace ptx {

Now now;
bool races;
Settings settings;
std::map<std::string, int64_t> launches;
Work work;
bool leave_out;  // launches of kernels that are not translated do nothing

namespace {

struct Kernel {
  void (*body)();
  int param_bytes, most_threads;
};
std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

// ---- Fibers (x86-64, System V): what a call preserves is pushed, the stacks are exchanged.

extern "C" void ptxrun_switch(void** save, void* load);
asm(R"(
.text
.hidden ptxrun_switch
.globl ptxrun_switch
.type ptxrun_switch, @function
ptxrun_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ptxrun_switch, .-ptxrun_switch
)");

struct Copy {
  uint64_t to, from;
  unsigned size, valid;
  int line;
};

enum State { kReady, kAtWarp, kAtBlock, kDone };

struct Thread {
  void* stack_pointer;
  State state;
  uint32_t tid[3];
  Meeting* meeting;
  std::vector<std::vector<Copy>> groups;  // of copies under way, the oldest first
  std::vector<Copy> open;                 // issued, in no group yet
};

constexpr size_t kStack = 256 << 10;  // with an unmapped page below
constexpr int kMostThreads = 1024;
char* stacks;
void* scheduler_stack;
Thread* threads;  // [kMostThreads]
int thread_count;
int running;  // its index
const Kernel* current;
const char* current_name;
std::string error;  // of the launch; the last one is also what cudaGetErrorString says

[[noreturn]] void leave() {
  void* ignored;
  ptxrun_switch(&ignored, scheduler_stack);
  __builtin_unreachable();
}

extern "C" void ptxrun_thread() {
  current->body();
  Thread& me = threads[running];
  if (!me.open.empty() || !me.groups.empty()) fail(0, "a copy is still under way when its thread ends");
  me.state = kDone;
  leave();
}

void resume(int index) {
  Thread& t = threads[index];
  running = index;
  std::copy(t.tid, t.tid + 3, now.tid);
  now.laneid = index % 32;
  PTXRUN_COUNTING(counts::resume(index % 32));
  ptxrun_switch(&scheduler_stack, t.stack_pointer);
  PTXRUN_COUNTING(counts::suspend(index % 32));
}

void start(int index) {
  Thread& t = threads[index];
  uint64_t* top = reinterpret_cast<uint64_t*>(stacks + (index + 1) * kStack);
  *--top = 0;  // a return address for ptxrun_thread, so that its frame is aligned
  *--top = reinterpret_cast<uint64_t>(&ptxrun_thread);
  for (int i = 0; i < 6; ++i) *--top = 0;
  t.stack_pointer = top;
  t.state = kReady;
  t.meeting = nullptr;
  t.groups.clear();
  t.open.clear();
}

void wait(State state, Meeting& mine) {
  Thread& me = threads[running];
  me.state = state;
  me.meeting = &mine;
  ptxrun_switch(&me.stack_pointer, scheduler_stack);
}

const char* name_of(int operation) {
  static const char* const names[] = {"bar.sync",  "bar.red.popc",   "bar.red.or", "bar.red.and", "vote.ballot",
                                      "vote.any",  "vote.all",       "redux.or",   "redux.and",   "redux.xor",
                                      "redux.add", "redux.min",      "redux.max",  "redux.min",   "redux.max",
                                      "shfl.up",   "shfl.down",      "shfl.bfly",  "shfl.idx",    "bar.warp.sync",
                                      "ldmatrix",  "ldmatrix.trans", "mma bf16",   "mma f16",     "mma tf32"};
  return names[operation];
}

void report(const std::string& text) {
  if (!error.empty()) return;
  error = std::string("ptxrun: kernel ") + current_name + ", block " + std::to_string(now.ctaid[0]) + "," +
          std::to_string(now.ctaid[1]) + "," + std::to_string(now.ctaid[2]) + ": " + text;
}

// ---- Races in shared memory: who has last written and read each byte, and when, in numbers of barriers

struct Shadow {
  uint32_t write_time, read_time;
  int32_t write_line, read_line;
  uint8_t write_warp, read_warp, several, atomic;  // several: warps have read it at that time
};
std::vector<Shadow> shadow;
uint32_t barriers = 1;

bool is_race(uint64_t offset, unsigned size, int access, int by, int line) {
  const uint8_t warp = static_cast<uint8_t>(by);
  for (uint64_t i = offset; i < offset + size; ++i) {
    Shadow& s = shadow[i];
    const bool written = s.write_time == barriers && s.write_warp != warp && !(access == kAtomic && s.atomic);
    const bool read = access != kRead && s.read_time == barriers && (s.several || s.read_warp != warp);
    if (written || read) {
      report("a race: byte " + std::to_string(i) + " of shared memory is " + (access == kRead ? "read" : "written") +
             " by warp " + std::to_string(warp) + " in PTX line " + std::to_string(line) + " and was " +
             (written ? "written" : "read") + " by " + (!written && s.several ? "several warps, the last one " : "") +
             "warp " + std::to_string(written ? s.write_warp : s.read_warp) + " in line " +
             std::to_string(written ? s.write_line : s.read_line) + ", with no barrier between");
      return true;
    }
    if (access == kRead) {
      s.several = s.read_time == barriers && (s.several || s.read_warp != warp);
      s.read_time = barriers, s.read_warp = warp, s.read_line = line;
    } else {
      s.write_time = barriers, s.write_warp = warp, s.write_line = line, s.atomic = access == kAtomic;
    }
  }
  return false;
}

// ---- Matrix products

float exact_sum(const double* products, int n, float c) {
  // Products of 11-bit numbers are exact in double; their sum is rounded to double, then to float.
  double sum = c;
  for (int k = 0; k < n; ++k) sum += products[k];
  return static_cast<float>(sum);
}

// As published for the tensor cores (a model, not NVIDIA's word): products exact; they and the sum so far are cut,
// toward zero, to `fraction` bits below the largest exponent among them (of products as they come, in [1, 4)), added
// exactly, and the sum is cut to float.
float cut_sum(const double* products, const int* exponents, int n, float c, int fraction) {
  int largest = -100000;
  for (int k = 0; k < n; ++k)
    if (products[k] != 0) largest = std::max(largest, exponents[k]);
  if (c != 0) largest = std::max(largest, std::max(std::ilogb(c), -126));
  if (largest == -100000) return c + static_cast<float>(std::accumulate(products, products + n, 0.));
  int64_t sum = 0;
  for (int k = 0; k < n; ++k) sum += static_cast<int64_t>(std::ldexp(products[k], fraction - largest));
  sum += static_cast<int64_t>(std::ldexp(static_cast<double>(c), fraction - largest));
  const double value = std::ldexp(static_cast<double>(sum), largest - fraction);
  float out = static_cast<float>(value);
  if (std::fabs(static_cast<double>(out)) > std::fabs(value)) out = std::nextafter(out, 0.f);
  return out;
}

int exponent_of(float x, int least) { return x == 0 ? -100000 : std::max(std::ilogb(x), least); }

void multiply(Meeting* const* lanes, Together kind) {
  PTXRUN_COUNTING(if (counts::skips_products()) {
    for (int lane = 0; lane < 32; ++lane) std::copy(lanes[lane]->in + 6, lanes[lane]->in + 10, lanes[lane]->out);
    return;
  });
  const int inner = kind == kTf32 ? 8 : 16;
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t* in = lanes[lane]->in;
    const int group = lane >> 2, in_group = lane % 4;
    if (kind == kTf32) {
      const auto value = [](uint32_t x) { return bits<float>(x & 0xffffe000); };
      for (int i = 0; i < 4; ++i) a[group + (i & 1) * 8][in_group + (i >> 1) * 4] = value(in[i]);
      for (int i = 0; i < 2; ++i) b[in_group + i * 4][group] = value(in[4 + i]);
    } else {
      const auto value = [&](uint32_t pair, int half) {
        const uint16_t x = static_cast<uint16_t>(half ? pair >> 16 : pair);
        return kind == kHalf ? from_f16(x) : from_bf16(x);
      };
      for (int i = 0; i < 8; ++i) {
        const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
        const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        a[row][column] = value(in[i / 2], i & 1);
      }
      for (int i = 0; i < 4; ++i) b[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = value(in[4 + i / 2], i & 1);
    }
    for (int i = 0; i < 4; ++i) c[group + (i >= 2 ? 8 : 0)][in_group * 2 + (i & 1)] = bits<float>(in[6 + i]);
  }
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      double products[16];
      int exponents[16];
      bool finite = std::isfinite(c[row][column]);
      for (int k = 0; k < inner; ++k) {
        products[k] = static_cast<double>(a[row][k]) * b[k][column];
        finite = finite && std::isfinite(products[k]);
      }
      float sum = c[row][column];
      if (settings.mma == kFloat || !finite) {
        for (int k = 0; k < inner; ++k) sum = static_cast<float>(sum + products[k]);
      } else if (settings.mma == kExact) {
        sum = exact_sum(products, inner, sum);
      } else {
        const int least = kind == kHalf ? -14 : -126;  // subnormal numbers have the exponent of the smallest normal one
        for (int k = 0; k < inner; ++k) exponents[k] = exponent_of(a[row][k], least) + exponent_of(b[k][column], least);
        // products at once, and bits below the largest exponent: A100, H100
        const bool hopper = settings.architecture >= 90;
        const int step = (hopper ? 16 : 8) / (kind == kTf32 ? 2 : 1), fraction = hopper ? 25 : 24;
        for (int k = 0; k < inner; k += step) sum = cut_sum(products + k, exponents + k, step, sum, fraction);
      }
      c[row][column] = sum;
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      lanes[lane]->out[i] = bits<uint32_t>(c[(lane >> 2) + (i >= 2 ? 8 : 0)][lane % 4 * 2 + (i & 1)]);
}

// ---- Warps

// Does what the lanes of the mask have met for. lanes[i] is null where lane i takes no part.
void perform(Meeting* const* lanes, uint32_t mask, int first) {
  Meeting* const any = lanes[__builtin_ctz(mask)];
  const auto each = [&](auto f) {
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) f(i, *lanes[i]);
  };
  switch (any->operation) {
    case kWarp:
      break;
    case kBallot:
    case kAny:
    case kAll: {
      uint32_t ballot = 0;
      each([&](int i, Meeting& m) { ballot |= (m.in[0] & 1) << i; });
      const uint32_t result = any->operation == kBallot ? ballot
                              : any->operation == kAny  ? ballot != 0
                                                        : ballot == mask;
      each([&](int, Meeting& m) { m.out[0] = result; });
      break;
    }
    case kReduxOr:
    case kReduxAnd:
    case kReduxXor:
    case kReduxAdd:
    case kReduxMin:
    case kReduxMax:
    case kReduxMinSigned:
    case kReduxMaxSigned: {
      uint32_t result = any->in[0];
      each([&](int, Meeting& m) {
        if (&m == any) return;
        const uint32_t x = m.in[0];
        const int32_t s = static_cast<int32_t>(x), r = static_cast<int32_t>(result);
        switch (any->operation) {
          case kReduxOr:
            result |= x;
            break;
          case kReduxAnd:
            result &= x;
            break;
          case kReduxXor:
            result ^= x;
            break;
          case kReduxAdd:
            result += x;
            break;
          case kReduxMin:
            result = std::min(result, x);
            break;
          case kReduxMax:
            result = std::max(result, x);
            break;
          case kReduxMinSigned:
            result = static_cast<uint32_t>(std::min(r, s));
            break;
          default:
            result = static_cast<uint32_t>(std::max(r, s));
        }
      });
      each([&](int, Meeting& m) { m.out[0] = result; });
      break;
    }
    case kUp:
    case kDown:
    case kBfly:
    case kIdx:
      each([&](int i, Meeting& m) {
        const int b = m.in[1] & 31, c = m.in[2] & 31, segment = m.in[2] >> 8 & 31;
        const int most = (i & segment) | (c & ~segment), least = i & segment;
        int from;
        bool valid;
        switch (m.operation) {
          case kUp:
            from = i - b, valid = from >= most;
            break;
          case kDown:
            from = i + b, valid = from <= most;
            break;
          case kBfly:
            from = i ^ b, valid = from <= most;
            break;
          default:
            from = least | (b & ~segment), valid = from <= most;
        }
        if (!valid) from = i;
        if (!(mask >> from & 1))
          return report("PTX line " + std::to_string(m.line) + ": lane " + std::to_string(i) + " takes from lane " +
                        std::to_string(from) + ", which is not in the mask");
        m.out[0] = lanes[from]->in[0];
        m.out[1] = valid;
      });
      break;
    case kLdmatrix:
    case kLdmatrixTrans: {
      const int count = static_cast<int>(any->in[0]);
      const unsigned char* rows[32] = {};
      for (int i = 0; i < 8 * count; ++i) {
        const uint64_t address = lanes[i]->in[1], offset = address - kSharedBase;
        if (address % 16 != 0 || address < kSharedBase || offset + 16 > now.shared_end - now.shared)
          return report("PTX line " + std::to_string(any->line) + ": ldmatrix row of lane " + std::to_string(i) +
                        " at shared offset " + std::to_string(static_cast<int64_t>(offset)));
        rows[i] = reinterpret_cast<const unsigned char*>(now.shared + offset);
        if (races && is_race(offset, 16, kRead, (first + i) / 32, any->line)) return;
      }
      for (int i = 0; i < 32; ++i)
        for (int n = 0; n < count; ++n)
          if (any->operation == kLdmatrix) {
            memcpy(&lanes[i]->out[n], rows[8 * n + i / 4] + i % 4 * 4, 4);
          } else {
            uint16_t pair[2];
            memcpy(&pair[0], rows[8 * n + i % 4 * 2] + i / 4 * 2, 2);
            memcpy(&pair[1], rows[8 * n + i % 4 * 2 + 1] + i / 4 * 2, 2);
            memcpy(&lanes[i]->out[n], pair, 4);
          }
      break;
    }
    default:
      multiply(lanes, static_cast<Together>(any->operation));
  }
}

std::string where(int index) {
  const Thread& t = threads[index];
  const char* const states[] = {"ready", "at", "at", "at its end"};
  std::string text = "thread " + std::to_string(index) + " is " + states[t.state];
  if (t.state == kAtWarp || t.state == kAtBlock)
    text += std::string(" ") + name_of(t.meeting->operation) + " in PTX line " + std::to_string(t.meeting->line);
  return text;
}

std::vector<int> order(int n, uint64_t salt) {
  std::vector<int> out(n);
  std::iota(out.begin(), out.end(), 0);
  if (settings.seed == 1) std::reverse(out.begin(), out.end());
  if (settings.seed > 1) {
    std::mt19937_64 random(settings.seed * 0x9e3779b97f4a7c15ull + salt);
    std::shuffle(out.begin(), out.end(), random);
  }
  return out;
}

// Runs a warp until all of its threads are at a barrier of the block or at their end.
void run_warp(int first, int lanes, const std::vector<int>& lane_order) {
  for (;;) {
    for (int lane : lane_order) {
      if (lane >= lanes || threads[first + lane].state != kReady) continue;
      resume(first + lane);
      if (!error.empty()) return;
    }
    bool progress = false, waiting = false;
    for (int i = 0; i < lanes && !progress; ++i) {
      Thread& t = threads[first + i];
      if (t.state != kAtWarp) continue;
      waiting = true;
      const Meeting& m = *t.meeting;
      if (!(m.mask >> i & 1)) return report("the mask leaves out its own lane: " + where(first + i));
      Meeting* all[32] = {};
      bool complete = true;
      for (int j = 0; j < 32 && complete; ++j)
        if (m.mask >> j & 1) {
          if (j >= lanes) return report("the mask names a lane that does not exist: " + where(first + i));
          Thread& other = threads[first + j];
          complete = other.state == kAtWarp && other.meeting->operation == m.operation && other.meeting->mask == m.mask;
          if (complete && m.aligned && other.meeting->line != m.line)
            return report("an aligned instruction is met in two places: " + where(first + i) + ", " + where(first + j));
          all[j] = other.meeting;
        }
      if (!complete) continue;
      perform(all, m.mask, first);
      if (!error.empty()) return;
      const uint32_t mask = m.mask;
      PTXRUN_COUNTING(if (__builtin_popcount(mask) == lanes) counts::fold(first, lanes));
      for (int j = 0; j < lanes; ++j)
        if (mask >> j & 1) threads[first + j].state = kReady;
      progress = true;
    }
    if (progress) continue;
    if (!waiting) {
      PTXRUN_COUNTING(counts::fold(first, lanes));
      return;
    }
    std::string text = "a warp waits for lanes that do not come";
    int shown = 0;
    for (int i = 0; i < lanes && shown < 4; ++i)
      if (i == 0 || where(first + i).substr(8) != where(first + i - 1).substr(8))
        text += "; " + where(first + i), ++shown;
    return report(text);
  }
}

void run_block(uint64_t number) {
  ++barriers;
  for (int i = 0; i < thread_count; ++i) start(i);
  const int warps = (thread_count + 31) / 32;
  for (uint64_t phase = 0;; ++phase) {
    const std::vector<int> warp_order = order(warps, number * 1000003 + phase * 2);
    const std::vector<int> lane_order = order(32, number * 1000003 + phase * 2 + 1);
    for (int w : warp_order) {
      run_warp(32 * w, std::min(32, thread_count - 32 * w), lane_order);
      if (!error.empty()) return;
    }
    int at_end = 0;
    for (int i = 0; i < thread_count; ++i) at_end += threads[i].state == kDone;
    if (at_end == thread_count) return;
    uint32_t count = 0;
    const Meeting* first = nullptr;
    int first_index = 0;
    for (int i = 0; i < thread_count; ++i) {
      if (threads[i].state == kDone) {
        for (int j = 0; j < thread_count; ++j)
          if (threads[j].state == kAtBlock)
            return report("a barrier that some threads do not reach: " + where(i) + ", " + where(j));
      }
      const Meeting& m = *threads[i].meeting;
      if (!first) first = &m, first_index = i;
      if (m.operation != first->operation || m.in[0] != first->in[0])
        return report("two barriers at once: " + where(first_index) + ", " + where(i));
      if (m.line != threads[i / 32 * 32].meeting->line)
        return report("one warp at a barrier in two places: " + where(i / 32 * 32) + ", " + where(i));
      count += m.in[1] != 0;
    }
    if (first->in[0] > 15) return report("barrier " + std::to_string(first->in[0]));
    const uint32_t result = first->operation == kPopc  ? count
                            : first->operation == kOr  ? count > 0
                            : first->operation == kAnd ? count == static_cast<uint32_t>(thread_count)
                                                       : 0;
    ++barriers;
    for (int i = 0; i < thread_count; ++i) {
      threads[i].meeting->out[0] = result;
      threads[i].state = kReady;
    }
  }
}

// Shared memory ends where its mapping ends: a read or a write through a plain pointer behind it cannot pass unseen,
// nor one before it, by the checks of every access.
constexpr size_t kMostShared = 256 << 10;
constexpr size_t kMostParam = 32 << 10;
unsigned char* arena;  // parameters, a gap, shared memory, a gap

void prepare_memory() {
  if (arena) return;
  const auto map = [](size_t size) {
    void* const at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) abort();
    return static_cast<char*>(at);
  };
  arena = reinterpret_cast<unsigned char*>(map(kMostParam + kMostShared + (128 << 10)));
  stacks = map(kStack * kMostThreads);
  for (int i = 0; i < kMostThreads; ++i) mprotect(stacks + i * kStack, 4096, PROT_NONE);
  threads = new Thread[kMostThreads];
  now.reserved = reinterpret_cast<uint64_t>(arena);
  now.reserved_end = now.reserved + kMostParam + kMostShared + (128 << 10);
}

}  // namespace

Entry::Entry(const char* name, void (*body)(), int param_bytes, int most_threads) {
  kernels()[name] = {body, param_bytes, most_threads};
}

void fail(int line, const char* format, ...) {
  char text[500];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  report("thread " + std::to_string(running) + ", PTX line " + std::to_string(line) + ": " + text);
  leave();
}

void fail_access(uint64_t address, unsigned size, const char* space, bool write, int line) {
  const bool shared = strncmp(space, "shared", 6) == 0;
  fail(line, "%s of %u bytes at %s address %lld (shared memory has %lld bytes from %lld; parameters %lld from %lld)%s",
       write ? "write" : "read", size, space, static_cast<long long>(shared ? address - kSharedBase : address),
       static_cast<long long>(now.shared_end - now.shared), static_cast<long long>(shared ? 0 : now.shared),
       static_cast<long long>(now.param_end - now.param), static_cast<long long>(now.param),
       size && address % size ? ": not aligned" : "");
}

void note_access(uint64_t offset, unsigned size, int access, int line) {
  if (is_race(offset, size, access, running / 32, line)) leave();
}

void meet_warp(Meeting& mine) { wait(kAtWarp, mine); }
void meet_block(Meeting& mine) { wait(kAtBlock, mine); }

// A copy happens when its thread waits for it. Until then its target holds 0xFF.
void copy_issue(uint64_t to, uint64_t from, unsigned size, unsigned valid, int line) {
  memset(reinterpret_cast<void*>(to), 0xff, size);
  threads[running].open.push_back({to, from, size, valid, line});
}
void copy_commit() {
  Thread& me = threads[running];
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}
void copy_wait(unsigned pending) {
  Thread& me = threads[running];
  const size_t done = me.groups.size() > pending ? me.groups.size() - pending : 0;
  for (size_t i = 0; i < done; ++i)
    for (const Copy& c : me.groups[i]) {
      if (races) note_access(c.to - now.shared, c.size, kWrite, c.line);
      memcpy(reinterpret_cast<void*>(c.to), reinterpret_cast<const void*>(c.from), c.valid);
      memset(reinterpret_cast<char*>(c.to) + c.valid, 0, c.size - c.valid);
    }
  me.groups.erase(me.groups.begin(), me.groups.begin() + static_cast<long>(done));
}

namespace {
// The ISA gives a largest error of 2 to the -22; "rough" is off by that, up or down by the bits of the argument.
float rough(double exact, float x) {
  if (!settings.rough || !std::isfinite(exact)) return static_cast<float>(exact);
  const uint32_t hash = bits<uint32_t>(x) * 2654435761u;
  return static_cast<float>(exact * (1 + (hash >> 31 ? 0x1p-22 : -0x1p-22) * ((hash >> 8 & 0xffff) / 65536.)));
}
}  // namespace

float ex2(float x, bool flush) {
  if (flush && std::fabs(x) < 0x1p-126f) x = std::copysign(0.f, x);
  float y = x == std::floor(x) ? static_cast<float>(std::exp2(static_cast<double>(x)))
                               : rough(std::exp2(static_cast<double>(x)), x);
  if (flush && y < 0x1p-126f) y = 0;
  return y;
}
float lg2(float x, bool flush) {
  if (flush && std::fabs(x) < 0x1p-126f) x = std::copysign(0.f, x);
  return rough(std::log2(static_cast<double>(x)), x);
}
// From the upper half of the number; the lower half of the result is 0. Subnormals are flushed.
double rcp_approx(double x) {
  if (x != x) return x;
  const double upper = bits<double>(bits<uint64_t>(x) & 0xffffffff00000000ull);
  if (std::fabs(upper) < 0x1p-1022) return std::copysign(std::numeric_limits<double>::infinity(), x);
  double y = bits<double>(bits<uint64_t>(1 / upper) & 0xffffffff00000000ull);
  if (settings.rough) y = bits<double>(bits<uint64_t>(y * (1 + 0x1p-20)) & 0xffffffff00000000ull);
  return std::fabs(y) < 0x1p-1022 ? std::copysign(0., y) : y;
}

// ---- Launches

namespace {

struct Dim {  // dim3
  unsigned x, y, z;
};
struct Function {
  std::string name;
  int shared_limit = 48 << 10;
};
std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> all;
  return all;
}
std::mutex mutex;
std::string last_error;

enum {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidDeviceFunction = 98,
  kLaunchFailure = 719,
  kLaunchOutOfResources = 701,
  kInvalidConfiguration = 9
};

int refuse(int code, const std::string& why) {
  last_error = "ptxrun: " + why;
  return code;
}

int launch(const void* function, Dim grid, Dim block, void** arguments, size_t shared) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = functions().find(function);
  if (found == functions().end()) return refuse(kInvalidDeviceFunction, "a launch of what is no kernel");
  const std::string& name = found->second.name;
  const auto kernel = kernels().find(name);
  if (kernel == kernels().end() && leave_out) return kSuccess;
  if (kernel == kernels().end()) return refuse(kInvalidDeviceFunction, "no translated kernel " + name);
  const uint64_t count = uint64_t(block.x) * block.y * block.z;
  if (count == 0 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535 || block.x > 1024 || block.y > 1024 || block.z > 64 || count > 1024)
    return refuse(kInvalidConfiguration, name + ": grid " + std::to_string(grid.x) + "," + std::to_string(grid.y) +
                                             "," + std::to_string(grid.z) + " of " + std::to_string(count) +
                                             " threads");
  if (count > static_cast<uint64_t>(kernel->second.most_threads))
    return refuse(kLaunchOutOfResources, name + ": " + std::to_string(count) + " threads, and its launch bounds say " +
                                             std::to_string(kernel->second.most_threads));
  if (shared > static_cast<size_t>(found->second.shared_limit))
    return refuse(kInvalidValue, name + ": " + std::to_string(shared) + " bytes of shared memory, and it may have " +
                                     std::to_string(found->second.shared_limit));
  prepare_memory();
  races = settings.races;
  if (races) shadow.resize(kMostShared);
  current = &kernel->second;
  current_name = name.c_str();
  error.clear();
  thread_count = static_cast<int>(count);
  // parameters and shared memory both end exactly where more than their bytes would begin
  now.param = now.reserved;
  now.param_end = now.param + current->param_bytes;
  memcpy(arena, arguments[0], current->param_bytes);
  std::vector<unsigned char> before(arena, arena + current->param_bytes);
  now.shared = now.reserved + kMostParam + (64 << 10);
  now.shared_end = now.shared + shared;
  for (int i = 0; i < thread_count; ++i) {
    threads[i].tid[0] = i % block.x;
    threads[i].tid[1] = i / block.x % block.y;
    threads[i].tid[2] = i / (block.x * block.y);
  }
  const unsigned sizes[2][3] = {{block.x, block.y, block.z}, {grid.x, grid.y, grid.z}};
  std::copy(sizes[0], sizes[0] + 3, now.ntid);
  std::copy(sizes[1], sizes[1] + 3, now.nctaid);
  ++launches[name];
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  const std::vector<int> block_order = order(static_cast<int>(blocks), 77);
  PTXRUN_COUNTING(counts::begin(name, &grid.x, &block.x, shared, work.kinds));
  for (const int b : block_order) {
    PTXRUN_COUNTING(if (!counts::wanted(b)) continue);
    now.ctaid[0] = b % grid.x;
    now.ctaid[1] = b / grid.x % grid.y;
    now.ctaid[2] = b / (grid.x * grid.y);
    memset(reinterpret_cast<void*>(now.shared), 0xff, shared);
    PTXRUN_COUNTING(counts::block(b));
    run_block(b);
    if (!error.empty()) {
      last_error = error;
      return kLaunchFailure;
    }
  }
  return kSuccess;
}

struct Configuration {
  Dim grid, block;
  size_t shared;
  void* stream;
};
std::vector<Configuration> configurations;

}  // namespace
}  // namespace ptx

// ---- The CUDA runtime's functions that a program of nvcc asks for (more: add them here; the linker names what is
// missing)

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, void*, void*, void*, void*,
                            int*) {
  ptx::functions()[host].name = device;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}  // of torch's headers; none is used
unsigned __cudaPushCallConfiguration(ptx::Dim grid, ptx::Dim block, size_t shared, void* stream) {
  ptx::configurations.push_back({grid, block, shared, stream});
  return 0;
}
int __cudaPopCallConfiguration(ptx::Dim* grid, ptx::Dim* block, size_t* shared, void** stream) {
  const ptx::Configuration c = ptx::configurations.back();
  ptx::configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *stream = c.stream;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int cudaLaunchKernel(const void* function, ptx::Dim grid, ptx::Dim block, void** arguments, size_t shared, void*) {
  return ptx::launch(function, grid, block, arguments, shared);
}
int __cudaLaunchKernel(const void* function, ptx::Dim grid, ptx::Dim block, void** arguments, size_t shared, void*) {
  return ptx::launch(function, grid, block, arguments, shared);
}
int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  const auto found = ptx::functions().find(function);
  if (found == ptx::functions().end())
    return ptx::refuse(ptx::kInvalidDeviceFunction, "an attribute of what is no kernel");
  if (attribute != 8) return ptx::refuse(ptx::kInvalidValue, "function attribute " + std::to_string(attribute));
  if (value < 0 || value > ptx::settings.shared_memory_limit)
    return ptx::refuse(ptx::kInvalidValue,
                       "cudaFuncSetAttribute: " + std::to_string(value) + " bytes of shared memory");
  found->second.shared_limit = value;
  return 0;
}
int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  if (device != 0) return ptx::refuse(101, "device " + std::to_string(device));
  switch (attribute) {
    case 1:
      *value = 1024;
      return 0;  // threads of a block
    case 8:
      *value = 48 << 10;
      return 0;  // shared memory of a block
    case 16:
      *value = 4;
      return 0;  // multiprocessors
    case 75:
      *value = ptx::settings.architecture / 10;
      return 0;  // compute capability
    case 76:
      *value = ptx::settings.architecture % 10;
      return 0;
    case 97:
      *value = ptx::settings.shared_memory_limit;
      return 0;  // shared memory of a block that asks for it
    default:
      return ptx::refuse(ptx::kInvalidValue, "device attribute " + std::to_string(attribute));
  }
}
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }
const char* cudaGetErrorString(int) { return ptx::last_error.c_str(); }
int cudaMemsetAsync(void* to, int value, size_t size, void*) {
  memset(to, value, size);
  return 0;
}
int cudaMemcpyAsync(void* to, const void* from, size_t size, int, void*) {
  memcpy(to, from, size);
  return 0;
}
int cudaStreamSynchronize(void*) { return 0; }
int cudaDeviceSynchronize() { return 0; }

}  // extern "C"
