/* What stub.c and device.c share. Structs and prototypes are those of the CUDA headers in torch's installation. */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define MEMORY (80ull << 30) /* bytes of the device */
#define SHARED 232448        /* bytes of shared memory that a block can have */
#define HANDLE ((void *)8)   /* for a context, a module and other things that are only passed on */
#define OK return 0

cudaError_t stub_fail(cudaError_t error, const char *what);
cudaError_t stub_unsafe(const char *what);
int stub_submit(const void *stream, const char *(*name)(const void *), const void *what);
static inline const char *itself(const void *name) { return name; } /* for work that is named by its submitter */
extern void (*stub_kernel)(const void *function, const unsigned *sizes, void **arguments);
