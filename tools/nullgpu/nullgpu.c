/* A CUDA device without a GPU, for LD_PRELOAD: memory, streams and launch checks are real, kernels
 * compute nothing.
 *
 * Device addresses lie in a reserved range that nobody may touch (a host access faults, as on a
 * card); their bytes live in a shadow range at a fixed distance, as zero pages that cost nothing
 * until a copy writes them. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define MIB ((size_t)1 << 20)
#define PAGE (2 * MIB) /* what a card hands out */
#define SPAN \
    ((size_t)4 << 40) /* addresses of one device; never used twice, so a stale pointer is found */
#define DEVICES 4
#define EXPORT __attribute__((visibility("default")))

/* ---- counters ---- */
#define COUNTERS(X) \
    X(launch) \
    X(blas) X(graph_launch) X(h2d) X(d2h) X(d2d) X(h2d_bytes) X(d2h_bytes) X(d2d_bytes) X(memset) \
        X(sync_stream) X(sync_device) X(sync_event) X(sync_copy) X(malloc) X(free) X(oom) \
            X(host_alloc) X(host_alloc_bytes) X(host_register) X(host_register_bytes) X(bad_copy) \
                X(bad_launch) X(unknown)
enum {
#define X(n) C_##n,
    COUNTERS(X)
#undef X
        C_COUNT
};
static const char *counter_names[] = {
#define X(n) #n,
    COUNTERS(X)
#undef X
};
static uint64_t counters[C_COUNT];
#define COUNT(n) __atomic_fetch_add(&counters[C_##n], 1, __ATOMIC_RELAXED)
#define ADD(n, v) __atomic_fetch_add(&counters[C_##n], (v), __ATOMIC_RELAXED)

/* ---- the card ---- */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int device_count = 1, major = 8, minor = 9, verbose, copying = 1;
static size_t capacity, used[DEVICES], next[DEVICES];
static char *base; /* device addresses: [base, base + DEVICES * SPAN); the shadow follows */
#define SHADOW (DEVICES * SPAN)
static __thread int current;
static __thread cudaError_t last_error;

typedef struct {
    char *at;
    size_t size, charge;
    int kind;
} Range; /* kind: 0 device, 1 host, 2 registered, 3 managed, 4 virtual */
static Range *ranges;
static size_t range_count, range_room;
static size_t registered, pin_limit; /* of pages that were ever registered, and at most */

static double env_number(const char *name, double otherwise) {
    const char *value = getenv(name);
    return value && *value ? atof(value) : otherwise;
}

static void start(void) {
    const char *cc = getenv("NULLGPU_CC");
    if (cc) sscanf(cc, "%d.%d", &major, &minor);
    capacity = (size_t)(env_number("NULLGPU_GIB", 8) * 1024) * MIB;
    device_count = (int)env_number("NULLGPU_DEVICES", 1);
    if (device_count > DEVICES) device_count = DEVICES;
    verbose = (int)env_number("NULLGPU_VERBOSE", 0);
    copying = (int)env_number("NULLGPU_COPY", 1);
    pin_limit = (size_t)(env_number("NULLGPU_PIN_GIB", 1 << 20) * 1024) * MIB;
    for (int i = 0; i < device_count; i++)
        used[i] = (size_t)env_number("NULLGPU_CONTEXT_MIB", 256) * MIB;
    base = mmap(NULL, 2 * SHADOW, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        perror("nullgpu: no address space");
        abort();
    }
}
#define START() pthread_once(&once, start)

static cudaError_t fail(cudaError_t error, const char *what) {
    if (verbose && error) fprintf(stderr, "nullgpu: %s: error %d\n", what, error);
    if (error) last_error = error;
    return error;
}
static int on_device(const void *p) {
    return base && (char *)p >= base && (char *)p < base + SHADOW;
}
static char *host(const void *p) { return on_device(p) ? (char *)p + SHADOW : (char *)p; }
static Range *find(const void *p) { /* under the lock */
    for (size_t i = range_count; i--;)
        if ((char *)p >= ranges[i].at && (char *)p < ranges[i].at + ranges[i].size)
            return &ranges[i];
    return NULL;
}
static void add(void *at, size_t size, size_t charge, int kind) {
    if (range_count == range_room)
        ranges = realloc(ranges, (range_room = range_room * 2 + 64) * sizeof *ranges);
    ranges[range_count++] = (Range){at, size, charge, kind};
}
static int charge(int device, size_t size) {
    if (used[device] + size > capacity) {
        COUNT(oom);
        return 0;
    }
    used[device] += size;
    return 1;
}
static char *reserve(int device, size_t size) {
    char *at = base + device * SPAN + next[device];
    next[device] += (size + PAGE - 1) / PAGE * PAGE +
                    PAGE; /* a hole after each, so a run past the end is found */
    return next[device] < SPAN ? at : NULL;
}
static void back(char *at, size_t size) { mprotect(at + SHADOW, size, PROT_READ | PROT_WRITE); }
static void unback(char *at, size_t size) {
    mmap(at + SHADOW, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
         0);
}

