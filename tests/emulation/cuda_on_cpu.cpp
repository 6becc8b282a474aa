// The side of cuda_on_cpu.h that the kernels do not see: fibers, their scheduler, memory with guard pages, and what
// blocks and warps do together. Every emulated library contains it; `arena` is shared between them.
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "cuda_on_cpu.h"

#if !defined(__x86_64__) || defined(SD_EMULATOR_UCONTEXT)
#undef SD_EMULATOR_UCONTEXT
#define SD_EMULATOR_UCONTEXT 1
#else
#define SD_EMULATOR_UCONTEXT 0
#endif
#include <ucontext.h>

typedef unsigned long long u64;

namespace emulator {

Place* here;
Index grid_size, block_size;

namespace {

const char* const NAMES[] = {"__syncwarp",  "a shuffle",        "mma_tf32",    "mma_f16",          "mma_bf16",
                             "ldmatrix_x2", "ldmatrix_x2_trans", "ldmatrix_x4", "ldmatrix_x4_trans"};
const unsigned ALL_LANES = 0xffffffffu;
const int MOST_THREADS = 1024, MOST_WARPS = 32, MOST_BLOCKS = 1024, MOST_COPIES = 256;
const size_t STACK = 64 * 1024;
// Each guard page costs two of the process's mappings, of which a system allows about 65000 by default.
const size_t GUARDED_STACKS = 16384;
// Nothing is mapped so near to memory that a kernel may access.
const size_t SHARED_MOAT = 1 << 20, BUFFER_MOAT = 16 << 20;
const unsigned char POISON = 0xff;  // not a number in every floating-point type

// ---- what the caller gives (emulator.py has the same structures) -------------------------------------------------

// A piece of the caller's memory. The kernel gets a copy of it at the end of a page, with no man's land around.
struct Buffer {
    unsigned char* original;
    u64 size;
    int writable;
    int argument;  // the first one that points into it
    // Only used here.
    unsigned char* data;
    unsigned char* mapping;
    u64 mapped;
};
struct Argument {
    int buffer;  // it points to an offset of this, or is a value if negative
    int unused;
    u64 value;
};

// Memory that serves every launch of a process, whichever library it is in. All zero at first.
struct Arena {
    unsigned char* stacks;
    unsigned char* copies;
    unsigned char* threads;
    u64 count;  // of stacks, and of rings of copies
    u64 thread_bytes;
};

struct Launch {
    const char* name;
    const Kernel* kernel;
    Buffer* buffers;
    Argument* arguments;
    int buffer_count;
    int grid, threads, shared;
    int cooperative;
    int races;  // the kernel is compiled to be searched for them
    u64 seed;
    double seconds;
    Arena* arena;
    char* error;
    u64 error_size;
};

// ---- fibers ------------------------------------------------------------------------------------------------------

#if SD_EMULATOR_UCONTEXT
typedef ucontext_t Context;
void switch_context(Context* from, Context* to) { swapcontext(from, to); }
void make_context(Context* context, unsigned char* stack, size_t size, void (*start)()) {
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = size;
    context->uc_link = nullptr;
    makecontext(context, start, 0);
}
#else
typedef void* Context;  // the stack pointer; what a function must preserve lies there
extern "C" __attribute__((visibility("hidden"))) void sd_emulator_switch(Context* from, Context to);
__asm__(
    ".text\n"
    ".globl sd_emulator_switch\n"
    ".hidden sd_emulator_switch\n"
    ".type sd_emulator_switch,@function\n"
    "sd_emulator_switch:\n"
    "    pushq %rbp\n"
    "    pushq %rbx\n"
    "    pushq %r12\n"
    "    pushq %r13\n"
    "    pushq %r14\n"
    "    pushq %r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq %rsi, %rsp\n"
    "    popq %r15\n"
    "    popq %r14\n"
    "    popq %r13\n"
    "    popq %r12\n"
    "    popq %rbx\n"
    "    popq %rbp\n"
    "    ret\n"
    ".size sd_emulator_switch,.-sd_emulator_switch\n");
inline void switch_context(Context* from, Context* to) { sd_emulator_switch(from, *to); }
void make_context(Context* context, unsigned char* stack, size_t size, void (*start)()) {
    // Six registers, the address that `ret` goes to, and the one that `start` would return to: a function expects the
    // stack to be a multiple of 16 before its caller pushed that.
    void** top = (void**)(stack + size);
    *--top = nullptr;
    *--top = (void*)start;
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    *context = top;
}
#endif

struct Block;
struct Warp;

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    unsigned group;
    unsigned short size;
    bool valid, done;
    int line;
};

struct Thread : Place {
    Context context;
    Block* home;
    Warp* warp;
    unsigned lane;
    int line;              // of the last call of something here
    const char* waits_in;  // null: it does not wait
    // What it does with its warp.
    Together what;
    unsigned mask;
    const void* in;
    void* out;
    // What it awaits.
    const unsigned* counter;
    unsigned count;
    Thread* next_awaiting;
    // Its asynchronous copies, those from `first` to before `end`, in a ring.
    Copy* copies;
    unsigned first, end, group;
};

struct Warp {
    unsigned existing, ended;
    unsigned ready;    // can go on
    unsigned arrived;  // at what the warp does together
    unsigned syncs;    // how often it did
    unsigned number;
    Thread* threads;
};

// A read or a write of two bytes of shared memory, for the detection of races.
struct Access {
    enum Kind : unsigned short { NONE, ONE_THREAD, ONE_WARP, MANY_WARPS };
    unsigned barriers, syncs;  // of the block and the warp before it
    unsigned short thread;
    Kind kind;
};
struct Cell {
    Access read, write;
};

struct Block {
    unsigned number;
    int slot;
    Thread* threads;
    Warp warps[MOST_WARPS];
    unsigned ready_warps;
    int alive;
    int at_barrier, barrier_line;
    unsigned barriers;  // passed so far
    // From a multiple of the page size to `shared`, and from the end of `shared` to another, nothing may be written.
    unsigned char *shared, *low, *high;
    unsigned char* mapping;
    size_t mapped;
    Cell* cells;
};

// ---- the launch under way ----------------------------------------------------------------------------------------

struct Run {
    Launch* launch;
    void* values[64];
    // Blocks that live at once.
    Block* blocks;
    int slots;
    u64 runnable[MOST_BLOCKS / 64];
    unsigned* order;  // of the blocks of the grid
    int next, live;
    Block* finished;
    Thread* awaiting;
    // The scheduler's state.
    Context main;
    Block* block;
    unsigned warp;
    int budget;
    enum Mode { LOWEST, HIGHEST, ONE_WARP, ANY } mode;
    int starved;  // a slot that has to wait for all others
    u64 random;
    unsigned until_preempted;
    // Errors.
    volatile bool active;
    pthread_t owner;
    sigjmp_buf give_up;
} run;

bool shuffled() { return run.launch->seed != 0; }
size_t page() {
    static const size_t size = sysconf(_SC_PAGESIZE);
    return size;
}
size_t rounded(size_t size, size_t to) { return (size + to - 1) / to * to; }

// xorshift64*
unsigned draw() {
    u64 x = run.random;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    run.random = x;
    return (unsigned)(x * 0x2545f4914f6cdd1dull >> 32);
}
unsigned draw(unsigned below) { return (unsigned)((u64)draw() * below >> 32); }

Thread& self() { return *(Thread*)here; }

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
    Launch& launch = *run.launch;
    size_t used = snprintf(launch.error, launch.error_size, "kernel %s", launch.name);
    if (here) {
        used += snprintf(launch.error + used, launch.error_size - used, ", block %u, thread %u", here->block.x,
                         here->thread.x);
        if (self().line) used += snprintf(launch.error + used, launch.error_size - used, ", line %d", self().line);
    }
    used += snprintf(launch.error + used, launch.error_size - used, ": ");
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(launch.error + used, launch.error_size - used, format, arguments);
    va_end(arguments);
    // The fibers are left where they are: kernels have nothing to clean up.
    siglongjmp(run.give_up, 1);
}

