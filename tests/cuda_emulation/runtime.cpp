// Runs and synchronises the threads of a block.
//
// Threads are fibers on one thread of the operating system, which switch where they wait; or, with
// FL_EMULATION_THREADS, each is a thread of the operating system, so that ThreadSanitizer detects
// accesses that CUDA does not order. Blocks run one after another.
//
// This file is compiled without ThreadSanitizer, and hides its own locks from it: only CUDA's
// ordering rules (see `Ordering`) order the kernel's accesses.
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

#if !defined(FL_EMULATION_THREADS) && (!defined(__x86_64__) || defined(FL_EMULATION_UCONTEXT))
#define FL_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include "cuda_shim.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

// Defined beside the kernels.
extern "C" const fl_emulation::Kernel fl_emulation_kernels[];

namespace fl_emulation {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;
constexpr std::size_t kStackBytes = 256 * 1024;
constexpr std::size_t kCanaryBytes = 64;
enum Order { kForward, kReverse, kRandom };
constexpr unsigned char kPoison = 0xff;  // NaN as float and double

FL_EMULATION_LOCAL ThreadIndex* self;
uint3 block_index;
dim3 block_size, grid_size;
unsigned char* dynamic_shared;

namespace {

const char* name_of(Operation operation) {
  static const char* const names[] = {
      "nothing",           "__syncthreads",       "__syncthreads_or",
      "__syncthreads_and", "__syncthreads_count", "__syncwarp",
      "__shfl_sync",       "__shfl_up_sync",      "__shfl_down_sync",
      "__shfl_xor_sync",   "__ballot_sync",       "__any_sync",
      "__all_sync",        "__match_any_sync",    "__activemask"};
  return names[int(operation)];
}

bool of_block(Operation operation) {
  return operation >= Operation::syncthreads && operation <= Operation::syncthreads_count;
}

// The ordering that ThreadSanitizer is told. __syncthreads and __syncwarp order the memory accesses
// of the participating threads. Shuffles and votes do not: CUDA guarantees that lanes synchronise
// there, not that one then sees another's writes. A fence orders accesses before it with those of
// other threads after a later fence of theirs; that is slightly more than CUDA guarantees, since
// the atomic access between them is not known here.
#if defined(FL_EMULATION_THREADS) && defined(FL_EMULATION_TSAN)
extern "C" {
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreSyncBegin(const char*, int);
void AnnotateIgnoreSyncEnd(const char*, int);
}
struct Ordering {
  static void acquire(void* at) { __tsan_acquire(at); }
  static void release(void* at) { __tsan_release(at); }
  static void ignore_locks() { AnnotateIgnoreSyncBegin(__FILE__, __LINE__); }
  static void heed_locks() { AnnotateIgnoreSyncEnd(__FILE__, __LINE__); }
};
#else
struct Ordering {
  static void acquire(void*) {}
  static void release(void*) {}
  static void ignore_locks() {}
  static void heed_locks() {}
};
#endif

struct Thread : ThreadIndex {
  int number;
  // The operation that it waits for, if any.
  Operation operation;
  unsigned mask;
  Bits brought;
  int source;
  const char* file;
  int line;
  // The result of the operation.
  Bits result;
  Copies copies;

#if defined(FL_EMULATION_THREADS)
  pthread_t handle;
  pthread_cond_t resumed = PTHREAD_COND_INITIALIZER;
  // For __syncwarp: two alternating addresses, so that a lane that runs ahead to its next
  // __syncwarp does not count for the previous one.
  char order[2];
  int turn;
  unsigned turns;     // of the lanes that it synchronised with
  unsigned barriers;  // that it has reached
#else
  unsigned char* stack;
#ifdef FL_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer;
#endif
  void* fake_stack;  // AddressSanitizer's
#endif
};

struct Warp {
  unsigned lanes;     // existing ones
  unsigned runnable;  // neither waiting nor returned
  unsigned returned;
  unsigned waiting;     // for other lanes
  unsigned ask_active;  // waiting for the result of __activemask
};

struct Launch {
  const Kernel* kernel;
  const void* argument;
  int threads, warps;
  int order;
  std::uint64_t random;
  Warp warp[kMostThreads / kWarp];
  unsigned ready;  // warps with a runnable lane
  int at_barrier;
  int returned;
  bool failed;
  std::string error;
};
Launch launch;
Thread* threads[kMostThreads];

Thread& me() { return *static_cast<Thread*>(self); }

std::uint32_t random_number() {
  launch.random = launch.random * 6364136223846793005u + 1442695040888963407u;
  return std::uint32_t(launch.random >> 33);
}

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* text, ...) {
  char buffer[512];
  va_list list;
  va_start(list, text);
  std::vsnprintf(buffer, sizeof buffer, text, list);
  va_end(list);
  return buffer;
}

std::string place(const uint3& at) { return format("(%u, %u, %u)", at.x, at.y, at.z); }

std::string block_name() {
  return format("kernel '%s', block ", launch.kernel->name) + place(block_index);
}

std::string site(const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  return format("%s:%d", slash ? slash + 1 : file, line);
}

bool has_returned(const Thread& t) {
  return launch.warp[t.number / kWarp].returned >> (t.number % kWarp) & 1;
}

std::string doing(const Thread& t) {
  if (has_returned(t)) return "returned";
  if (t.operation == Operation::none) return "runs";
  std::string text = std::string("waits at ") + name_of(t.operation);
  if (t.operation > Operation::syncthreads_count && t.operation != Operation::activemask)
    text += format(" with mask 0x%x", t.mask);
  return text + " (" + site(t.file, t.line) + ")";
}

// The first thread that `t` waits for and that will never arrive.
const Thread* missing(const Thread& t) {
  for (int i = 0; i < launch.threads; ++i) {
    const Thread& other = *threads[i];
    if (other.operation == t.operation && (of_block(t.operation) || other.mask == t.mask)) continue;
    bool same_warp = i / kWarp == t.number / kWarp;
    if (of_block(t.operation) || (same_warp && t.mask >> (i % kWarp) & 1)) return &other;
  }
  return nullptr;
}

// Deadlock: all threads wait or have returned.
std::string deadlock() {
  const Thread *waits = nullptr, *absent = nullptr;
  int waiting = 0;
  for (int i = 0; i < launch.threads; ++i) {
    const Thread& t = *threads[i];
    if (has_returned(t)) continue;
    ++waiting;
    const Thread* other = missing(t);
    if (!other) continue;
    // A thread that returned explains more than one that waits for something else.
    if (!waits || (!has_returned(*absent) && has_returned(*other))) waits = &t, absent = other;
  }
  std::string text = block_name() + ": ";
  if (!waits) return text + "all threads wait";
  return text + "thread " + place(waits->index) + " " + doing(*waits) + ", where thread " +
         place(absent->index) + " never comes: it " + doing(*absent) +
         format(" (threads that wait: %d, that returned: %d)", waiting, launch.returned);
}

// --- How threads wait: fibers, or threads of the operating system -------------------------------

void resume(Thread& t);  // `t` can run
void wait();             // until this thread can run
[[noreturn]] void abandon(const std::string& error);

#ifdef FL_EMULATION_THREADS
pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
struct Locked {
  Locked() {
    Ordering::ignore_locks();
    pthread_mutex_lock(&mutex);
  }
  ~Locked() {
    pthread_mutex_unlock(&mutex);
    Ordering::heed_locks();
  }
};
#else
struct Locked {
  Locked() {}
  ~Locked() {}
};
#endif

void make_runnable(int warp, unsigned lanes) {
  launch.warp[warp].runnable |= lanes;
  launch.ready |= 1u << warp;
}

void stop_running(const Thread& t) {
  int warp = t.number / kWarp;
  launch.warp[warp].runnable &= ~(1u << (t.number % kWarp));
  if (!launch.warp[warp].runnable) launch.ready &= ~(1u << warp);
}

bool can_run(const Thread& t) {
  return launch.warp[t.number / kWarp].runnable >> (t.number % kWarp) & 1;
}

// --- Results of synchronising operations --------------------------------------------------------

// Called when all threads of the block wait at a barrier.
void meet_block() {
  const Thread& first = *threads[0];
  int count = 0;
  for (int i = 0; i < launch.threads; ++i) {
    const Thread& t = *threads[i];
    if (t.operation != first.operation || t.line != first.line ||
        (t.file != first.file && std::strcmp(t.file, first.file) != 0))
      abandon(block_name() + ": thread " + place(first.index) + " " + doing(first) +
              ", but thread " + place(t.index) + " " + doing(t));
    count += int(t.brought);
  }
  Bits result = 0;
  if (first.operation == Operation::syncthreads_or) result = count != 0;
  if (first.operation == Operation::syncthreads_and) result = count == launch.threads;
  if (first.operation == Operation::syncthreads_count) result = Bits(count);
  launch.at_barrier = 0;
  for (int i = 0; i < launch.threads; ++i) {
    threads[i]->operation = Operation::none;
    threads[i]->result = result;
  }
  for (int w = 0; w < launch.warps; ++w) make_runnable(w, launch.warp[w].lanes);
  for (int i = 0; i < launch.threads; ++i) resume(*threads[i]);
}

// Called when all existing lanes in `mask` have reached the same operation.
void meet_lanes(int warp, unsigned lanes, Operation operation) {
  Thread** const lane = threads + warp * kWarp;
  switch (operation) {
    case Operation::shfl:
    case Operation::shfl_up:
    case Operation::shfl_down:
    case Operation::shfl_xor:
      for (unsigned rest = lanes; rest; rest &= rest - 1) {
        Thread& t = *lane[__builtin_ctz(rest)];
        t.result = lanes >> t.source & 1 ? lane[t.source]->brought : ~Bits(0);
      }
      break;
    case Operation::ballot:
    case Operation::any:
    case Operation::all: {
      unsigned yes = 0;
      for (unsigned rest = lanes; rest; rest &= rest - 1) {
        int i = __builtin_ctz(rest);
        yes |= unsigned(lane[i]->brought) << i;
      }
      Bits result = operation == Operation::ballot ? yes
                    : operation == Operation::any  ? yes != 0
                                                   : yes == lanes;
      for (unsigned rest = lanes; rest; rest &= rest - 1)
        lane[__builtin_ctz(rest)]->result = result;
      break;
    }
    case Operation::match_any:
      for (unsigned rest = lanes; rest; rest &= rest - 1) {
        Thread& t = *lane[__builtin_ctz(rest)];
        t.result = 0;
        for (unsigned others = lanes; others; others &= others - 1) {
          int i = __builtin_ctz(others);
          if (lane[i]->brought == t.brought) t.result |= 1u << i;
        }
      }
      break;
    case Operation::activemask:
      for (unsigned rest = lanes; rest; rest &= rest - 1) lane[__builtin_ctz(rest)]->result = lanes;
      break;
    default:
      break;
  }
#ifdef FL_EMULATION_THREADS
  unsigned turns = 0;
  for (unsigned rest = lanes; rest; rest &= rest - 1) {
    int i = __builtin_ctz(rest);
    turns |= unsigned(lane[i]->turn) << i;
  }
  for (unsigned rest = lanes; rest; rest &= rest - 1) lane[__builtin_ctz(rest)]->turns = turns;
#endif
  for (unsigned rest = lanes; rest; rest &= rest - 1)
    lane[__builtin_ctz(rest)]->operation = Operation::none;
  launch.warp[warp].waiting &= ~lanes;
  make_runnable(warp, lanes);
  for (unsigned rest = lanes; rest; rest &= rest - 1) resume(*lane[__builtin_ctz(rest)]);
}

// Resumes the lanes that `t` synchronises with if it was the last to arrive.
void try_to_meet(const Thread& t) {
  int number = t.number / kWarp;
  const Warp& warp = launch.warp[number];
  // A full mask means the existing lanes, in a warp that the block fills only in part.
  unsigned lanes = t.mask & warp.lanes;
  if ((warp.waiting & lanes) != lanes) return;
  Thread** const lane = threads + number * kWarp;
  for (unsigned rest = lanes; rest; rest &= rest - 1) {
    const Thread& other = *lane[__builtin_ctz(rest)];
    if (other.operation != t.operation || other.mask != t.mask) return;
  }
  meet_lanes(number, lanes, t.operation);
}

// No lane of the warp is runnable any more: those that called __activemask get their result.
void answer_activemask(int number) {
  Warp& warp = launch.warp[number];
  while (warp.ask_active && !warp.runnable) {
    const Thread& first = *threads[number * kWarp + __builtin_ctz(warp.ask_active)];
    unsigned lanes = 0;
    for (unsigned rest = warp.ask_active; rest; rest &= rest - 1) {
      int i = __builtin_ctz(rest);
      const Thread& t = *threads[number * kWarp + i];
      if (t.line == first.line && std::strcmp(t.file, first.file) == 0) lanes |= 1u << i;
    }
    warp.ask_active &= ~lanes;
    meet_lanes(number, lanes, Operation::activemask);
  }
}

// Called when the current thread stops running, because it waits or has returned.
void leave() {
  Thread& t = me();
  int number = t.number / kWarp;
  stop_running(t);
  if (of_block(t.operation)) {
    if (++launch.at_barrier == launch.threads) meet_block();
  } else if (t.operation == Operation::activemask) {
    launch.warp[number].ask_active |= 1u << (t.number % kWarp);
  } else if (t.operation != Operation::none) {
    launch.warp[number].waiting |= 1u << (t.number % kWarp);
    try_to_meet(t);
  }
  if (!launch.warp[number].runnable) answer_activemask(number);
  if (!launch.ready && launch.returned < launch.threads) abandon(deadlock());
}

void start_block() {
  for (int w = 0; w < launch.warps; ++w) {
    int lanes = launch.threads - w * kWarp;
    unsigned all = lanes >= kWarp ? ~0u : (1u << lanes) - 1;
    launch.warp[w] = {all, all, 0, 0, 0};
  }
  launch.ready = launch.warps == kWarp ? ~0u : (1u << launch.warps) - 1;
  launch.at_barrier = 0;
  launch.returned = 0;
  for (int i = 0; i < launch.threads; ++i) threads[i]->operation = Operation::none;
}

void mark_returned() {
  Thread& t = me();
  launch.warp[t.number / kWarp].returned |= 1u << (t.number % kWarp);
  ++launch.returned;
}

#ifndef FL_EMULATION_THREADS

// --- Fibers -------------------------------------------------------------------------------------

#ifdef FL_UCONTEXT
ucontext_t main_context;
#else
void* main_stack_pointer;
// Saves the callee-saved registers on the stack, and switches to another stack.
extern "C" __attribute__((visibility("hidden"))) void fl_emulation_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.hidden fl_emulation_switch
.globl fl_emulation_switch
.type fl_emulation_switch, @function
fl_emulation_switch:
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
.size fl_emulation_switch, .-fl_emulation_switch
)");
#endif

