// CUDA's driver for a GPU that is not here: answers what Triton's launcher asks, runs nothing.
// A kernel that is loaded and a launch are told to Python, which judges the launch.

#include "cuda.h"

typedef CUresult (*Loaded)(const void *cubin, const char *name, CUfunction *kernel);
typedef CUresult (*Launched)(const CUlaunchConfig *config, CUfunction kernel, void **parameters);

static Loaded told_of_kernel;
static Launched told_of_launch;
static CUcontext current;
// Of an H100; the third is what a block may ask for beyond 48 KiB.
static const int attributes[][2] = {
    {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 232448},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 233472},
    {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
    {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1980000},
    {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 2619000},
    {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 5120},
};

void stand_in_tell(Loaded loaded, Launched launched) {
  told_of_kernel = loaded;
  told_of_launch = launched;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_NOT_SUPPORTED ? "the stand-in has no answer" : "the stand-in refuses";
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  for (unsigned place = 0; place < sizeof attributes / sizeof *attributes; ++place) {
    if (attributes[place][0] == (int)attribute) {
      *value = attributes[place][1];
      return CUDA_SUCCESS;
    }
  }
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)&current;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuModuleLoadData(CUmodule *module, const void *cubin) {
  *module = (CUmodule)cubin;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *kernel, CUmodule module, const char *name) {
  return told_of_kernel(module, name, kernel);
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction kernel) {
  // Registers and spills are counted elsewhere; Triton refuses blocks of more threads than this.
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction kernel, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction kernel, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction kernel, void **parameters,
                          void **extra) {
  return told_of_launch(config, kernel, parameters);
}
