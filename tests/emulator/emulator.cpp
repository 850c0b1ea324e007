#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <boost/context/detail/fcontext.hpp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "half.h"
#include "races.h"
#include "sanitizer.h"

namespace emulator {
namespace {

constexpr size_t kStackBytes = kAddressSanitizer ? 1 << 20 : 256 << 10;  // only the pages that are used take memory
constexpr size_t kPage = 4096;
constexpr int kMaxThreads = 1024;
// Shared memory starts kGuardBefore after a multiple of kSharedAlignment: code that needs a larger alignment than
// csrc/cuda/ptx.cuh gives goes wrong.
constexpr size_t kSharedAlignment = 1024, kGuardBefore = 128, kGuardBehind = 16 << 10;
constexpr uint16_t kGuard = 0x7FF7;  // NaN as float, double, half and bfloat16

namespace boost_context = boost::context::detail;

// A stack and where its execution stands.
struct Context {
  boost_context::fcontext_t at = nullptr;
  const void* stack = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// What a thread waits for.
struct Meeting {
  const char* name;
  Perform perform;
  uint32_t mask;  // 0: the whole block
  Site site;
  bool operator==(const Meeting& other) const {
    auto same = [](const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; };
    return perform == other.perform && mask == other.mask && site.line == other.site.line && same(name, other.name) &&
           same(site.file, other.site.file);
  }
};

struct Copy {
  void* shared;
  const void* global;
  int bytes, valid;
  int64_t group;
};

enum class State { kReady, kWaitsForWarp, kWaitsForBlock, kExited };

struct Thread {
  State state = State::kExited;
  Context context;
  Meeting meeting = {};
  void* argument = nullptr;
  std::vector<Copy> copies;  // under way, oldest first
  int64_t groups = 0;        // of copies, closed so far
};

// The launch that runs, if any.
const char* kernel_name = nullptr;
const std::function<void()>* kernel_body = nullptr;
std::string error;       // of the kernel
std::string host_error;  // undefined behavior in the host's code, reported by the next launch
std::mt19937_64 generator;
Context scheduler;
std::vector<Thread> threads;  // kept from launch to launch, for their stacks
int thread_count = 0;
Thread* running = nullptr;  // null while the scheduler runs

// The warp that runs: `lanes` in their order, the first `lanes_begun` of which have had their turn.
std::array<int, warpSize> lanes;
int lanes_begun, warp_begin, warp_size;

// The block's shared memory.
std::vector<unsigned char> memory;
unsigned char* shared = nullptr;
size_t shared_bytes = 0;

// The last two parts of a path.
const char* tail(const char* path) {
  const char *last = path, *previous = path;
  for (const char* c = path; *c; ++c)
    if (*c == '/') previous = last, last = c + 1;
  return previous;
}

std::string text_of(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string text_of(const Thread& thread) {
  if (thread.state == State::kExited) return "has exited";
  char mask[32] = "";
  if (thread.state == State::kWaitsForWarp) std::snprintf(mask, sizeof mask, ", mask 0x%08x", thread.meeting.mask);
  return std::string("waits at ") + thread.meeting.name + " (" + tail(thread.meeting.site.file) + ":" +
         std::to_string(thread.meeting.site.line) + mask + ")";
}

// An error's text with kernel, block and thread in front; thread < 0: none.
std::string located(int thread, const std::string& text) {
  return std::string("emulator: kernel ") + kernel_name + ", block " + text_of(blockIdx) +
         (thread < 0 ? "" : ", thread " + std::to_string(thread)) + ": " + text;
}

int running_index() { return static_cast<int>(running - threads.data()); }

Thread& running_thread(const char* name) {
  if (!running) fail("%s outside of a kernel", name);
  return *running;
}

// `self` runs (again), after jump(): the context that was left is kept.
void arrive(Context& self, boost_context::transfer_t transfer) {
  auto& from = *static_cast<Context*>(transfer.data);
  from.at = transfer.fctx;
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(self.fake_stack, &stack, &bytes);
  if (&from == &scheduler) scheduler.stack = stack, scheduler.bytes = bytes;
}

void jump(Context& from, Context& to, bool for_good) {
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.bytes);
  arrive(from, boost_context::jump_fcontext(to.at, &from));
}

// The warp's next lane that can run gets `running`; null: none.
bool choose_lane() {
  while (lanes_begun < warpSize) {
    const int lane = lanes[lanes_begun++];
    if (lane >= warp_size || threads[warp_begin + lane].state != State::kReady) continue;
    running = &threads[warp_begin + lane];
    threadIdx.x = warp_begin + lane;
    return true;
  }
  running = nullptr;
  return false;
}

// From a fiber to the next lane, or after an error and the last lane to the scheduler. No exception ever leaves a
// fiber: one that is not gone on with is simply forgotten, which is right for kernel code, as nothing on its stack owns
// anything.
void leave(Thread& self, bool for_good) {
  const bool next = error.empty() && choose_lane();
  jump(self.context, next ? running->context : scheduler, for_good);
}

// Without AddressSanitizer, as a frame that is never returned from would stay poisoned in a stack that is used again.
__attribute__((no_sanitize_address)) void fiber(boost_context::transfer_t transfer) {
  Thread& self = *running;
  arrive(self.context, transfer);
  [&]() __attribute__((noinline)) {
    try {
      (*kernel_body)();
      if (!self.copies.empty()) error = located(running_index(), "exits while asynchronous copies are under way");
    } catch (const std::exception& thrown) {
      error = located(running_index(), thrown.what());
    }
  }();
  self.state = State::kExited;
  leave(self, true);
}

void start(Thread& thread, int index) {
  Context& context = thread.context;
  if (!context.stack) {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED || mprotect(stack, kPage, PROT_NONE)) throw std::bad_alloc();
    context.stack = stack;
    context.bytes = kStackBytes;
  }
  // Stacks that all end at the same offset in a page would compete for the same lines of the cache.
  const size_t bytes = kStackBytes - index % 29 * 320;
  context.at = boost_context::make_fcontext(static_cast<char*>(const_cast<void*>(context.stack)) + bytes, bytes, fiber);
  context.fake_stack = nullptr;
  thread.state = State::kReady;
  thread.groups = 0;
}

template <class Indices>
void put_in_order(Indices& indices) {
  std::iota(indices.begin(), indices.end(), 0);
  if (settings.seed == 1) std::reverse(indices.begin(), indices.end());
  if (settings.seed > 1) std::shuffle(indices.begin(), indices.end(), generator);
}

// Performs each meeting that all its lanes have come to. Says whether any lane can go on; an error if some wait for
// ever.
bool release_warp() {
  Thread* warp = threads.data() + warp_begin;
  uint32_t waiting = 0, released = 0;
  for (int i = 0; i < warp_size; ++i) waiting |= uint32_t{warp[i].state == State::kWaitsForWarp} << i;
  for (uint32_t left = waiting; left;) {
    const Meeting& meeting = warp[__builtin_ctz(left)].meeting;
    std::array<void*, warpSize> arguments = {};
    uint32_t came = 0;
    for (int i = 0; i < warp_size; ++i)
      if (left >> i & 1 && warp[i].meeting == meeting) came |= 1u << i, arguments[i] = warp[i].argument;
    left &= ~came;
    if (came != meeting.mask) continue;
    meeting.perform(arguments.data(), meeting.mask);
    for (int i = 0; i < warp_size; ++i)
      if (came >> i & 1) warp[i].state = State::kReady;
    released |= came;
  }
  if (!waiting || released) return released;
  const int lane = __builtin_ctz(waiting);
  const Meeting& meeting = warp[lane].meeting;
  for (int i = 0;; ++i) {
    if (!(meeting.mask >> i & 1)) continue;
    if (i < warp_size && warp[i].state == State::kWaitsForWarp && warp[i].meeting == meeting) continue;
    throw std::runtime_error(located(warp_begin + lane, "divergent: it " + text_of(warp[lane]) + ", but thread " +
                                                            std::to_string(warp_begin + i) + " " +
                                                            (i < warp_size ? text_of(warp[i]) : "does not exist")));
  }
}

void release_block() {
  const Meeting& meeting = threads[0].meeting;
  std::array<void*, kMaxThreads> arguments;
  for (int i = 0; i < thread_count; ++i) {
    if (threads[i].state != threads[0].state || !(threads[i].meeting == meeting))
      throw std::runtime_error(
          located(i, "divergent: it " + text_of(threads[i]) + ", but thread 0 " + text_of(threads[0])));
    arguments[i] = threads[i].argument;
  }
  meeting.perform(arguments.data(), 0);
  races::barrier();
  for (int i = 0; i < thread_count; ++i) threads[i].state = State::kReady;
}

unsigned char guard_at(const unsigned char* byte) {
  return reinterpret_cast<uintptr_t>(byte) % 2 ? kGuard >> 8 : kGuard & 255;
}

void check_guards(const unsigned char* begin, size_t bytes) {
  if (kAddressSanitizer) return;  // which has them poisoned
  for (const unsigned char* byte = begin; byte < begin + bytes; ++byte)
    if (*byte != guard_at(byte))
      fail("writes outside of its %zu bytes of shared memory, at byte %td", shared_bytes, byte - shared);
}

void run_block() {
  races::start_block();
  std::memset(shared, 0xFF, shared_bytes);  // poison: NaN in every type
  for (int i = 0; i < thread_count; ++i) start(threads[i], i);
  std::vector<int> warps((thread_count + warpSize - 1) / warpSize);
  for (;;) {
    put_in_order(warps);
    // Each warp as far as it comes, to the block's next barrier: what needs that barrier and does not have it finds the
    // other warps either not begun or much further.
    for (int warp : warps) {
      warp_begin = warp * warpSize;
      warp_size = std::min(warpSize, thread_count - warp_begin);
      put_in_order(lanes);
      do {
        lanes_begun = 0;
        if (choose_lane()) jump(scheduler, running->context, false);
        running = nullptr;
        if (!error.empty()) throw std::runtime_error(error);
      } while (release_warp());
    }
    if (std::all_of(&threads[0], &threads[0] + thread_count,
                    [](auto& thread) { return thread.state == State::kExited; }))
      break;
    release_block();
  }
  check_guards(shared - kGuardBefore, kGuardBefore);
  check_guards(shared + shared_bytes, kGuardBehind);
}

void use_shared_memory(size_t bytes) {
  memory.resize(std::max(memory.size(), kSharedAlignment + kGuardBefore + bytes + kGuardBehind));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory.data());
  shared = memory.data() + (kSharedAlignment - begin % kSharedAlignment) % kSharedAlignment + kGuardBefore;
  shared_bytes = bytes;
  for (unsigned char* byte = shared - kGuardBefore; byte < shared; ++byte) *byte = guard_at(byte);
  for (unsigned char* byte = shared + bytes; byte < shared + bytes + kGuardBehind; ++byte) *byte = guard_at(byte);
  __asan_poison_memory_region(shared - kGuardBefore, kGuardBefore);
  __asan_poison_memory_region(shared + bytes, kGuardBehind);
}

// After a launch, also one that failed.
struct Cleanup {
  ~Cleanup() {
    __asan_unpoison_memory_region(shared - kGuardBefore, kGuardBefore + shared_bytes + kGuardBehind);
    for (Thread& thread : threads) {
      // A fiber that was forgotten midway has left its frames poisoned.
      if (thread.context.stack && std::uncaught_exceptions())
        __asan_unpoison_memory_region(static_cast<const char*>(thread.context.stack) + kPage, kStackBytes - kPage);
      thread.copies.clear();
    }
    kernel_name = nullptr;
    running = nullptr;
    in_atomic = false;
    error.clear();
  }
};

// Whether the bytes lie in the block's shared memory.
bool is_shared(const void* pointer, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(pointer), begin = reinterpret_cast<uintptr_t>(shared);
  return address >= begin && bytes <= shared_bytes && address - begin <= shared_bytes - bytes;
}

bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace

void launch(const char* name, dim3 grid, int block, size_t bytes, const std::function<void()>& body) {
  if (kernel_name) fail("kernel %s is launched while another runs", name);
  if (!host_error.empty()) fail("%s", std::exchange(host_error, "").c_str());
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
    if (settings.empty_grid_is_error) fail("kernel %s: empty grid (%u, %u, %u)", name, grid.x, grid.y, grid.z);
    return;
  }
  if (grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535)
    fail("kernel %s: grid (%u, %u, %u) is larger than (2147483647, 65535, 65535)", name, grid.x, grid.y, grid.z);
  if (block < 1 || block > kMaxThreads) fail("kernel %s: %d threads; a block has 1 to %d", name, block, kMaxThreads);
  if (bytes > settings.shared_memory_limit)
    fail("kernel %s: %zu bytes of shared memory; the limit is %zu", name, bytes, settings.shared_memory_limit);
  ++launches[name];
  threads.resize(std::max<size_t>(threads.size(), block));
  thread_count = block;
  use_shared_memory(bytes);
  Cleanup cleanup;
  kernel_name = name;
  kernel_body = &body;
  generator.seed(settings.seed);
  races::start_launch();
  gridDim = grid;
  blockDim = dim3(block);
  threadIdx = {};
  std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
  put_in_order(blocks);
  for (uint64_t index : blocks) {
    blockIdx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                static_cast<unsigned>(index / grid.x / grid.y)};
    run_block();
  }
}