void* main_fake_stack;
const void* main_stack;
std::size_t main_stack_bytes;

// Switches from one fiber, or from the caller of the launch (nullptr), to another.
void switch_fiber(Thread* from, Thread* to, bool last = false) {
  self = to;
#ifdef __SANITIZE_ADDRESS__
  void** fake = from ? &from->fake_stack : &main_fake_stack;
  __sanitizer_start_switch_fiber(last ? nullptr : fake, to ? to->stack : main_stack,
                                 to ? kStackBytes : main_stack_bytes);
#else
  (void)last;
#endif
#ifdef FL_UCONTEXT
  swapcontext(from ? &from->context : &main_context, to ? &to->context : &main_context);
#else
  fl_emulation_switch(from ? &from->stack_pointer : &main_stack_pointer,
                      to ? to->stack_pointer : main_stack_pointer);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(*fake, nullptr, nullptr);
#endif
}

// One of the set bits: in forward and reverse order, the next one after `last`.
int choose(unsigned set, int last) {
  unsigned long long wide = set | static_cast<unsigned long long>(set) << kWarp;
  if (launch.order == kReverse) {
    // The highest below `last`, or, wrapping around, the highest.
    wide &= (1ull << (last + kWarp)) - 1;
    return (63 - __builtin_clzll(wide)) % kWarp;
  }
  if (launch.order == kRandom) last = int(random_number() % kWarp) - 1;
  return __builtin_ctzll(wide >> (last + 1) << (last + 1)) % kWarp;
}

