// Our kernels as operators of torch, which compiled and exported programs call without Python.
//
// Their schemas, and what they are without this file, are in native.py and native_codes.py.  Only
// torch's stable C++ interface is used, which costs a compiler a second.  Compiled with native.cpp.

#include "codes.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

extern "C" {
int slr_set();
void slr_few(int kind, int set, int threads, int64_t tokens, int64_t m, int64_t n, int64_t k,
             const char* x, const char* values, int64_t count, const uint8_t* bits,
             const int64_t* starts, int64_t each, const char* B, const char* A, const char* bias,
             char* y);
void slr_codes(int kind, int set, int threads, int64_t tokens, const Coded* S, int64_t k,
               const char* x, const char* B, const char* A, const char* bias, char* y);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

int kind_of(const Tensor& x) {  // as `Kind` in native.cpp
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return 0;
    case ScalarType::Half: return 1;
    case ScalarType::Float: return 2;
    default: STD_TORCH_CHECK(false, "x must be bfloat16, float16 or float32");
  }
}

int set_here() {
  static const int set = slr_set();
  return set;
}

Tensor whole(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <class T>
const T* at(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <class T>
const T* at(const Maybe& tensor) {
  return tensor ? at<T>(*tensor) : nullptr;
}

// Room for y: (…, m).
Tensor like(const Tensor& x, int64_t m) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = m;
  return torch::stable::new_empty(x, shape);
}

Tensor few(const Tensor& x, const Tensor& values, const Tensor& bitmask, Maybe starts,
           const Tensor& B, const Tensor& A, Maybe bias) {
  const int64_t n = x.size(-1), m = B.size(0), k = B.size(1), kept = values.numel();
  const Tensor in = whole(x), S = whole(values), b = whole(B), a = whole(A);
  Tensor y = like(x, m);
  slr_few(kind_of(x), set_here(), torch::stable::get_num_threads(), x.numel() / n, m, n, k,
          at<char>(in), at<char>(S), kept, at<uint8_t>(bitmask), at<int64_t>(starts), kept / m,
          at<char>(b), at<char>(a), at<char>(bias), static_cast<char*>(y.data_ptr()));
  return y;
}

Tensor codes(const Tensor& x, const Tensor& planes, const Tensor& scale, Maybe zero,
             Maybe bitmask, Maybe starts, const Tensor& B, const Tensor& A, Maybe bias,
             int64_t bits, int64_t group, int64_t kept) {
  const int64_t n = x.size(-1), m = B.size(0), k = B.size(1);
  const Tensor in = whole(x), b = whole(B), a = whole(A);
  const Coded S{m, n, int(bits), at<uint8_t>(planes), planes.size(1), kept, at<uint16_t>(scale),
                at<uint8_t>(zero), group, at<uint8_t>(bitmask), at<int64_t>(starts), kept / m};
  Tensor y = like(x, m);
  slr_codes(kind_of(x), set_here(), torch::stable::get_num_threads(), x.numel() / n, &S, k,
            at<char>(in), at<char>(b), at<char>(a), at<char>(bias),
            static_cast<char*>(y.data_ptr()));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slr, CPU, library) {
  library.impl("native", TORCH_BOX(&few));
  library.impl("native_codes", TORCH_BOX(&codes));
}

extern "C" void slr_operators() {}  // tells compiled.py that they are here
