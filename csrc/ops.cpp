// The schemas of all operators. csrc/cpu implements them for CPU tensors, csrc/cuda for CUDA tensors.
//
// Arguments of the adapter:
//   *_weight, *_bias     the projections' parameters, named after their results: the image, text or rational query, the
//                        key, the value, the output
//   input_scale_factor   the projections' inputs are scaled by this times logit_scale; 0 means that they are not scaled
//   widened              whether bfloat16 is multiplied as float32
//   output_is_zero       whether the output projection is known to be zero
//   given_*, given_scale what an earlier forward pass with the same features has returned, and the factor by which all
//                        projections but the output's are larger now; they save their products in the forward pass
//   keep                 whether the backward pass may be called; otherwise the results that only it needs are empty
//   needed               one flag for each gradient; a gradient that is not needed is returned empty
#include <torch/library.h>

#define RADA_PARAMETERS                                                                                            \
  "Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor? image_weight, Tensor? image_bias, "    \
  "Tensor? text_weight, Tensor? text_bias, Tensor? rational_weight, Tensor? rational_bias, Tensor key_weight, "    \
  "Tensor? key_bias, Tensor value_weight, Tensor? value_bias, Tensor output_weight, Tensor? output_bias, "

#define RADA_OPTIONS                                                                                               \
  "int num_heads, float temperature, bool matrix_softmax, float input_scale_factor, bool relu, str penalty, "     \
  "bool widened, bool output_is_zero, Tensor? given_projections, Tensor? given_attended, Tensor? given_factors, "  \
  "Tensor? given_statistics, Tensor? given_image_state, Tensor? given_text_query, float given_scale"

