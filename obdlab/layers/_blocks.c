/* Checks and unpacks the blocks of a ZFile that one read needs, and packs those of a batch, in one call each and
 * without the interpreter's lock.
 *
 * Optional: obdlab/layers/native.py decides whether it is used. Compression is liblz4's and libzstd's, loaded when
 * this module is: without a library Python does its work. The stored bytes are hostile. Every bound is
 * checked here, a decompressor gets the exact room it may fill, and a read is answered only if each block in it has
 * the right CRC and length; otherwise the answer is None, and the caller looks for the damage block by block.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#if !defined(__x86_64__)
#error "the CRC instruction of x86-64 is needed; other processors use Python"
#endif

enum { LZ4 = 1, ZSTD = 2, CRC_SIZE = 4, SEED = 100007, CONTEXTS = 16 };
/* Room beyond a block's size that the original gives LZ4, which decides about its bytes: layout.MAX_GROWTH. */
#define MAX_GROWTH 512
/* Largest block a ZFile may have: layout.MAX_BLOCK_SIZE. */
#define MOST_BLOCK (64u << 10)
/* Most stored bytes of one read of a file: zfile_reader.MAX_RUN. */
#define MOST_RUN (1u << 20)
/* Content below this is unpacked with the lock held: giving it away and taking it back costs more. */
#define RELEASED_FROM (32 << 10)

static int (*lz4_decompress)(const char *, char *, int, int);
static int (*lz4_compress)(const char *, char *, int, int);
static void *(*zstd_context)(void);
static size_t (*zstd_free)(void *);
static size_t (*zstd_decompress)(void *, void *, size_t, const void *, size_t);
static size_t (*zstd_frame_size)(const void *, size_t);

/* Idle zstd contexts; making one costs more than a block. The interpreter's lock guards them. */
static void *idle[CONTEXTS];
static int idle_count;

typedef struct {
    PyObject_HEAD
    Py_buffer offsets; /* where each block begins, then where the last ends: u32 or u64 */
    uint64_t size;     /* of the whole content */
    uint32_t block_size;
    int crc_size, algorithm;
} Unpacker;

static uint64_t offset_of(const Unpacker *self, uint64_t number) {
    return self->offsets.itemsize == 4 ? ((const uint32_t *)self->offsets.buf)[number]
                                       : ((const uint64_t *)self->offsets.buf)[number];
}