Memory memory_of(const void* pointer) {
  if (!running) return Memory::kPrivate;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto stack = reinterpret_cast<uintptr_t>(running->context.stack);
  if (address >= stack && address < stack + kStackBytes) return Memory::kPrivate;
  return is_shared(pointer, 0) ? Memory::kShared : Memory::kGlobal;
}

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!running) throw std::runtime_error(kernel_name ? located(-1, text) : std::string("emulator: ") + text);
  error = located(running_index(), text);
  leave(*running, true);
  std::abort();  // never reached
}

void meet_warp(const char* name, Perform perform, uint32_t mask, void* argument, Site site) {
  Thread& self = running_thread(name);
  if (!(mask >> running_index() % warpSize & 1))
    fail("%s (%s:%d): mask 0x%08x does not name the lane itself", name, tail(site.file), site.line, mask);
  self.meeting = {name, perform, mask, site};
  self.argument = argument;
  self.state = State::kWaitsForWarp;
  leave(self, false);
}

void meet_block(const char* name, Perform perform, void* argument, Site site) {
  Thread& self = running_thread(name);
  self.meeting = {name, perform, 0, site};
  self.argument = argument;
  self.state = State::kWaitsForBlock;
  leave(self, false);
}

namespace {

template <Vote kKind>
void perform_barrier(void* const* arguments, uint32_t) {
  if constexpr (kKind != Vote::kNone) {
    int votes = 0;
    for (int i = 0; i < thread_count; ++i) votes += *static_cast<int*>(arguments[i]) != 0;
    const int result = kKind == Vote::kCount ? votes : kKind == Vote::kAnd ? votes == thread_count : votes > 0;
    for (int i = 0; i < thread_count; ++i) *static_cast<int*>(arguments[i]) = result;
  }
}

void perform_sync_warp(void* const*, uint32_t) { races::sync_warp(warp_begin / warpSize); }

void perform_ballot(void* const* arguments, uint32_t mask) {
  uint32_t votes = 0;
  for (int i = 0; i < warpSize; ++i)
    if (mask >> i & 1 && *static_cast<uint32_t*>(arguments[i])) votes |= 1u << i;
  for (int i = 0; i < warpSize; ++i)
    if (mask >> i & 1) *static_cast<uint32_t*>(arguments[i]) = votes;
}

struct Exchange {
  uint64_t value, result;
  int source;
};

void perform_shuffle(void* const* arguments, uint32_t mask) {
  for (int i = 0; i < warpSize; ++i) {
    if (!(mask >> i & 1)) continue;
    auto& lane = *static_cast<Exchange*>(arguments[i]);
    lane.result = static_cast<Exchange*>(arguments[lane.source])->value;
  }
}

}  // namespace

