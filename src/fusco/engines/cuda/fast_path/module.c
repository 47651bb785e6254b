/* Dispatch and combine of plain tensors, alike to some that dispatch.py and combine.py have served
   before: the same steps, without the time that Python takes for them. Whatever is not so, they
   leave to Python and return None, before they have done anything. */
#include "combine.h"
#include "dispatch.h"

static void forget_dispatching(PyObject* capsule) {
  Dispatching* how = PyCapsule_GetPointer(capsule, NULL);
  Py_XDECREF(how->call);
  Py_XDECREF(how->make_block);
  Py_XDECREF(how->layout);
  Py_XDECREF(how->format);
  free(how);
}

static void forget_combining(PyObject* capsule) {
  Combining* how = PyCapsule_GetPointer(capsule, NULL);
  Py_XDECREF(how->kind);
  Py_XDECREF(how->form);
  Py_XDECREF(how->num_returners);
  free(how);
}

/* Keep what is known of calls with tensors of these formats. */
static PyObject* keep(PyObject* known, PyObject* formats, void* how, PyCapsule_Destructor forget) {
  PyObject* capsule = PyCapsule_New(how, NULL, forget);
  /* What is there stays, for the spare memory belongs to it. */
  PyObject* kept = capsule ? PyDict_SetDefault(known, formats, capsule) : NULL;
  Py_XDECREF(capsule);
  if (!kept) return NULL;
  Py_RETURN_NONE;
}

#define LAUNCH "(KKKK)"
#define LAUNCH_OF(kernel) \
  &(kernel).config, &(kernel).function, &(kernel).parameters, &(kernel).stream_at

static PyObject* know_dispatch(FastPath* self, PyObject* given) {
  PyObject *formats, *shape;
  Dispatching* how = calloc(1, sizeof *how);
  if (!how) return PyErr_NoMemory();
  int is_read = PyArg_ParseTuple(
      given, "O(LLLL)OOOO(LLL)" LAUNCH LAUNCH "(Liiiii)O!", &formats, &how->operation, &how->status,
      &how->number, &how->signature, &how->call, &how->make_block, &how->layout, &how->format,
      &how->expert_offsets, &how->pairs, &how->links, LAUNCH_OF(how->plan),
      LAUNCH_OF(how->dispatch), &how->row_bytes, &how->slot_bytes, &how->num_tokens,
      &how->chunk_tokens, &how->code, &how->bits, &PyTuple_Type, &shape);
  how->ndim = is_read ? 1 + (int)PyTuple_GET_SIZE(shape) : 0;
  if (is_read && how->ndim > kMaxDims) {
    PyErr_SetString(PyExc_ValueError, "rows have too many dimensions");
    is_read = 0;
  }
  for (int i = 0; is_read && i < how->ndim - 1; ++i)
    how->row_shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
  if (!is_read || PyErr_Occurred()) {
    free(how);
    return NULL;
  }
  Py_INCREF(how->call);
  Py_INCREF(how->make_block);
  Py_INCREF(how->layout);
  Py_INCREF(how->format);
  return keep(self->dispatchings, formats, how, forget_dispatching);
}

static PyObject* know_combine(FastPath* self, PyObject* given) {
  PyObject* formats;
  Combining* how = calloc(1, sizeof *how);
  if (!how) return PyErr_NoMemory();
  if (!PyArg_ParseTuple(given, "O(LLL)OOO" LAUNCH "(Liii)", &formats, &how->operation, &how->status,
                        &how->signature, &how->kind, &how->form, &how->num_returners,
                        LAUNCH_OF(how->combine), &how->returns_at, &how->row_bytes,
                        &how->piece_bytes, &how->num_slots)) {
    free(how);
    return NULL;
  }
  Py_INCREF(how->kind);
  Py_INCREF(how->form);
  Py_INCREF(how->num_returners);
  return keep(self->combinings, formats, how, forget_combining);
}

/* Nothing is served from now on, and no memory kept. */
static PyObject* shut(FastPath* self, PyObject* given) {
  (void)given;
  self->is_closed = 1;
  Py_CLEAR(self->chunks);
  Py_CLEAR(self->spare);
  Py_RETURN_NONE;
}

static void destroy(FastPath* self) {
#define DROP(name) Py_CLEAR(self->name);
  OBJECTS(DROP)
  Py_CLEAR(self->dispatchings);
  Py_CLEAR(self->combinings);
  Py_CLEAR(self->spare);
  Py_TYPE(self)->tp_free(self);
}

static int set_up(FastPath* self, PyObject* given, PyObject* named) {
  PyObject *shared, *value;
  (void)named;
  if (!PyArg_ParseTuple(given, "O", &shared)) return -1;
#define SET_OBJECT(name)                                           \
  if (!(value = PyObject_GetAttrString(shared, #name))) return -1; \
  Py_XSETREF(self->name, value);
#define SET_NUMBER(name)                                           \
  if (!(value = PyObject_GetAttrString(shared, #name))) return -1; \
  self->name##_ = as_number(value);                                \
  if (PyErr_Occurred()) return -1;
  OBJECTS(SET_OBJECT)
  NUMBERS(SET_NUMBER)
  Py_XSETREF(self->dispatchings, PyDict_New());
  Py_XSETREF(self->combinings, PyDict_New());
  return self->dispatchings && self->combinings ? 0 : -1;
}

static PyMethodDef methods[] = {
    {"dispatch", (PyCFunction)(void (*)(void))dispatch, METH_FASTCALL,
     "The Dispatched of three tensors, or None."},
    {"combine", (PyCFunction)(void (*)(void))combine, METH_FASTCALL,
     "The weighted sums of rows and the Dispatched, or None."},
    {"know_dispatch", (PyCFunction)know_dispatch, METH_VARARGS, "See fast_path.py."},
    {"know_combine", (PyCFunction)know_combine, METH_VARARGS, "See fast_path.py."},
    {"close", (PyCFunction)shut, METH_NOARGS, "Serve nothing any more."},
    {NULL}};

static PyTypeObject fast_path_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "fusco.FastPath",
    .tp_basicsize = sizeof(FastPath),
    .tp_dealloc = (destructor)destroy,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = methods,
    .tp_init = (initproc)set_up,
    .tp_new = PyType_GenericNew,
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "fusco_fast_path", NULL, -1};

PyMODINIT_FUNC PyInit_fusco_fast_path(void) {
#define INTERN(name) \
  if (!(n_##name = PyUnicode_InternFromString(#name))) return NULL;
  NAMES(INTERN)
  nothing = PyTuple_New(0);
  PyObject* module =
      nothing && !PyType_Ready(&fast_path_type) ? PyModule_Create(&definition) : NULL;
  if (module && PyModule_AddObjectRef(module, "FastPath", (PyObject*)&fast_path_type))
    Py_CLEAR(module);
  return module;
}
