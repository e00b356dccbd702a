/* The stub's device, kernels, driver and cuBLAS; see stub.c. */
#include "stub.h"

/* ---- the device: an H100 of 80 GB on paper ---- */

static int capability(void) { /* 9, or what STUB_CAPABILITY says */
    const char *asked = getenv("STUB_CAPABILITY");
    return asked ? atoi(asked) : 9;
}
static const int ATTRIBUTES[][2] = {
    {cudaDevAttrComputeCapabilityMinor, 0}, {cudaDevAttrWarpSize, 32},
    {cudaDevAttrMultiProcessorCount, 132}, {cudaDevAttrMaxThreadsPerBlock, 1024}, {cudaDevAttrClockRate, 1980000},
    {cudaDevAttrMaxThreadsPerMultiProcessor, 2048}, {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, SHARED}, {cudaDevAttrMaxSharedMemoryPerMultiprocessor, SHARED + 1024},
    {cudaDevAttrMaxRegistersPerBlock, 65536}, {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
    {cudaDevAttrMaxGridDimX, 2147483647}, {cudaDevAttrMaxGridDimY, 65535}, {cudaDevAttrMaxGridDimZ, 65535},
    {cudaDevAttrMemoryClockRate, 2619000}, {cudaDevAttrGlobalMemoryBusWidth, 5120}, {cudaDevAttrL2CacheSize, 50 << 20},
};

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; OK; }
cudaError_t cudaGetDevice(int *device) { *device = 0; OK; }
cudaError_t cudaSetDevice(int device) { return device ? stub_fail(cudaErrorInvalidDevice, __func__) : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; OK; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; OK; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; OK; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) { snprintf(id, size, "0000:01:00.0"); OK; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    OK;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability() : 0;
    for (size_t i = 0; i < sizeof ATTRIBUTES / sizeof *ATTRIBUTES; i++)
        if (ATTRIBUTES[i][0] == (int)attribute) *value = ATTRIBUTES[i][1];
    OK;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *device, int number) {
    *device = (struct cudaDeviceProp){
        .name = "stub of CUDA", .totalGlobalMem = MEMORY, .major = capability(), .minor = 0, .warpSize = 32,
        .multiProcessorCount = 132, .maxThreadsPerBlock = 1024, .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {2147483647, 65535, 65535}, .maxThreadsPerMultiProcessor = 2048,
        .maxBlocksPerMultiProcessor = 32, .sharedMemPerBlock = 49152, .sharedMemPerBlockOptin = SHARED,
        .sharedMemPerMultiprocessor = SHARED + 1024,
        .regsPerBlock = 65536, .regsPerMultiprocessor = 65536, .totalConstMem = 65536, .textureAlignment = 512,
        .memoryBusWidth = 5120, .l2CacheSize = 50 << 20, .concurrentKernels = 1, .cooperativeLaunch = 1,
        .unifiedAddressing = 1};
    OK;
}

/* ---- kernels of torch, which register themselves by name when its libraries are loaded ---- */

typedef struct Function { const void *handle; const char *name; } Function;
static Function *functions;
static size_t count, room;

void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void **binary) {}
void __cudaUnregisterFatBinary(void **binary) {}
char __cudaInitModule(void **binary) { return 1; }
void __cudaRegisterVar(void **binary, char *host, char *device, const char *name, int extern_, size_t size,
                       int constant, int global) {}
void __cudaRegisterFunction(void **binary, const char *handle, char *device, const char *name, int limit, uint3 *thread,
                            uint3 *block, dim3 *block_size, dim3 *grid_size, int *warp) {
    if (count == room) functions = realloc(functions, (room = 2 * room + 4096) * sizeof *functions);
    functions[count++] = (Function){handle, name};
}
static const char *name_of(const void *handle) {
    for (size_t i = 0; i < count; i++)
        if (functions[i].handle == handle) return functions[i].name;
    return "an unknown kernel";
}

static __thread struct { dim3 grid, block; size_t shared; void *stream; } configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    configuration.grid = grid, configuration.block = block;
    configuration.shared = shared, configuration.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
    *(void **)stream = configuration.stream;
    OK;
}