int barrier(const char* name, Vote kind, int vote, Site site) {
  constexpr Perform performs[] = {perform_barrier<Vote::kNone>, perform_barrier<Vote::kCount>,
                                  perform_barrier<Vote::kAnd>, perform_barrier<Vote::kOr>};
  meet_block(name, performs[static_cast<int>(kind)], &vote, site);
  return vote;
}

void sync_warp(uint32_t mask, Site site) { meet_warp("__syncwarp", perform_sync_warp, mask, nullptr, site); }

uint32_t ballot(const char* name, uint32_t mask, bool vote, Site site) {
  uint32_t votes = vote;
  meet_warp(name, perform_ballot, mask, &votes, site);
  return votes;
}

uint64_t shuffle(const char* name, uint32_t mask, Shuffle kind, uint64_t value, int by, int width, Site site) {
  if (width < 1 || width > warpSize || (width & (width - 1))) fail("%s: width %d", name, width);
  running_thread(name);
  const int lane = running_index() % warpSize, first = lane & -width;
  by &= 31;
  int source = kind == Shuffle::kIndex  ? first + (by & (width - 1))
               : kind == Shuffle::kUp   ? lane - by
               : kind == Shuffle::kDown ? lane + by
                                        : lane ^ by;
  if (source >= first + width || (kind == Shuffle::kUp && source < first)) source = lane;
  if (source != lane && !(mask >> source & 1))
    fail("%s (%s:%d): reads lane %d, which mask 0x%08x does not name", name, tail(site.file), site.line, source, mask);
  Exchange exchange = {value, 0, source};
  meet_warp(name, perform_shuffle, mask, &exchange, site);
  return exchange.result;
}

