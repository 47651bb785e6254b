/* The same steps as in combine.py. */
#pragma once

#include "plain.h"

/* What a combine needs of a plan. */
typedef struct {
  long long num_rows, num_tokens, number;
  uint64_t pairs, links;
} Made;

/* Whether a plan is this Shuffle's, made on this stream; then what is needed of it. */
static int read_plan(FastPath* self, PyObject* plan, unsigned long long stream, Made* made) {
  if ((PyObject*)Py_TYPE(plan) != self->plan_type) return 0;
  if (!has_number(plan, n__key, self->key)) return 0;
  if ((unsigned long long)number_of(plan, n_stream) != stream) return 0;
  PyObject* layout = PyObject_GetAttr(plan, n__layout);
  PyObject* addresses = PyObject_GetAttr(plan, n_addresses);
  if (layout && addresses) {
    made->num_tokens = number_of(layout, n_num_tokens);
    made->pairs = number_of(addresses, n_pairs);
    made->links = number_of(addresses, n_links);
  }
  Py_XDECREF(layout);
  Py_XDECREF(addresses);
  made->num_rows = number_of(plan, n__num_rows);
  made->number = number_of(plan, n__number);
  return !PyErr_Occurred();
}

/* Whether the first extent of a tensor is so long, and others follow or not. */
static int begins_with(PyObject* shape, long long extent, int has_others) {
  Py_ssize_t ndim = PyTuple_GET_SIZE(shape);
  return (has_others ? ndim >= 1 : ndim == 1) &&
         PyLong_AsLongLong(PyTuple_GET_ITEM(shape, 0)) == extent;
}

/* See `num_returners` in combine.py. */
static int returners_of(const Combining* how, const Made* made) {
  PyObject* numbers[] = {PyLong_FromLongLong(made->num_tokens),
                         PyLong_FromLongLong(made->num_rows)};
  PyObject* number =
      numbers[0] && numbers[1] ? PyObject_Vectorcall(how->num_returners, numbers, 2, NULL) : NULL;
  Py_XDECREF(numbers[0]);
  Py_XDECREF(numbers[1]);
  return (int)as_number(number);
}

static PyObject* launch_combine(FastPath* self, Combining* how, const Made* made, PyObject* rows,
                                PyObject* row_shape, const uint64_t* from,
                                unsigned long long stream) {
  struct Call* call = (struct Call*)self->call_;
  PyObject* sizes[kMaxDims + 1] = {rows, PyLong_FromLongLong(made->num_tokens)};
  Py_ssize_t ndim = 1 + PyTuple_GET_SIZE(row_shape);
  for (Py_ssize_t i = 1; i < ndim; ++i) sizes[i + 1] = PyTuple_GET_ITEM(row_shape, i - 1);
  PyObject* out = sizes[1] ? PyObject_VectorcallMethod(n_new_empty, sizes, ndim + 1, NULL) : NULL;
  Py_XDECREF(sizes[1]);
  uint64_t out_at = out ? as_number(call_method(out, n_data_ptr)) : 0;
  int num_returners = out ? returners_of(how, made) : 0;
  if (PyErr_Occurred()) {
    Py_XDECREF(out);
    return leave();
  }
  PyObject* described = as_named(
      self->call_type, Py_BuildValue("(OLOO)", how->kind, made->number, how->form, Py_None));
  long long ticket = call->ticket + 1;
  int is_ready = described && !remember(self, ticket, described);
  Py_XDECREF(described);
  if (is_ready) {
    *call = (struct Call){.operation = how->operation_,
                          .status = how->status_,
                          .plan = made->number,
                          .signature = how->signature_,
                          .ticket = ticket};
    *(struct CombineArgs*)self->combine_args_ =
        (struct CombineArgs){.rows = from[0],
                             .out = out_at,
                             .row_weights = from[1],
                             .pairs = made->pairs,
                             .links = made->links,
                             .returns_at = how->returns_at_,
                             .row_bytes = (int)how->row_bytes_,
                             .num_tokens = (int)made->num_tokens,
                             .is_last = 1,
                             .piece_bytes = (int)how->piece_bytes_,
                             .num_slots = (int)how->num_slots_,
                             .num_returners = num_returners};
    is_ready = !launch(self, &how->combine, stream);
  }
  PyObject* counted = is_ready ? PyObject_CallNoArgs(self->combined) : NULL;
  if (!counted) Py_CLEAR(out);
  Py_XDECREF(counted);
  return out;
}

/* A weighted combine, which is known by its form where gradients are wanted. */
static PyObject* serve_combine(FastPath* self, PyObject* form, PyObject* rows, PyObject* weights,
                               PyObject* plan) {
  if ((PyObject*)Py_TYPE(rows) != self->tensor_type ||
      (PyObject*)Py_TYPE(weights) != self->tensor_type || self->is_closed)
    Py_RETURN_NONE;
  PyObject *result = NULL, *row_shape = NULL;
  PyObject *shape = PyObject_GetAttr(rows, n_shape), *dtype = PyObject_GetAttr(rows, n_dtype);
  PyObject* weights_shape = PyObject_GetAttr(weights, n_shape);
  uint64_t from[2];
  unsigned long long stream;
  Made made = {0};
  if (!shape || !dtype || !weights_shape) goto done;
  if (!is_object(PyObject_GetAttr(weights, n_dtype), self->float32)) goto done;
  if (PyTuple_GET_SIZE(shape) > kMaxDims) goto done;
  if (!(row_shape = PySequence_GetSlice(shape, 1, kMaxDims))) goto done;
  Combining* how = find(self->combinings, PyTuple_Pack(3, form, row_shape, dtype));
  if (how && is_plain(self, rows, &from[0]) && is_plain(self, weights, &from[1]) &&
      is_free(self, &stream) && read_plan(self, plan, stream, &made) &&
      begins_with(shape, made.num_rows, 1) && begins_with(weights_shape, made.num_rows, 0)) {
    result = launch_combine(self, how, &made, rows, row_shape, from, stream);
    goto end;
  }
done:
  result = leave();
end:
  Py_XDECREF(shape);
  Py_XDECREF(dtype);
  Py_XDECREF(weights_shape);
  Py_XDECREF(row_shape);
  return result;
}

static PyObject* combine(FastPath* self, PyObject* const* given, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "combine takes a tensor and a Dispatched");
  PyObject *rows = given[0], *dispatched = given[1];
  if ((PyObject*)Py_TYPE(rows) != self->tensor_type ||
      (PyObject*)Py_TYPE(dispatched) != self->dispatched_type)
    Py_RETURN_NONE;
  PyObject* plan = PyObject_GetAttr(dispatched, n_plan);
  PyObject* weights = PyObject_GetAttr(dispatched, n_row_weights);
  PyObject* tokens = PyObject_GetAttr(dispatched, n_tokens);
  int is_served =
      plan && weights && tokens && is_constant(rows) && is_constant(weights) && is_constant(tokens);
  PyObject* result = is_served ? serve_combine(self, Py_None, rows, weights, plan) : leave();
  Py_XDECREF(plan);
  Py_XDECREF(weights);
  Py_XDECREF(tokens);
  return result;
}

static PyObject* combine_in_graph(FastPath* self, PyObject* const* given, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "combine takes a form and 3 arguments");
  return serve_combine(self, given[0], given[1], given[2], given[3]);
}
