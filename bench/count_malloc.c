// Counts the bytes that a process holds through malloc, between start and stop.
//
// Preloaded into the benchmark (memory.py), it stands before glibc's allocator, so that everything
// is seen alike: torch's tensors, the scratch of C++ kernels, the workspaces of libraries. Outside
// of a measurement each function is one untaken branch longer than glibc's own.
//
// A running total needs no table of blocks: releasing one that is older than the measurement
// lowers the total below its start, as it does the memory that the process holds.

#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* block, size_t size);
void* __libc_memalign(size_t alignment, size_t size);
void __libc_free(void* block);

static atomic_bool counting;
static atomic_llong held, peak;

static void* taken(void* block) {
  if (block && atomic_load_explicit(&counting, memory_order_relaxed)) {
    const long long size = (long long)malloc_usable_size(block);
    const long long now = atomic_fetch_add(&held, size) + size;
    long long most = atomic_load(&peak);
    while (now > most && !atomic_compare_exchange_weak(&peak, &most, now)) {
    }
  }
  return block;
}

static void given_back(void* block) {
  if (block && atomic_load_explicit(&counting, memory_order_relaxed)) {
    atomic_fetch_sub(&held, (long long)malloc_usable_size(block));
  }
}

void* malloc(size_t size) { return taken(__libc_malloc(size)); }

void* calloc(size_t count, size_t size) { return taken(__libc_calloc(count, size)); }

void free(void* block) {
  given_back(block);
  __libc_free(block);
}

void* realloc(void* block, size_t size) {
  given_back(block);
  void* moved = __libc_realloc(block, size);
  if (!moved && size) taken(block);  // failed: the old block is still held
  return taken(moved);
}

void* memalign(size_t alignment, size_t size) { return taken(__libc_memalign(alignment, size)); }

void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** block, size_t alignment, size_t size) {
  if (alignment % sizeof(void*) || !alignment || (alignment & (alignment - 1))) return EINVAL;
  void* const made = memalign(alignment, size);
  if (!made) return ENOMEM;
  *block = made;
  return 0;
}

void count_malloc_start(void) {
  atomic_store(&held, 0);
  atomic_store(&peak, 0);
  atomic_store(&counting, 1);
}

long long count_malloc_stop(void) {
  atomic_store(&counting, 0);
  return atomic_load(&peak);
}