/* ---- devices ---- */
EXPORT cudaError_t cudaGetDeviceCount(int *n) {
    START();
    *n = device_count;
    return cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int *d) {
    START();
    *d = current;
    return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int d) {
    START();
    if (d < 0 || d >= device_count) return fail(cudaErrorInvalidDevice, "cudaSetDevice");
    current = d;
    return cudaSuccess;
}
static int turing(void) { return major * 10 + minor == 75; }
EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
    START();
    if (d < 0 || d >= device_count) return fail(cudaErrorInvalidDevice, "cudaGetDeviceProperties");
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s",
             turing() ? "Null GeForce RTX 2070" : "Null GeForce RTX 4060");
    memset(&p->uuid, d + 1, sizeof p->uuid);
    p->major = major, p->minor = minor, p->totalGlobalMem = capacity, p->warpSize = 32;
    p->multiProcessorCount = (int)env_number("NULLGPU_SMS", turing() ? 36 : 24);
    p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = turing() ? 1024
                                                                   : major == 8 && minor == 0
                                                                       ? 2048
                                                                       : 1536;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerMultiprocessor = (turing() ? 64 : major == 8 && minor == 0 ? 164 : 100) << 10;
    p->sharedMemPerBlockOptin = p->sharedMemPerMultiprocessor - (turing() ? 0 : 1 << 10);
    p->maxBlocksPerMultiProcessor = turing() ? 16 : 24, p->l2CacheSize = (turing() ? 4 : 24) << 20;
    p->totalConstMem = 64 << 10, p->memPitch = 0x7fffffff, p->textureAlignment = 512,
    p->memoryBusWidth = 128;
    p->concurrentKernels = p->unifiedAddressing = p->managedMemory = p->canMapHostMemory = 1,
    p->asyncEngineCount = 2;
    p->streamPrioritiesSupported = p->hostRegisterSupported = p->cooperativeLaunch =
        p->memoryPoolsSupported = 1;
    p->pciBusID = d + 1;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
    struct cudaDeviceProp p;
    cudaError_t error = cudaGetDeviceProperties(&p, d);
    if (error) return error;
    const int known[][2] = {
        {cudaDevAttrComputeCapabilityMajor, p.major},
        {cudaDevAttrComputeCapabilityMinor, p.minor},
        {cudaDevAttrWarpSize, 32},
        {cudaDevAttrMultiProcessorCount, p.multiProcessorCount},
        {cudaDevAttrMaxThreadsPerBlock, p.maxThreadsPerBlock},
        {cudaDevAttrMaxThreadsPerMultiProcessor, p.maxThreadsPerMultiProcessor},
        {cudaDevAttrMaxBlocksPerMultiprocessor, p.maxBlocksPerMultiProcessor},
        {cudaDevAttrMaxSharedMemoryPerBlock, p.sharedMemPerBlock},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, p.sharedMemPerBlockOptin},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, p.sharedMemPerMultiprocessor},
        {cudaDevAttrL2CacheSize, p.l2CacheSize},
        {cudaDevAttrMaxRegistersPerBlock, p.regsPerBlock},
        {cudaDevAttrMaxRegistersPerMultiprocessor, p.regsPerMultiprocessor},
        {cudaDevAttrMaxBlockDimX, 1024},
        {cudaDevAttrMaxBlockDimY, 1024},
        {cudaDevAttrMaxBlockDimZ, 64},
        {cudaDevAttrMaxGridDimX, 0x7fffffff},
        {cudaDevAttrMaxGridDimY, 65535},
        {cudaDevAttrMaxGridDimZ, 65535},
        {cudaDevAttrGlobalMemoryBusWidth, p.memoryBusWidth},
        {cudaDevAttrClockRate, 2460000},
        {cudaDevAttrMemoryClockRate, 8501000},
        {cudaDevAttrTextureAlignment, 512},
        {cudaDevAttrUnifiedAddressing, 1},
        {cudaDevAttrManagedMemory, 1},
        {cudaDevAttrConcurrentKernels, 1},
        {cudaDevAttrCooperativeLaunch, 1},
        {cudaDevAttrHostRegisterSupported, 1},
        {cudaDevAttrCanMapHostMemory, 1},
        {cudaDevAttrMemoryPoolsSupported, 1}};
    *v = 0;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i][0] == (int)a) *v = known[i][1];
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d) {
    snprintf(s, n, "0000:%02x:00.0", d + 1);
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) {
    (void)a, (void)b;
    *can = 0;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) {
    if (low) *low = 0;
    if (high) *high = -5;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDriverGetVersion(int *v) {
    *v = CUDART_VERSION;
    return cudaSuccess;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int *v) {
    *v = CUDART_VERSION;
    return cudaSuccess;
}
EXPORT cudaError_t cudaGetLastError(void) {
    cudaError_t e = last_error;
    last_error = cudaSuccess;
    return e;
}
EXPORT cudaError_t cudaPeekAtLastError(void) { return last_error; }
EXPORT const char *cudaGetErrorName(cudaError_t e) {
    return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation"
           : e                            ? "cudaErrorNull"
                                          : "cudaSuccess";
}
EXPORT const char *cudaGetErrorString(cudaError_t e) {
    switch ((int)e) {
    case cudaSuccess:
        return "no error";
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInvalidConfiguration:
        return "invalid configuration argument";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorHostMemoryAlreadyRegistered:
        return "part or all of the requested memory range is already mapped";
    case cudaErrorHostMemoryNotRegistered:
        return "pointer does not correspond to a registered memory region";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted when stream is capturing";
    default:
        return "an error of the null device";
    }
}

/* ---- memory ---- */
EXPORT cudaError_t cudaMalloc(void **p, size_t size) {
    START();
    COUNT(malloc);
    *p = NULL;
    if (!size) return cudaSuccess;
    pthread_mutex_lock(&lock);
    size_t whole = (size + PAGE - 1) / PAGE * PAGE;
    int fits = charge(current, whole);
    if (fits) {
        *p = reserve(current, size);
        back(*p, whole);
        add(*p, size, whole, 0);
    }
    pthread_mutex_unlock(&lock);
    return fits ? cudaSuccess : fail(cudaErrorMemoryAllocation, "cudaMalloc");
}
static cudaError_t drop(void *p, int kind, cudaError_t missing) {
    if (!p) return cudaSuccess;
    pthread_mutex_lock(&lock);
    Range *r = find(p);
    int found = r && r->at == (char *)p && (r->kind == kind || (kind == 0 && r->kind == 3));
    if (found) {
        if (r->kind == 0) {
            used[(r->at - base) / SPAN] -= r->charge;
            unback(r->at, r->charge);
        }
        if (r->kind == 1 || r->kind == 3) munmap(r->at, r->charge);
        *r = ranges[--range_count];
    }
    pthread_mutex_unlock(&lock);
    return found ? cudaSuccess : fail(missing, "free");
}
EXPORT cudaError_t cudaFree(void *p) {
    COUNT(free);
    return drop(p, 0, cudaErrorInvalidValue);
}
EXPORT cudaError_t cudaMallocAsync(void **p, size_t size, cudaStream_t s) {
    (void)s;
    return cudaMalloc(p, size);
}
EXPORT cudaError_t cudaFreeAsync(void *p, cudaStream_t s) {
    (void)s;
    return cudaFree(p);
}
EXPORT cudaError_t cudaMemGetInfo(size_t *free_, size_t *total) {
    START();
    *free_ = capacity - used[current], *total = capacity;
    return cudaSuccess;
}
static cudaError_t host_memory(void **p, size_t size, int kind) {
    size_t whole = (size + 4095) / 4096 * 4096;
    START();
    *p = mmap(NULL, whole ? whole : 4096, PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*p == MAP_FAILED) return fail(cudaErrorMemoryAllocation, "cudaHostAlloc");
    pthread_mutex_lock(&lock);
    add(*p, size, whole, kind);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
EXPORT cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) {
    (void)flags;
    COUNT(host_alloc);
    ADD(host_alloc_bytes, size);
    return host_memory(p, size, 1);
}
EXPORT cudaError_t cudaMallocManaged(void **p, size_t size, unsigned flags) {
    (void)flags;
    return host_memory(p, size, 3);
}
EXPORT cudaError_t cudaFreeHost(void *p) { return drop(p, 1, cudaErrorInvalidValue); }
EXPORT cudaError_t cudaHostRegister(void *p, size_t size, unsigned flags) {
    START();
    if (!p || !size) return fail(cudaErrorInvalidValue, "cudaHostRegister");
    pthread_mutex_lock(&lock);
    int taken = 0, readable = 0, writable = 0;
    for (size_t i = 0; i < range_count; i++)
        taken |= ranges[i].at < (char *)p + size && (char *)p < ranges[i].at + ranges[i].size;
    FILE *maps =
        fopen("/proc/self/maps",
              "r"); /* a card's driver pins only pages that may be written, unless told otherwise */
    for (char line[512]; maps && fgets(line, sizeof line, maps);) {
        uintptr_t from, to;
        char mode[5];
        if (sscanf(line, "%lx-%lx %4s", &from, &to, mode) == 3 && (uintptr_t)p >= from &&
            (uintptr_t)p < to)
            readable = mode[0] == 'r', writable = mode[1] == 'w';
    }
    if (maps) fclose(maps);
    int allowed = readable && (writable || flags & 8);
    int room = registered + size <= pin_limit;
    if (!taken && allowed && room) {
        registered += size;
        add(p, size, 0, 2);
        COUNT(host_register);
        ADD(host_register_bytes, size);
    }
    pthread_mutex_unlock(&lock);
    return fail(taken      ? cudaErrorHostMemoryAlreadyRegistered
                : !allowed ? cudaErrorInvalidValue
                : !room    ? cudaErrorMemoryAllocation
                           : cudaSuccess,
                "cudaHostRegister");
}
EXPORT cudaError_t cudaHostUnregister(void *p) {
    return drop(p, 2, cudaErrorHostMemoryNotRegistered);
}
EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    START();
    memset(a, 0, sizeof *a);
    pthread_mutex_lock(&lock);
    Range *r = find(p);
    int kind = r ? r->kind : -1;
    pthread_mutex_unlock(&lock);
    a->type = kind < 0                 ? cudaMemoryTypeUnregistered
              : kind == 3              ? cudaMemoryTypeManaged
              : kind == 0 || kind == 4 ? cudaMemoryTypeDevice
                                       : cudaMemoryTypeHost;
    a->device = kind == 0 || kind == 4 ? (int)(((char *)p - base) / SPAN) : kind < 0 ? -2 : 0;
    a->devicePointer = kind < 0 ? NULL : (void *)p,
    a->hostPointer = kind > 0 && kind < 4 ? (void *)p : NULL;
    return cudaSuccess;
}
static int inside(const void *p, size_t size) { /* of a live allocation, for a device address */
    if (!on_device(p)) return 1;
    pthread_mutex_lock(&lock);
    Range *r = find(p);
    int fits = r && (char *)p + size <= r->at + r->size;
    pthread_mutex_unlock(&lock);
    return fits;
}
static int pageable(const void *p) {
    pthread_mutex_lock(&lock);
    int plain = !find(p);
    pthread_mutex_unlock(&lock);
    return plain;
}
static cudaError_t copy(void *to, const void *from, size_t size, int kind, int blocking) {
    START();
    if (!size) return cudaSuccess;
    int up = on_device(to), down = on_device(from);
    int agrees = kind == cudaMemcpyDefault || (kind == cudaMemcpyHostToDevice && up && !down) ||
                 (kind == cudaMemcpyDeviceToHost && down && !up) ||
                 (kind == cudaMemcpyDeviceToDevice) ||
                 (kind == cudaMemcpyHostToHost && !up && !down);
    if (!agrees || !inside(to, size) || !inside(from, size)) {
        COUNT(bad_copy);
        return fail(cudaErrorInvalidValue, "cudaMemcpy");
    }
    if (up && down) {
        COUNT(d2d);
        ADD(d2d_bytes, size);
    } else if (up) {
        COUNT(h2d);
        ADD(h2d_bytes, size);
    } else if (down) {
        COUNT(d2h);
        ADD(d2h_bytes, size);
    }
    if (blocking || (down && !up && pageable(to))) COUNT(sync_copy);
    if (copying || !up || !down) memmove(host(to), host(from), size);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    return copy(to, from, size, kind, 1);
}
EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size,
                                   enum cudaMemcpyKind kind, cudaStream_t s) {
    (void)s;
    return copy(to, from, size, kind, 0);
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size,
                                       cudaStream_t s) {
    (void)a, (void)b, (void)s;
    return copy(to, from, size, cudaMemcpyDefault, 0);
}
EXPORT cudaError_t cudaMemcpy2DAsync(void *to, size_t tp, const void *from, size_t fp, size_t w,
                                     size_t h, enum cudaMemcpyKind kind, cudaStream_t s) {
    (void)s;
    cudaError_t e = cudaSuccess;
    for (size_t i = 0; i < h && !e; i++)
        e = copy((char *)to + i * tp, (const char *)from + i * fp, w, kind, 0);
    return e;
}
EXPORT cudaError_t cudaMemsetAsync(void *to, int v, size_t size, cudaStream_t s) {
    (void)s;
    COUNT(memset);
    if (!inside(to, size)) {
        COUNT(bad_copy);
        return fail(cudaErrorInvalidValue, "cudaMemset");
    }
    if (copying) memset(host(to), v, size);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemset(void *to, int v, size_t size) {
    return cudaMemsetAsync(to, v, size, 0);
}
EXPORT cudaError_t cudaMemPrefetchAsync(const void *p, size_t n, struct cudaMemLocation l,
                                        unsigned f, cudaStream_t s) {
    (void)p, (void)n, (void)l, (void)f, (void)s;
    return cudaSuccess;
}

/* ---- virtual memory (expandable segments); a handle is its size in pages ---- */
EXPORT int cuMemAddressReserve(char **p, size_t size, size_t align, char *hint,
                               unsigned long long flags) {
    (void)align, (void)hint, (void)flags;
    START();
    pthread_mutex_lock(&lock);
    if ((*p = reserve(current, size))) add(*p, size, 0, 4);
    pthread_mutex_unlock(&lock);
    return *p ? 0 : 2;
}
EXPORT int cuMemAddressFree(char *p, size_t size) {
    (void)size;
    return drop(p, 4, cudaErrorInvalidValue) ? 1 : 0;
}
EXPORT int cuMemCreate(unsigned long long *handle, size_t size, const void *prop,
                       unsigned long long flags) {
    (void)prop, (void)flags;
    START();
    pthread_mutex_lock(&lock);
    int fits = charge(current, size);
    pthread_mutex_unlock(&lock);
    *handle = size / PAGE * DEVICES + current;
    return fits ? 0 : 2;
}
EXPORT int cuMemRelease(unsigned long long handle) {
    used[handle % DEVICES] -= handle / DEVICES * PAGE;
    return 0;
}
EXPORT int cuMemMap(char *p, size_t size, size_t offset, unsigned long long handle,
                    unsigned long long flags) {
    (void)offset, (void)handle, (void)flags;
    back(p, size);
    return 0;
}
EXPORT int cuMemUnmap(char *p, size_t size) {
    unback(p, size);
    return 0;
}
EXPORT int cuMemGetAllocationGranularity(size_t *g, const void *prop, int option) {
    (void)prop, (void)option;
    *g = PAGE;
    return 0;
}

/* ---- streams, events, graphs ---- */
static cudaError_t handle(void **h) {
    *h = calloc(1, 64);
    return cudaSuccess;
}
static void *volatile capturing;
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) {
    (void)f, (void)p;
    return handle((void **)s);
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) {
    (void)f;
    return handle((void **)s);
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t *s) { return handle((void **)s); }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) {
    (void)s;
    *p = 0;
    return cudaSuccess;
}
static void (*on_sync)(void);
EXPORT void nullgpu_on_sync(void (*call)(void)) {
    on_sync = call;
} /* called at every wait of the host for the device */
static cudaError_t synchronize(void) {
    if (on_sync) on_sync();
    return capturing ? fail(cudaErrorStreamCaptureUnsupported, "synchronize") : cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    (void)s;
    COUNT(sync_stream);
    return synchronize();
}
EXPORT cudaError_t cudaDeviceSynchronize(void) {
    COUNT(sync_device);
    return synchronize();
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    (void)e;
    COUNT(sync_event);
    return synchronize();
}
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) {
    (void)f;
    return handle((void **)e);
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t *e) { return handle((void **)e); }
EXPORT cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    (void)s;
    clock_gettime(CLOCK_MONOTONIC, (struct timespec *)e);
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) {
    (void)f;
    return cudaEventRecord(e, s);
}
EXPORT cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    struct timespec *x = (void *)a, *y = (void *)b;
    *ms = (float)((double)(y->tv_sec - x->tv_sec) * 1e3 + (double)(y->tv_nsec - x->tv_nsec) / 1e6);
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *data,
                                         unsigned flags) {
    (void)flags;
    f(s, cudaSuccess, data);
    return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data) {
    (void)s;
    f(data);
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) {
    (void)m;
    capturing = s;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
    (void)s;
    capturing = NULL;
    return handle((void **)g);
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    *status = s && capturing == s ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *g,
                                            const cudaGraphNode_t **d, const cudaGraphEdgeData **e,
                                            size_t *n) {
    cudaStreamIsCapturing(s, status);
    if (id) *id = *status == cudaStreamCaptureStatusActive ? 1 : 0;
    if (g) *g = NULL;
    if (d) *d = NULL;
    if (e) *e = NULL;
    if (n) *n = 0;
    return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *x, cudaGraph_t g,
                                                 unsigned long long f) {
    (void)g, (void)f;
    return handle((void **)x);
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *n) {
    (void)g, (void)nodes;
    *n = 1;
    return cudaSuccess;
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s) {
    (void)x, (void)s;
    COUNT(graph_launch);
    return cudaSuccess;
}