unsigned char* shared_memory() {
  running_thread("shared_memory");
  return shared;
}

uint32_t shared_address(const void* pointer) {
  if (!is_shared(pointer, 0)) fail("shared_address: not a pointer into shared memory");
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared);
}

// The bytes are copied as late as the program allows, when the thread waits for them. Until then they are poison, as if
// the copy had begun at once: what is read too early, and what others still wanted to read there, both show.
void copy_async(void* to, const void* from, int bytes, int valid, Site site) {
  Thread& self = running_thread("copy_async");
  auto refuse = [&](const char* why) { fail("copy_async<%d> (%s:%d): %s", bytes, tail(site.file), site.line, why); };
  if (valid < 0 || valid > bytes) refuse("`valid` is negative or larger than that");
  if (!is_aligned(to, bytes)) refuse("the shared address is not aligned to that");
  if (!is_aligned(from, bytes)) refuse("the global address is not aligned to that");
  if (!is_shared(to, bytes)) refuse("the shared address is not in shared memory");
  if (valid && is_shared(from, 1)) refuse("the global address is in shared memory");
  if (valid && __asan_region_is_poisoned(const_cast<void*>(from), valid)) refuse("reads out of bounds");
  races::access(to, bytes, true, __builtin_return_address(0));
  self.copies.push_back({to, from, bytes, valid, self.groups});
  std::memset(to, 0xFF, bytes);
}

