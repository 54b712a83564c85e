// Our kernels as operators of torch, which compiled and exported programs call without Python.
//
// Their schemas, and what they are without this file, are in native.py, native_codes.py and
// joint.py.  Only torch's stable C++ interface is used, which costs a compiler a second.
// Compiled with native.cpp.

#include "codes.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

extern "C" {
int slr_set();
void slr_together(int kind, int set, int threads, int64_t tokens, int64_t n, int count,
                  const Part* parts, const char* x, char* const* ys);
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

// Layers that have x in common, while they are put together.
class Together {
 public:
  explicit Together(const Tensor& x) : x_(whole(x)), n_(x.size(-1)), kind_(kind_of(x)) {}

  Part& add(const Tensor& B, const Tensor& A, const Maybe& bias) {
    const char *b = hold(B), *a = hold(A), *add = bias ? hold(*bias) : nullptr;
    parts_.push_back({B.size(0), B.size(1), nullptr, 0, nullptr, nullptr, 0, b, a, add, nullptr});
    const int64_t m = B.size(0);
    ys_.push_back(like(x_, m));
    return parts_.back();
  }

  void add(const Tensor& values, const Tensor& bitmask, const Maybe& starts, const Tensor& B,
           const Tensor& A, const Maybe& bias) {
    const char* const S = hold(values);
    Part& part = add(B, A, bias);
    part.values = S, part.count = values.numel(), part.each = values.numel() / part.m;
    part.bits = at<uint8_t>(bitmask), part.starts = at<int64_t>(starts);
  }

  std::vector<Tensor> multiply() {
    if (parts_.empty()) return {};
    std::vector<char*> ys;
    for (const Tensor& y : ys_) ys.push_back(static_cast<char*>(y.data_ptr()));
    slr_together(kind_, set_here(), torch::stable::get_num_threads(), x_.numel() / n_, n_,
                 int(parts_.size()), parts_.data(), at<char>(x_), ys.data());
    return std::move(ys_);
  }

 private:
  // The numbers of a tensor, contiguous, for as long as this lives.
  const char* hold(const Tensor& part) {
    STD_TORCH_CHECK(part.scalar_type() == x_.scalar_type(),
                    "x and the parts of the layer differ in dtype");
    held_.push_back(whole(part));
    return at<char>(held_.back());
  }

  const Tensor x_;
  const int64_t n_;
  const int kind_;
  std::vector<Tensor> held_, ys_;
  std::vector<Part> parts_;
};

Coded coded(const Tensor& x, const Tensor& planes, const Tensor& scale, const Maybe& zero,
            const Maybe& mask, const Maybe& starts, int64_t m, int64_t bits, int64_t group,
            int64_t kept) {
  return {m, x.size(-1), int(bits), at<uint8_t>(planes), planes.size(1), kept,
          at<uint16_t>(scale), at<uint8_t>(zero), group, at<uint8_t>(mask), at<int64_t>(starts),
          kept / m};
}

Tensor few(const Tensor& x, const Tensor& values, const Tensor& bitmask, Maybe starts,
           const Tensor& B, const Tensor& A, Maybe bias) {
  Together one(x);
  one.add(values, bitmask, starts, B, A, bias);
  return one.multiply()[0];
}

Tensor codes(const Tensor& x, const Tensor& planes, const Tensor& scale, Maybe zero, Maybe mask,
             Maybe starts, const Tensor& B, const Tensor& A, Maybe bias, int64_t bits,
             int64_t group, int64_t kept) {
  const Coded S = coded(x, planes, scale, zero, mask, starts, B.size(0), bits, group, kept);
  Together one(x);
  one.add(B, A, bias).coded = &S;
  return one.multiply()[0];
}

using Many = std::vector<Tensor>;
using Maybes = std::vector<Maybe>;
using Numbers = std::vector<int64_t>;

Many few_together(const Tensor& x, Many values, Many bitmasks, Maybes starts, Many B, Many A,
                  Maybes bias) {
  Together all(x);
  for (size_t i = 0; i < B.size(); i++)
    all.add(values[i], bitmasks[i], starts[i], B[i], A[i], bias[i]);
  return all.multiply();
}

Many codes_together(const Tensor& x, Many planes, Many scale, Maybes zero, Maybes mask,
                    Maybes starts, Many B, Many A, Maybes bias, Numbers bits, Numbers group,
                    Numbers kept) {
  std::vector<Coded> S;
  for (size_t i = 0; i < B.size(); i++)
    S.push_back(coded(x, planes[i], scale[i], zero[i], mask[i], starts[i], B[i].size(0), bits[i],
                      group[i], kept[i]));
  Together all(x);
  for (size_t i = 0; i < B.size(); i++) all.add(B[i], A[i], bias[i]).coded = &S[i];
  return all.multiply();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slr, CPU, library) {
  library.impl("native", TORCH_BOX(&few));
  library.impl("native_codes", TORCH_BOX(&codes));
  library.impl("native_together", TORCH_BOX(&few_together));
  library.impl("native_codes_together", TORCH_BOX(&codes_together));
}

extern "C" void slr_operators() {}  // tells compiled.py that they are here