/* ---- kernels: registered by name, checked and counted, never run ---- */
typedef struct {
    const void *function;
    const char *name;
    uint64_t launches;
} Kernel;
#define KERNELS ((size_t)1 << 19)
static Kernel *kernels;
static Kernel *kernel_of(const void *f) {
    if (!kernels) kernels = calloc(KERNELS, sizeof *kernels);
    for (size_t i = ((uintptr_t)f * 0x9E3779B97F4A7C15ull >> 40) % KERNELS;;
         i = (i + 1) % KERNELS) {
        if (!kernels[i].function) kernels[i].function = f;
        if (kernels[i].function == f) return &kernels[i];
    }
}
static cudaError_t launched(const void *f, dim3 g, dim3 b, size_t shared) {
    START();
    COUNT(launch);
    pthread_mutex_lock(&lock);
    Kernel *k = kernel_of(f);
    k->launches++;
    pthread_mutex_unlock(&lock);
    uint64_t threads = (uint64_t)b.x * b.y * b.z, most = turing() ? 64 << 10 : 99 << 10;
    if (!g.x || !g.y || !g.z || !threads || threads > 1024 || b.z > 64 || g.x > 0x7fffffff ||
        g.y > 65535 || g.z > 65535 || (major < 9 && shared > most && !(major == 8 && minor == 0))) {
        COUNT(bad_launch);
        if (verbose)
            fprintf(stderr, "nullgpu: bad launch (%u,%u,%u)x(%u,%u,%u) %zu of %s\n", g.x, g.y, g.z,
                    b.x, b.y, b.z, shared, k->name ? k->name : "?");
        return fail(cudaErrorInvalidConfiguration, "launch");
    }
    return cudaSuccess;
}
EXPORT void **__cudaRegisterFatBinary(void *binary) {
    (void)binary;
    static void *handles[2];
    return handles;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **h) { (void)h; }
