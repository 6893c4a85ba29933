// A whole image encoder in one call, without gradients: a vision transformer that is so small that the weights of a layer
// and the activations of a few images fit into the caches of one core.
//
// A thread takes a few images through all layers, so that threads meet only twice and activations never leave its cache.
// A row of a product does not depend on the other rows, and everything else is computed for each image by itself: features
// depend on nothing but their own image.
//
// Residuals are never added: a product is accumulated onto the rows that it is added to, and onto its bias, which is
// written or added there before. The last block computes the pooled token alone. There is one query, and products can be
// taken in another order: q (N K^T)^T = (q K) N^T and p (N V^T) = (p N) V^T, where N are the normalised rows, so that neither
// keys nor values are computed for all rows. The keys' bias adds the same to all scores of a query and is left out.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "adapter_loops.h"
#include "matrix_product.h"
#include "scratch.h"
#include "tasks.h"
#include "transformer_loops.h"

namespace rada_fast {
namespace {

using at::Tensor;

// About the rows (tokens) of a task in the blocks, and of one in the end, where an image has a single row.
constexpr int64_t kTaskRows = 260;
constexpr int64_t kPooledRows = 32;
// The columns of the hidden layer that are in the cache at a time: a multiple of every panel's.
constexpr int64_t kHiddenColumns = 320;

struct Norm {
  const float *weight, *bias;  // null where there is no normalisation
  float eps;
};

// The panels of a right factor (depth, columns), and a bias.
struct Layer {
  const float* data;
  int64_t depth, columns;
  const float* bias;
};

struct Block {
  Norm norm_1, norm_2;
  Layer projection;              // to queries, keys and values; in the last block to queries
  const float *key, *value;      // only in the last block: K (W, W), and V^T (W, W)
  const float* value_bias;
  Layer output, hidden, mlp_output;
};

struct Encoder {
  int64_t channels, height, width, high, wide;  // of an image, and of a patch
  int64_t tokens, columns, heads;
  Activation activation;
  Layer patches;
  const float* positions;  // (tokens, columns); the class token is part of the first
  Norm norm_pre, norm_post;
  std::vector<Block> blocks;
  Layer projection;  // without data where there is none
};

// Reads the weights in their order.
class Reader {
 public:
  Reader(at::TensorList weights, at::ArrayRef<double> eps) : weights_(weights), eps_(eps) {}

  const float* next(int64_t count) {
    const Tensor& tensor = take();
    TORCH_CHECK(tensor.numel() == count, "weights[", next_ - 1, "] must have ", count, " values, got ", tensor.sizes());
    return tensor.const_data_ptr<float>();
  }
  Norm norm(int64_t width) {
    TORCH_CHECK(norms_ < eps_.size(), "eps must have a value for each normalisation");
    const float eps = static_cast<float>(eps_[norms_++]);
    const bool absent = next_ < weights_.size() && weights_[next_].numel() == 0;
    const float* weight = next(absent ? 0 : width);
    const float* bias = next(absent ? 0 : width);
    return absent ? Norm{nullptr, nullptr, eps} : Norm{weight, bias, eps};
  }
  // Columns that are -1 are those of the bias.
  Layer layer(int64_t depth, int64_t columns, bool has_bias) {
    const Tensor& tensor = take();
    if (columns < 0) columns = next_ < weights_.size() ? weights_[next_].numel() : 0;
    const int64_t panel = panel_columns();
    TORCH_CHECK(tensor.dim() == 3 && tensor.size(0) == (columns + panel - 1) / panel && tensor.size(1) == depth &&
                    tensor.size(2) == panel,
                "weights[", next_ - 1, "] must be the panels of (", depth, ", ", columns, "), got ", tensor.sizes());
    return Layer{tensor.const_data_ptr<float>(), depth, columns, has_bias ? next(columns) : nullptr};
  }
  size_t left() const { return weights_.size() - next_; }

 private:
  const Tensor& take() {
    TORCH_CHECK(next_ < weights_.size(), "weights ends too early, after ", weights_.size());
    const Tensor& tensor = weights_[next_++];
    TORCH_CHECK(tensor.device().is_cpu() && tensor.scalar_type() == at::kFloat && tensor.is_contiguous(),
                "weights must be contiguous float32 on the CPU");
    return tensor;
  }