// ---- scheduler ---------------------------------------------------------------------------------------------------

void make_ready(Block& block, Warp& warp, unsigned lanes) {
    if (!lanes) return;
    warp.ready |= lanes;
    block.ready_warps |= 1u << warp.number;
    run.runnable[block.slot / 64] |= 1ull << block.slot % 64;
}

// A bit that is set, from `start` upwards and round.
unsigned bit_from(unsigned bits, unsigned start) {
    const unsigned turned = start ? bits >> start | bits << (32 - start) : bits;
    return (__builtin_ctz(turned) + start) % 32;
}

// How to go on for a while: which block, which of its threads, how long.
bool choose_block() {
    const int words = (run.slots + 63) / 64;
    if (!shuffled()) {
        run.mode = Run::LOWEST;
        run.budget = 0x7fffffff;
        for (int i = 0; i < words; ++i)
            if (run.runnable[i]) {
                run.block = run.blocks + i * 64 + __builtin_ctzll(run.runnable[i]);
                return true;
            }
        return false;
    }
    if (!draw(16)) run.starved = (int)draw(run.slots);
    int found = -1;
    const int start = (int)draw(run.slots);
    for (int i = 0; i < run.slots; ++i) {
        const int slot = (start + i) % run.slots;
        if (!(run.runnable[slot / 64] >> slot % 64 & 1)) {
            // Nothing of 64 blocks: on to the next ones.
            if (!run.runnable[slot / 64] && slot % 64 == 0) i += 63 < run.slots - 1 - slot ? 63 : run.slots - 1 - slot;
            continue;
        }
        found = slot;
        if (slot != run.starved) break;
    }
    if (found < 0) return false;
    run.block = run.blocks + found;
    run.mode = (Run::Mode)draw(4);
    run.warp = draw(32);
    run.budget = 1 << draw(14);
    return true;
}

// The fiber to go on with; null when none can.
Thread* pick() {
    if (--run.budget <= 0 || !run.block || !run.block->ready_warps) {
        if (!choose_block()) return nullptr;
    }
    Block& block = *run.block;
    unsigned w, lane;
    switch (run.mode) {
        case Run::LOWEST:
            w = __builtin_ctz(block.ready_warps);
            lane = __builtin_ctz(block.warps[w].ready);
            break;
        case Run::HIGHEST:
            w = 31 - __builtin_clz(block.ready_warps);
            lane = 31 - __builtin_clz(block.warps[w].ready);
            break;
        case Run::ONE_WARP:
            w = run.warp = bit_from(block.ready_warps, run.warp);
            lane = bit_from(block.warps[w].ready, draw(32));
            break;
        default:
            w = bit_from(block.ready_warps, draw(32));
            lane = bit_from(block.warps[w].ready, draw(32));
    }
    Warp& warp = block.warps[w];
    warp.ready &= ~(1u << lane);
    if (!warp.ready) {
        block.ready_warps &= ~(1u << w);
        if (!block.ready_warps) run.runnable[block.slot / 64] &= ~(1ull << block.slot % 64);
    }
    return warp.threads + lane;
}

// Goes on with another fiber, or with main when no fiber can go on. Returns when this one is picked.
__attribute__((noinline)) void suspend() {
    Thread* const from = &self();
    Thread* const to = pick();
    if (to == from) return;
    here = to;
    switch_context(&from->context, to ? &to->context : &run.main);
}