static uint64_t word(const char *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* Three blocks at a time: the instruction takes three cycles, and one of another block can start in each. */
__attribute__((target("sse4.2"))) static void crc_three(const char *const at[3], const size_t length[3],
                                                        uint32_t crc[3]) {
    uint64_t a = SEED, b = SEED, c = SEED;
    size_t common = length[0] < length[1] ? length[0] : length[1], done = 0;
    if (length[2] < common) common = length[2];
    for (; done + 8 <= common; done += 8) {
        a = __builtin_ia32_crc32di(a, word(at[0] + done));
        b = __builtin_ia32_crc32di(b, word(at[1] + done));
        c = __builtin_ia32_crc32di(c, word(at[2] + done));
    }
    const uint64_t begun[3] = {a, b, c};
    for (int i = 0; i < 3; i++) {
        uint64_t state = begun[i];
        size_t p = done;
        for (; p + 8 <= length[i]; p += 8) state = __builtin_ia32_crc32di(state, word(at[i] + p));
        uint32_t last = (uint32_t)state;
        for (; p < length[i]; p++) last = __builtin_ia32_crc32qi(last, (unsigned char)at[i][p]);
        crc[i] = last;
    }
}

/* Return 1 if the blocks [first, last] in `stored` lie inside it and have the CRCs that follow them. */
static int sound(const Unpacker *self, const char *stored, size_t stored_size, uint64_t first, uint64_t last) {
    const uint64_t base = offset_of(self, first);
    uint64_t end = base;
    for (uint64_t number = first; number <= last; number++) {
        const uint64_t begin = end;
        end = offset_of(self, number + 1);
        if (end < begin || end - begin <= (uint64_t)self->crc_size || end - base > stored_size) return 0;
        if (end - begin > 2u * MOST_BLOCK) return 0;
    }
    if (end - base != stored_size) return 0;
    for (uint64_t number = first; self->crc_size && number <= last; number += 3) {
        const char *at[3];
        size_t length[3];
        uint32_t crc[3];
        for (int i = 0; i < 3; i++) { /* past the last one, the last one again */
            const uint64_t which = number + i <= last ? number + i : last;
            at[i] = stored + (offset_of(self, which) - base);
            length[i] = offset_of(self, which + 1) - offset_of(self, which) - CRC_SIZE;
        }
        crc_three(at, length, crc);
        for (int i = 0; i < 3; i++) {
            uint32_t wanted;
            memcpy(&wanted, at[i] + length[i], CRC_SIZE);
            if (wanted != crc[i]) return 0;
        }
    }
    return 1;
}

static int decompress(const Unpacker *self, void *context, const char *from, size_t size, char *to, size_t room) {
    if (self->algorithm == LZ4) return lz4_decompress(from, to, (int)size, (int)room) == (int)room;
    /* One frame without anything after it. An error is a huge size, which differs from these as well. */
    return zstd_frame_size(from, size) == size && zstd_decompress(context, to, room, from, size) == room;
}

/* Fill `out` with the content's bytes [offset, offset + length). `scratch` holds one block. */
static int unpack(const Unpacker *self, void *context, const char *stored, size_t stored_size, uint64_t offset,
                  uint64_t length, char *out, char *scratch) {
    const uint64_t first = offset / self->block_size, last = (offset + length - 1) / self->block_size;
    if (!sound(self, stored, stored_size, first, last)) return 0;
    const uint64_t base = offset_of(self, first), end = offset + length;
    for (uint64_t number = first; number <= last; number++) {
        const char *from = stored + (offset_of(self, number) - base);
        const size_t size = offset_of(self, number + 1) - offset_of(self, number) - self->crc_size;
        const uint64_t begin = number * self->block_size, left = self->size - begin;
        const size_t room = left < self->block_size ? (size_t)left : self->block_size;
        if (begin >= offset && begin + room <= end) {
            if (!decompress(self, context, from, size, out + (begin - offset), room)) return 0;
            continue;
        }
        if (!decompress(self, context, from, size, scratch, room)) return 0;
        const uint64_t from_byte = begin < offset ? offset : begin, to_byte = begin + room < end ? begin + room : end;
        memcpy(out + (from_byte - offset), scratch + (from_byte - begin), to_byte - from_byte);
    }
    return 1;
}

/* Return 1 if the range is a part of the content; else 0 with an exception. */
static int inside(const Unpacker *self, uint64_t offset, uint64_t length) {
    if (length && length <= self->size && offset <= self->size - length && length <= PY_SSIZE_T_MAX / 2) return 1;
    PyErr_SetString(PyExc_ValueError, "the range is not inside the content");
    return 0;
}

static void *take_context(const Unpacker *self) {
    if (self->algorithm != ZSTD) return NULL;
    return idle_count ? idle[--idle_count] : zstd_context();
}

static void give_context(void *context) {
    if (context && idle_count < CONTEXTS)
        idle[idle_count++] = context;
    else if (context)
        zstd_free(context);
}

/* Unpack into `out`, letting go of the interpreter's lock if that pays. Returns 1, 0 for damage, -1 with an exception. */
static int fill(Unpacker *self, PyObject *from, uint64_t offset, uint64_t length, char *out) {
    Py_buffer stored;
    if (!inside(self, offset, length) || PyObject_GetBuffer(from, &stored, PyBUF_SIMPLE) < 0) return -1;
    const int parts = offset % self->block_size || (offset + length) % self->block_size;
    char *scratch = parts ? PyMem_RawMalloc(self->block_size) : NULL;
    void *context = take_context(self);
    int good = 0, lacking = (parts && !scratch) || (self->algorithm == ZSTD && !context);
    if (!lacking) {
        PyThreadState *state = length >= RELEASED_FROM ? PyEval_SaveThread() : NULL;
        good = unpack(self, context, stored.buf, (size_t)stored.len, offset, length, out, scratch);
        if (state) PyEval_RestoreThread(state);
    }
    give_context(context);
    PyMem_RawFree(scratch);
    PyBuffer_Release(&stored);
    if (lacking) PyErr_NoMemory();
    return lacking ? -1 : good;
}

/* The same of a file in which the stored bytes begin at `start`. Returns 0 also if they cannot be read at once. */
static int fill_from(Unpacker *self, int fd, uint64_t start, uint64_t offset, uint64_t length, char *out) {
    if (!inside(self, offset, length)) return -1;
    const uint64_t base = offset_of(self, offset / self->block_size);
    const uint64_t end = offset_of(self, (offset + length - 1) / self->block_size + 1);
    if (end <= base || end - base > MOST_RUN || start > INT64_MAX / 2 || end > INT64_MAX / 2) return 0;
    const size_t size = (size_t)(end - base);
    char *stored = PyMem_RawMalloc(size + self->block_size);
    void *context = take_context(self);
    int good = 0, lacking = !stored || (self->algorithm == ZSTD && !context);
    if (!lacking) {
        PyThreadState *state = PyEval_SaveThread();
        good = pread(fd, stored, size, (off_t)(start + base)) == (ssize_t)size &&
               unpack(self, context, stored, size, offset, length, out, stored + size);
        PyEval_RestoreThread(state);
    }
    give_context(context);
    PyMem_RawFree(stored);
    if (lacking) PyErr_NoMemory();
    return lacking ? -1 : good;
}

/* Unpacker.read(stored, offset, length) -> bytes, or None */
static PyObject *read_bytes(PyObject *object, PyObject *const *args, Py_ssize_t count) {
    if (count != 3) return PyErr_Format(PyExc_TypeError, "got %zd arguments, wanted 3", count);
    const unsigned long long offset = PyLong_AsUnsignedLongLong(args[1]);
    const unsigned long long length = PyLong_AsUnsignedLongLong(args[2]);
    if (PyErr_Occurred()) return NULL;
    /* Longer than the content: refused by fill(), which then writes nothing. */
    const uint64_t room = length <= ((Unpacker *)object)->size ? length : 0;
    PyObject *out = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)room);
    const int good = out ? fill((Unpacker *)object, args[0], offset, length, PyBytes_AS_STRING(out)) : -1;
    if (good > 0) return out;
    Py_XDECREF(out);
    if (good < 0) return NULL;
    Py_RETURN_NONE;
}