  at::TensorList weights_;
  at::ArrayRef<double> eps_;
  size_t next_ = 0, norms_ = 0;
};

constexpr size_t kBlockWeights = 12, kLastBlockWeights = 15, kEndWeights = 3;  // the end includes the projection

// The order of the weights: patches; positions; the first normalisation's weight and bias; for each block the first
// normalisation, the projection and its bias, in the last block K, V^T and the bias of V, the output layer and its bias, the
// second normalisation, the hidden layer and its bias, the MLP's output layer and its bias; the last normalisation; the
// projection to features. An empty tensor stands for a normalisation or a projection that is absent.
Encoder encoder_of(const Tensor& images, at::TensorList weights, int64_t width, at::IntArrayRef patch, int64_t heads,
                   const std::string& activation, at::ArrayRef<double> eps) {
  TORCH_CHECK(images.dim() == 4 && images.scalar_type() == at::kFloat, "images must be (N, C, S, S') float32, got ",
              images.scalar_type(), " ", images.sizes());
  TORCH_CHECK(patch.size() == 2 && patch[0] > 0 && patch[1] > 0, "patch must be two positive numbers");
  TORCH_CHECK(activation == "gelu" || activation == "silu", "activation must be gelu or silu, got ", activation);
  TORCH_CHECK(weights.size() > 1 && weights[1].dim() == 2, "weights[1] must be the positions (tokens, width)");
  Encoder encoder{};
  encoder.channels = images.size(1);
  encoder.height = images.size(2);
  encoder.width = images.size(3);
  encoder.high = patch[0];
  encoder.wide = patch[1];
  encoder.tokens = weights[1].size(0);
  encoder.columns = weights[1].size(1);
  encoder.heads = heads;
  encoder.activation = activation == "gelu" ? Activation::gelu : Activation::silu;
  const int64_t grid = encoder.height / encoder.high * (encoder.width / encoder.wide), columns = encoder.columns;
  TORCH_CHECK(encoder.tokens == grid + 1, "weights[1] must have ", grid + 1, " positions, got ", encoder.tokens);
  TORCH_CHECK(heads > 0 && columns % heads == 0, "heads must divide the width ", columns, ", got ", heads);
  Reader reader(weights, eps);
  encoder.patches = reader.layer(encoder.channels * encoder.high * encoder.wide, columns, false);
  encoder.positions = reader.next(encoder.tokens * columns);
  encoder.norm_pre = reader.norm(columns);
  TORCH_CHECK(reader.left() >= kLastBlockWeights + kEndWeights, "weights must have a block");
  bool last = false;
  while (!last) {
    last = reader.left() < kBlockWeights + kLastBlockWeights + kEndWeights;
    Block block{};
    block.norm_1 = reader.norm(columns);
    block.projection = reader.layer(columns, last ? columns : 3 * columns, true);
    if (last) {
      block.key = reader.next(columns * columns);
      block.value = reader.next(columns * columns);
      block.value_bias = reader.next(columns);
    }
    block.output = reader.layer(columns, columns, true);
    block.norm_2 = reader.norm(columns);
    block.hidden = reader.layer(columns, -1, true);
    block.mlp_output = reader.layer(block.hidden.columns, columns, true);
    TORCH_CHECK(block.norm_1.weight && block.norm_2.weight, "a block's normalisation must not be empty");
    encoder.blocks.push_back(block);
  }
  encoder.norm_post = reader.norm(columns);
  TORCH_CHECK(reader.left() == 1, "weights has ", reader.left() - 1, " entries more than the blocks need");
  if (weights.back().numel() > 0) encoder.projection = reader.layer(columns, width, false);
  TORCH_CHECK(encoder.projection.data || width == columns, "width must be ", columns, " without a projection, got ", width);
  return encoder;
}

// out = rows * layer + bias, for `columns` columns of the layer from `first_column` on, which begins a panel. `after` is
// called for each panel of the result.
template <typename After>
void apply(const TransformerLoops& loops, const Layer& layer, int64_t first_column, int64_t columns, const float* rows,
           int64_t ld, int64_t count, float* out, int64_t ldo, const After& after) {
  const int64_t panel = panel_columns();
  for (int64_t c = 0; c < columns; c += panel) {
    const int64_t n = std::min(panel, columns - c);
    loops.repeat(layer.bias + first_column + c, n, count, out + c, ldo);
    panel_product(count, n, layer.depth, rows, ld, layer.data + (first_column + c) * layer.depth, out + c, ldo);
    after(out + c, n);
  }
}

// out += rows * layer, for `depth` rows of the layer from the row `first` on.
void accumulate(const Layer& layer, int64_t first, int64_t depth, const float* rows, int64_t ld, int64_t count,
                float* out, int64_t ldo) {
  const int64_t panel = panel_columns();
  for (int64_t c = 0; c < layer.columns; c += panel)
    panel_product(count, std::min(panel, layer.columns - c), depth, rows, ld,
                  layer.data + c * layer.depth + first * panel, out + c, ldo);
}

constexpr auto nothing = [](float*, int64_t) {};

// The second half of a block, in place: rows += MLP(normalised rows). Their biases are added by the normalisation.
void through_mlp(const Encoder& encoder, const TransformerLoops& loops, const Block& block, float* rows, int64_t count,
                 float* normalised, float* hidden) {
  const int64_t columns = encoder.columns;
  loops.normalise(rows, count, columns, block.norm_2.weight, block.norm_2.bias, block.norm_2.eps, block.mlp_output.bias,
                  normalised);
  for (int64_t h = 0; h < block.hidden.columns; h += kHiddenColumns) {
    const int64_t part = std::min(kHiddenColumns, block.hidden.columns - h);
    apply(loops, block.hidden, h, part, normalised, columns, count, hidden, kHiddenColumns,
          [&](float* values, int64_t n) { loops.activate(encoder.activation, values, kHiddenColumns, count, n); });
    for (int64_t k = 0; k < part; k += kHiddenColumns / 2)
      accumulate(block.mlp_output, h + k, std::min(kHiddenColumns / 2, part - k), hidden + k, kHiddenColumns, count, rows,
                 columns);
  }
}

// Memory for the images of a task.
struct Space {
  Space(const Encoder& encoder, int64_t images, Scratch& scratch) {
    const int64_t rows = images * encoder.tokens, columns = encoder.columns;
    padded = whole_vectors(encoder.tokens);
    stream = scratch.take<float>(rows * columns);
    normalised = scratch.take<float>(rows * columns);
    // The last block has a row for each head of an image, of which there may be more than tokens.
    wide = scratch.take<float>(std::max(rows * std::max({3 * columns, kHiddenColumns, encoder.patches.depth}),
                                        images * encoder.heads * columns));
    keys = scratch.take<float>(std::max(columns / encoder.heads * padded, columns * encoder.heads));
    scores = scratch.take<float>(std::max(encoder.tokens, encoder.heads) * padded);
    total = scratch.take<float>(std::max(encoder.tokens, encoder.heads));
    transposed = scratch.take<float>(encoder.tokens * encoder.heads);
    queries = scratch.take<float>(images * columns);
    first_rows = scratch.take<float>(images * columns);
  }
  int64_t padded;
  float *stream, *normalised, *wide, *keys, *scores, *total, *transposed, *queries, *first_rows;
};

void embed(const Encoder& encoder, const TransformerLoops& loops, const float* images, int64_t count, Space& space) {
  const int64_t grid = encoder.tokens - 1, columns = encoder.columns;
  const int64_t pixels = encoder.channels * encoder.height * encoder.width;
  for (int64_t i = 0; i < count; ++i) {
    float* rows = space.stream + i * encoder.tokens * columns;
    loops.patches(images + i * pixels, encoder.channels, encoder.height, encoder.width, encoder.high, encoder.wide,
                  space.wide);
    std::copy(encoder.positions, encoder.positions + encoder.tokens * columns, rows);
    accumulate(encoder.patches, 0, encoder.patches.depth, space.wide, encoder.patches.depth, grid, rows + columns, columns);
  }
  if (encoder.norm_pre.weight)
    loops.normalise(space.stream, count * encoder.tokens, columns, encoder.norm_pre.weight, encoder.norm_pre.bias,
                    encoder.norm_pre.eps, nullptr, space.stream);
}

// The attention of one image. projected: queries, keys and values side by side (tokens, 3 columns). out: (tokens, columns).
void attend(const Encoder& encoder, const TransformerLoops& loops, const float* projected, Space& space, float* out) {
  const AdapterLoops<float>& shared = chosen_loops<AdapterLoops<float>>();
  const int64_t tokens = encoder.tokens, columns = encoder.columns, ld = 3 * columns, d = columns / encoder.heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  for (int64_t head = 0; head < encoder.heads; ++head) {
    const float *queries = projected + head * d, *keys = queries + columns, *values = keys + columns;
    shared.transpose(keys, ld, tokens, d, space.keys, space.padded);
    for (int64_t r = 0; r < d; ++r)
      std::fill(space.keys + r * space.padded + tokens, space.keys + (r + 1) * space.padded, 0.0f);
    matrix_product<float>(tokens, space.padded, d, queries, ld, space.keys, space.padded, space.scores, space.padded, false);
    loops.exponentials(space.scores, space.padded, tokens, tokens, space.padded, scale, space.total);
    matrix_product<float>(tokens, d, tokens, space.scores, space.padded, values, ld, out + head * d, columns, false);
    loops.divide(out + head * d, columns, tokens, d, space.total);
  }
}

void through_block(const Encoder& encoder, const TransformerLoops& loops, const Block& block, int64_t images, Space& space) {
  const int64_t tokens = encoder.tokens, columns = encoder.columns, rows = images * tokens;
  loops.normalise(space.stream, rows, columns, block.norm_1.weight, block.norm_1.bias, block.norm_1.eps,
                  block.output.bias, space.normalised);
  apply(loops, block.projection, 0, 3 * columns, space.normalised, columns, rows, space.wide, 3 * columns, nothing);
  float* attended = space.normalised;  // the normalised rows are not needed any more
  for (int64_t i = 0; i < images; ++i)
    attend(encoder, loops, space.wide + i * tokens * 3 * columns, space, attended + i * tokens * columns);
  accumulate(block.output, 0, columns, attended, columns, rows, space.stream, columns);
  through_mlp(encoder, loops, block, space.stream, rows, space.normalised, space.wide);
}

// The last block's attention of the first token, before its values are projected: for each image and head the average
// (heads, columns) of the normalised rows by their probabilities. pooled receives the first rows of the images.
void pool(const Encoder& encoder, const TransformerLoops& loops, const Block& block, int64_t images, Space& space,
          float* averages, float* pooled) {
  const AdapterLoops<float>& shared = chosen_loops<AdapterLoops<float>>();
  const int64_t tokens = encoder.tokens, columns = encoder.columns, heads = encoder.heads, d = columns / heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  for (int64_t i = 0; i < images; ++i)
    std::copy_n(space.stream + i * tokens * columns, columns, pooled + i * columns);
  loops.normalise(space.stream, images * tokens, columns, block.norm_1.weight, block.norm_1.bias, block.norm_1.eps, nullptr,
                  space.normalised);
  for (int64_t i = 0; i < images; ++i)
    std::copy_n(space.normalised + i * tokens * columns, columns, space.first_rows + i * columns);
  apply(loops, block.projection, 0, columns, space.first_rows, columns, images, space.queries, columns, nothing);
  // (q K) for each head: (images, heads, columns)
  for (int64_t head = 0; head < heads; ++head)
    matrix_product<float>(images, columns, d, space.queries + head * d, columns, block.key + head * d * columns, columns,
                          space.wide + head * columns, heads * columns, false);
  for (int64_t i = 0; i < images; ++i) {
    const float* normalised = space.normalised + i * tokens * columns;
    shared.transpose(space.wide + i * heads * columns, columns, heads, columns, space.keys, heads);
    matrix_product<float>(tokens, heads, columns, normalised, columns, space.keys, heads, space.transposed, heads, false);
    shared.transpose(space.transposed, heads, tokens, heads, space.scores, space.padded);
    loops.exponentials(space.scores, space.padded, heads, tokens, space.padded, scale, space.total);
    float* out = averages + i * heads * columns;
    matrix_product<float>(heads, columns, tokens, space.scores, space.padded, normalised, columns, out, columns, false);
    loops.divide(out, columns, heads, columns, space.total);
  }
}

// The rest of the last block, and the projection to features, for the pooled rows of some images.
void finish(const Encoder& encoder, const TransformerLoops& loops, int64_t images, const float* averages, float* pooled,
            float* features, int64_t width) {
  const Block& block = encoder.blocks.back();
  const int64_t columns = encoder.columns, heads = encoder.heads, d = columns / heads;
  Scratch& scratch = Scratch::rewound();
  float *attended = scratch.take<float>(images * columns), *normalised = scratch.take<float>(images * columns);
  float* hidden = scratch.take<float>(images * kHiddenColumns);
  loops.repeat(block.value_bias, columns, images, attended, columns);
  for (int64_t head = 0; head < heads; ++head)
    matrix_product<float>(images, d, columns, averages + head * columns, heads * columns, block.value + head * d, columns,
                          attended + head * d, columns, true);
  for (int64_t i = 0; i < images; ++i)
    for (int64_t c = 0; c < columns; ++c) pooled[i * columns + c] += block.output.bias[c];
  accumulate(block.output, 0, columns, attended, columns, images, pooled, columns);
  through_mlp(encoder, loops, block, pooled, images, normalised, hidden);
  if (encoder.norm_post.weight)
    loops.normalise(pooled, images, columns, encoder.norm_post.weight, encoder.norm_post.bias, encoder.norm_post.eps, nullptr,
                    pooled);
  if (!encoder.projection.data) {
    std::copy_n(pooled, images * columns, features);
    return;
  }
  std::fill_n(features, images * width, 0.0f);
  accumulate(encoder.projection, 0, columns, pooled, columns, images, features, width);
}

Tensor small_transformer(const Tensor& images_, at::TensorList weights, int64_t width, at::IntArrayRef patch,
                         int64_t heads, std::string activation, at::ArrayRef<double> eps) {
  TORCH_CHECK(has_brgemm_float(), "this processor has no fast product of small float32 matrices");
  const Encoder encoder = encoder_of(images_, weights, width, patch, heads, activation, eps);
  const Tensor images = images_.contiguous();
  const TransformerLoops& loops = chosen_loops<TransformerLoops>();
  const int64_t count = images.size(0), columns = encoder.columns, tokens = encoder.tokens;
  Tensor features = at::empty({count, width}, images.options());
  if (count == 0) return features;
  Tensor averages_ = at::empty({count, heads, columns}, images.options());
  Tensor pooled_ = at::empty({count, columns}, images.options());
  const float* pixels = images.const_data_ptr<float>();
  float *averages = averages_.mutable_data_ptr<float>(), *pooled = pooled_.mutable_data_ptr<float>();
  float* out = features.mutable_data_ptr<float>();
  const int64_t image = images.numel() / count;
  const int64_t each = std::max<int64_t>(1, kTaskRows / tokens), tasks = (count + each - 1) / each;
  int64_t work = 0;  // of one row
  for (const Block& block : encoder.blocks) work += columns * (4 * columns + 2 * tokens + 2 * block.hidden.columns);
  share_tasks(at::get_num_threads(), tasks, count * tokens * work, [&](TaskQueue& queue) {
    Scratch& scratch = Scratch::rewound();
    Space space(encoder, std::min(each, count), scratch);
    for (int64_t task; queue.take(task);) {
      const int64_t first = task * each, number = std::min(each, count - first);
      embed(encoder, loops, pixels + first * image, number, space);
      for (size_t b = 0; b + 1 < encoder.blocks.size(); ++b)
        through_block(encoder, loops, encoder.blocks[b], number, space);
      pool(encoder, loops, encoder.blocks.back(), number, space, averages + first * heads * columns,
           pooled + first * columns);
    }
  });
  share_tasks(at::get_num_threads(), (count + kPooledRows - 1) / kPooledRows, count * work, [&](TaskQueue& queue) {
    for (int64_t task; queue.take(task);) {
      const int64_t first = task * kPooledRows, number = std::min(kPooledRows, count - first);
      finish(encoder, loops, number, averages + first * heads * columns, pooled + first * columns, out + first * width, width);
    }
  });
  return features;
}

Tensor panels_of(const Tensor& factor) {
  TORCH_CHECK(factor.dim() == 2, "factor must be (K, N), got ", factor.sizes());
  const int64_t panel = panel_columns(), panels = (factor.size(1) + panel - 1) / panel;
  const Tensor whole = at::constant_pad_nd(factor, {0, panels * panel - factor.size(1)});
  return whole.view({factor.size(0), panels, panel}).transpose(0, 1).contiguous();
}

}  // namespace

TORCH_LIBRARY_IMPL(rada_fast, CPU, library) {
  library.impl("small_transformer", &small_transformer);
  library.impl("panels_of", &panels_of);
}

}  // namespace rada_fast