EXPORT void __cudaUnregisterFatBinary(void **h) { (void)h; }
EXPORT char __cudaInitModule(void **h) {
    (void)h;
    return 1;
}
EXPORT void __cudaRegisterVar(void **h, char *v, char *a, const char *n, int e, size_t s, int c,
                              int g) {
    (void)h, (void)v, (void)a, (void)n, (void)e, (void)s, (void)c, (void)g;
}
EXPORT void __cudaRegisterFunction(void **h, const char *f, char *d, const char *name, int limit,
                                   void *t, void *b, void *bd, void *gd, int *w) {
    (void)h, (void)d, (void)limit, (void)t, (void)b, (void)bd, (void)gd, (void)w;
    pthread_mutex_lock(&lock);
    kernel_of(f)->name = name;
    pthread_mutex_unlock(&lock);
}
static __thread struct {
    dim3 g, b;
    size_t shared;
    void *stream;
} pushed;
EXPORT unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t shared, void *s) {
    pushed.g = g, pushed.b = b, pushed.shared = shared, pushed.stream = s;
    return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *shared, void *s) {
    *g = pushed.g, *b = pushed.b, *shared = pushed.shared, *(void **)s = pushed.stream;
    return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(void **k, const void *f) {
    *k = (void *)f;
    return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(void *k, dim3 g, dim3 b, void **args, size_t shared,
                                      cudaStream_t s) {
    (void)args, (void)s;
    return launched(k, g, b, shared);
}
EXPORT cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **args, size_t shared,
                                    cudaStream_t s) {
    (void)args, (void)s;
    return launched(f, g, b, shared);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **args) {
    (void)args;
    return launched(f, c->gridDim, c->blockDim, c->dynamicSmemBytes);
}
EXPORT int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                          unsigned bz, unsigned shared, void *s, void **args, void **extra) {
    (void)s, (void)args, (void)extra;
    return launched(f, (dim3){gx, gy, gz}, (dim3){bx, by, bz}, shared);
}
EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    (void)f;
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->maxDynamicSharedSizeBytes = 48 << 10;
    a->ptxVersion = a->binaryVersion =
        major * 10 + minor == 89 ? 86 : major * 10 + minor; /* the build's nearest */
    return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f,
                                                                          int threads,
                                                                          size_t shared,
                                                                          unsigned flags) {
    (void)f, (void)shared, (void)flags;
    *n = threads > 0 && threads < 1024 ? 1024 / threads : 1;
    return cudaSuccess;
}
static char symbols[1 << 16];
EXPORT cudaError_t cudaGetSymbolAddress(void **p, const void *s) {
    (void)s;
    *p = symbols;
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyToSymbol(const void *s, const void *from, size_t n, size_t o,
                                      enum cudaMemcpyKind k) {
    (void)s, (void)from, (void)n, (void)o, (void)k;
    return cudaSuccess;
}

/* ---- cuBLAS and cuBLASLt ---- */
static int blas(void) {
    COUNT(blas);
    return 0;
}
EXPORT int cublasCreate_v2(void **h) { return handle(h); }
EXPORT int cublasGetMathMode(void *h, int *m) {
    (void)h;
    *m = 0;
    return 0;
}
EXPORT int cublasGetPointerMode_v2(void *h, int *m) {
    (void)h;
    *m = 0;
    return 0;
}
EXPORT int cublasLtCreate(void **h) { return handle(h); }
EXPORT int cublasLtMatmulDescCreate(void **d, int compute, int scale) {
    (void)compute, (void)scale;
    return handle(d);
}
EXPORT int cublasLtMatrixLayoutCreate(void **d, int type, uint64_t r, uint64_t c, int64_t ld) {
    (void)type, (void)r, (void)c, (void)ld;
    return handle(d);
}
EXPORT int cublasLtMatmulPreferenceCreate(void **p) { return handle(p); }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *e,
                                          void *p, int wanted, void *results, int *found) {
    (void)h, (void)d, (void)a, (void)b, (void)c, (void)e, (void)p;
    memset(results, 0,
           64 + 8 + 4 + 4 + 16); /* one result: an algorithm without a workspace, success */
    return *found = wanted > 0, 0;
}
EXPORT int cublasLtMatmulAlgoConfigGetAttribute(const void *a, int k, void *buffer, size_t n,
                                                size_t *written) {
    (void)a, (void)k;
    memset(buffer, 0, n);
    if (written) *written = n;
    return 0;
}

