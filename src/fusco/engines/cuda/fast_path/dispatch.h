/* The same steps as in dispatch.py. */
#pragma once

#include "plain.h"
#include "tensor.h"

/* What a report is waited for with Python's lock: several times what planning takes, and less than
   threads of Python wait for each other anyway. */
enum { kPatienceNs = 100000 };
enum { kFloat = 2, kFloatBits = 32 }; /* DLPack's */

/* What a kernel reports of a ticket, if it does so soon. */
static const struct Report* await_report(FastPath* self, long long ticket) {
  volatile struct Report* report = (struct Report*)self->reports_ + ticket % kReports;
  struct timespec begin, now;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  while (report->ticket != ticket) {
    clock_gettime(CLOCK_MONOTONIC, &now);
    long long waited = (now.tv_sec - begin.tv_sec) * 1000000000LL + now.tv_nsec - begin.tv_nsec;
    if (waited > kPatienceNs) return NULL;
  }
  __atomic_thread_fence(__ATOMIC_ACQUIRE);
  return (const struct Report*)report;
}

/* Of a block. */
static long long size_of(PyObject* room) { return number_of(room, n_size); }

/* A block for what comes, of the size that is known, else the largest; NULL where it is too small.
 */
static PyObject* reserve(FastPath* self) {
  if (!self->static_rows_) return call_method(self->heap, n_reserve_largest);
  PyObject* given[] = {self->heap, PyLong_FromLongLong(self->static_bytes_)};
  PyObject* room = given[1] ? PyObject_VectorcallMethod(n_reserve, given, 2, NULL) : NULL;
  Py_XDECREF(given[1]);
  if (!room || size_of(room) >= self->static_bytes_) return room;
  PyObject* done = PyObject_CallMethodOneArg(self->heap, n_release, room);
  Py_XDECREF(done);
  Py_DECREF(room);
  return NULL;
}

/* Whether the memory that is spare can be this call's: it belongs to the stream that it was
   allocated on, and tensors of the inference mode are no others. */
static int is_spare_for(FastPath* self, const Dispatching* how, unsigned long long stream) {
  return self->spare && self->spare_of == how && self->spare_stream == stream &&
         is_object(PyObject_CallNoArgs(self->is_inference), self->spare_mode);
}

/* Memory for the plan of the next call; there may be none. */
static int make_spare(FastPath* self, Dispatching* how, unsigned long long stream) {
  Py_XSETREF(self->spare_mode, PyObject_CallNoArgs(self->is_inference));
  Py_CLEAR(self->spare);
  if (self->spare_mode && !self->is_closed) self->spare = PyObject_CallNoArgs(how->make_block);
  self->spare_of = how;
  self->spare_stream = stream;
  if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) return -1;
  PyErr_Clear();
  return 0;
}

/* Launch both kernels and learn how many rows come; -1 with an error set, and -2 where there was no
   room, so that it must be done once more. */
static long long launch_dispatch(FastPath* self, Dispatching* how, const uint64_t* from,
                                 uint64_t plan_at, unsigned long long stream, PyObject* room) {
  struct Call* call = (struct Call*)self->call_;
  long long base = number_of(room, n_base);
  long long ticket = call->ticket + 1;
  *call = (struct Call){.operation = how->operation_,
                        .status = how->status_,
                        .plan = how->number_,
                        .signature = how->signature_,
                        .base = base % self->chunk_span_,
                        .capacity = size_of(room),
                        .chunk = base / self->chunk_span_,
                        .ticket = ticket};
  if (remember(self, ticket, how->call)) return -1;
  *(struct PlanArgs*)self->plan_args_ =
      (struct PlanArgs){.topk_idx = from[1],
                        .pairs = plan_at + how->pairs_,
                        .links = plan_at + how->links_,
                        .tokens_per_expert = plan_at,
                        .expert_offsets = plan_at + how->expert_offsets_,
                        .row_bytes = {(int)how->row_bytes_},
                        .num_parts = 1,
                        .num_tokens = (int)how->num_tokens_,
                        .chunk_tokens = (int)how->chunk_tokens_};
  if (launch(self, &how->plan, stream)) return -1;
  *(struct DispatchArgs*)self->dispatch_args_ =
      (struct DispatchArgs){.rows = {from[0]},
                            .weights = from[2],
                            .pairs = plan_at + how->pairs_,
                            .links = plan_at + how->links_,
                            .tokens_per_expert = plan_at,
                            .expert_offsets = plan_at + how->expert_offsets_,
                            .row_bytes = {(int)how->row_bytes_},
                            .num_parts = 1,
                            .num_tokens = (int)how->num_tokens_,
                            .slot_bytes = (int)how->slot_bytes_};
  if (launch(self, &how->dispatch, stream)) return -1;
  /* There is time until the report comes. */
  if (make_spare(self, how, stream)) return -1;
  if (self->static_rows_) return self->static_rows_;
  const struct Report* report = await_report(self, ticket);
  if (report && report->verdict == kGo) return report->num_rows;
  PyObject* rows = PyObject_CallFunction(self->finish, "OLO", how->call, ticket, room);
  if (rows == Py_None) {
    Py_DECREF(rows);
    return -2;
  }
  return as_number(rows);
}