TORCH_LIBRARY(rada_fast, library) {
  library.def("rational_adapter(" RADA_PARAMETERS RADA_OPTIONS
              ", bool return_mask, bool keep) -> (Tensor logits, Tensor penalty, Tensor mask, Tensor projections, "
              "Tensor attended, Tensor factors, Tensor statistics, Tensor image_state, Tensor text_query, Tensor offset, "
              "Tensor peak, Tensor sums)");
  library.def("rational_adapter_backward(Tensor? dlogits, Tensor? dpenalty, Tensor? dmask, " RADA_PARAMETERS RADA_OPTIONS
              ", Tensor projections, Tensor attended, Tensor factors, Tensor statistics, Tensor image_state, "
              "Tensor text_query, Tensor offset, Tensor peak, bool[] needed) -> (Tensor dimage_features, Tensor dtext_features, "
              "Tensor dimage_weight, Tensor dimage_bias, Tensor dtext_weight, Tensor dtext_bias, "
              "Tensor drational_weight, Tensor drational_bias, Tensor dkey_weight, Tensor dkey_bias, "
              "Tensor dvalue_weight, Tensor dvalue_bias, Tensor doutput_weight, Tensor doutput_bias)");
  // Returns softmax(Q K^T / sqrt(d)) V for each of the heads, (N, L', W), without gradients.
  //   queries        (N, L', W)
  //   keys, values   (N, L, W)
  library.def("encoder_attention(Tensor queries, Tensor keys, Tensor values, int heads) -> Tensor");
  // Encodes images (N, C, S, S') float32 to features (N, D) float32, without gradients, as ops/small_transformer.py says.
  //   weights      in the order that cpu/small_transformer.cpp lists
  //   width        D
  //   patch        the height and the width of a patch
  //   activation   "gelu" or "silu"
  //   eps          one for each normalisation, in their order
  library.def("small_transformer(Tensor images, Tensor[] weights, int width, int[] patch, int heads, str activation, float[] eps) -> "
              "Tensor");
  // Returns a right factor (K, N) as the panels that small_transformer multiplies, (panels, K, columns of a panel).
  library.def("panels_of(Tensor factor) -> Tensor");
  // Returns the indices of the `count` views of every episode whose predictions have the lowest entropies, and all
  // entropies, (E, V). logits: (E, V, K). Indices are in ascending order of entropy; equal entropies in that of the index.
  library.def("select_views(Tensor logits, int count) -> (Tensor indices, Tensor entropies)");
  // Returns a loss over the predictions of every episode, (E,), and its gradient with respect to the logits.
  //   logits   (E, n, K); on a CPU also (n, K), one episode
  //   kind     "mean" entropy, entropy of the "marginal" prediction, or "cross_entropy"
  //   labels   (E, n) int64, or (n,) as the logits are, for "cross_entropy" alone
  //   keep     whether the gradient is wanted; otherwise dlogits is empty
  library.def("prediction_loss(Tensor logits, str kind, Tensor? labels, float label_smoothing, bool keep) -> "
              "(Tensor losses, Tensor dlogits)");
  // Takes one step of an optimiser, in place; shared/episodic_optimizer.h has the arithmetic. Every list has one entry per
  // parameter, and a tensor holds the copies of all episodes.
  //   first_moments, second_moments   an empty tensor stands for a moment that is zero and stays zero
  //   gradients                       None stands for a gradient that is exactly zero
  //   sources                         the one copy that all episodes start from, which is read in place of the parameter;
  //                                   None reads the parameter itself
  //   fresh                           whether the moments are zero; they are then not read
  //   rule                            "adamw", "adam" or "sgd"
  //   copies                          the new values in bfloat16; an empty tensor asks for no copy
  //   last                            whether neither the moments nor a parameter that has a copy are read again; they may
  //                                   be left as they are
  //   torch_roots                     whether square roots come from PyTorch, whose library may round them differently
  //                                   than the processor does
  library.def("episodic_optimizer_step(Tensor(a!)[] parameters, Tensor(b!)[] first_moments, "
              "Tensor(c!)[] second_moments, Tensor?[] gradients, Tensor?[] sources, bool[] fresh, str rule, int step, "
              "float lr, float weight_decay, float beta1, float beta2, float eps, float momentum, "
              "bool torch_roots, Tensor(d!)[] copies, bool last) -> ()");
  // Returns views of pictures, (N, 3, size, size): boxes in the pictures, resized, mirrored and normalised.
  //   pictures    (height, width, 3) uint8 each
  //   views       (N, 11) int64; shared/view_table.h names the columns
  //   mean, std   a number for each of the three channels
  //   tall_first  Pillow's order of the two passes of a resize; see shared/view_table.h
  library.def("multi_view_crops(Tensor[] pictures, Tensor views, int size, float[] mean, float[] std, ScalarType dtype, "
              "bool tall_first) -> Tensor");
  // Returns the same views after AugMix, each mixed with the results of chains of operations on it.
  //   operations  (N, chains, depth) int64: 0 none, 1 autocontrast, 2 equalize, 3 posterize, 4 solarize, 5 affine
  //   matrices    (N, chains, depth, 6) float64: the matrix of an affine transform; posterize and solarize use only the
  //               first number, the bits to keep or the least value to invert
  //   weights     (N, chains + 2) float32: the weights of each chain, of the view itself, and of the mix of the chains
  library.def("augmix(Tensor[] pictures, Tensor views, Tensor operations, Tensor matrices, Tensor weights, int size, "
              "float[] mean, float[] std, ScalarType dtype, bool tall_first) -> Tensor");
  // These draw random AugMix plans and random views, with the same random numbers as the reference.
  library.def("random_augmix(int height, int width, int size, int count, float[] scale, float[] ratio, int chains, "
              "int depth, float severity, Generator? generator) -> (Tensor views, Tensor operations, Tensor matrices, "
              "Tensor weights)");
  library.def("random_views(int height, int width, int size, int count, float[] scale, float[] ratio, "
              "Generator? generator) -> Tensor");
  // Says how the operators compute on this processor: "vectors" names the copy of the vector loops, "float32" and
  // "bfloat16" the libraries of their matrix products; "" where a type cannot be multiplied.
  library.def("cpu_paths() -> Dict(str, str)");
  // Returns which copy of the compiled device code a CUDA device runs, () int32: ten times its compute capability, 800 for
  // sm_80.
  library.def("device_architecture(Tensor like) -> Tensor");
}