void copy_async_commit() { ++running_thread("copy_async_commit").groups; }

void copy_async_wait(int pending) {
  Thread& self = running_thread("copy_async_wait");
  auto copy = self.copies.begin();
  for (; copy != self.copies.end() && copy->group < self.groups - pending; ++copy) {
    races::access(copy->shared, copy->bytes, true, __builtin_return_address(0));
    races::access(copy->global, copy->valid, false, __builtin_return_address(0));
    std::memset(copy->shared, 0, copy->bytes);
    if (copy->valid) std::memcpy(copy->shared, copy->global, copy->valid);
  }
  self.copies.erase(self.copies.begin(), copy);
}

namespace {

struct MatrixLoad {
  uint32_t* out;
  const void* row;
};

template <bool kTransposed>
void perform_load_matrices(void* const* arguments, uint32_t) {
  uint16_t matrix[4][8][8];
  for (int lane = 0; lane < warpSize; ++lane)
    std::memcpy(matrix[lane / 8][lane % 8], static_cast<MatrixLoad*>(arguments[lane])->row, 16);
  for (int lane = 0; lane < warpSize; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint32_t low = kTransposed ? matrix[i][t][g] : matrix[i][g][t];
      const uint32_t high = kTransposed ? matrix[i][t + 1][g] : matrix[i][g][t + 1];
      static_cast<MatrixLoad*>(arguments[lane])->out[i] = low | high << 16;
    }
}

template <class Registers>
struct Product {
  float* d;
  const Registers* a;
  const Registers* b;
};

// d += a b with a 16 x K, b K x 8 and d 16 x 8; put(g, t, product, a, b) puts lane 4g + t's elements into the matrices.
template <int K, class Registers, class Put>
void perform_multiply_add(void* const* arguments, Put put) {
  float a[16][K], b[K][8], d[16][8];
  auto d_of = [&d](int lane, int i) -> float& { return d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]; };
  for (int lane = 0; lane < warpSize; ++lane) {
    const auto& product = *static_cast<Product<Registers>*>(arguments[lane]);
    put(lane / 4, lane % 4, product, a, b);
    for (int i = 0; i < 4; ++i) d_of(lane, i) = product.d[i];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < K; ++k)  // each sum in order of k
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < warpSize; ++lane)
    for (int i = 0; i < 4; ++i) static_cast<Product<Registers>*>(arguments[lane])->d[i] = d_of(lane, i);
}

