// relu(x_scale * weight_scale * x @ weight.T + bias) for Hopper, by CUTLASS: one kernel, in which the epilogue is a tree of
// what happens to an element of the product before it is rounded to bf16.
#include <jitk/result.h>  // Output, and empty for the workspace
#include <jitk/tensor.h>  // TensorMatcher

#include <jitk/fp8.cuh>     // fp8_e4m3_t
#include <jitk/launch.cuh>  // the stream, get_sm_count

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <cutlass/epilogue/thread/activation.h>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

namespace cutlass_gemm {

using namespace jitk;
using cute::_0;
using cute::_1;

// A block works on kTile tokens at a time. Two warpgroups share a tile of 128; tiles of 64 alternate between two warpgroups, of
// which one computes while the other stores.
template <typename T, int32_t kTile>
struct Gemm {
  static constexpr bool kTogether = kTile == 128;
  using Element = std::conditional_t<sizeof(T) == 1, cutlass::float_e4m3_t, cutlass::bfloat16_t>;
  using Result = cutlass::bfloat16_t;
  using RowMajor = cutlass::layout::RowMajor;
  static constexpr int kAlignment = 16 / sizeof(Element);  // TMA reads 16 bytes at a time
  static constexpr int kResultAlignment = 16 / sizeof(Result);
  using Tile = cute::Shape<cute::Int<kTile>, cute::_128, cute::Int<128 / sizeof(Element)>>;
  using Cluster = cute::Shape<cute::Int<kTile / 64>, _1, _1>;  // blocks that share their loads of the weight

  // The epilogue, inside out: scales * accumulator + bias, then relu.
  template <template <typename> class Function, typename To, typename... Inputs>
  using Apply = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<Function, To, float, cutlass::FloatRoundStyle::round_to_nearest>, Inputs...>;
  using Scales = cutlass::epilogue::fusion::Sm90ScalarBroadcast<float, cute::Stride<_0, _0, _0>, 2>;  // their product
  using Bias = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float>;
  using Scaled = Apply<cutlass::homogeneous_multiply_add, float, Scales, cutlass::epilogue::fusion::Sm90AccFetch, Bias>;
  using Epilogue = Apply<cutlass::epilogue::thread::ReLu, Result, Scaled>;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto,
      float, float, void, RowMajor, kResultAlignment, Result, RowMajor, kResultAlignment,
      std::conditional_t<kTogether, cutlass::epilogue::TmaWarpSpecializedCooperative, cutlass::epilogue::TmaWarpSpecialized>,
      Epilogue>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element, cutlass::layout::ColumnMajor,
      kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename CollectiveEpilogue::SharedStorage)>,
      std::conditional_t<kTogether, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                         cutlass::gemm::KernelTmaWarpSpecializedPingpong>>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, CollectiveEpilogue>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
};

template <typename T, int32_t kTile>
void linear_relu(TensorView x, TensorView weight, TensorView bias, TensorView x_scale, TensorView weight_scale, Output& out) {
  using namespace host;
  using Gemm = cutlass_gemm::Gemm<T, kTile>;
  // 1. Match.
  SymbolicSize tokens{"tokens"}, inputs{"inputs"}, outputs{"outputs"};
  SymbolicDevice device;
  TensorMatcher({tokens, inputs})
      .with_strides({-1, 1})
      .with_device<kDLCUDA>(device)
      .ensure_alignment(16)
      .with_dtype<T>()
      .verify(x);
  TensorMatcher({outputs, inputs}).with_device(device).ensure_alignment(16).with_dtype<T>().verify(weight);
  TensorMatcher({outputs}).with_dtype<float>().with_device(device).ensure_alignment(16).verify(bias);
  TensorMatcher({}).with_dtype<float>().with_device(device).verify(x_scale).verify(weight_scale);
  const int64_t shape[] = {tokens.unwrap(), outputs.unwrap()};
  const TensorView to = out.empty({shape, 2}, dtype_of<bf16_t>(), x.device());
  TensorMatcher({tokens, outputs}).with_dtype<bf16_t>().with_device(device).ensure_alignment(16).verify(to);
  RuntimeCheck(inputs.unwrap() % Gemm::kAlignment == 0 && outputs.unwrap() % Gemm::kResultAlignment == 0,
               "linear_relu reads and writes 16 bytes at a time: inputs must be a multiple of ", Gemm::kAlignment,
               " and outputs of ", Gemm::kResultAlignment, ", got ", inputs.unwrap(), " and ", outputs.unwrap());

  // 2. Plan.
  const int m = static_cast<int>(tokens.unwrap());
  const int n = static_cast<int>(outputs.unwrap());
  const int k = static_cast<int>(inputs.unwrap());
  if (m == 0 || n == 0) return;
  typename Gemm::Scales::Arguments scales;
  scales.scalar_ptrs[0] = static_cast<const float*>(x_scale.data_ptr());
  scales.scalar_ptrs[1] = static_cast<const float*>(weight_scale.data_ptr());
  const typename Gemm::Bias::Arguments row_of_bias{static_cast<const float*>(bias.data_ptr())};
  const int64_t row = m == 1 ? k : x.stride(0);
  const typename Gemm::Device::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {m, n, k, 1},
      {static_cast<const typename Gemm::Element*>(x.data_ptr()),
       {row, _1{}, int64_t{0}},
       static_cast<const typename Gemm::Element*>(weight.data_ptr()),
       {int64_t{k}, _1{}, int64_t{0}}},
      {{{scales, {}, row_of_bias, {}}, {}},
       nullptr,
       {int64_t{n}, _1{}, int64_t{0}},
       static_cast<typename Gemm::Result*>(to.data_ptr()),
       {int64_t{n}, _1{}, int64_t{0}}},
      {x.device().device_id, static_cast<int>(runtime::get_sm_count(x.device().device_id))}};

  // 3. Launch.
  const cudaStream_t stream = LaunchKernel::resolve_device(x.device());
  const int64_t bytes = static_cast<int64_t>(Gemm::Device::get_workspace_size(arguments));
  const Tensor workspace = empty(IntList{&bytes, 1}, dtype_of<uint8_t>(), x.device(), "workspace");
  const cutlass::Status status = typename Gemm::Device{}.run(arguments, workspace.data_ptr(), stream);
  RuntimeCheck(status == cutlass::Status::kSuccess, "CUTLASS: ", cutlassGetStatusString(status));
}

}  // namespace cutlass_gemm
