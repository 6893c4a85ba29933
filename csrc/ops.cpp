// The schemas of all operators. csrc/cpu implements them for CPU tensors, csrc/cuda for CUDA tensors.
//
// Arguments of the adapter:
//   *_weight, *_bias     parameters, named after what they project to: the image, text or rational query, the key, the
//                        value, the output
//   input_scale_factor   the inputs' scale is this times logit_scale; 0 means that inputs are not scaled
//   widened              bfloat16 is multiplied as float32
//   keep                 whether the backward will be called; the results that it needs are empty otherwise
//   needed               one flag for each gradient; a gradient that is not needed is returned empty
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
  // The indices of the `count` views of every episode whose predictions have the lowest entropies, and all entropies,
  // (E, V). logits: (E, V, K). Indices ascend in entropy, and equal entropies in the index.
  library.def("select_views(Tensor logits, int count) -> (Tensor indices, Tensor entropies)");
  // A loss over the predictions of every episode, (E,), and its gradient.
  //   logits   (E, n, K)
  //   kind     "mean" entropy, entropy of the "marginal" prediction, or "cross_entropy"
  //   labels   (E, n) int64, for cross-entropy alone
  //   keep     whether the gradient is wanted; dlogits is empty otherwise
  library.def("prediction_loss(Tensor logits, str kind, Tensor? labels, float label_smoothing, bool keep) -> "
              "(Tensor losses, Tensor dlogits)");
  // One step of an optimiser, in place; shared/episodic_optimizer.h has the arithmetic. Every list has one entry per
  // parameter, and a tensor holds the copies of all episodes.
  //   first_moments, second_moments   empty: the moment is zero and stays zero
  //   gradients                       None: exactly zero
  //   sources                         where the parameter is read from: one copy that all episodes start from; None: the
  //                                   parameter itself
  //   fresh                           the moments are zero and are not read
  //   rule                            "adamw", "adam" or "sgd"
  //   torch_roots                     take square roots from PyTorch, whose library may round them differently than the
  //                                   processor does
  library.def("episodic_optimizer_step(Tensor(a!)[] parameters, Tensor(b!)[] first_moments, "
              "Tensor(c!)[] second_moments, Tensor?[] gradients, Tensor?[] sources, bool[] fresh, str rule, int step, "
              "float lr, float weight_decay, float beta1, float beta2, float eps, float momentum, "
              "bool torch_roots) -> ()");
  // Views of pictures, (N, 3, size, size): boxes of them resized, mirrored and normalised.
  //   pictures    (height, width, 3) uint8 each
  //   views       (N, 11) int64; shared/view_table.h names the columns
  //   mean, std   of the three channels
  //   tall_first  Pillow's order of the two passes of a resize; see shared/view_table.h
  library.def("multi_view_crops(Tensor[] pictures, Tensor views, int size, float[] mean, float[] std, ScalarType dtype, "
              "bool tall_first) -> Tensor");
  // The same views after AugMix: a mix of the view with chains of operations on it.
  //   operations  (N, chains, depth) int64: 0 none, 1 autocontrast, 2 equalize, 3 posterize, 4 solarize, 5 affine
  //   matrices    (N, chains, depth, 6) float64: an affine transform; posterize and solarize use the first number alone, the
  //               bits to keep or the least value to invert
  //   weights     (N, chains + 2) float32: of each chain, of the view itself, and of the mix of the chains
  library.def("augmix(Tensor[] pictures, Tensor views, Tensor operations, Tensor matrices, Tensor weights, int size, "
              "float[] mean, float[] std, ScalarType dtype, bool tall_first) -> Tensor");
  // Random views and random AugMix plans, drawn with the same numbers as the reference draws them.
  library.def("random_augmix(int height, int width, int size, int count, float[] scale, float[] ratio, int chains, "
              "int depth, float severity, Generator? generator) -> (Tensor views, Tensor operations, Tensor matrices, "
              "Tensor weights)");
  library.def("random_views(int height, int width, int size, int count, float[] scale, float[] ratio, "
              "Generator? generator) -> Tensor");
  // How the operators compute on this processor, in words: "vectors" names the copy of the vector loops, "float32" and
  // "bfloat16" the library of their matrix products; "" where a type cannot be multiplied.
  library.def("cpu_paths() -> Dict(str, str)");
  // Which of the compiled device codes a CUDA device runs, () int32: ten times the compute capability, 800 for sm_80.
  library.def("device_architecture(Tensor like) -> Tensor");
}
