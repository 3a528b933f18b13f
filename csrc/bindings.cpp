// The Python interface of this folder. No other file includes pybind11. internvl_rt/_C.pyi repeats the signatures for
// type checkers, and a test compares the two.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "check.h"
#include "paged_kv_cache.h"

namespace py = pybind11;

namespace internvl_rt {
namespace {

using Ints = py::array_t<std::int32_t>;

// Returns the memory of an int32 C-contiguous array. Other arrays are refused and not converted, because results have
// to be written into the caller's memory and not into a copy.
std::span<const std::int32_t> input(const char* name, const py::array& array, py::ssize_t ndim = 1) {
  CHECK_ARGUMENT(py::isinstance<Ints>(array), name, ": expected dtype int32, got ",
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

// A prompt as Python gives it. Its memory belongs to Python's objects, and that of the pictures to this object.
struct PromptArgument {
  PromptArgument(const py::array& token_ids, const py::iterable& picture_list, const std::optional<py::bytes>& identity,
                 std::optional<std::int64_t> max_cached) {
    for (const py::handle item : picture_list) {
      const auto [start, num_tokens, digest] = item.cast<std::tuple<std::int32_t, std::int32_t, std::string_view>>();
      Picture& picture = pictures.emplace_back(Picture{start, num_tokens, {}});
      CHECK_ARGUMENT(digest.size() == picture.digest.size(), "pictures: expected digests of ", picture.digest.size(),
                     " bytes, got ", digest.size());
      std::memcpy(picture.digest.data(), digest.data(), digest.size());
    }
    prompt.token_ids = input("token_ids", token_ids);
    prompt.pictures = pictures;
    if (max_cached) prompt.max_cached = *max_cached;
    if (!identity) return;
    const std::string_view bytes = *identity;
    prompt.identity = std::span(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
  }
  std::vector<Picture> pictures;
  Prompt prompt;
};

std::int64_t match(const PagedKVCache& cache, const py::array& token_ids, const py::iterable& pictures,
                   const std::optional<py::bytes>& identity, std::optional<std::int64_t> max_cached) {
  return cache.match(PromptArgument(token_ids, pictures, identity, max_cached).prompt);
}

std::optional<std::int64_t> admit(PagedKVCache& cache, std::int64_t seq_id, const py::array& token_ids,
                                  const py::iterable& pictures, const std::optional<py::bytes>& identity,
                                  std::int64_t num_reserved, std::optional<std::int64_t> max_cached) {
  return cache.admit(seq_id, PromptArgument(token_ids, pictures, identity, max_cached).prompt, num_reserved);
}

std::int64_t fill_step(PagedKVCache& cache, const py::array& seq_ids, const py::array& num_new_tokens,
                       py::array& query_start_S1, py::array& seq_len_S, py::array& block_table_SN, py::array& slot_T,
                       std::optional<py::array> split_start_S1, std::optional<py::array> split_W3,
                       std::optional<py::array> window_table_SN, std::optional<py::array> window_slot_T) {
  CHECK_ARGUMENT(split_start_S1.has_value() == split_W3.has_value(),
                 "split_start_S1 and split_W3: expected both or neither, got one of them");
  const bool has_window = cache.window() > 0;
  CHECK_ARGUMENT(window_table_SN.has_value() == has_window && window_slot_T.has_value() == has_window,
                 "window_table_SN and window_slot_T: expected ", has_window ? "both" : "neither", ", as the cache has ",
                 has_window ? "a" : "no", " window");
  StepBuffers step{
      .seq_ids = input("seq_ids", seq_ids),
      .num_new_tokens = input("num_new_tokens", num_new_tokens),
      .query_start_S1 = output("query_start_S1", query_start_S1),
      .seq_len_S = output("seq_len_S", seq_len_S),
      .table_width = 0,
      .tables = {{{output("block_table_SN", block_table_SN, 2), output("slot_T", slot_T)}, {}}},
      .split_start_S1 = {},
      .split_W3 = {},
  };
  step.table_width = block_table_SN.shape(1);
  if (has_window) {
    step.tables[1] = {output("window_table_SN", *window_table_SN, 2), output("window_slot_T", *window_slot_T)};
    CHECK_ARGUMENT(window_table_SN->shape(1) == step.table_width, "window_table_SN: expected ", step.table_width,
                   " columns, as block_table_SN has, got ", window_table_SN->shape(1));
  }
  if (split_W3) {
    step.split_start_S1 = output("split_start_S1", *split_start_S1);
    step.split_W3 = output("split_W3", *split_W3, 2);
    CHECK_ARGUMENT(!step.split_start_S1.empty(), "split_start_S1: expected size ", step.seq_len_S.size() + 1,
                   ", got 0");
    CHECK_ARGUMENT(split_W3->shape(1) == 3, "split_W3: expected 3 columns, got ", split_W3->shape(1));
  }
  return cache.fill_step(step);
}

Ints take_copies(PagedKVCache& cache) {
  const auto copies = cache.take_copies();
  Ints rows({std::ssize(copies), std::ptrdiff_t{2}});
  std::int32_t* out = rows.mutable_data();
  for (const BlockCopy& copy : copies) {
    *out++ = copy.source;
    *out++ = copy.destination;
  }
  return rows;
}

py::bytes bytes_of(const Hash128& hash) { return {reinterpret_cast<const char*>(&hash), sizeof hash}; }

std::optional<Hash128> key_of(const std::optional<py::bytes>& hash_key) {
  if (!hash_key) return std::nullopt;
  const std::string_view bytes = *hash_key;
  Hash128 key;
  CHECK_ARGUMENT(bytes.size() == sizeof key, "hash_key: expected ", sizeof key, " bytes, got ", bytes.size());
  std::memcpy(&key, bytes.data(), sizeof key);
  return key;
}

py::list digests(const PagedKVCache& cache, const py::array& token_ids, const py::iterable& pictures,
                 const std::optional<py::bytes>& identity, std::optional<std::int64_t> max_cached) {
  py::list found;
  for (const Hash128& hash : cache.digests(PromptArgument(token_ids, pictures, identity, max_cached).prompt))
    found.append(bytes_of(hash));
  return found;
}

py::list drain_events(PagedKVCache& cache) {
  py::list events;
  for (const PrefixEvent& event : cache.drain_events()) {
    static constexpr const char* kNames[] = {"stored", "removed", "cleared"};
    events.append(py::make_tuple(kNames[static_cast<int>(event.kind)], bytes_of(event.hash), bytes_of(event.parent),
                                 Ints(std::ssize(event.token_ids), event.token_ids.data())));
  }
  return events;
}

py::dict stats(const PagedKVCache& cache) {
  const CacheStats s = cache.stats();
  using namespace py::literals;
  return py::dict("num_blocks"_a = s.num_blocks, "num_free"_a = s.num_free, "num_cached"_a = s.num_cached,
                  "num_used"_a = s.num_used, "num_deferred"_a = s.num_deferred, "num_sequences"_a = s.num_sequences,
                  "queried_tokens"_a = s.queried_tokens, "hit_tokens"_a = s.hit_tokens,
                  "num_evictions"_a = s.num_evictions, "num_copies"_a = s.num_copies);
}

}  // namespace
}  // namespace internvl_rt

PYBIND11_MODULE(_C, module) {
  using namespace internvl_rt;
  using namespace py::literals;
  using Array = const py::array&;
  module.doc() = "Bookkeeping of the paged KV cache (csrc/); a wrong argument raises ValueError.";
  const py::tuple no_pictures;
  py::class_<PagedKVCache>(module, "PagedKVCache")
      .def(py::init([](std::int32_t num_blocks, std::int32_t block_size, std::int32_t watermark_blocks, bool events,
                       std::int32_t hash_bits, const std::optional<py::bytes>& hash_key,
                       std::optional<std::int32_t> window) {
             CHECK_ARGUMENT(!window || *window > 0, "window: expected at least 1 token, got ", *window);
             return PagedKVCache(
                 {num_blocks, block_size, watermark_blocks, events, hash_bits, key_of(hash_key), window.value_or(0)});
           }),
           "num_blocks"_a, "block_size"_a, py::kw_only(), "watermark_blocks"_a = 0, "events"_a = false,
           "hash_bits"_a = 128, "hash_key"_a = py::none(), "window"_a = py::none())
      .def("match", &match, "token_ids"_a, "pictures"_a = no_pictures, "identity"_a = py::bytes(), py::kw_only(),
           "max_cached"_a = py::none())
      .def("digests", &digests, "token_ids"_a, "pictures"_a = no_pictures, "identity"_a = py::bytes(), py::kw_only(),
           "max_cached"_a = py::none())
      .def("admit", &admit, "seq_id"_a, "token_ids"_a, "pictures"_a = no_pictures, "identity"_a = py::bytes(),
           py::kw_only(), "num_reserved"_a = 0, "max_cached"_a = py::none())
      .def(
          "append",
          [](PagedKVCache& cache, Array seq_ids, Array num_tokens) {
            return cache.append(input("seq_ids", seq_ids), input("num_tokens", num_tokens));
          },
          "seq_ids"_a, "num_tokens"_a)
      .def(
          "extend",
          [](PagedKVCache& cache, std::int64_t seq_id, Array token_ids) {
            cache.extend(seq_id, input("token_ids", token_ids));
          },
          "seq_id"_a, "token_ids"_a)
      .def(
          "publish",
          [](PagedKVCache& cache, Array seq_ids, Array num_tokens) {
            cache.publish(input("seq_ids", seq_ids), input("num_tokens", num_tokens));
          },
          "seq_ids"_a, "num_tokens"_a)
      .def("fork", &PagedKVCache::fork, "seq_id"_a, "new_seq_id"_a)
      .def("rollback", &PagedKVCache::rollback, "seq_id"_a, "num_tokens"_a)
      .def("release", &PagedKVCache::release, "seq_id"_a)
      .def("fill_step", &fill_step, "seq_ids"_a, "num_new_tokens"_a, "query_start_S1"_a, "seq_len_S"_a,
           "block_table_SN"_a, "slot_T"_a, "split_start_S1"_a = py::none(), "split_W3"_a = py::none(),
           "window_table_SN"_a = py::none(), "window_slot_T"_a = py::none())
      .def("complete", &PagedKVCache::complete, "step"_a, py::kw_only(), "failed"_a = false)
      .def("take_copies", &take_copies)
      .def("reset", &PagedKVCache::reset)
      .def("drain_events", &drain_events)
      .def("stats", &stats)
      .def("check_invariants", &PagedKVCache::check_invariants)
      .def_property_readonly("num_available_blocks", &PagedKVCache::num_available_blocks)
      .def_property_readonly("num_blocks", &PagedKVCache::num_blocks)
      .def_property_readonly("block_size", &PagedKVCache::block_size)
      .def_property_readonly(
          "window",
          [](const PagedKVCache& cache) { return cache.window() > 0 ? std::optional(cache.window()) : std::nullopt; })
      .def_property_readonly("num_sequences", &PagedKVCache::num_sequences)
      .def_property_readonly("num_steps", &PagedKVCache::num_steps);
}
