// The Python face of this folder, and the only file that knows pybind11. Signatures are mirrored in internvl_rt/_C.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <span>
#include <string>

#include "check.h"
#include "paged_kv_cache.h"

namespace py = pybind11;

namespace internvl_rt {
namespace {

// The memory of an int32 C-contiguous array, never a converted copy: results are written into what the caller gave.
std::span<const std::int32_t> input(const char* name, const py::array& array, py::ssize_t ndim = 1) {
  CHECK_ARGUMENT(py::isinstance<py::array_t<std::int32_t>>(array), name, ": expected dtype int32, got ",
                 py::str(array.dtype()).cast<std::string>());
  CHECK_ARGUMENT(array.ndim() == ndim, name, ": expected ", ndim, " dimension(s), got ", array.ndim());
  CHECK_ARGUMENT((array.flags() & py::array::c_style) != 0, name, ": expected a C-contiguous array, got a strided one");
  return {static_cast<const std::int32_t*>(array.data()), static_cast<std::size_t>(array.size())};
}

std::span<std::int32_t> output(const char* name, py::array& array, py::ssize_t ndim = 1) {
  const auto values = input(name, array, ndim);
  CHECK_ARGUMENT(array.writeable(), name, ": expected a writable array, got a read-only one");
  return {static_cast<std::int32_t*>(array.mutable_data()), values.size()};
}

void fill_step(PagedKVCache& cache, const py::array& seq_ids, const py::array& num_new_tokens,
               py::array& query_start_S1, py::array& seq_len_S, py::array& block_table_SN, py::array& slot_T) {
  const auto block_table = output("block_table_SN", block_table_SN, 2);
  cache.fill_step({
      .seq_ids = input("seq_ids", seq_ids),
      .num_new_tokens = input("num_new_tokens", num_new_tokens),
      .query_start_S1 = output("query_start_S1", query_start_S1),
      .seq_len_S = output("seq_len_S", seq_len_S),
      .block_table_SN = block_table,
      .table_width = block_table_SN.shape(1),
      .slot_T = output("slot_T", slot_T),
  });
}

}  // namespace
}  // namespace internvl_rt

PYBIND11_MODULE(_C, module) {
  using internvl_rt::PagedKVCache;
  module.doc() = "Bookkeeping of the paged KV cache (csrc/); a wrong argument raises ValueError.";
  py::class_<PagedKVCache>(module, "PagedKVCache")
      .def(py::init<std::int32_t, std::int32_t>(), py::arg("num_blocks"), py::arg("block_size"))
      .def("admit", &PagedKVCache::admit, py::arg("seq_id"), py::arg("num_tokens"))
      .def("append", &PagedKVCache::append, py::arg("seq_id"), py::arg("num_tokens"))
      .def("release", &PagedKVCache::release, py::arg("seq_id"))
      .def("length", &PagedKVCache::length, py::arg("seq_id"))
      .def("fill_step", &internvl_rt::fill_step, py::arg("seq_ids"), py::arg("num_new_tokens"),
           py::arg("query_start_S1"), py::arg("seq_len_S"), py::arg("block_table_SN"), py::arg("slot_T"))
      .def("check_invariants", &PagedKVCache::check_invariants)
      .def_property_readonly("num_free_blocks", &PagedKVCache::num_free_blocks)
      .def_property_readonly("num_blocks", &PagedKVCache::num_blocks)
      .def_property_readonly("block_size", &PagedKVCache::block_size)
      .def_property_readonly("num_sequences", &PagedKVCache::num_sequences);
}