/* ---- names that need no more than success; %a counts as a product of matrices ---- */
EXPORT int nullgpu_ok(void) { return 0; }
EXPORT int nullgpu_blas(void) { return blas(); }
EXPORT int nullgpu_sink(void) {
    COUNT(unknown);
    return 0;
}
#define ALIAS(name, target) \
    __asm__(".globl " #name "\n.type " #name ", @function\n.set " #name ", " #target)
#define OK(n) ALIAS(n, nullgpu_ok);
#define GEMM(n) ALIAS(n, nullgpu_blas);
#define SINK(n) ALIAS(n, nullgpu_sink);
#define TYPES(X, pre, post) \
    X(cublasS##pre##post) X(cublasD##pre##post) X(cublasC##pre##post) X(cublasZ##pre##post)
OK(cudaDeviceEnablePeerAccess)
OK(cudaEventDestroy) OK(cudaEventQuery) OK(cudaStreamDestroy) OK(cudaStreamQuery) OK(
    cudaStreamWaitEvent) OK(cudaThreadExchangeStreamCaptureMode) OK(cudaFuncSetAttribute)
    OK(cudaKernelSetAttributeForDevice) OK(cudaProfilerStart) OK(cudaProfilerStop) OK(
        cudaGraphDestroy) OK(cudaGraphExecDestroy) OK(cudaGraphRetainUserObject)
        OK(cudaUserObjectCreate) OK(cudaUserObjectRelease) OK(cublasDestroy_v2) OK(
            cublasSetMathMode) OK(cublasSetPointerMode_v2) OK(cublasSetSmCountTarget)
            OK(cublasSetStream_v2) OK(cublasSetWorkspace_v2) OK(cublasLtDestroy) OK(
                cublasLtMatmulDescDestroy) OK(cublasLtMatmulDescSetAttribute)
                OK(cublasLtMatmulPreferenceDestroy) OK(cublasLtMatmulPreferenceSetAttribute) OK(
                    cublasLtMatrixLayoutDestroy) OK(cublasLtMatrixLayoutSetAttribute)
                    OK(cublasLtMatmulAlgoCheck) OK(cublasLtMatmulAlgoConfigSetAttribute) OK(
                        cublasLtMatmulAlgoInit) GEMM(cublasLtMatmul) GEMM(cublasGemmEx)
                        GEMM(cublasGemmStridedBatchedEx) GEMM(cublasSgemmEx) GEMM(cublasDotEx) TYPES(
                            GEMM, gemm,
                            _v2) TYPES(GEMM, gemmStridedBatched, ) TYPES(GEMM, gemv,
                                                                         _v2) TYPES(GEMM, trsm, _v2)
                            TYPES(GEMM, trsmBatched, ) GEMM(cublasSdot_v2) GEMM(cublasDdot_v2) GEMM(
                                cublasCdotu_v2) GEMM(cublasCdotc_v2) GEMM(cublasZdotu_v2)
                                GEMM(cublasZdotc_v2) SINK(cudaDeviceGetDefaultMemPool) SINK(
                                    cudaDeviceGetGraphMemAttribute)
                                    SINK(cudaDeviceSetGraphMemAttribute) SINK(
                                        cudaGraphNodeGetDependencies) SINK(cudaIpcCloseMemHandle)
                                        SINK(cudaIpcGetMemHandle) SINK(cudaIpcOpenMemHandle) SINK(
                                            cudaIpcGetEventHandle) SINK(cudaIpcOpenEventHandle)
                                            SINK(cudaMemPoolGetAttribute) SINK(
                                                cudaMemPoolSetAccess) SINK(cudaMemPoolSetAttribute)
                                                SINK(cudaMemPoolTrimTo) SINK(cudaGraphAddNode) SINK(
                                                    cudaGraphConditionalHandleCreate)
                                                    SINK(cudaLibraryGetKernel) SINK(
                                                        cudaLibraryLoadData) SINK(cudaLibraryUnload)
                                                        SINK(cudaStreamBeginCaptureToGraph) SINK(
                                                            cudaStreamUpdateCaptureDependencies)

    /* ---- the driver: this library is also libcuda.so.1 ---- */
    EXPORT int cuInit(unsigned f) {
    (void)f;
    START();
    return 0;
}
EXPORT int cuDriverGetVersion(int *v) {
    *v = CUDART_VERSION;
    return 0;
}
EXPORT int cuDeviceGetCount(int *n) { return cudaGetDeviceCount(n); }
EXPORT int cuDeviceGet(int *d, int i) {
    *d = i;
    return 0;
}
EXPORT int cuDeviceGetAttribute(int *v, int a, int d) { return cudaDeviceGetAttribute(v, a, d); }
EXPORT int cuDeviceGetName(char *s, int n, int d) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, d);
    snprintf(s, n, "%s", p.name);
    return 0;
}
EXPORT int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *active) {
    (void)d;
    if (f) *f = 0;
    *active = 1;
    return 0;
}
EXPORT int cuDevicePrimaryCtxRetain(void **c, int d) {
    (void)d;
    *c = symbols;
    return 0;
}
EXPORT int cuCtxGetCurrent(void **c) {
    *c = symbols;
    return 0;
}
EXPORT int cuGetErrorString(int e, const char **s) {
    *s = cudaGetErrorString(e);
    return 0;
}
EXPORT int cuGetErrorName(int e, const char **s) {
    *s = cudaGetErrorName(e);
    return 0;
}
EXPORT int cuMemGetAddressRange_v2(char **b, size_t *n, char *p) {
    Range *r = find(p);
    if (!r) return 1;
    if (b) *b = r->at;
    if (n) *n = r->size;
    return 0;
}
EXPORT int cuPointerGetAttribute(void *data, int attribute, char *p) {
    if (attribute == 9) *(int *)data = (int)((p - base) / SPAN);
    return 0;
}
OK(cuCtxSetCurrent)
OK(cuCtxPushCurrent) OK(cuCtxPopCurrent) OK(cuMemSetAccess) OK(cuFuncSetAttribute)
    OK(cuFuncGetAttribute) OK(cuFuncSetCacheConfig) SINK(cuLaunchCooperativeKernel)
        SINK(cuLinkAddData_v2) SINK(cuLinkComplete) SINK(cuLinkCreate_v2) SINK(cuModuleGetFunction)
            SINK(cuModuleLoad) SINK(cuModuleLoadData) SINK(cuModuleLoadDataEx) SINK(cuModuleUnload)
                SINK(cuOccupancyMaxActiveBlocksPerMultiprocessor)
                    SINK(cuTensorMapEncodeTiled) EXPORT cudaError_t
    cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v,
                                     unsigned long long flags,
                                     enum cudaDriverEntryPointQueryResult *status) {
    (void)v, (void)flags;
    char second[128];
    snprintf(second, sizeof second, "%s_v2", name);
    if (!(*f = dlsym(RTLD_DEFAULT, name)) && !(*f = dlsym(RTLD_DEFAULT, second)))
        *f = (void *)nullgpu_sink;
    if (status) *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* ---- NVML, of which this library is also a copy; 3 is "not supported" ---- */
EXPORT int nvmlDeviceGetCount_v2(unsigned *n) {
    START();
    *n = device_count;
    return 0;
}
static int nvml_handle(void **d) {
    *d = symbols;
    return 0;
}
EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **d) {
    (void)id;
    return nvml_handle(d);
}
EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) {
    (void)i;
    return nvml_handle(d);
}
EXPORT int nvmlDeviceGetHandleByUUID(const char *u, void **d) {
    (void)u;
    return nvml_handle(d);
}
EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *v) {
    *v = CUDART_VERSION;
    return 0;
}
EXPORT const char *nvmlErrorString(int e) {
    (void)e;
    return "not supported by the null device";
}
EXPORT int nullgpu_not_supported(void) { return 3; }
#define NOT(n) ALIAS(n, nullgpu_not_supported);
OK(nvmlInit_v2)
OK(nvmlInitWithFlags) OK(nvmlShutdown) NOT(nvmlDeviceGetComputeRunningProcesses)
    NOT(nvmlDeviceGetComputeRunningProcesses_v3) NOT(nvmlDeviceGetGpuFabricInfoV)
        NOT(nvmlDeviceGetNvLinkRemoteDeviceType) NOT(nvmlDeviceGetNvLinkRemotePciInfo_v2)
            NOT(nvmlDeviceGetUUID) NOT(nvmlDeviceGetP2PStatus) NOT(nvmlDeviceGetUtilizationRates)
                NOT(nvmlDeviceGetTemperature)

    /* ---- what a program under test may ask ---- */
    EXPORT uint64_t nullgpu_launches(void) {
    return counters[C_launch] + counters[C_blas] + counters[C_graph_launch];
}
EXPORT int nullgpu_counter(int i, const char **name, uint64_t *value) {
    if (i >= C_COUNT) return 0;
    *name = counter_names[i], *value = counters[i];
    return 1;
}
EXPORT int nullgpu_kernel(size_t *i, const char **name,
                          uint64_t *launches) { /* the next kernel launched at least once */
    for (; kernels && *i < KERNELS; ++*i)
        if (kernels[*i].launches) {
            *name = kernels[*i].name, *launches = kernels[*i].launches;
            ++*i;
            return 1;
        }
    return 0;
}
EXPORT void nullgpu_reset(void) {
    memset(counters, 0, sizeof counters);
    for (size_t i = 0; kernels && i < KERNELS; i++) kernels[i].launches = 0;
}
EXPORT void *nullgpu_host(const void *p) {
    return host(p);
} /* where the bytes of a device address really are */