/* Unpacker.read_into(stored, offset, out) -> True, or False */
static PyObject *read_into(PyObject *object, PyObject *const *args, Py_ssize_t count) {
    Py_buffer out;
    if (count != 3) return PyErr_Format(PyExc_TypeError, "got %zd arguments, wanted 3", count);
    const unsigned long long offset = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred() || PyObject_GetBuffer(args[2], &out, PyBUF_WRITABLE) < 0) return NULL;
    const int good = fill((Unpacker *)object, args[0], offset, (uint64_t)out.len, out.buf);
    PyBuffer_Release(&out);
    return good < 0 ? NULL : PyBool_FromLong(good);
}

/* Unpacker.pread(fd, start, offset, length) -> bytes, or None */
static PyObject *pread_bytes(PyObject *object, PyObject *const *args, Py_ssize_t count) {
    if (count != 4) return PyErr_Format(PyExc_TypeError, "got %zd arguments, wanted 4", count);
    const long fd = PyLong_AsLong(args[0]);
    const unsigned long long start = PyLong_AsUnsignedLongLong(args[1]);
    const unsigned long long offset = PyLong_AsUnsignedLongLong(args[2]);
    const unsigned long long length = PyLong_AsUnsignedLongLong(args[3]);
    if (PyErr_Occurred()) return NULL;
    const uint64_t room = length <= ((Unpacker *)object)->size ? length : 0;
    PyObject *out = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)room);
    const int good = out ? fill_from((Unpacker *)object, (int)fd, start, offset, length, PyBytes_AS_STRING(out)) : -1;
    if (good > 0) return out;
    Py_XDECREF(out);
    if (good < 0) return NULL;
    Py_RETURN_NONE;
}

/* Unpacker.pread_into(fd, start, offset, out) -> True, or False */
static PyObject *pread_into(PyObject *object, PyObject *const *args, Py_ssize_t count) {
    Py_buffer out;
    if (count != 4) return PyErr_Format(PyExc_TypeError, "got %zd arguments, wanted 4", count);
    const long fd = PyLong_AsLong(args[0]);
    const unsigned long long start = PyLong_AsUnsignedLongLong(args[1]);
    const unsigned long long offset = PyLong_AsUnsignedLongLong(args[2]);
    if (PyErr_Occurred() || PyObject_GetBuffer(args[3], &out, PyBUF_WRITABLE) < 0) return NULL;
    const int good = fill_from((Unpacker *)object, (int)fd, start, offset, (uint64_t)out.len, out.buf);
    PyBuffer_Release(&out);
    return good < 0 ? NULL : PyBool_FromLong(good);
}