// Lets others go first.
void yield() {
    Thread& t = self();
    make_ready(*t.home, *t.warp, 1u << t.lane);
    suspend();
}
void yield_perhaps() {
    if (shuffled() && !(draw() & 3)) yield();
}

void wait_in(const char* what) {
    Thread& t = self();
    t.waits_in = what;
    suspend();
    t.waits_in = nullptr;
}

// Of every fiber: the kernel, and how it ends.
void fiber() {
    run.launch->kernel->call(run.values);
    Thread& t = self();
    Block& block = *t.home;
    Warp& warp = *t.warp;
    t.line = 0;
    if (block.at_barrier)
        fail("it ends while %d threads of its block wait in __syncthreads at line %d", block.at_barrier,
             block.barrier_line);
    for (unsigned lanes = warp.arrived; lanes; lanes &= lanes - 1) {
        const Thread& other = warp.threads[__builtin_ctz(lanes)];
        if (other.mask >> t.lane & 1)
            fail("it ends while thread %u waits for it in %s at line %d", other.thread.x, NAMES[other.what],
                 other.line);
    }
    warp.ended |= 1u << t.lane;
    t.waits_in = "its end";
    if (--block.alive == 0) {
        run.finished = &block;
        here = nullptr;
        switch_context(&t.context, &run.main);
    }
    suspend();
    abort();  // an ended fiber is never ready
}

// ---- blocks ------------------------------------------------------------------------------------------------------

void* reserve(size_t size) {
    void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail("no memory for %zu bytes", size);
    return p;
}

void map_guarded(size_t size, size_t moat, unsigned char*& mapping, size_t& mapped, unsigned char*& low,
                 unsigned char*& high) {
    const size_t body = rounded(size ? size : 1, page());
    mapped = body + 2 * moat;
    mapping = (unsigned char*)mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) {
        mapping = nullptr;
        fail("no memory to emulate it in");
    }
    low = mapping + moat;
    high = low + body;
    if (mprotect(low, body, PROT_READ | PROT_WRITE)) fail("no memory to emulate it in");
    memset(low, POISON, body);
}

bool poisoned(const unsigned char* from, const unsigned char* to) {
    for (; from != to; ++from)
        if (*from != POISON) return false;
    return true;
}

u64 cell_bytes() { return rounded(((u64)run.launch->shared / 2 + 1) * sizeof(Cell), page()); }

void map_block(Block& block) {
    const Launch& launch = *run.launch;
    map_guarded(launch.shared, SHARED_MOAT, block.mapping, block.mapped, block.low, block.high);
    // The end lies against the guard, so an access beyond is found; the beginning is as aligned as the size.
    block.shared = block.high - rounded(launch.shared, 16);
}

void start_block(Block& block, unsigned number) {
    const Launch& launch = *run.launch;
    block.number = number;
    block.alive = launch.threads;
    block.at_barrier = 0;
    block.barriers = 0;
    memset(block.low, POISON, block.high - block.low);
    if (launch.races) {
        if (block.cells) munmap(block.cells, cell_bytes());
        block.cells = nullptr;
        block.cells = (Cell*)reserve(cell_bytes());
    }
    for (int w = 0; w * 32 < launch.threads; ++w) {
        Warp& warp = block.warps[w];
        const int lanes = launch.threads - w * 32;
        warp.existing = lanes >= 32 ? ALL_LANES : (1u << lanes) - 1;
        warp.ended = warp.arrived = warp.syncs = 0;
        warp.number = w;
        warp.threads = block.threads + 32 * w;
        make_ready(block, warp, warp.existing);
    }
    Arena& arena = *launch.arena;
    for (int i = 0; i < launch.threads; ++i) {
        Thread& t = block.threads[i];
        const size_t at = (size_t)block.slot * launch.threads + i;
        t.thread = {(unsigned)i, 0, 0};
        t.block = {number, 0, 0};
        t.shared = block.shared;
        t.home = &block;
        t.warp = &block.warps[i / 32];
        t.lane = i % 32;
        t.line = 0;
        t.waits_in = nullptr;
        t.copies = (Copy*)(arena.copies + at * MOST_COPIES * sizeof(Copy));
        t.first = t.end = t.group = 0;
        // Stacks are a power of two apart: without these steps their ends would share few sets of the caches.
        const size_t size = STACK - page() - at % 64 * 64;
        make_context(&t.context, arena.stacks + at * STACK + page(), size, fiber);
    }
    ++run.live;
}

void finish_block(Block& block) {
    const Launch& launch = *run.launch;
    if (!poisoned(block.low, block.shared))
        fail("block %u has written before the beginning of its shared memory", block.number);
    if (!poisoned(block.shared + launch.shared, block.high))
        fail("block %u has written after the end of its shared memory (%d bytes)", block.number, launch.shared);
    --run.live;
}

// ---- why nothing goes on -----------------------------------------------------------------------------------------

[[noreturn]] void report_deadlock() {
    char text[1500];
    size_t used = 0;
    int told = 0;
    for (int slot = 0; slot < run.slots; ++slot) {
        const Block& block = run.blocks[slot];
        if (!block.alive) continue;
        if (told++ == 4) {
            used += snprintf(text + used, sizeof text - used, "; and so on");
            break;
        }
        used += snprintf(text + used, sizeof text - used, "%sblock %u: ", told > 1 ? "; " : "", block.number);
        // Each place where a thread waits, with the number of threads there, in the order of the first.
        bool first = true;
        for (int i = 0; i < run.launch->threads && used < sizeof text - 300; ++i) {
            const Thread& t = block.threads[i];
            int count = 0;
            bool seen = false;
            for (int j = 0; j < run.launch->threads; ++j) {
                const Thread& other = block.threads[j];
                if (other.line != t.line || other.waits_in != t.waits_in) continue;
                seen = seen || j < i;
                ++count;
            }
            if (seen) continue;
            used += snprintf(text + used, sizeof text - used, "%s%d at %s", first ? "threads: " : ", ", count,
                             t.waits_in ? t.waits_in : "?");
            if (t.line) used += snprintf(text + used, sizeof text - used, ", line %d", t.line);
            if (t.waits_in && !strcmp(t.waits_in, "await"))
                used += snprintf(text + used, sizeof text - used, " (count %u of %u)", *t.counter, t.count);
            first = false;
        }
    }
    here = nullptr;
    fail("deadlock: %s", text);
}

