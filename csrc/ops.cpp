// The operators' schemas, one readable list; csrc/cpu implements them for CPU tensors, csrc/cuda for CUDA tensors.
//
// Names of parameters follow the query they make: image, text, rational, key, value, output. An input scale factor of 0
// means no input scale. widened: bfloat16 is multiplied as float32. Saved tensors are empty where `keep` is false; a gradient is empty where it was not needed.
#include <torch/library.h>

#define RADA_PARAMETERS                                                                                            \
  "Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor? image_weight, Tensor? image_bias, "    \
  "Tensor? text_weight, Tensor? text_bias, Tensor? rational_weight, Tensor? rational_bias, Tensor key_weight, "    \
  "Tensor? key_bias, Tensor value_weight, Tensor? value_bias, Tensor output_weight, Tensor? output_bias, "

#define RADA_OPTIONS                                                                                               \
  "int num_heads, float temperature, bool matrix_softmax, float input_scale_factor, bool relu, str penalty, "     \
  "bool widened"

TORCH_LIBRARY(rada_fast, library) {
  library.def("rational_adapter(" RADA_PARAMETERS RADA_OPTIONS
              ", bool return_mask, bool keep) -> (Tensor logits, Tensor penalty, Tensor mask, Tensor projections, "
              "Tensor attended, Tensor factors, Tensor statistics, Tensor image_state, Tensor text_query, Tensor peak, "
              "Tensor sums)");
  library.def("rational_adapter_backward(Tensor? dlogits, Tensor? dpenalty, Tensor? dmask, " RADA_PARAMETERS RADA_OPTIONS
              ", Tensor projections, Tensor attended, Tensor factors, Tensor statistics, Tensor image_state, "
              "Tensor text_query, Tensor peak, bool[] needed) -> (Tensor dimage_features, Tensor dtext_features, "
              "Tensor dimage_weight, Tensor dimage_bias, Tensor dtext_weight, Tensor dtext_bias, "
              "Tensor drational_weight, Tensor drational_bias, Tensor dkey_weight, Tensor dkey_bias, "
              "Tensor dvalue_weight, Tensor dvalue_bias, Tensor doutput_weight, Tensor doutput_bias)");
  // Indices of the `count` lowest prediction entropies of every episode of logits (E, V, K), ascending, ties by index; and
  // the entropies (E, V).
  library.def("select_views(Tensor logits, int count) -> (Tensor indices, Tensor entropies)");
  // kind: "mean", "marginal" or "cross_entropy", over logits (E, n, K), labels (E, n); losses (E,), and each episode's
  // gradient, empty where `keep` is false.
  library.def("prediction_loss(Tensor logits, str kind, Tensor? labels, float label_smoothing, bool keep) -> "
              "(Tensor losses, Tensor dlogits)");
  // In place on what belongs to all episodes; see episodic_optimizer.h. An empty moment is zero and stays so; a gradient
  // that is None is exactly zero; a source is one copy that the parameter's rows are read from; fresh: moments not read;
  // torch_roots: PyTorch's square roots, which a library may round otherwise than the processor.
  library.def("episodic_optimizer_step(Tensor(a!)[] parameters, Tensor(b!)[] first_moments, "
              "Tensor(c!)[] second_moments, Tensor?[] gradients, Tensor?[] sources, bool[] fresh, str rule, int step, "
              "float lr, float weight_decay, float beta1, float beta2, float eps, float momentum, "
              "bool torch_roots) -> ()");
  // A view is a row of 11 numbers: picture; top, left, height, width of its box; the size that the box is resized to;
  // where the view lies in that (top, left); mirrored; bicubic (else bilinear). tall_first is Pillow's order of passes.
  library.def("multi_view_crops(Tensor[] pictures, Tensor views, int size, float[] mean, float[] std, ScalarType dtype, "
              "bool tall_first) -> Tensor");
  // AugMix of views. operations: 0 none, 1 autocontrast, 2 equalize, 3 posterize, 4 solarize, 5 affine; matrices: of the
  // last, and in their first place the bits to keep or the least value to invert; weights: of the chains, then of the
  // plain view and of the chains' mix.
  library.def("augmix(Tensor[] pictures, Tensor views, Tensor operations, Tensor matrices, Tensor weights, int size, "
              "float[] mean, float[] std, ScalarType dtype, bool tall_first) -> Tensor");
  library.def("random_augmix(int height, int width, int size, int count, float[] scale, float[] ratio, int chains, "
              "int depth, float severity, Generator? generator) -> (Tensor views, Tensor operations, Tensor matrices, "
              "Tensor weights)");
  library.def("random_views(int height, int width, int size, int count, float[] scale, float[] ratio, "
              "Generator? generator) -> Tensor");
  // How this build computes here: "vectors", "float32", "bfloat16" -> one word each; "" where a type cannot be served.
  library.def("cpu_paths() -> Dict(str, str)");
  // Ten times the compute capability of the code that a CUDA device runs of this build, () int32: 800 for sm_80.
  library.def("device_architecture(Tensor like) -> Tensor");
}