/* Compress every `block_size` bytes into `out`, each followed by its CRC if `checked`. Returns the length of all, 0 if
 * the library refuses a block. */
static size_t pack(const char *data, size_t size, uint32_t block_size, int checked, char *out, uint32_t *lengths) {
    const size_t crc_size = checked ? CRC_SIZE : 0;
    const char *at[3];
    size_t length[3], filled = 0, blocks = 0;
    for (size_t begin = 0; begin < size; begin += block_size) {
        const size_t left = size - begin, content = left < block_size ? left : block_size;
        const int got = lz4_compress(data + begin, out + filled, (int)content, (int)(content + MAX_GROWTH));
        if (got <= 0) return 0;
        at[blocks % 3] = out + filled;
        length[blocks % 3] = (size_t)got;
        lengths[blocks++] = (uint32_t)(got + crc_size);
        filled += (size_t)got + crc_size;
        const int waiting = (int)((blocks - 1) % 3) + 1; /* blocks without their CRC */
        if (!checked || (waiting < 3 && left > block_size)) continue;
        uint32_t crc[3];
        for (int i = waiting; i < 3; i++) at[i] = at[0], length[i] = 0;
        crc_three(at, length, crc);
        for (int i = 0; i < waiting; i++) memcpy((char *)at[i] + length[i], &crc[i], CRC_SIZE);
    }
    return filled;
}

/* store(data, block_size, checked) -> (bytes, lengths), or None if the library refuses a block */
static PyObject *store(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    Py_buffer data;
    if (count != 3) return PyErr_Format(PyExc_TypeError, "got %zd arguments, wanted 3", count);
    const long block_size = PyLong_AsLong(args[1]);
    const int checked = PyObject_IsTrue(args[2]);
    if (PyErr_Occurred()) return NULL;
    if (!lz4_compress || block_size <= 0 || block_size > (long)MOST_BLOCK) {
        PyErr_SetString(PyExc_ValueError, lz4_compress ? "block size out of bounds" : "no library for this compression");
        return NULL;
    }
    if (PyObject_GetBuffer(args[0], &data, PyBUF_SIMPLE) < 0) return NULL;
    const size_t size = (size_t)data.len, blocks = size / block_size + (size % block_size != 0);
    uint32_t *lengths = PyMem_RawMalloc(blocks * sizeof *lengths + 1);
    char *room = PyMem_RawMalloc(size + blocks * (MAX_GROWTH + CRC_SIZE) + 1);
    PyObject *answer = NULL, *out = NULL, *list = NULL;
    size_t filled = 0;
    if (lengths && room) {
        PyThreadState *state = size >= RELEASED_FROM ? PyEval_SaveThread() : NULL;
        filled = pack(data.buf, size, (uint32_t)block_size, checked, room, lengths);
        if (state) PyEval_RestoreThread(state);
        if (!filled && size) {
            answer = Py_NewRef(Py_None);
        } else if ((out = PyBytes_FromStringAndSize(room, (Py_ssize_t)filled)) && (list = PyList_New((Py_ssize_t)blocks))) {
            for (size_t i = 0; i < blocks; i++) PyList_SET_ITEM(list, (Py_ssize_t)i, PyLong_FromUnsignedLong(lengths[i]));
            if (!PyErr_Occurred()) answer = PyTuple_Pack(2, out, list);
        }
        Py_XDECREF(out);
        Py_XDECREF(list);
    } else {
        PyErr_NoMemory();
    }
    PyMem_RawFree(room);
    PyMem_RawFree(lengths);
    PyBuffer_Release(&data);
    return answer;
}

