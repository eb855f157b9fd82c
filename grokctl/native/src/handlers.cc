// The functions that XLA calls.
#include <algorithm>
#include <cstdint>

#include "project.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

ffi::Error wrong(const char* message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, message);
}

// x (tokens, inputs), weight (…, rows, outputs), scales (…, groups, outputs) or (0,), the number of
// the matrix in the stack; `parts` bytes of an activation.
using Rows = ffi::Buffer<ffi::F32, 2>;
using Number = ffi::Buffer<ffi::S32, 0>;

ffi::Error project(Rows x, ffi::AnyBuffer weight, ffi::AnyBuffer scales, Number number,
                   ffi::Result<Rows> y, int64_t parts) {
  grokctl::Product product{};
  int64_t size = 1, codes = 1;
  switch (weight.element_type()) {
    case ffi::S8:
      product.stored = grokctl::Stored::kInt8;
      break;
    case ffi::U8:
      product.stored = grokctl::Stored::kInt4;
      codes = 2;
      break;
    case ffi::U16:
      product.stored = grokctl::Stored::kBfloat16;
      size = 2;
      break;
    case ffi::F32:
      product.stored = grokctl::Stored::kFloat32;
      size = 4;
      break;
    default:
      return wrong("weight: expected int8, uint8, uint16 or float32");
  }
  const auto shape = weight.dimensions();
  if (shape.size() < 2) return wrong("weight: expected at least two axes");
  const int64_t rows = shape[shape.size() - 2];
  product.outputs = shape[shape.size() - 1];
  product.tokens = x.dimensions()[0];
  product.inputs = x.dimensions()[1];
  product.x = x.typed_data();
  product.y = y->typed_data();
  product.parts = static_cast<int>(parts);
  if (product.inputs != rows * codes) return wrong("x: another number of inputs than the weight");
  if (y->dimensions()[0] != product.tokens || y->dimensions()[1] != product.outputs)
    return wrong("y: another shape than that of the product");
  if (parts != 2 && parts != 3) return wrong("parts: expected 2 or 3");
  int64_t stack = 1;
  for (size_t axis = 0; axis + 2 < shape.size(); ++axis) stack *= shape[axis];
  // as XLA does: a number outside the stack is the nearest inside
  const int64_t matrix = std::clamp<int64_t>(*number.typed_data(), 0, std::max<int64_t>(stack, 1) - 1);
  product.weight = static_cast<const uint8_t*>(weight.untyped_data()) +
                   matrix * rows * product.outputs * size;
  product.groups = 1;
  if (scales.element_count() > 0) {
    const auto of_scales = scales.dimensions();
    product.scales_are_wide = scales.element_type() == ffi::F32;
    if (of_scales.size() != shape.size() || of_scales[of_scales.size() - 1] != product.outputs)
      return wrong("scales: another shape than the weight's");
    if (!product.scales_are_wide && scales.element_type() != ffi::U16)
      return wrong("scales: expected uint16 or float32");
    product.groups = of_scales[of_scales.size() - 2];
    if (rows % product.groups != 0) return wrong("scales: groups are not of the same size");
    product.scales = static_cast<const uint8_t*>(scales.untyped_data()) +
                     matrix * product.groups * product.outputs * (product.scales_are_wide ? 4 : 2);
  }
  if (!grokctl::project(product))
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the activations");
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(grokctl_project, project,
                              ffi::Ffi::Bind()
                                  .Arg<Rows>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Number>()
                                  .Ret<Rows>()
                                  .Attr<int64_t>("parts"));
#pragma GCC visibility pop
