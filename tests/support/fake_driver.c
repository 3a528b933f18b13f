/* This library replaces libcuda.so.1 and runs nothing: it records the launches that it is asked for.
 *
 * Triton's launcher is compiled against the driver's interface and called with real arguments. So the tests can see
 * without a GPU whether the launcher accepts the arguments, and the grid, threads, shared memory and attributes of
 * each launch. Each launch writes one line to the file that FAKE_DRIVER_LOG names.
 */
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

CUresult cuGetErrorString(CUresult error, const char **text) { (void)error; *text = "an error of the stand-in"; return 0; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return 0; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return 0; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { (void)context; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { (void)device; *context = (CUcontext)1; return 0; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { (void)limit; *value = 0; return 0; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { (void)limit; (void)value; return 0; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) { /* values of an H200 */
  (void)device;
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 227 * 1024
         : attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT              ? 132
                                                                              : 1;
  return 0;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) { (void)image; *module = (CUmodule)1; return 0; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  (void)module;
  *function = (CUfunction)strdup(name);
  return 0;
}
CUresult cuModuleUnload(CUmodule module) { (void)module; return 0; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  (void)stream;
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return 0;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  (void)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return 0;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  (void)function; (void)attribute; (void)value;
  return 0;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { (void)function; (void)config; return 0; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  (void)attribute;
  *(CUdeviceptr *)data = pointer;
  return 0;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  (void)type; (void)rank; (void)address; (void)sizes; (void)strides; (void)box;
  (void)steps; (void)interleave; (void)swizzle; (void)promotion; (void)fill;
  memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  int pdl = 0;
  (void)params; (void)extra;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      pdl = config->attrs[i].value.programmaticStreamSerializationAllowed;
  const char *path = getenv("FAKE_DRIVER_LOG");
  if (!path) return CUDA_SUCCESS; /* without a log, launches can be timed */
  FILE *log = fopen(path, "a");
  if (!log) return CUDA_ERROR_FILE_NOT_FOUND;
  fprintf(log, "{\"kernel\": \"%s\", \"grid\": [%u, %u, %u], \"threads\": %u, \"shared_bytes\": %u, \"pdl\": %s}\n",
          (const char *)function, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
          config->sharedMemBytes, pdl ? "true" : "false");
  return fclose(log) ? CUDA_ERROR_UNKNOWN : CUDA_SUCCESS;
}
