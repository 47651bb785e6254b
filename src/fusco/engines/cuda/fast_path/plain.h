/* What makes a call one that is served: tensors as kernels take them, and nothing in the way. */
#pragma once

#include "shared.h"

/* Whether no gradient of a tensor is wanted. */
static int is_constant(PyObject* tensor) {
  return is_object(PyObject_GetAttr(tensor, n_requires_grad), Py_False);
}

/* Whether kernels can take a tensor as it is; then its address. */
static int is_plain(FastPath* self, PyObject* tensor, uint64_t* address) {
  return is_object(PyObject_GetAttr(tensor, n_layout), self->strided) &&
         as_number(call_method(tensor, n_get_device)) == self->tensor_index_ &&
         is_object(call_method(tensor, n_is_contiguous), Py_True) &&
         is_object(call_method(tensor, n_is_neg), Py_False) &&
         (*address = as_number(call_method(tensor, n_data_ptr))) % kVectorBytes == 0;
}

/* Whether an attribute is a number. */
static int has_number(PyObject* of, PyObject* name, PyObject* number) {
  PyObject* value = PyObject_GetAttr(of, name);
  int is_equal = value && value != Py_None && PyObject_RichCompareBool(value, number, Py_EQ) == 1;
  Py_XDECREF(value);
  return is_equal;
}

/* Whether nothing stands in the way of an operation on the current stream; then its handle. */
static int is_free(FastPath* self, unsigned long long* stream) {
  if (self->is_closed || *(int64_t*)self->failure_) return 0;
  if (!is_object(PyObject_CallNoArgs(self->is_transformed), Py_False)) return 0;
  if (!is_object(PyObject_CallNoArgs(self->is_profiled), Py_False)) return 0;
  if (as_number(PyObject_CallNoArgs(self->current_device)) != self->device_index_) return 0;
  PyObject* index = PyLong_FromLongLong(self->device_index_);
  PyObject* handle = index ? PyObject_CallOneArg(self->current_raw_stream, index) : NULL;
  Py_XDECREF(index);
  if (!handle) return 0;
  /* As in `Order.begin`, for which there is nothing to do then. */
  int follows = has_number(self->order, n__last, handle) &&
                has_number(self->traffic, n_only, handle) &&
                is_object(PyObject_GetAttr(self->order, n_is_capturing), Py_False);
  *stream = PyLong_AsUnsignedLongLong(handle);
  Py_DECREF(handle);
  /* This also gives the thread the device's context, which a launch needs. */
  return follows && is_object(PyObject_CallNoArgs(self->is_stream_capturing), Py_False);
}

/* A call that is not served here: what was raised, whoever serves it finds again, but interrupts.
 */
static PyObject* leave(void) {
  if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) return NULL;
  PyErr_Clear();
  Py_RETURN_NONE;
}

static void* find(PyObject* known, PyObject* key) {
  PyObject* capsule = key ? PyDict_GetItemWithError(known, key) : NULL;
  Py_XDECREF(key);
  return capsule ? PyCapsule_GetPointer(capsule, NULL) : NULL;
}

/* What a dispatch is known by; the form is None where no gradients are wanted. */
static PyObject* key_of(PyObject* form, PyObject* const* tensors, int count) {
  PyObject* key = PyTuple_New(1 + 2 * count);
  if (key) PyTuple_SET_ITEM(key, 0, Py_NewRef(form));
  for (int i = 0; key && i < count; ++i) {
    PyObject* shape = PyObject_GetAttr(tensors[i], n_shape);
    PyObject* dtype = PyObject_GetAttr(tensors[i], n_dtype);
    PyTuple_SET_ITEM(key, 2 * i + 1, shape);
    PyTuple_SET_ITEM(key, 2 * i + 2, dtype);
    if (!shape || !dtype) Py_CLEAR(key);
  }
  return key;
}
