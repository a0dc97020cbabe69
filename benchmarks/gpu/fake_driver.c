/* A stand-in for libcuda.so.1: every call succeeds and nothing runs.

   With it Triton's JIT, cache and C launcher compile, load and "launch" kernels on a machine without a GPU.
   fake.py builds and loads it. */
#include <stddef.h>
#include <stdint.h>

typedef int Result;

static int handle; /* what every pointer to a context, module or function points to */

static int attribute(int which) { /* of an H100 */
  switch (which) {
    case 10: return 32;      /* threads a warp */
    case 12: return 65536;   /* registers a block */
    case 13: return 1755000; /* clock, kHz */
    case 16: return 132;     /* multiprocessors */
    case 36: return 2619000; /* memory clock, kHz */
    case 37: return 5120;    /* memory bus, bits */
    case 75: return 9;       /* compute capability */
    case 76: return 0;
    case 81: return 228 * 1024; /* shared memory a multiprocessor, and what a block can have of it */
    case 97: return 227 * 1024;
    default: return 0;
  }
}

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuCtxGetCurrent(void **context) { *context = &handle; return 0; }
Result cuCtxSetCurrent(void *context) { return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuDeviceGetAttribute(int *value, int which, int device) { *value = attribute(which); return 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { *context = &handle; return 0; }
Result cuFuncGetAttribute(int *value, int which, void *function) {
  *value = which == 0 ? 1024 : 0; /* threads a block */
  return 0;
}
Result cuFuncSetAttribute(void *function, int which, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuGetErrorString(int code, const char **text) { *text = "fake driver"; return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { *function = &handle; return 0; }
Result cuModuleLoadData(void **module, const void *image) { *module = &handle; return 0; }
Result cuModuleUnload(void *module) { return 0; }
Result cuOccupancyMaxActiveClusters(int *count, void *function, void *config) { *count = 1; return 0; }
Result cuPointerGetAttribute(uint64_t *out, int which, uint64_t pointer) { *out = pointer; return 0; }
Result cuPointerGetAttributes(unsigned count, int *which, void **out, uint64_t pointer) { return 0; }
Result cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuTensorMapEncodeIm2col(void) { return 0; }
Result cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) { return 0; }