// Awaiting fibers whose counter was changed by something else than announce_to.
bool wake_awaiting(const unsigned* counter) {
    bool any = false;
    for (Thread** link = &run.awaiting; *link;) {
        Thread& t = **link;
        if ((counter && t.counter != counter) || *t.counter < t.count) {
            link = &t.next_awaiting;
            continue;
        }
        *link = t.next_awaiting;
        make_ready(*t.home, *t.warp, 1u << t.lane);
        any = true;
    }
    return any;
}

void run_all() {
    Launch& launch = *run.launch;
    for (int slot = 0; slot < run.slots; ++slot) {
        map_block(run.blocks[slot]);
        start_block(run.blocks[slot], run.order[run.next++]);
    }
    while (run.live) {
        here = pick();
        if (!here) {
            if (wake_awaiting(nullptr)) continue;
            report_deadlock();
        }
        switch_context(&run.main, &self().context);
        here = nullptr;
        if (run.finished) {
            Block& block = *run.finished;
            run.finished = nullptr;
            finish_block(block);
            if (run.next < launch.grid) start_block(block, run.order[run.next++]);
        }
    }
}

// ---- faults ------------------------------------------------------------------------------------------------------

const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGVTALRM};
const int SIGNAL_COUNT = sizeof SIGNALS / sizeof *SIGNALS;
struct sigaction actions_before[SIGNAL_COUNT];

extern "C" const char __ehdr_start __attribute__((visibility("hidden")));

// Where an instruction is, counted from the beginning of this library.
u64 offset_of(u64 pc) { return pc - (u64)(size_t)&__ehdr_start; }

