// The CUDA extension: one function per kernel, a params struct as bytes in. It links the CUDA
// runtime statically, so it imports on a machine without a driver and says so when called.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "launch.h"

namespace py = pybind11;
using namespace snn;

namespace {

template <class Params>
void run(const char* name, int (*launch)(const Params&, int, void*), const py::bytes& bytes,
         int device, std::uintptr_t stream) {
  const Params p = unpack<Params>(bytes);
  int error;
  {
    py::gil_scoped_release nogil;
    error = launch(p, device, reinterpret_cast<void*>(stream));
  }
  if (error) throw std::runtime_error(std::string(name) + ": " + error_string(error));
}

}  // namespace

void bind_maps(py::module_& m);

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "snnkernels CUDA kernels";
  m.def("if_forward", [](const py::bytes& p, int device, std::uintptr_t stream) {
    run("if_forward", launch_if_forward, p, device, stream);
  });
  m.def("if_general", [](const py::bytes& p, int device, std::uintptr_t stream) {
    run("if_general", launch_if_general, p, device, stream);
  });
  m.def("if_backward", [](const py::bytes& p, int device, std::uintptr_t stream) {
    run("if_backward", launch_if_backward, p, device, stream);
  });
  m.def("if_backward_general", [](const py::bytes& p, int device, std::uintptr_t stream) {
    run("if_backward_general", launch_if_backward_general, p, device, stream);
  });
  m.def(
      "versions",
      [] {
        int runtime = 0, driver = 0;
        cuda_versions(&runtime, &driver);
        return py::make_tuple(runtime, driver);
      },
      "CUDA versions of the runtime linked in and of the driver, such as (13000, 12080).");
  m.attr("LAYOUT") = layout();
  bind_maps(m);
#if defined(SNN_ARCHS)
  m.attr("ARCHS") = SNN_ARCHS;
#endif
}
