/* What the calls of a Shuffle share, and what is known of each kind of them. */
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#include "structs.h"

enum { kVectorBytes = 16, kMaxDims = 8 };

/* A kernel with its grid, as the driver takes them; all but the stream stays as it is. */
typedef struct {
  long long config, function, parameters, stream_at;
} Launch;

/* What is known of calls; fields are set from attributes of the same names. */
/* clang-format off */
#define DISPATCHING_OBJECTS(F) F(call) F(make_block) F(layout) F(format)
#define DISPATCHING_NUMBERS(F) \
  F(operation) F(status) F(number) F(signature) F(expert_offsets) F(pairs) F(links) \
  F(row_bytes) F(slot_bytes) F(num_tokens) F(chunk_tokens) F(type) F(bits)
#define COMBINING_OBJECTS(F) F(kind) F(form) F(num_returners)
#define COMBINING_NUMBERS(F) \
  F(operation) F(status) F(signature) F(returns_at) F(row_bytes) F(piece_bytes) F(num_slots)
/* clang-format on */

#define OBJECT_FIELD(name) PyObject* name;
#define NUMBER_FIELD(name) long long name##_;

typedef struct {
  DISPATCHING_OBJECTS(OBJECT_FIELD)
  DISPATCHING_NUMBERS(NUMBER_FIELD)
  Launch plan, dispatch;
  int ndim; /* of what comes */
  int64_t shape[kMaxDims];
} Dispatching;

typedef struct {
  COMBINING_OBJECTS(OBJECT_FIELD)
  COMBINING_NUMBERS(NUMBER_FIELD)
  Launch combine;
} Combining;

/* What a Shuffle's calls share, likewise. */
/* clang-format off */
#define OBJECTS(F) \
  F(tensor_type) F(dispatched_type) F(plan_type) F(addresses_type) F(block_type) F(call_type) \
  F(float32) F(strided) \
  F(from_dlpack) F(current_device) F(current_raw_stream) F(is_transformed) F(is_profiled) \
  F(is_stream_capturing) F(is_inference) \
  F(order) F(traffic) F(heap) F(chunks) F(calls) F(works) F(one) F(zero) F(key) \
  F(new_number) F(dispatched) F(combined) F(finish) F(wrap)
#define NUMBERS(F) \
  F(device_type) F(device_index) F(tensor_index) F(chunk_span) F(static_rows) F(static_bytes) \
  F(launch) F(failure) F(reports) \
  F(call) F(plan_args) F(dispatch_args) F(combine_args)
/* clang-format on */

typedef struct {
  PyObject_HEAD int is_closed;
  OBJECTS(OBJECT_FIELD)
  NUMBERS(NUMBER_FIELD)
  PyObject *dispatchings, *combinings; /* capsules, by what calls are known by */
  PyObject* spare;                     /* memory for the next plan */
  Dispatching* spare_of;
  PyObject* spare_mode; /* whether torch was in its inference mode */
  unsigned long long spare_stream;
} FastPath;

/* clang-format off */
#define NAMES(F) \
  F(shape) F(dtype) F(layout) F(requires_grad) F(get_device) F(is_contiguous) F(is_neg) \
  F(data_ptr) F(new_empty) \
  F(_last) F(only) F(is_capturing) \
  F(reserve) F(reserve_largest) F(shrink) F(release) F(append) F(base) F(size) F(last_plan) \
  F(plan) F(row_weights) F(tokens) \
  F(_number) F(_key) F(_num_rows) F(_layout) F(_block) F(addresses) F(stream) F(_one) \
  F(num_tokens) F(pairs) F(links)
/* clang-format on */
#define NAME(name) static PyObject* n_##name;
NAMES(NAME)
static PyObject* nothing;

static long long round_up(long long size) {
  return (size + kBlockAlignment - 1) / kBlockAlignment * kBlockAlignment;
}

static PyObject* call_method(PyObject* of, PyObject* name) {
  return PyObject_VectorcallMethod(name, &of, 1, NULL);
}

/* Consumes `value`. */
static long long as_number(PyObject* value) {
  if (!value) return -1;
  long long number = PyLong_AsLongLong(value);
  Py_DECREF(value);
  return number;
}

static long long number_of(PyObject* of, PyObject* name) {
  return as_number(PyObject_GetAttr(of, name));
}

/* Whether what a call or an attribute gave is an object; consumes it. */
static int is_object(PyObject* value, PyObject* expected) {
  Py_XDECREF(value);
  return value == expected;
}

/* A named tuple. */
static PyObject* as_named(PyObject* type, PyObject* values) {
  if (!values) return NULL;
  PyObject* arguments = PyTuple_Pack(1, values);
  Py_DECREF(values);
  if (!arguments) return NULL;
  PyObject* made = PyTuple_Type.tp_new((PyTypeObject*)type, arguments, NULL);
  Py_DECREF(arguments);
  return made;
}

/* An object of a frozen class with these attributes. */
static PyObject* as_frozen(PyObject* type, PyObject** names, PyObject** values, int count) {
  PyObject* made = PyBaseObject_Type.tp_new((PyTypeObject*)type, nothing, NULL);
  for (int i = 0; made && i < count; ++i)
    if (!values[i] || PyObject_GenericSetAttr(made, names[i], values[i])) Py_CLEAR(made);
  return made;
}

static PyObject* as_block(FastPath* self, long long base, long long size) {
  return as_named(self->block_type, Py_BuildValue("(LL)", base, size));
}

/* Without Python's lock, for the driver waits where its queue is full. */
static int launch(FastPath* self, const Launch* kernel, unsigned long long stream) {
  typedef int (*LaunchFunction)(void*, void*, void*, void*);
  LaunchFunction function = (LaunchFunction)self->launch_;
  *(unsigned long long*)kernel->stream_at = stream;
  int error;
  Py_BEGIN_ALLOW_THREADS;
  error = function((void*)kernel->config, (void*)kernel->function, (void*)kernel->parameters, NULL);
  Py_END_ALLOW_THREADS;
  if (error) PyErr_Format(PyExc_RuntimeError, "cuLaunchKernelEx: CUDA driver error %d", error);
  return error ? -1 : 0;
}

static int remember(FastPath* self, long long ticket, PyObject* call) {
  PyObject* entry = Py_BuildValue("(LO)", ticket, call);
  if (!entry) return -1;
  PyObject* done = PyObject_CallMethodOneArg(self->calls, n_append, entry);
  Py_DECREF(entry);
  Py_XDECREF(done);
  return done ? 0 : -1;
}