u64 pc_of(const void* context) {
#if defined(__x86_64__) && defined(REG_RIP)
    return (u64)((const ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
    return (u64)((const ucontext_t*)context)->uc_mcontext.pc;
#else
    (void)context;
    return 0;
#endif
}

[[noreturn]] void explain_fault(int signal, const siginfo_t* info, u64 pc) {
    const Launch& launch = *run.launch;
    const unsigned char* address = (const unsigned char*)info->si_addr;
    char where[32] = "";
    if (pc) snprintf(where, sizeof where, " [pc 0x%llx]", offset_of(pc));
    if (signal == SIGVTALRM) fail("it did not end in %g seconds%s", launch.seconds, where);
    if (signal == SIGFPE) fail("division by zero%s", where);
    if (signal == SIGILL) fail("an illegal instruction%s", where);
    for (int i = 0; i < launch.buffer_count; ++i) {
        const Buffer& b = launch.buffers[i];
        if (!b.mapping || address < b.mapping || address >= b.mapping + b.mapped) continue;
        if (address >= b.data && address < b.data + b.size)
            fail("it writes to argument %d, which it takes as const%s", b.argument, where);
        fail("out of bounds: byte %lld of the %llu of argument %d%s", (long long)(address - b.data), b.size, b.argument,
             where);
    }
    for (int slot = 0; slot < run.slots; ++slot) {
        const Block& block = run.blocks[slot];
        if (block.mapping && address >= block.mapping && address < block.mapping + block.mapped)
            fail("out of bounds: byte %lld of the %d of shared memory of block %u%s",
                 (long long)(address - block.shared), launch.shared, block.number, where);
    }
    const unsigned char* stacks = launch.arena->stacks;
    if (address >= stacks && address < stacks + launch.arena->count * STACK) fail("stack overflow%s", where);
    if ((size_t)address < 1 << 20) fail("a null or misaligned pointer%s", where);
    fail("a wild pointer%s", where);
}

void on_signal(int signal, siginfo_t* info, void* context) {
    if (run.active && pthread_equal(pthread_self(), run.owner)) {
        run.active = false;  // a fault while this one is explained is not ours
        explain_fault(signal, info, pc_of(context));
    }
    // Somebody else's: as if there were no emulator.
    for (int i = 0; i < SIGNAL_COUNT; ++i)
        if (SIGNALS[i] == signal) sigaction(signal, &actions_before[i], nullptr);
}

struct Guard {
    stack_t stack_before;
    void* stack;
    size_t stack_size;
    timer_t timer;
    bool timed;
};

void begin_guard(Guard& guard, double seconds) {
    // Faults are handled on a stack of their own, since they may be those of a stack.
    guard.stack_size = 256 * 1024;
    guard.stack = mmap(nullptr, guard.stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stack_t stack = {};
    stack.ss_sp = guard.stack;
    stack.ss_size = guard.stack_size;
    sigaltstack(&stack, &guard.stack_before);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigfillset(&action.sa_mask);
    for (int i = 0; i < SIGNAL_COUNT; ++i) sigaction(SIGNALS[i], &action, &actions_before[i]);
    // Processor time of this thread, so that a busy machine does not matter.
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGVTALRM;
#ifdef sigev_notify_thread_id
    event.sigev_notify_thread_id = (int)syscall(SYS_gettid);
#else
    event._sigev_un._tid = (int)syscall(SYS_gettid);
#endif
    guard.timed = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &guard.timer) == 0;
    if (guard.timed) {
        itimerspec limit = {};
        limit.it_value.tv_sec = (time_t)seconds;
        limit.it_value.tv_nsec = (long)((seconds - (double)limit.it_value.tv_sec) * 1e9) + 1;
        timer_settime(guard.timer, 0, &limit, nullptr);
    }
}

void end_guard(Guard& guard) {
    if (guard.timed) timer_delete(guard.timer);
    for (int i = 0; i < SIGNAL_COUNT; ++i) sigaction(SIGNALS[i], &actions_before[i], nullptr);
    sigaltstack(&guard.stack_before, nullptr);
    munmap(guard.stack, guard.stack_size);
}

// ---- memory ------------------------------------------------------------------------------------------------------

void grow(Arena& arena, u64 count) {
    const u64 thread_bytes = rounded(count * sizeof(Thread), page());
    if (arena.thread_bytes < thread_bytes) {
        if (arena.threads) munmap(arena.threads, arena.thread_bytes);
        arena.thread_bytes = 0;
        arena.threads = (unsigned char*)reserve(thread_bytes);
        arena.thread_bytes = thread_bytes;
    }
    if (arena.count >= count) return;
    const size_t copies = MOST_COPIES * sizeof(Copy);
    if (arena.stacks) munmap(arena.stacks, arena.count * STACK);
    if (arena.copies) munmap(arena.copies, arena.count * copies);
    arena.stacks = arena.copies = nullptr;
    arena.count = 0;
    u64 room = 256;
    while (room < count) room *= 2;
    arena.stacks = (unsigned char*)reserve(room * STACK);
    arena.copies = (unsigned char*)reserve(room * copies);
    arena.count = room;
    for (u64 i = 0; i < room && i < GUARDED_STACKS; ++i) mprotect(arena.stacks + i * STACK, page(), PROT_NONE);
}

void map_buffers() {
    Launch& launch = *run.launch;
    for (int i = 0; i < launch.buffer_count; ++i) {
        Buffer& b = launch.buffers[i];
        unsigned char *low, *high;
        size_t mapped = 0;
        map_guarded(b.size, BUFFER_MOAT, b.mapping, mapped, low, high);
        b.mapped = mapped;
        b.data = high - rounded(b.size, 16);
        memcpy(b.data, b.original, b.size);
        if (!b.writable) mprotect(low, high - low, PROT_READ);
    }
    for (int i = 0; i < launch.kernel->count; ++i) {
        Argument& a = launch.arguments[i];
        if (a.buffer >= 0) a.value += (u64)(size_t)launch.buffers[a.buffer].data;
        run.values[i] = &a.value;
    }
}

void copy_back() {
    for (int i = 0; i < run.launch->buffer_count; ++i) {
        const Buffer& b = run.launch->buffers[i];
        if (!b.writable) continue;
        const unsigned char *low = b.mapping + BUFFER_MOAT, *high = b.mapping + b.mapped - BUFFER_MOAT;
        if (!poisoned(low, b.data)) fail("it has written before the beginning of argument %d", b.argument);
        if (!poisoned(b.data + b.size, high)) fail("it has written after the end of argument %d", b.argument);
    }
    for (int i = 0; i < run.launch->buffer_count; ++i) {
        const Buffer& b = run.launch->buffers[i];
        if (b.writable) memcpy(b.original, b.data, b.size);
    }
}

void set_up() {
    Launch& launch = *run.launch;
    run.random = launch.seed * 0x9e3779b97f4a7c15ull + 1;
    if (!run.random) run.random = 1;
    for (int i = 0; i < 8; ++i) draw();
    run.slots = launch.grid;
    // Blocks that need not live at once do so in part, as it comes.
    if (!launch.cooperative) run.slots = shuffled() ? 1 + (int)draw(launch.grid < 8 ? launch.grid : 8) : 1;
    if (run.slots > MOST_BLOCKS) fail("more than %d blocks at once", MOST_BLOCKS);
    grid_size = {(unsigned)launch.grid, 1, 1};
    block_size = {(unsigned)launch.threads, 1, 1};
    grow(*launch.arena, (u64)run.slots * launch.threads);
    run.order = (unsigned*)malloc(launch.grid * sizeof(unsigned));
    for (int i = 0; i < launch.grid; ++i) run.order[i] = i;
    if (shuffled())
        for (int i = launch.grid - 1; i > 0; --i) {
            const int j = (int)draw(i + 1);
            const unsigned kept = run.order[i];
            run.order[i] = run.order[j];
            run.order[j] = kept;
        }
    run.blocks = (Block*)calloc(run.slots, sizeof(Block));
    for (int i = 0; i < run.slots; ++i) {
        run.blocks[i].slot = i;
        run.blocks[i].threads = (Thread*)launch.arena->threads + (size_t)i * launch.threads;
    }
    run.starved = shuffled() ? (int)draw(run.slots) : -1;
    run.until_preempted = 64;
    map_buffers();
}

void tear_down() {
    Launch& launch = *run.launch;
    for (int i = 0; run.blocks && i < run.slots; ++i) {
        const Block& block = run.blocks[i];
        if (block.mapping) munmap(block.mapping, block.mapped);
        if (block.cells) munmap(block.cells, cell_bytes());
    }
    for (int i = 0; i < launch.buffer_count; ++i)
        if (launch.buffers[i].mapping) munmap(launch.buffers[i].mapping, launch.buffers[i].mapped);
    free(run.blocks);
    free(run.order);
    // A big launch's stacks are given back; those of usual ones are kept, since touching them anew takes time.
    Arena& arena = *launch.arena;
    if (arena.stacks && (u64)run.slots * launch.threads > GUARDED_STACKS)
        madvise(arena.stacks, arena.count * STACK, MADV_DONTNEED);
}

// ---- asynchronous copies -----------------------------------------------------------------------------------------

void note_access(Thread& t, const void* address, unsigned size, bool writes, u64 pc);

bool in_shared(const Thread& t, const void* address, unsigned size) {
    const unsigned char* p = (const unsigned char*)address;
    return p >= t.shared && p + size <= t.shared + run.launch->shared;
}

void carry_out(Copy& copy) {
    if (copy.done) return;
    if (copy.valid)
        memcpy(copy.to, copy.from, copy.size);
    else
        memset(copy.to, 0, copy.size);
    copy.done = true;
}

// Some of the copies under way happen now, in any order: all of them, one, mostly none.
void copy_perhaps(Thread& t) {
    if (!shuffled() || t.first == t.end) return;
    const unsigned what = draw(16);
    if (what == 0)
        for (unsigned i = t.first; i != t.end; ++i) carry_out(t.copies[i % MOST_COPIES]);
    else if (what < 4)
        carry_out(t.copies[(t.first + draw(t.end - t.first)) % MOST_COPIES]);
}

// ---- what a warp does together -----------------------------------------------------------------------------------

void do_shuffle(Warp& warp, unsigned mask) {
    for (unsigned lanes = mask; lanes; lanes &= lanes - 1) {
        const Thread& t = warp.threads[__builtin_ctz(lanes)];
        const unsigned source = ((const unsigned*)t.in)[1] % 32;
        if (!(mask >> source & 1))
            fail("a shuffle lets lane %u read lane %u, which takes no part", t.lane, source);
        *(unsigned*)t.out = *(const unsigned*)warp.threads[source].in;
    }
}

// The elements of a register of an operand, as floats. In loops without branches, which compilers turn into few
// instructions: there are many products.
template <Together what>
void unpack(const unsigned (&registers)[192], float (&elements)[what == MMA_TF32 ? 192 : 384]) {
    if (what == MMA_TF32) {
        // The low 13 bits are ignored, not rounded: whoever has not rounded is less exact.
        for (int i = 0; i < 192; ++i) elements[i] = __uint_as_float(registers[i] & 0xffffe000u);
    } else {
        half_bits halves[384];
        memcpy(halves, registers, sizeof halves);
        for (int i = 0; i < 384; ++i)
            elements[i] = what == MMA_F16 ? f16_to_float(halves[i]) : __uint_as_float((unsigned)halves[i] << 16);
    }
}

// The layouts of fragments are those of PTX: lane = 4 g + q; see device.cuh. A register of a is of row g or g + 8 and
// of the first or the second half of the depth, one of b of either half.
template <Together what>
void do_product(Warp& warp) {
    constexpr int each = what == MMA_TF32 ? 1 : 2, half = 4 * each, depth = 2 * half;
    unsigned registers[192];
    float elements[192 * each], a[16][depth], b[depth][8], c[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const unsigned* const in = (const unsigned*)warp.threads[lane].in;
        memcpy(registers + 6 * lane, in, 6 * sizeof(unsigned));
        const int g = lane / 4, q = lane % 4;
        memcpy(&c[g][2 * q], in + 6, 2 * sizeof(float));
        memcpy(&c[g + 8][2 * q], in + 8, 2 * sizeof(float));
    }
    unpack<what>(registers, elements);
    for (int lane = 0; lane < 32; ++lane) {
        const float* const own = elements + 6 * each * lane;
        const int g = lane / 4, k = lane % 4 * each;
        for (int j = 0; j < each; ++j) {
            a[g][k + j] = own[j];
            a[g + 8][k + j] = own[each + j];
            a[g][half + k + j] = own[2 * each + j];
            a[g + 8][half + k + j] = own[3 * each + j];
            b[k + j][g] = own[4 * each + j];
            b[half + k + j][g] = own[5 * each + j];
        }
    }
    for (int m = 0; m < 16; ++m) {
        float sums[8];
        for (int n = 0; n < 8; ++n) sums[n] = c[m][n];
        for (int k = 0; k < depth; ++k)
            for (int n = 0; n < 8; ++n) sums[n] += a[m][k] * b[k][n];
        for (int n = 0; n < 8; ++n) c[m][n] = sums[n];
    }
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, q = lane % 4;
        float* const out = (float*)warp.threads[lane].out;
        memcpy(out, &c[g][2 * q], 2 * sizeof(float));
        memcpy(out + 2, &c[g + 8][2 * q], 2 * sizeof(float));
    }
}

void do_ldmatrix(Warp& warp, int matrices, bool transposed) {
    for (int m = 0; m < matrices; ++m) {
        half_bits matrix[8][8];
        for (int row = 0; row < 8; ++row) {
            Thread& t = warp.threads[8 * m + row];
            const void* const address = *(const void* const*)t.in;
            if (!in_shared(t, address, 16)) fail("ldmatrix: the row of lane %u is not in shared memory", t.lane);
            if ((size_t)address % 16) fail("ldmatrix: the row of lane %u is not aligned to 16 bytes", t.lane);
            if (t.home->cells) note_access(t, address, 16, false, 0);
            memcpy(matrix[row], address, 16);
        }
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, q = lane % 4;
            const unsigned low = transposed ? matrix[2 * q][g] : matrix[g][2 * q];
            const unsigned high = transposed ? matrix[2 * q + 1][g] : matrix[g][2 * q + 1];
            ((unsigned*)warp.threads[lane].out)[m] = low | high << 16;
        }
    }
}