int before_first() { return launch.order == kReverse ? 0 : -1; }

// The fiber that runs after `t`, or the first one; nullptr: all have returned.
Thread* next(const Thread* t) {
  if (!launch.ready) return nullptr;
  int warp = t ? t->number / kWarp : before_first();
  int lane = t ? t->number % kWarp : before_first();
  if (!t || !launch.warp[warp].runnable) {
    warp = choose(launch.ready, warp);
    lane = before_first();
  }
  return threads[warp * kWarp + choose(launch.warp[warp].runnable, lane)];
}

void resume(Thread&) {}

void wait() {
  Thread* t = &me();
  switch_fiber(t, next(t));
}

void abandon(const std::string& error) {
  launch.failed = true;
  launch.error = error;
  // The stacks of the other fibers need no destructors, as kernels own nothing.
  switch_fiber(&me(), nullptr, true);
  std::abort();
}

void run_fiber() {
#ifdef __SANITIZE_ADDRESS__
  const void** stack = main_stack ? nullptr : &main_stack;
  __sanitizer_finish_switch_fiber(nullptr, stack, stack ? &main_stack_bytes : nullptr);
#endif
  launch.kernel->call(launch.argument);
  Thread* t = &me();
  mark_returned();
  leave();
  switch_fiber(t, next(t), true);
  std::abort();
}

