/* Dispatch and combine of plain tensors, alike to some that dispatch.py and combine.py have served
   before: the same steps, without the time that Python takes for them. Whatever is not so, they
   leave to Python and return None, before they have done anything. */
#include "combine.h"
#include "dispatch.h"

#define DROP(name) Py_CLEAR(of->name);
#define SET_OBJECT(name) \
  if (!(of->name = PyObject_GetAttrString(given, #name))) goto failed;
#define SET_NUMBER(name)                                         \
  of->name##_ = as_number(PyObject_GetAttrString(given, #name)); \
  if (PyErr_Occurred()) goto failed;

static void forget_dispatching(PyObject* capsule) {
  Dispatching* of = PyCapsule_GetPointer(capsule, NULL);
  DISPATCHING_OBJECTS(DROP)
  free(of);
}

static void forget_combining(PyObject* capsule) {
  Combining* of = PyCapsule_GetPointer(capsule, NULL);
  COMBINING_OBJECTS(DROP)
  free(of);
}

/* Keep what is known of calls, in a capsule that this consumes, by a key: a form or None, and
   formats of tensors. */
static PyObject* keep(PyObject* known, PyObject* key, PyObject* capsule) {
  /* What is there stays, for the spare memory belongs to it. */
  PyObject* kept = PyDict_SetDefault(known, key, capsule);
  Py_DECREF(capsule);
  if (!kept) return NULL;
  Py_RETURN_NONE;
}

static int read_launch(PyObject* given, const char* name, Launch* launch) {
  PyObject* values = PyObject_GetAttrString(given, name);
  int is_read = values && PyArg_ParseTuple(values, "LLLL", &launch->config, &launch->function,
                                           &launch->parameters, &launch->stream_at);
  Py_XDECREF(values);
  return is_read;
}

/* The shape of a row, behind the number of rows. */
static int read_shape(PyObject* given, Dispatching* of) {
  PyObject* shape = PyObject_GetAttrString(given, "row_shape");
  if (!shape) return 0;
  of->ndim = 1 + (int)PyTuple_GET_SIZE(shape);
  if (of->ndim > kMaxDims) PyErr_SetString(PyExc_ValueError, "rows have too many dimensions");
  for (int i = 1; !PyErr_Occurred() && i < of->ndim; ++i)
    of->shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i - 1));
  Py_DECREF(shape);
  return !PyErr_Occurred();
}

static PyObject* know_dispatch(FastPath* self, PyObject* arguments) {
  PyObject *key, *given, *capsule;
  if (!PyArg_ParseTuple(arguments, "OO", &key, &given)) return NULL;
  Dispatching* of = calloc(1, sizeof *of);
  if (!of) return PyErr_NoMemory();
  if (!(capsule = PyCapsule_New(of, NULL, forget_dispatching))) {
    free(of);
    return NULL;
  }
  DISPATCHING_OBJECTS(SET_OBJECT)
  DISPATCHING_NUMBERS(SET_NUMBER)
  if (read_launch(given, "plan", &of->plan) && read_launch(given, "dispatch", &of->dispatch) &&
      read_shape(given, of))
    return keep(self->dispatchings, key, capsule);
failed:
  Py_DECREF(capsule);
  return NULL;
}

static PyObject* know_combine(FastPath* self, PyObject* arguments) {
  PyObject *key, *given, *capsule;
  if (!PyArg_ParseTuple(arguments, "OO", &key, &given)) return NULL;
  Combining* of = calloc(1, sizeof *of);
  if (!of) return PyErr_NoMemory();
  if (!(capsule = PyCapsule_New(of, NULL, forget_combining))) {
    free(of);
    return NULL;
  }
  COMBINING_OBJECTS(SET_OBJECT)
  COMBINING_NUMBERS(SET_NUMBER)
  if (read_launch(given, "combine", &of->combine)) return keep(self->combinings, key, capsule);
failed:
  Py_DECREF(capsule);
  return NULL;
}

/* Nothing is served from now on, and no memory kept. */
static PyObject* shut(FastPath* self, PyObject* given) {
  (void)given;
  self->is_closed = 1;
  Py_CLEAR(self->chunks);
  Py_CLEAR(self->spare);
  Py_RETURN_NONE;
}

static void destroy(FastPath* of) {
  OBJECTS(DROP)
  Py_CLEAR(of->dispatchings);
  Py_CLEAR(of->combinings);
  Py_CLEAR(of->spare);
  Py_CLEAR(of->spare_mode);
  Py_TYPE(of)->tp_free(of);
}

static PyObject* create(PyTypeObject* type, PyObject* arguments, PyObject* named) {
  PyObject* given;
  (void)named;
  if (!PyArg_ParseTuple(arguments, "O", &given)) return NULL;
  FastPath* of = (FastPath*)type->tp_alloc(type, 0);
  if (!of) return NULL;
  OBJECTS(SET_OBJECT)
  NUMBERS(SET_NUMBER)
  if ((of->dispatchings = PyDict_New()) && (of->combinings = PyDict_New())) return (PyObject*)of;
failed:
  Py_DECREF(of);
  return NULL;
}

static PyMethodDef methods[] = {
    {"dispatch", (PyCFunction)(void (*)(void))dispatch, METH_FASTCALL,
     "The Dispatched of three tensors, or None."},
    {"combine", (PyCFunction)(void (*)(void))combine, METH_FASTCALL,
     "The weighted sums of rows and the Dispatched, or None."},
    {"dispatch_in_graph", (PyCFunction)(void (*)(void))dispatch_in_graph, METH_FASTCALL,
     "Likewise, by form."},
    {"combine_in_graph", (PyCFunction)(void (*)(void))combine_in_graph, METH_FASTCALL,
     "The weighted sums by form, of rows, their weights, and the plan; or None."},
    {"know_dispatch", (PyCFunction)know_dispatch, METH_VARARGS, "See calls.py."},
    {"know_combine", (PyCFunction)know_combine, METH_VARARGS, "See calls.py."},
    {"close", (PyCFunction)shut, METH_NOARGS, "Serve nothing any more."},
    {NULL}};

static PyTypeObject fast_path_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "fusco.FastPath",
    .tp_basicsize = sizeof(FastPath),
    .tp_dealloc = (destructor)destroy,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = methods,
    .tp_new = create,
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "fusco_fast_path", NULL, -1};

PyMODINIT_FUNC PyInit_fusco_fast_path(void) {
#define INTERN(name) \
  if (!(n_##name = PyUnicode_InternFromString(#name))) return NULL;
  NAMES(INTERN)
  nothing = PyTuple_New(0);
  PyObject* module =
      nothing && !PyType_Ready(&fast_path_type) ? PyModule_Create(&definition) : NULL;
  if (module && (PyModule_AddObjectRef(module, "FastPath", (PyObject*)&fast_path_type) ||
                 PyModule_AddIntConstant(module, "MAX_DIMS", kMaxDims)))
    Py_CLEAR(module);
  return module;
}