void do_together(Together what, Warp& warp, unsigned mask) {
    switch (what) {
        case SYNC_WARP: ++warp.syncs; break;
        case SHUFFLE: do_shuffle(warp, mask); break;
        case MMA_TF32: do_product<MMA_TF32>(warp); break;
        case MMA_F16: do_product<MMA_F16>(warp); break;
        case MMA_BF16: do_product<MMA_BF16>(warp); break;
        case LDMATRIX_X2: do_ldmatrix(warp, 2, false); break;
        case LDMATRIX_X2_T: do_ldmatrix(warp, 2, true); break;
        case LDMATRIX_X4: do_ldmatrix(warp, 4, false); break;
        case LDMATRIX_X4_T: do_ldmatrix(warp, 4, true); break;
    }
}

// ---- races in shared memory --------------------------------------------------------------------------------------

// Whether `before` is sure to happen before what `t` does now: by a barrier of the block, or of its warp.
bool ordered(const Access& before, const Thread& t) {
    if (before.kind == Access::NONE || before.barriers != t.home->barriers) return true;
    if (before.kind == Access::MANY_WARPS) return false;
    if (before.kind == Access::ONE_THREAD && before.thread == t.thread.x) return true;
    return before.thread / 32 == t.thread.x / 32 && before.syncs != t.warp->syncs;
}