void prepare_fiber(Thread& t) {
#ifdef __SANITIZE_ADDRESS__
  // run_fiber never returns, and so leaves its stack marked.
  __asan_unpoison_memory_region(t.stack + kStackBytes - 8192, 8192);
#endif
#ifdef FL_UCONTEXT
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = t.stack;
  t.context.uc_stack.ss_size = kStackBytes;
  t.context.uc_link = nullptr;
  makecontext(&t.context, run_fiber, 0);
#else
  // Stacks start at different offsets in their pages, or all would compete for the same cache sets.
  // Then come the values that fl_emulation_switch pops: six registers and the return address.
  void** top = reinterpret_cast<void**>(t.stack + kStackBytes - 192 * (t.number % 21));
  *--top = nullptr;  // no caller
  *--top = reinterpret_cast<void*>(run_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  t.stack_pointer = top;
#endif
}

constexpr int kGuarded = 16;

bool make_thread(Thread& t) {
  std::size_t page = std::size_t(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return false;
  // A guard page against stack overflow. Each takes a mapping or two, of which a process has a
  // limited number; all threads run the same kernel, so guards on a few of them suffice.
  if (t.number < kGuarded) mprotect(memory, page, PROT_NONE);
  t.stack = static_cast<unsigned char*>(memory) + page;
  return true;
}

bool start_threads() { return true; }
void end_threads() {
#ifdef __SANITIZE_ADDRESS__
  // Clears the marks of abandoned fibers.
  if (launch.failed)
    for (int i = 0; i < launch.threads; ++i)
      __asan_unpoison_memory_region(threads[i]->stack, kStackBytes);
#endif
}

void run_block() {
  for (int i = 0; i < launch.threads; ++i) prepare_fiber(*threads[i]);
#ifdef __SANITIZE_ADDRESS__
  main_stack = nullptr;
#endif
  switch_fiber(nullptr, next(nullptr));
}

#else

// --- Threads of the operating system ------------------------------------------------------------

struct Abandoned {};
pthread_cond_t block_starts = PTHREAD_COND_INITIALIZER;
pthread_cond_t block_ends = PTHREAD_COND_INITIALIZER;
int started_blocks, ended_threads;
bool over;
// Addresses for ThreadSanitizer's happens-before annotations.
char block_start_order, block_end_order, barrier_order[2], fence_order;

void resume(Thread& t) { pthread_cond_signal(&t.resumed); }

void wait() {
  Thread& t = me();
  while (!can_run(t) && !launch.failed) pthread_cond_wait(&t.resumed, &mutex);
  if (launch.failed) throw Abandoned();
}

void abandon(const std::string& error) {
  if (!launch.failed) launch.error = error;
  launch.failed = true;
  for (int i = 0; i < launch.threads; ++i) pthread_cond_signal(&threads[i]->resumed);
  throw Abandoned();
}

void* run_thread(void* argument) {
  self = static_cast<Thread*>(argument);
  for (int block = 1;; ++block) {
    {
      Locked lock;
      while (started_blocks < block && !over) pthread_cond_wait(&block_starts, &mutex);
      if (over) return nullptr;
    }
    Ordering::acquire(&block_start_order);
    try {
      launch.kernel->call(launch.argument);
      Locked lock;
      mark_returned();
      if (!launch.failed) leave();
    } catch (const Abandoned&) {
    }
    Ordering::release(&block_end_order);
    Locked lock;
    if (++ended_threads == launch.threads) pthread_cond_signal(&block_ends);
  }
}

bool make_thread(Thread&) { return true; }

int existing_threads;

bool start_threads() {
  over = false;
  started_blocks = 0;
  for (existing_threads = 0; existing_threads < launch.threads; ++existing_threads) {
    Thread& t = *threads[existing_threads];
    t.turn = 0;
    t.barriers = 0;
    if (pthread_create(&t.handle, nullptr, run_thread, &t) != 0) return false;
  }
  return true;
}

void end_threads() {
  {
    Locked lock;
    over = true;
    pthread_cond_broadcast(&block_starts);
  }
  for (int i = 0; i < existing_threads; ++i) pthread_join(threads[i]->handle, nullptr);
}

void run_block() {
  Ordering::release(&block_start_order);
  {
    Locked lock;
    ended_threads = 0;
    ++started_blocks;
    pthread_cond_broadcast(&block_starts);
    while (ended_threads < launch.threads) pthread_cond_wait(&block_ends, &mutex);
  }
  Ordering::acquire(&block_end_order);
}

#endif

struct Region {
  void* start;
  std::size_t bytes;
};
std::vector<Region> statics;

// Runs the blocks of a launch one after another. Returns an error message, or nothing.
std::string run_blocks(std::size_t shared_bytes) {
  std::vector<std::uint64_t> order(std::uint64_t(grid_size.x) * grid_size.y * grid_size.z);
  std::iota(order.begin(), order.end(), std::uint64_t(0));
  if (launch.order == kReverse) std::reverse(order.begin(), order.end());
  if (launch.order == kRandom)
    for (std::size_t i = order.size(); i > 1; --i)
      std::swap(order[i - 1], order[random_number() % i]);

#ifdef __SANITIZE_ADDRESS__
  const std::size_t canary = 0;  // AddressSanitizer sees the access itself
#else
  const std::size_t canary = kCanaryBytes;
#endif
  for (std::uint64_t number : order) {
    block_index.x = unsigned(number % grid_size.x);
    block_index.y = unsigned(number / grid_size.x % grid_size.y);
    block_index.z = unsigned(number / grid_size.x / grid_size.y);
    for (const Region& region : statics) std::memset(region.start, kPoison, region.bytes);
    unsigned char* memory = nullptr;
    if (shared_bytes) {
      memory = static_cast<unsigned char*>(std::malloc(shared_bytes + canary));
      if (!memory) return "no memory for the shared memory of a block";
      std::memset(memory, kPoison, shared_bytes + canary);
    }
    dynamic_shared = memory;
    for (int i = 0; i < launch.threads; ++i) {
      threads[i]->copies.queued.clear();
      threads[i]->copies.groups = 0;
    }
    start_block();
    run_block();
    dynamic_shared = nullptr;
    bool overrun = false;
    for (std::size_t i = 0; memory && i < canary; ++i)
      overrun |= memory[shared_bytes + i] != kPoison;
    std::free(memory);
    if (launch.failed) return launch.error;
    if (overrun)
      return block_name() +
             format(": wrote beyond its %zu bytes of dynamic shared memory", shared_bytes);
  }
  return "";
}

}  // namespace

void fail(const char* what, const char* file, int line) {
  Locked lock;
  abandon(block_name() + ", thread " + place(self->index) + ": " + what + " (" + site(file, line) +
          ")");
}

Bits meet(Operation operation, unsigned mask, Bits brought, int source, const char* file,
          int line) {
  Thread& t = me();
#ifdef FL_EMULATION_THREADS
  char* order = nullptr;
  if (of_block(operation)) order = &barrier_order[t.barriers++ % 2];
  if (operation == Operation::syncwarp) order = &t.order[t.turn];
  if (order) Ordering::release(order);
#endif
  {
    Locked lock;
    if (launch.failed) abandon("");
    int lane = t.number % kWarp;
    if (!of_block(operation) && operation != Operation::activemask && !(mask >> lane & 1))
      abandon(block_name() + ", thread " + place(t.index) + ": lane " +
              format("%d is not in the mask 0x%x of its ", lane, mask) + name_of(operation) + " (" +
              site(file, line) + ")");
    t.operation = operation;
    t.mask = mask;
    t.brought = brought;
    t.source = source;
    t.file = file;
    t.line = line;
    leave();
    if (!can_run(t)) wait();
  }
#ifdef FL_EMULATION_THREADS
  if (of_block(operation)) Ordering::acquire(order);
  if (operation == Operation::syncwarp) {
    Thread** warp = threads + t.number / kWarp * kWarp;
    for (int i = 0; i < kWarp && t.number / kWarp * kWarp + i < launch.threads; ++i)
      if (mask >> i & 1) Ordering::acquire(&warp[i]->order[t.turns >> i & 1]);
    t.turn ^= 1;
  }
#endif
  return t.result;
}

Bits shuffle(Operation operation, unsigned mask, Bits brought, int argument, int width,
             const char* file, int line) {
  if (width < 1 || width > kWarp || (width & (width - 1)))
    fail(format("%s: width is %d; expected a power of two up to 32", name_of(operation), width)
             .c_str(),
         file, line);
  // Groups of `width` lanes shuffle separately. A lane that reads beyond its group gets its own
  // value; but __shfl_xor_sync may read from lower groups.
  int lane = me().number % kWarp;
  int first = lane & ~(width - 1), last = first + width - 1;
  // Unsigned, so that numbers far out of range stay out of range.
  unsigned step = unsigned(argument);
  int source = lane;
  if (operation == Operation::shfl) source = first + int(step & unsigned(width - 1));
  if (operation == Operation::shfl_up && step <= unsigned(lane - first)) source = lane - argument;
  if (operation == Operation::shfl_down && step <= unsigned(last - lane)) source = lane + argument;
  if (operation == Operation::shfl_xor) {
    unsigned other = unsigned(lane) ^ step;
    if (other <= unsigned(last)) source = int(other);
  }
  return meet(operation, mask, brought, source, file, line);
}

Copies& copies() { return me().copies; }

void thread_fence() {
#ifdef FL_EMULATION_THREADS
  Ordering::acquire(&fence_order);
  Ordering::release(&fence_order);
#endif
}

}  // namespace fl_emulation

