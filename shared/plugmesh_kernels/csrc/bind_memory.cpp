// Memory in large pages, which Python's mmap cannot ask for: with pages of 4 KiB a virtual machine reads weights and KV at 22 GB/s where it reads 34 with 2 MiB.
#include <pybind11/numpy.h>

#include <cerrno>
#include <cstring>

#include "bind.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace {

#if defined(__linux__)
constexpr size_t LARGE = size_t(2) << 20;
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

[[noreturn]] void fail(const char* what) {
  PyErr_SetObject(PyExc_OSError, py::make_tuple(errno, std::string(what) + ": " + std::strerror(errno)).ptr());
  throw py::error_already_set();
}

// n bytes that start at a multiple of 2 MiB; unmapped with the array's last view.
py::array map(int fd, size_t n, bool writable) {
  if (n == 0) return py::array_t<uint8_t>(0);
  const size_t whole = n + LARGE;
  void* reserved = mmap(nullptr, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) fail("reserving addresses");
  const auto start = reinterpret_cast<uintptr_t>(reserved);
  void* at = reinterpret_cast<void*>((start + LARGE - 1) / LARGE * LARGE);
  const int flags = MAP_FIXED | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
  if (mmap(at, n, PROT_READ | (writable ? PROT_WRITE : 0), flags, fd, 0) == MAP_FAILED) {
    const int error = errno;
    munmap(reserved, whole);
    errno = error;
    fail("mapping");
  }
  if (fd < 0) madvise(at, n, MADV_HUGEPAGE);
  struct Mapping {
    void* address;
    size_t size;
  };
  py::capsule owner(new Mapping{reserved, whole}, [](void* p) {
    auto* m = static_cast<Mapping*>(p);
    munmap(m->address, m->size);
    delete m;
  });
  py::array_t<uint8_t> array(py::ssize_t(n), static_cast<uint8_t*>(at), owner);
  if (!writable) array.attr("flags").attr("writeable") = false;
  return std::move(array);
}

bool collapse(const py::array& array) {
  void* begin = const_cast<void*>(array.data());
  const size_t n = size_t(array.nbytes()) / LARGE * LARGE;
  py::gil_scoped_release release;  // it copies: hundreds of milliseconds for a model, while a service's event loop must run
  return madvise(begin, n, MADV_COLLAPSE) == 0;
}
#else
py::array map(int, size_t, bool) {
  PyErr_SetString(PyExc_OSError, "large pages are asked for on Linux only");
  throw py::error_already_set();
}
bool collapse(const py::array&) { return false; }
#endif

}  // namespace

void bind_memory(py::module_& m) {
  m.def("large_pages", [](size_t num_bytes) { return map(-1, num_bytes, true); }, py::arg("num_bytes"),
        "Zeroed private memory, (num_bytes,) uint8, in pages of 2 MiB where the system has them; committed as it is touched. OSError.");
  m.def("map_file", &map, py::arg("fd"), py::arg("num_bytes"), py::arg("writable"),
        "A file's first bytes at an address that its large pages can be mapped to, (num_bytes,) uint8; the descriptor may be closed. OSError.");
  m.def("collapse", &collapse, py::arg("array"), "Gathers what is there of such an array into pages of 2 MiB; whether the system did. For memory and tmpfs files.");
}