template <int kMantissa>
void perform_multiply_add_half(void* const* arguments, uint32_t) {
  perform_multiply_add<16, uint32_t>(arguments, [](int g, int t, const auto& product, auto& a, auto& b) {
    for (int i = 0; i < 2; ++i) {  // of a register's pair
      auto element = [i](uint32_t pair) { return widen<kMantissa>(static_cast<uint16_t>(pair >> 16 * i)); };
      for (int part = 0; part < 4; ++part) a[g + part % 2 * 8][2 * t + part / 2 * 8 + i] = element(product.a[part]);
      for (int part = 0; part < 2; ++part) b[2 * t + part * 8 + i][g] = element(product.b[part]);
    }
  });
}

void perform_multiply_add_tf32(void* const* arguments, uint32_t) {
  auto tf32 = [](float x) { return bits_as<float>(bits_as<uint32_t>(x) & 0xFFFFE000); };  // what the tensor cores read
  perform_multiply_add<8, float>(arguments, [tf32](int g, int t, const auto& product, auto& a, auto& b) {
    for (int part = 0; part < 4; ++part) a[g + part % 2 * 8][t + part / 2 * 4] = tf32(product.a[part]);
    for (int part = 0; part < 2; ++part) b[t + part * 4][g] = tf32(product.b[part]);
  });
}

}  // namespace