using namespace fl_emulation;

#ifndef FL_EMULATION_UBSAN
// Called by -fsanitize=alignment for an access that a GPU refuses.
struct Mismatch {
  const char* file;
  unsigned line, column;
  const char* type;  // its kind, in four bytes, and its name
  unsigned char log_alignment, access;
};
extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1_abort(
    const Mismatch* found, std::uintptr_t address) {
  fail(format("misaligned address %#zx of %s, expected a multiple of %d", std::size_t(address),
              found->type + 4, 1 << found->log_alignment)
           .c_str(),
       found->file, int(found->line));
}
#endif

#define FL_EXPORT extern "C" __attribute__((visibility("default")))

// Sets the static __shared__ variables: `offsets` from fl_emulation_kernels. Every block starts
// with them poisoned.
FL_EXPORT void fl_emulation_set_statics(const long long* offsets, const unsigned long long* bytes,
                                        int count) {
  statics.clear();
  char* base = reinterpret_cast<char*>(const_cast<Kernel*>(fl_emulation_kernels));
  for (int i = 0; i < count; ++i) statics.push_back({base + offsets[i], std::size_t(bytes[i])});
}

FL_EXPORT unsigned long long fl_emulation_argument_bytes(int kernel) {
  return fl_emulation_kernels[kernel].argument_bytes;
}

