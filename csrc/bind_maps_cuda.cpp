// The small kernels of the CUDA extension: one entry, `map(name, params, device, stream)`.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "bind_maps.h"
#include "launch.h"
#include "maps_launch.h"

namespace py = pybind11;
using namespace snn;

namespace {

template <class Params>
int launch(int (*run)(const Params&, int, void*), const py::bytes& bytes, int device,
           std::uintptr_t stream) {
  const Params p = unpack<Params>(bytes);
  py::gil_scoped_release nogil;
  return run(p, device, reinterpret_cast<void*>(stream));
}

void run_map(const std::string& name, const py::bytes& bytes, int device, std::uintptr_t stream) {
  int error = 0;
#define SNN_RUN(map, Params)                                     \
  if (name == #map)                                              \
    error = launch<Params>(launch_##map, bytes, device, stream); \
  else
  SNN_MAPS(SNN_RUN)
#undef SNN_RUN
  throw std::invalid_argument("map: '" + name + "' is unknown");
  if (error) throw std::runtime_error(name + ": " + error_string(error));
}

}  // namespace

void bind_maps(py::module_& m) {
  m.def("map", &run_map);
  m.attr("MAP_LAYOUT") = map_layout();
}