static PyObject* as_plan(FastPath* self, Dispatching* how, PyObject* block, uint64_t plan_at,
                         unsigned long long stream, long long num_rows) {
  PyObject* names[] = {n__number, n_stream,  n__num_rows, n_addresses,
                       n__key,    n__layout, n__block,    n__one};
  PyObject* values[] = {PyObject_CallNoArgs(self->new_number),
                        PyLong_FromUnsignedLongLong(stream),
                        PyLong_FromLongLong(num_rows),
                        as_named(self->addresses_type,
                                 Py_BuildValue("(KKKK)", plan_at, plan_at + how->expert_offsets_,
                                               plan_at + how->pairs_, plan_at + how->links_)),
                        self->key,
                        how->layout,
                        block,
                        self->one};
  PyObject* plan = PyErr_Occurred() ? NULL : as_frozen(self->plan_type, names, values, 8);
  for (int i = 0; i < 4; ++i) Py_XDECREF(values[i]);
  return plan;
}

/* The rows and their weights where they lie; the rest of the room is free again. */
static PyObject* as_dispatched(FastPath* self, Dispatching* how, PyObject* room, PyObject* plan,
                               long long num_rows) {
  if (!num_rows) return PyObject_CallFunctionObjArgs(self->wrap, room, how->format, plan, NULL);
  long long base = number_of(room, n_base);
  long long rows_size = round_up(num_rows * how->row_bytes_), weights_size = round_up(num_rows * 4);
  if (self->static_rows_) {
    weights_size = size_of(room) - rows_size;
  } else {
    PyObject* shrink[] = {self->heap, room, PyLong_FromLongLong(rows_size + weights_size)};
    PyObject* done = shrink[2] ? PyObject_VectorcallMethod(n_shrink, shrink, 3, NULL) : NULL;
    Py_XDECREF(shrink[2]);
    Py_XDECREF(done);
    if (!done) return NULL;
  }
  how->shape[0] = num_rows;
  PyObject* rows = lend(self, base, rows_size, how->shape, how->ndim, how->type_, how->bits_);
  PyObject* weights =
      rows ? lend(self, base + rows_size, weights_size, how->shape, 1, kFloat, kFloatBits) : NULL;
  PyObject* names[] = {n_tokens, n_row_weights, n_plan};
  PyObject* values[] = {rows, weights, plan};
  PyObject* result = weights ? as_frozen(self->dispatched_type, names, values, 3) : NULL;
  Py_XDECREF(rows);
  Py_XDECREF(weights);
  return result;
}

/* A dispatch of three tensors, which is known by its form where gradients are wanted. */
static PyObject* serve_dispatch(FastPath* self, PyObject* form, PyObject* const* given) {
  Dispatching* how = find(self->dispatchings, key_of(form, given, 3));
  uint64_t from[3];
  unsigned long long stream;
  if (!how || !is_plain(self, given[0], &from[0]) || !is_plain(self, given[1], &from[1]) ||
      !is_plain(self, given[2], &from[2]) || !is_free(self, &stream))
    return leave();
  PyObject* block = NULL;
  if (is_spare_for(self, how, stream)) {
    block = self->spare;
    self->spare = NULL;
  } else {
    block = PyObject_CallNoArgs(how->make_block);
  }
  uint64_t plan_at = block ? as_number(call_method(block, n_data_ptr)) : 0;
  PyObject* room = block && !PyErr_Occurred() ? reserve(self) : NULL;
  if (!room) {
    Py_XDECREF(block);
    return leave();
  }
  PyObject *plan = NULL, *result = NULL;
  long long num_rows;
  while ((num_rows = launch_dispatch(self, how, from, plan_at, stream, room)) == -2) {
    Py_SETREF(room, reserve(self));
    if (!room) break;
  }
  if (num_rows >= 0) plan = as_plan(self, how, block, plan_at, stream, num_rows);
  if (plan) result = as_dispatched(self, how, room, plan, num_rows);
  Py_DECREF(block);
  Py_XDECREF(room);
  if (result) {
    PyObject* done = PyObject_CallOneArg(self->dispatched, self->zero);
    if (!done || PyObject_SetAttr(self->works, n_last_plan, plan)) Py_CLEAR(result);
    Py_XDECREF(done);
  }
  Py_XDECREF(plan);
  return result;
}

static int are_tensors(FastPath* self, PyObject* const* given, int count) {
  for (int i = 0; i < count; ++i)
    if ((PyObject*)Py_TYPE(given[i]) != self->tensor_type) return 0;
  return !self->is_closed;
}

static PyObject* dispatch(FastPath* self, PyObject* const* given, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "dispatch takes 3 tensors");
  if (!are_tensors(self, given, 3)) Py_RETURN_NONE;
  if (!is_constant(given[0]) || !is_constant(given[2])) return leave();
  return serve_dispatch(self, Py_None, given);
}

static PyObject* dispatch_in_graph(FastPath* self, PyObject* const* given, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "dispatch takes a form and 3 tensors");
  if (!are_tensors(self, given + 1, 3)) Py_RETURN_NONE;
  return serve_dispatch(self, given[0], given + 1);
}
