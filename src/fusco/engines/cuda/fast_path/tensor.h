/* Tensors over memory of a heap, by the DLPack protocol (dlpack.h, version 0.8). */
#pragma once

#include "shared.h"

typedef struct {
  void* data;
  struct {
    int32_t type, index;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} DLTensor;

typedef struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(struct DLManagedTensor*);
} DLManagedTensor;

/* What a tensor holds, until the last one over the same memory is gone. */
typedef struct {
  DLManagedTensor managed;
  int64_t shape[kMaxDims];
  PyObject *heap, *block, *chunk;
} Lent;

static void let_go(DLManagedTensor* managed) {
  Lent* lent = managed->context;
  if (!Py_IsInitialized()) return; /* the process ends, and its memory with it */
  PyGILState_STATE state = PyGILState_Ensure();
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyObject* done = PyObject_CallMethodOneArg(lent->heap, n_release, lent->block);
  if (!done) PyErr_WriteUnraisable(lent->heap);
  Py_XDECREF(done);
  Py_DECREF(lent->heap);
  Py_DECREF(lent->block);
  Py_DECREF(lent->chunk);
  PyErr_Restore(type, value, trace);
  PyGILState_Release(state);
  free(lent);
}

static void drop_capsule(PyObject* capsule) {
  /* Who takes the tensor renames it. */
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;
  DLManagedTensor* managed = PyCapsule_GetPointer(capsule, "dltensor");
  managed->deleter(managed);
}

/* The `size` bytes at `base` of the heap as a tensor, with which they return to it. */
static PyObject* lend(FastPath* self, long long base, long long size, const int64_t* shape,
                      int ndim, long long type, long long bits) {
  if (!self->chunks) {
    PyErr_SetString(PyExc_RuntimeError, "the Shuffle was closed during a dispatch");
    return NULL;
  }
  PyObject* chunk = PyList_GetItem(self->chunks, (Py_ssize_t)(base / self->chunk_span_));
  if (!chunk) return NULL;
  Py_INCREF(chunk);
  long long address = number_of(chunk, n_base);
  PyObject* block = PyErr_Occurred() ? NULL : as_block(self, base, size);
  Lent* lent = block ? malloc(sizeof *lent) : NULL;
  if (!lent) {
    Py_DECREF(chunk);
    if (block) PyErr_NoMemory();
    Py_XDECREF(block);
    return NULL;
  }
  lent->heap = Py_NewRef(self->heap);
  lent->block = block;
  lent->chunk = chunk;
  for (int i = 0; i < ndim; ++i) lent->shape[i] = shape[i];
  lent->managed = (DLManagedTensor){
      .tensor = {.data = (void*)(address + base % self->chunk_span_),
                 .device = {(int32_t)self->device_type_, (int32_t)self->device_index_},
                 .ndim = ndim,
                 .dtype = {(uint8_t)type, (uint8_t)bits, 1},
                 .shape = lent->shape},
      .context = lent,
      .deleter = let_go};
  PyObject* capsule = PyCapsule_New(&lent->managed, "dltensor", drop_capsule);
  if (!capsule) {
    let_go(&lent->managed);
    return NULL;
  }
  PyObject* tensor = PyObject_CallOneArg(self->from_dlpack, capsule);
  Py_DECREF(capsule);
  return tensor;
}