void note_access(Thread& t, const void* address, unsigned size, bool writes, u64 pc) {
    Block& block = *t.home;
    const size_t first = ((const unsigned char*)address - block.shared) / 2;
    for (size_t i = first; i < first + (size + 1) / 2; ++i) {
        Cell& cell = block.cells[i];
        const bool write_races = !ordered(cell.write, t), read_races = writes && !ordered(cell.read, t);
        if (write_races || read_races) {
            const Access& other = write_races ? cell.write : cell.read;
            char where[32] = "";
            if (pc) snprintf(where, sizeof where, " [pc 0x%llx]", offset_of(pc));
            fail("race: it %s byte %zu of shared memory, which thread %u%s has %s, with no barrier between%s",
                 writes ? "writes" : "reads", 2 * i, other.thread, other.kind > Access::ONE_THREAD ? " or another" : "",
                 write_races ? "written" : "read", where);
        }
        const Access now = {block.barriers, t.warp->syncs, (unsigned short)t.thread.x, Access::ONE_THREAD};
        if (writes) {
            cell.write = now;
            cell.read.kind = Access::NONE;
        } else if (ordered(cell.read, t)) {
            cell.read = now;
        } else {
            // Several readers at once: of which warps is all that is kept.
            const bool one_warp = cell.read.kind != Access::MANY_WARPS && cell.read.thread / 32 == t.thread.x / 32;
            cell.read.kind = one_warp ? Access::ONE_WARP : Access::MANY_WARPS;
            cell.read.syncs = now.syncs;
        }
    }
}

// Called at every load and store of a kernel that is compiled to be searched for races.
inline void on_access(const void* address, unsigned size, bool writes, void* pc) {
    if (!here) return;
    Thread& t = self();
    if (in_shared(t, address, size) && size > 1) note_access(t, address, size, writes, (u64)(size_t)pc - 1);
    // Any access is a place to go on with another fiber at.
    if (shuffled() && --run.until_preempted == 0) {
        run.until_preempted = 1 + draw(512);
        yield();
    }
}

}  // namespace

// ---- what kernels call -------------------------------------------------------------------------------------------

void sync_threads(int line) {
    Thread& t = self();
    Block& block = *t.home;
    t.line = line;
    copy_perhaps(t);
    if (block.alive != run.launch->threads)
        fail("__syncthreads, while %d threads of the block have ended", run.launch->threads - block.alive);
    if (!block.at_barrier)
        block.barrier_line = line;
    else if (block.barrier_line != line)
        fail("__syncthreads, while %d threads of the block wait in that of line %d", block.at_barrier,
             block.barrier_line);
    if (++block.at_barrier < run.launch->threads) {
        wait_in("__syncthreads");
        return;
    }
    block.at_barrier = 0;
    ++block.barriers;
    for (int w = 0; w * 32 < run.launch->threads; ++w) {
        Warp& warp = block.warps[w];
        make_ready(block, warp, t.warp == &warp ? warp.existing & ~(1u << t.lane) : warp.existing);
    }
    // The last to come need not be the first to go.
    if (shuffled()) yield();
}

void together(Together what, unsigned mask, const void* in, void* out, int line) {
    Thread& t = self();
    Warp& warp = *t.warp;
    t.line = line;
    copy_perhaps(t);
    if (what >= MMA_TF32 && warp.existing != ALL_LANES) fail("%s needs a warp of 32 lanes", NAMES[what]);
    mask &= warp.existing;
    const unsigned own = 1u << t.lane;
    if (!(mask & own)) fail("%s with a mask that leaves out the calling lane %u", NAMES[what], t.lane);
    if (warp.ended & mask) fail("%s, while lanes 0x%x of the warp have ended", NAMES[what], warp.ended & mask);
    t.what = what;
    t.mask = mask;
    t.in = in;
    t.out = out;
    const bool last = (warp.arrived & mask) == (mask & ~own);
    // One of the others before the last lane, so that divergence is told where it happens; all of them then.
    unsigned others = warp.arrived & mask;
    if (!last) others &= -others;
    for (; others; others &= others - 1) {
        const Thread& other = warp.threads[__builtin_ctz(others)];
        if (other.what != what || other.mask != mask || other.line != line)
            fail("the warp diverges: lane %u is at %s, lane %u at %s, line %d", t.lane, NAMES[what], other.lane,
                 NAMES[other.what], other.line);
    }
    if (!last) {
        warp.arrived |= own;
        wait_in(NAMES[what]);
        return;
    }
    warp.arrived &= ~mask;
    do_together(what, warp, mask);
    make_ready(*t.home, warp, mask & ~own);
    yield_perhaps();
}