void load_matrices(bool transposed, uint32_t* out, const void* row, Site site) {
  const char* name = transposed ? "load_matrices_transposed" : "load_matrices";
  if (!is_aligned(row, 16)) fail("%s (%s:%d): the row is not aligned to 16 bytes", name, tail(site.file), site.line);
  if (!is_shared(row, 16)) fail("%s (%s:%d): the row is not in shared memory", name, tail(site.file), site.line);
  races::access(row, 16, false, __builtin_return_address(0));
  MatrixLoad load = {out, row};
  meet_warp(name, transposed ? perform_load_matrices<true> : perform_load_matrices<false>, 0xFFFFFFFF, &load, site);
}

void multiply_add_bfloat16(float* d, const uint32_t* a, const uint32_t* b, Site site) {
  Product<uint32_t> product = {d, a, b};
  meet_warp("multiply_add (bfloat16)", perform_multiply_add_half<7>, 0xFFFFFFFF, &product, site);
}

void multiply_add_half(float* d, const uint32_t* a, const uint32_t* b, Site site) {
  Product<uint32_t> product = {d, a, b};
  meet_warp("multiply_add (half)", perform_multiply_add_half<10>, 0xFFFFFFFF, &product, site);
}

void multiply_add_tf32(float* d, const float* a, const float* b, Site site) {
  Product<float> product = {d, a, b};
  meet_warp("multiply_add (tf32)", perform_multiply_add_tf32, 0xFFFFFFFF, &product, site);
}

namespace {

struct Location {  // what the data of each of UndefinedBehaviorSanitizer's reports begins with
  const char* file;
  uint32_t line, column;
};

void report(const char* what, const Location* where) {
  if (running) fail("%s (%s:%u)", what, tail(where->file), where->line);
  // In the host's code. No exception can leave from here: g++ takes these functions for ones that do not throw.
  std::fprintf(stderr, "emulator: %s (%s:%u:%u)\n", what, tail(where->file), where->line, where->column);
  if (host_error.empty())
    host_error = std::string(what) + " (" + tail(where->file) + ":" + std::to_string(where->line) + ")";
}

}  // namespace
}  // namespace emulator

// UndefinedBehaviorSanitizer's runtime: what g++ finds in a kernel ends the launch with an error like any other.
extern "C" {
using emulator::Location;
using emulator::report;
void __ubsan_handle_type_mismatch_v1(const Location* where, uintptr_t pointer) {
  report(pointer ? "misaligned address" : "null pointer", where);
}
void __ubsan_handle_pointer_overflow(const Location* where, void*, void*) { report("pointer overflow", where); }
void __ubsan_handle_out_of_bounds(const Location* where, void*) { report("index out of bounds", where); }
void __ubsan_handle_shift_out_of_bounds(const Location* where, void*, void*) { report("shift out of bounds", where); }
void __ubsan_handle_add_overflow(const Location* where, void*, void*) { report("integer overflow", where); }
void __ubsan_handle_sub_overflow(const Location* where, void*, void*) { report("integer overflow", where); }
void __ubsan_handle_mul_overflow(const Location* where, void*, void*) { report("integer overflow", where); }
void __ubsan_handle_negate_overflow(const Location* where, void*) { report("integer overflow", where); }
void __ubsan_handle_divrem_overflow(const Location* where, void*, void*) { report("integer division by zero", where); }
void __ubsan_handle_float_cast_overflow(const Location* where, void*) { report("number beyond its new type", where); }
void __ubsan_handle_load_invalid_value(const Location* where, void*) { report("invalid bool or enum", where); }
void __ubsan_handle_builtin_unreachable(const Location* where) { report("unreachable code", where); }
void __ubsan_handle_missing_return(const Location* where) { report("no return", where); }
void __ubsan_handle_vla_bound_not_positive(const Location* where, void*) { report("empty array", where); }
void __ubsan_handle_nonnull_arg(const Location* where) { report("null argument", where); }
void __ubsan_handle_nonnull_return_v1(const void*, const Location* where) { report("null returned", where); }
void __ubsan_handle_invalid_builtin(const Location* where) { report("zeros of 0 counted", where); }
}
