// The functions that XLA calls.
#include <algorithm>
#include <cstdint>

#include "expert.h"
#include "project.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

ffi::Error wrong(const char* message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, message);
}

using Rows = ffi::Buffer<ffi::F32, 2>;
using Number = ffi::Buffer<ffi::S32, 0>;

// Describes a product with one matrix of a stack: weight (..., rows, outputs), and scales
// (..., groups, outputs) or (0,).
ffi::Error describe(grokctl::Product& product, const ffi::AnyBuffer& weight,
                    const ffi::AnyBuffer& scales, int64_t number) {
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
  product.inputs = rows * codes;
  product.outputs = shape[shape.size() - 1];
  int64_t stack = 1;
  for (size_t axis = 0; axis + 2 < shape.size(); ++axis) stack *= shape[axis];
  // as XLA does: a number outside the stack is the nearest inside
  const int64_t matrix = std::clamp<int64_t>(number, 0, std::max<int64_t>(stack, 1) - 1);
  product.weight = static_cast<const uint8_t*>(weight.untyped_data()) +
                   matrix * rows * product.outputs * size;
  product.groups = 1;
  if (scales.element_count() == 0) return ffi::Error::Success();
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
  return ffi::Error::Success();
}

// Gives a product its activations, and room for its outputs.
ffi::Error connect(grokctl::Product& product, const float* x, int64_t tokens, int64_t inputs,
                   float* y, int64_t outputs, int64_t parts) {
  if (product.inputs != inputs) return wrong("x: another number of inputs than the weight");
  if (product.outputs != outputs) return wrong("y: another number of outputs than the weight");
  if (parts != 2 && parts != 3) return wrong("parts: expected 2 or 3");
  product.x = x;
  product.y = y;
  product.tokens = tokens;
  product.parts = static_cast<int>(parts);
  return ffi::Error::Success();
}

ffi::Error ended(bool has_memory) {
  if (has_memory) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the activations");
}

// x (tokens, inputs) times a matrix of a stack; `parts` bytes of an activation.
ffi::Error project(Rows x, ffi::AnyBuffer weight, ffi::AnyBuffer scales, Number number,
                   ffi::Result<Rows> y, int64_t parts) {
  grokctl::Product product{};
  const auto from = x.dimensions(), to = y->dimensions();
  if (from[0] != to[0]) return wrong("y: another number of tokens than x");
  ffi::Error error = describe(product, weight, scales, *number.typed_data());
  if (error.failure()) return error;
  error = connect(product, x.typed_data(), from[0], from[1], y->typed_data(), to[1], parts);
  if (error.failure()) return error;
  return ended(grokctl::project(product));
}

// One expert of a stack for the first `count` tokens; the outputs of others are 0. `wide` is room
// for what comes between, (2, tokens, columns).
ffi::Error expert(Rows x, ffi::AnyBuffer gate, ffi::AnyBuffer of_gate, ffi::AnyBuffer up,
                  ffi::AnyBuffer of_up, ffi::AnyBuffer down, ffi::AnyBuffer of_down, Number number,
                  Number count, ffi::Result<Rows> y, ffi::Result<ffi::Buffer<ffi::F32, 3>> wide,
                  int64_t parts) {
  grokctl::Product gates{}, ups{}, downs{};
  const int64_t chosen = *number.typed_data();
  const auto from = x.dimensions(), to = y->dimensions(), between = wide->dimensions();
  if (from[0] != to[0] || between[0] != 2 || between[1] != from[0])
    return wrong("y: another number of tokens than x");
  const int64_t tokens = std::clamp<int64_t>(*count.typed_data(), 0, from[0]);
  float* first = wide->typed_data();
  float* second = first + from[0] * between[2];
  ffi::Error error = describe(gates, gate, of_gate, chosen);
  if (error.success()) error = describe(ups, up, of_up, chosen);
  if (error.success()) error = describe(downs, down, of_down, chosen);
  if (error.success())
    error = connect(gates, x.typed_data(), tokens, from[1], first, between[2], parts);
  if (error.success())
    error = connect(ups, x.typed_data(), tokens, from[1], second, between[2], parts);
  if (error.success())
    error = connect(downs, first, tokens, between[2], y->typed_data(), to[1], parts);
  if (error.failure()) return error;
  std::fill(y->typed_data() + tokens * to[1], y->typed_data() + to[0] * to[1], 0.0f);
  return ended(grokctl::expert(gates, ups, downs));
}

// x (tokens, inputs) times the transpose of weight (rows, inputs).
ffi::Error project_back(Rows x, ffi::AnyBuffer weight, ffi::Result<Rows> y) {
  const auto from = x.dimensions(), to = y->dimensions(), shape = weight.dimensions();
  if (shape.size() != 2 || shape[1] != from[1]) return wrong("weight: another shape than x wants");
  if (to[0] != from[0] || to[1] != shape[0]) return wrong("y: another shape than the product's");
  grokctl::Back back{};
  back.is_wide = weight.element_type() == ffi::F32;
  if (!back.is_wide && weight.element_type() != ffi::U16)
    return wrong("weight: expected float32 or uint16");
  back.weight = static_cast<const uint8_t*>(weight.untyped_data());
  back.rows = shape[0];
  back.inputs = shape[1];
  back.x = x.typed_data();
  back.tokens = from[0];
  back.y = y->typed_data();
  return ended(grokctl::project_back(back));
}

}  // namespace

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(grokctl_project_back, project_back,
                              ffi::Ffi::Bind().Arg<Rows>().Arg<ffi::AnyBuffer>().Ret<Rows>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(grokctl_project, project,
                              ffi::Ffi::Bind()
                                  .Arg<Rows>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Number>()
                                  .Ret<Rows>()
                                  .Attr<int64_t>("parts"));

using Wide = ffi::Buffer<ffi::F32, 3>;
XLA_FFI_DEFINE_HANDLER_SYMBOL(grokctl_expert, expert,
                              ffi::Ffi::Bind()
                                  .Arg<Rows>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Number>()
                                  .Arg<Number>()
                                  .Ret<Rows>()
                                  .Ret<Wide>()
                                  .Attr<int64_t>("parts"));
#pragma GCC visibility pop
