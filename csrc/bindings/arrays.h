// numpy arrays as arguments: nothing is converted, an array of another dtype, shape or memory order
// is a ValueError that names the argument, what came and what was expected.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace fastbert::bindings {

namespace py = pybind11;

/// Elements one after the other in C order, each aligned.
inline bool is_plain(const py::array& array) {
  constexpr int kPlain = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  return (array.flags() & kPlain) == kPlain;
}

inline std::string dtype_of(const py::array& array) { return py::str(array.dtype()); }

/// An argument that is to be an array of this type and shape (-1: any); nullptr for None. A T that
/// is not const asks for a writeable one.
template <class T>
T* elements(const char* name, const py::object& value, const std::vector<int64_t>& shape) {
  using Element = std::remove_const_t<T>;
  if (value.is_none()) return nullptr;
  // What is right is found out without a string: numpy takes 4 us to name a dtype.
  if (py::isinstance<py::array_t<Element, 0>>(value)) {
    const auto array = py::reinterpret_borrow<py::array>(value);
    bool fits = is_plain(array) && array.ndim() == static_cast<py::ssize_t>(shape.size()) &&
                (std::is_const_v<T> || array.writeable());
    for (size_t i = 0; fits && i < shape.size(); ++i) {
      fits = shape[i] < 0 || array.shape(i) == shape[i];
    }
    if (fits) return static_cast<T*>(const_cast<void*>(array.data()));
  }
  std::string expected =
      "a C-contiguous, aligned " + std::string(py::str(py::dtype::of<Element>()));
  expected += std::is_const_v<T> ? " array" : " writeable array";
  expected += " of shape (";
  for (const int64_t size : shape) expected += (size < 0 ? "*" : std::to_string(size)) + ",";
  expected += ")";
  std::string got = py::str(py::type::of(value));
  if (py::isinstance<py::array>(value)) {
    const auto array = py::reinterpret_borrow<py::array>(value);
    got = dtype_of(array) + " of shape " + std::string(py::str(py::object(array.attr("shape"))));
  }
  throw py::value_error(std::string(name) + ": got " + got + ", expected " + expected);
}

/// The same where None is none of the choices.
template <class T>
T* given_elements(const char* name, const py::object& value, const std::vector<int64_t>& shape) {
  T* const data = elements<T>(name, value, shape);
  if (data == nullptr) throw py::value_error(std::string(name) + ": got None, expected an array");
  return data;
}

}  // namespace fastbert::bindings