void copy_async(void* shared, const void* global, unsigned size, bool valid, int line) {
    Thread& t = self();
    t.line = line;
    if (!in_shared(t, shared, size))
        fail("cp_async_%u to byte %lld of the %d of shared memory", size,
             (long long)((unsigned char*)shared - t.shared), run.launch->shared);
    if ((size_t)shared % size) fail("cp_async_%u to an address that is not aligned", size);
    if ((size_t)global % size) fail("cp_async_%u from an address that is not aligned", size);
    if (t.end - t.first == (unsigned)MOST_COPIES) fail("more than %d copies of one thread under way", MOST_COPIES);
    if (t.home->cells) note_access(t, shared, size, true, 0);
    // Whoever reads too early gets this.
    memset(shared, POISON, size);
    t.copies[t.end++ % MOST_COPIES] = {(unsigned char*)shared, (const unsigned char*)global, t.group,
                                       (unsigned short)size,   valid,                         false,
                                       line};
    copy_perhaps(t);
}

void copy_commit(int line) {
    Thread& t = self();
    t.line = line;
    ++t.group;
    copy_perhaps(t);
    yield_perhaps();
}

void copy_wait(int groups, int line) {
    Thread& t = self();
    yield_perhaps();
    while (t.first != t.end) {
        Copy& copy = t.copies[t.first % MOST_COPIES];
        if ((int)(t.group - copy.group) <= groups) break;
        t.line = copy.line;  // where to look if its source cannot be read
        carry_out(copy);
        if (t.home->cells) note_access(t, copy.to, copy.size, true, 0);
        ++t.first;
    }
    t.line = line;
    copy_perhaps(t);
    yield_perhaps();
}

void announce_to(unsigned* counter, int line) {
    self().line = line;
    yield_perhaps();
    ++*counter;
    wake_awaiting(counter);
    yield_perhaps();
}

void await_count(const unsigned* counter, unsigned count, int line) {
    Thread& t = self();
    t.line = line;
    yield_perhaps();
    while (*(const volatile unsigned*)counter < count) {
        t.counter = counter;
        t.count = count;
        t.next_awaiting = run.awaiting;
        run.awaiting = &t;
        wait_in("await");
    }
    yield_perhaps();
}

void trap(int line) {
    self().line = line;
    fail("trap: what stop_unless asks for does not hold");
}

}  // namespace emulator

// ---- what compilers call -----------------------------------------------------------------------------------------

// Of code compiled with -fsanitize=undefined: each handler's first argument begins with the place in the source.
namespace {
struct SourcePlace {
    const char* file;
    unsigned line, column;
};
[[noreturn]] void undefined(const void* data, const char* what) {
    const SourcePlace& place = *(const SourcePlace*)data;
    if (emulator::here) ((emulator::Thread*)emulator::here)->line = (int)place.line;
    emulator::fail("%s", what);
}
}  // namespace
#define SD_HANDLER(name, what) \
    extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_##name##_abort(const void* data) { \
        undefined(data, what);                                                                              \
    }
SD_HANDLER(type_mismatch_v1, "an access through a null or misaligned pointer")
SD_HANDLER(out_of_bounds, "an index outside of an array")
SD_HANDLER(add_overflow, "an int overflows in a sum")
SD_HANDLER(sub_overflow, "an int overflows in a difference")
SD_HANDLER(mul_overflow, "an int overflows in a product")
SD_HANDLER(negate_overflow, "an int overflows in a negation")
SD_HANDLER(divrem_overflow, "division by zero")
SD_HANDLER(shift_out_of_bounds, "a shift by too many bits or of a negative number")

// Of code compiled with -fsanitize=thread.
#define SD_HOOK extern "C" __attribute__((visibility("hidden"))) void
#define SD_HOOKS(size)                                                                                              \
    SD_HOOK __tsan_read##size(void* p) { emulator::on_access(p, size, false, __builtin_return_address(0)); }         \
    SD_HOOK __tsan_write##size(void* p) { emulator::on_access(p, size, true, __builtin_return_address(0)); }         \
    SD_HOOK __tsan_unaligned_read##size(void* p) { emulator::on_access(p, size, false, __builtin_return_address(0)); } \
    SD_HOOK __tsan_unaligned_write##size(void* p) { emulator::on_access(p, size, true, __builtin_return_address(0)); }
SD_HOOKS(1)
SD_HOOKS(2)
SD_HOOKS(4)
SD_HOOKS(8)
SD_HOOKS(16)
SD_HOOK __tsan_read_range(void* p, unsigned long size) {
    emulator::on_access(p, (unsigned)size, false, __builtin_return_address(0));
}
SD_HOOK __tsan_write_range(void* p, unsigned long size) {
    emulator::on_access(p, (unsigned)size, true, __builtin_return_address(0));
}
SD_HOOK __tsan_func_entry(void*) {}
SD_HOOK __tsan_func_exit() {}
SD_HOOK __tsan_init() {}

// ---- what Python calls -------------------------------------------------------------------------------------------

// 0, or 1 with a text in launch->error. One launch at a time in a process.
extern "C" __attribute__((visibility("default"))) int sd_emulate(emulator::Launch* launch) {
    using namespace emulator;
    memset(&run, 0, sizeof run);
    here = nullptr;
    run.launch = launch;
    run.owner = pthread_self();
    Guard guard;
    begin_guard(guard, launch->seconds);
    int failed = sigsetjmp(run.give_up, 1);
    if (!failed) {
        set_up();
        run.active = true;
        run_all();
        run.active = false;
        copy_back();
    }
    run.active = false;
    here = nullptr;
    end_guard(guard);
    tear_down();
    return failed;
}