// Returns 0, or 1 with what went wrong in `message`. One launch at a time.
FL_EXPORT int fl_emulation_launch(int kernel, const unsigned* grid, const unsigned* block,
                                  unsigned long long shared_bytes, const void* argument, int order,
                                  unsigned long long seed, char* message,
                                  unsigned long long capacity) {
  launch.kernel = &fl_emulation_kernels[kernel];
  launch.argument = argument;
  launch.order = order;
  launch.random = seed;
  launch.failed = false;
  launch.error.clear();
  grid_size = dim3(grid[0], grid[1], grid[2]);
  block_size = dim3(block[0], block[1], block[2]);
  launch.threads = int(block[0] * block[1] * block[2]);
  launch.warps = (launch.threads + kWarp - 1) / kWarp;
  std::string error;
  for (int i = 0; i < launch.threads && error.empty(); ++i) {
    if (!threads[i]) {
      Thread* t = new Thread();
      t->number = i;
      if (!make_thread(*t)) {
        delete t;
        error = "no memory for the stacks of the threads";
        break;
      }
      threads[i] = t;
    }
    unsigned x = unsigned(i);
    threads[i]->index = {x % block[0], x / block[0] % block[1], x / block[0] / block[1]};
  }
  if (error.empty()) {
    error = start_threads() ? run_blocks(std::size_t(shared_bytes))
                            : "the system starts no more threads";
    end_threads();
  }
  std::snprintf(message, std::size_t(capacity), "%s", error.c_str());
  return error.empty() ? 0 : 1;
}