static PyObject *create(PyTypeObject *type, PyObject *args, PyObject *named) {
    static char *names[] = {"offsets", "block_size", "size", "algorithm", "checked", NULL};
    PyObject *offsets;
    unsigned long long block_size, size;
    int algorithm, checked;
    if (!PyArg_ParseTupleAndKeywords(args, named, "OKKip", names, &offsets, &block_size, &size, &algorithm, &checked))
        return NULL;
    Unpacker *self = (Unpacker *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    if (PyObject_GetBuffer(offsets, &self->offsets, PyBUF_ND | PyBUF_C_CONTIGUOUS) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    const Py_ssize_t width = self->offsets.itemsize;
    const uint64_t blocks = block_size ? size / block_size + (size % block_size != 0) : 0;
    const char *wrong = NULL;
    if (!block_size || block_size > MOST_BLOCK) wrong = "block size out of bounds";
    else if ((width != 4 && width != 8) || (uint64_t)(self->offsets.len / width) != blocks + 1)
        wrong = "the offsets do not match the size";
    else if (!(algorithm == LZ4 && lz4_decompress) && !(algorithm == ZSTD && zstd_decompress))
        wrong = "no library for this compression";
    if (wrong) {
        PyErr_SetString(PyExc_ValueError, wrong);
        Py_DECREF(self);
        return NULL;
    }
    self->block_size = (uint32_t)block_size;
    self->size = size;
    self->algorithm = algorithm;
    self->crc_size = checked ? CRC_SIZE : 0;
    return (PyObject *)self;
}

static void destroy(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    PyBuffer_Release(&((Unpacker *)object)->offsets);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"read", (PyCFunction)(void (*)(void))read_bytes, METH_FASTCALL, "Return bytes of the content, or None if damaged."},
    {"pread", (PyCFunction)(void (*)(void))pread_bytes, METH_FASTCALL, "The same, of a file."},
    {"pread_into", (PyCFunction)(void (*)(void))pread_into, METH_FASTCALL, "Fill a buffer from a file."},
    {"read_into", (PyCFunction)(void (*)(void))read_into, METH_FASTCALL, "Fill a buffer; False if damaged."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot slots[] = {{Py_tp_new, create}, {Py_tp_dealloc, destroy}, {Py_tp_methods, methods}, {0, NULL}};
static PyType_Spec spec = {"obdlab.layers._blocks.Unpacker", sizeof(Unpacker), 0, Py_TPFLAGS_DEFAULT, slots};
static PyMethodDef functions[] = {
    {"store", (PyCFunction)(void (*)(void))store, METH_FASTCALL, "Return LZ4 blocks as a ZFile stores them."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_blocks", NULL, -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__blocks(void) {
    if (!__builtin_cpu_supports("sse4.2")) {
        PyErr_SetString(PyExc_ImportError, "this processor has no CRC instruction");
        return NULL;
    }
    void *library = dlopen("liblz4.so.1", RTLD_NOW | RTLD_LOCAL);
    int (*lz4_version)(void) = NULL;
    if (library) {
        *(void **)&lz4_decompress = dlsym(library, "LZ4_decompress_safe");
        *(void **)&lz4_compress = dlsym(library, "LZ4_compress_default");
        *(void **)&lz4_version = dlsym(library, "LZ4_versionNumber");
    }
    library = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library) {
        *(void **)&zstd_context = dlsym(library, "ZSTD_createDCtx");
        *(void **)&zstd_free = dlsym(library, "ZSTD_freeDCtx");
        *(void **)&zstd_frame_size = dlsym(library, "ZSTD_findFrameCompressedSize");
        *(void **)&zstd_decompress = dlsym(library, "ZSTD_decompressDCtx");
        if (!zstd_context || !zstd_free || !zstd_frame_size) zstd_decompress = NULL;
    }
    PyObject *module = PyModule_Create(&definition), *type = module ? PyType_FromSpec(&spec) : NULL;
    PyObject *found = type ? Py_BuildValue("{sOsO}", "lz4", lz4_decompress ? Py_True : Py_False, "zstd",
                                           zstd_decompress ? Py_True : Py_False)
                           : NULL;
    if (!found || PyModule_AddObjectRef(module, "Unpacker", type) < 0 ||
        PyModule_AddIntConstant(module, "LZ4_VERSION", lz4_compress && lz4_version ? lz4_version() : 0) < 0 ||
        PyModule_AddObjectRef(module, "LIBRARIES", found) < 0)
        Py_CLEAR(module);
    Py_XDECREF(type);
    Py_XDECREF(found);
    return module;
}