static cudaError_t launch(const void *stream, const char *(*name)(const void *), const void *function, dim3 grid,
                          dim3 block, size_t shared) {
    size_t threads = (size_t)block.x * block.y * block.z;
    int empty = !grid.x || !grid.y || !grid.z || !threads;
    if (empty || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535 || threads > 1024 || shared > SHARED)
        return stub_fail(cudaErrorInvalidConfiguration, name(function));
    stub_submit(stream, name, function);
    OK;
}
cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    return launch(stream, name_of, function, grid, block, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *at, const void *function, void **arguments) {
    return launch(at->stream, name_of, function, at->gridDim, at->blockDim, at->dynamicSmemBytes);
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) { *kernel = (cudaKernel_t)function; OK; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
    return launch(stream, name_of, kernel, grid, block, shared);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
    *found = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = 1024, .numRegs = 32, .binaryVersion = 90, .ptxVersion = 90};
    OK;
}
cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) { OK; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                                   size_t shared, unsigned flags) {
    *blocks = 4;
    OK;
}

/* ---- the driver, which Triton launches through ---- */

CUresult cuInit(unsigned flags) { OK; }
CUresult cuDriverGetVersion(int *version) { *version = CUDART_VERSION; OK; }
CUresult cuDeviceGetCount(int *count) { *count = 1; OK; }
CUresult cuDeviceGet(CUdevice *device, int number) { *device = 0; OK; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device); /* the same numbers */
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { *flags = 0; *active = 1; OK; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = HANDLE; OK; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = HANDLE; OK; }
CUresult cuCtxSetCurrent(CUcontext context) { OK; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; OK; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1024; OK; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { OK; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = cudaGetErrorString((cudaError_t)error); OK; }
CUresult cuLogsRegisterCallback(CUlogsCallback call, void *data, CUlogsCallbackHandle *made) { OK; }
CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle handle) { OK; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = HANDLE; return stub_unsafe(__func__); }
CUresult cuModuleUnload(CUmodule module) { OK; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)strdup(name);
    OK;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = 0;
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK) *value = 1024;
    if (attribute == CU_FUNC_ATTRIBUTE_NUM_REGS) *value = 64;
    OK;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { OK; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *at) {
    *clusters = 1;
    OK;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *at,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
    memset(map, 0, sizeof *map);
    OK;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { OK; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) {
    *blocks = 4;
    OK;
}

/* Set by executing.py, to run kernels. sizes: of the grid, of a block, and bytes of shared memory. */
void (*stub_kernel)(const void *function, const unsigned *sizes, void **arguments);

static CUresult launch_kernel(CUfunction function, dim3 grid, dim3 block, unsigned shared, CUstream stream,
                              void **arguments) {
    unsigned sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z, shared};
    if (launch(stream, itself, function, grid, block, shared)) return CUDA_ERROR_INVALID_VALUE;
    if (stub_kernel) stub_kernel(function, sizes, arguments);
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *at, CUfunction function, void **arguments, void **extra) {
    dim3 grid = {at->gridDimX, at->gridDimY, at->gridDimZ}, block = {at->blockDimX, at->blockDimY, at->blockDimZ};
    return launch_kernel(function, grid, block, at->sharedMemBytes, at->hStream, arguments);
}
CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned i, unsigned j, unsigned k,
                        unsigned shared, CUstream stream, void **arguments, void **extra) {
    return launch_kernel(function, (dim3){x, y, z}, (dim3){i, j, k}, shared, stream, arguments);
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    OK;
}

/* ---- cuBLAS, declared here since its headers need more than the wheels have; build.py generates products ---- */

typedef struct Handle { void *stream; } Handle;
typedef struct Algorithm {
    unsigned long long opaque[8];
    size_t space;
    int status;
    float waves;
    int reserved[4];
} Algorithm;

int stub_product(const void *handle, const char *name) { stub_submit(((Handle *)handle)->stream, itself, name); OK; }
int cublasCreate_v2(void **handle) { *handle = calloc(1, sizeof(Handle)); OK; }
int cublasSetStream_v2(Handle *handle, void *stream) { handle->stream = stream; OK; }
int cublasGetMathMode(const void *handle, int *mode) { *mode = 0; OK; }
int cublasGetPointerMode_v2(const void *handle, int *mode) { *mode = 0; OK; }
size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { *made = HANDLE; OK; }
int cublasLtMatrixLayoutCreate(void **made, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    *made = HANDLE;
    OK;
}
int cublasLtMatmulPreferenceCreate(void **made) { *made = HANDLE; OK; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, Algorithm *found, int *count) {
    memset(found, 0, sizeof *found);
    *count = 1;
    OK;
}
int cublasLtMatmul(void *handle, void *product, const void *alpha, const void *a, void *a_layout, const void *b,
                   void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout,
                   const void *algorithm, void *space, size_t size, void *stream) {
    stub_submit(stream, itself, __func__);
    OK;
}
