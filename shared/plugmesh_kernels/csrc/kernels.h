// What the native kernels offer to the executor, and how their data lies in memory.
//
// Every function here exists once per instruction set (avx512, avx2, portable) behind a table of function pointers that is chosen when the module is
// loaded. None of them allocates, locks, throws or starts threads; the executor splits the work.
//
// Two promises run through all of them, because requests migrate, are preempted and share prefixes:
// - Batch invariance: what a row gets depends on that row alone, bit for bit, never on the number of rows, on tiling, or on which thread did it. So sums
//   over K (and over keys) always run in the same order with the same operations, for one row and for a thousand.
// - A NaN or infinity in a row stays in that row.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pm {

constexpr int ROWS = 16;          // rows of a weight that lie side by side: one 512-bit register of floats
constexpr int GROUP = 32;         // weights along K that share scale and minimum (GGUF's block)
constexpr int INPUT_GROUP = 64;   // activations along K that share one scale; K is padded to a multiple of it
constexpr int BLOCK_TOKENS = 16;  // tokens of a KV block
constexpr int SPLIT_KEYS = 512;   // keys that are attended to in one piece; pieces are merged in order

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

// ---- weights ---------------------------------------------------------------------------------------------------------------------------------------
// A weight (N, K) is a sequence of row blocks of 16 rows (the last one padded with zero rows); within a row block, K comes in pieces of 64 (zero padded):
//   Q4_1  640 bytes: f16 d[2][16], f16 m[2][16] (group, row), then per group 4 vectors of 64 bytes; byte 4*r+i of vector v holds in its low
//         nibble q[row r][k = 4v+i] of the group, in its high nibble q[row r][k = 16+4v+i].           w = d * q + m
//   Q8_0  1088 bytes: f16 d[2][16], then per group 8 vectors of 64 bytes; byte 4*r+i of vector v holds q[row r][k = 4v+i] + 128.   w = d * q
//   BF16  2048 bytes: 32 vectors of 64 bytes; vector v holds for row r the bf16 pair w[r][2v], w[r][2v+1].
//   F32   4096 bytes: 64 vectors of 64 bytes; vector v holds w[r][v] for the 16 rows.
// Data is at least 64-byte aligned in files, but kernels must not rely on more than 2-byte alignment.
enum class WeightType : int { Q4_1 = 0, Q8_0 = 1, BF16 = 2, F32 = 3 };

struct Weight {
  WeightType type;
  int n, k;             // logical shape
  const uint8_t* data;  // row_blocks() * row_block_bytes()
  const float* bias;    // (n,) or nullptr
  int kp() const { return round_up(k, INPUT_GROUP); }
  int row_blocks() const { return round_up(n, ROWS) / ROWS; }
  size_t piece_bytes() const {
    switch (type) {
      case WeightType::Q4_1: return 640;
      case WeightType::Q8_0: return 1088;
      case WeightType::BF16: return 2048;
      default: return 4096;
    }
  }
  size_t row_block_bytes() const { return size_t(kp() / INPUT_GROUP) * piece_bytes(); }
};

// 64 activations of one row as integers, with all that a product with them needs: x ~= scale * q; scale = max|x| / 127, q rounded to nearest even. With a
// NaN or infinity among them scale is NaN and q = 0; when all are below 1e-30 both are 0.
struct QuantPiece {
  int8_t q[INPUT_GROUP];
  float scale;
  float sum[2];     // of q, per group of 32
  int32_t init[2];  // -128 * that sum
};
static_assert(sizeof(QuantPiece) == 84, "no padding");

// T rows of activations in the encodings that the weights on them want. Padding beyond k is zero.
struct Input {
  int t, k;
  QuantPiece* pieces;  // Q4_1, Q8_0: piece p of row t at p * stride + t, so that the tokens of a piece lie together
  size_t stride;       // rows of the whole buffer
  uint16_t* bf16;  // row stride kp; round to nearest even, NaN stays NaN
  float* f32;      // row stride kp as well
  int kp() const { return round_up(k, INPUT_GROUP); }
};

// ---- KV memory -------------------------------------------------------------------------------------------------------------------------------------
// block -> layer -> K part, V part. `D` is the head's width (even; a multiple of 16 is fast, others may be slow but right).
//   BF16: K [kv_head][D/2][16 tokens][2] bf16, V [kv_head][8 token pairs][D][2] bf16.
//   INT8: K [kv_head] { float scale[16 tokens]; int8 [ceil(D/4)][16 tokens][4] },  V [kv_head] { float scale[16 tokens]; int8 [16 tokens][D] }.
//         one scale per token and head: max|x| / 127; a NaN or infinity gives scale NaN.
enum class KvType : int { BF16 = 0, INT8 = 1 };

struct KvMemory {
  uint8_t* base;
  size_t block_bytes;  // num_layers * layer_bytes()
  int num_layers, kv_heads, head_dim;
  KvType type;
  size_t part_bytes() const {  // K or V of a layer
    return type == KvType::BF16 ? size_t(kv_heads) * BLOCK_TOKENS * head_dim * 2
                                : size_t(kv_heads) * (BLOCK_TOKENS * 4 + size_t(BLOCK_TOKENS) * round_up(head_dim, 4));
  }
  size_t layer_bytes() const { return 2 * part_bytes(); }
  uint8_t* k_part(int block, int layer) const { return base + size_t(block) * block_bytes + size_t(layer) * layer_bytes(); }
  uint8_t* v_part(int block, int layer) const { return k_part(block, layer) + part_bytes(); }
};

// Consecutive rows of one sequence within a step.
struct SequenceRows {
  int first_row, num_rows;  // rows of the step
  int position;             // tokens before the first row: row i attends to keys 0 .. position + i
  const int32_t* blocks;    // the sequence's blocks in order
};

// ---- linear.* --------------------------------------------------------------------------------------------------------------------------------------
struct LinearKernels {
  const char* isa;
  // Fill one row of an Input (or a part of it that starts at a multiple of 64), padding included, from k floats.
  void (*quantize_row)(const float* x, int k, QuantPiece* to, size_t stride);
  void (*to_bf16_row)(const float* x, int k, int kp, uint16_t* out);
  // y[t * ldy + n] = (or +=, with add) sum_k x[t][k] w[n][k] + bias[n], for all rows t of x and n in [16 * block0, min(16 * block1, N)).
  // Reads the encoding of x that the weight's type wants. `scratch` has scratch_bytes(w) bytes, 64-byte aligned, one per thread.
  void (*linear)(const Weight& w, const Input& x, int block0, int block1, float* y, size_t ldy, bool add, void* scratch);
  // One row of the weight as floats (embedding lookup); exactly d * q + m, rounded once to float (fma).
  void (*dequantize_row)(const Weight& w, int row, float* out);
};
size_t linear_scratch_bytes(int max_kp);

const LinearKernels* linear_avx512();    // VNNI, BF16, VBMI as needed; nullptr when not compiled for this architecture
const LinearKernels* linear_avx2();      // AVX2 + FMA + F16C
const LinearKernels* linear_portable();

// ---- ops.*, attention.*, sample.* -----------------------------------------------------------------------------------------------------------------
struct OpsKernels {
  const char* isa;
  // out[i] = x[i] * weight[i] / sqrt(mean(x^2) + eps)
  void (*rms_norm_row)(const float* x, const float* weight, int k, float eps, float* out);
  // out[i] = gate[i] / (1 + exp(-gate[i])) * up[i]; out may be gate or up
  void (*silu_mul)(const float* gate, const float* up, int n, float* out);
  // Turns one head (D floats) in place. cos and sin (D/2): pairs (i, i + D/2), or (2i, 2i + 1) when interleaved.
  void (*rope_head)(float* x, int head_dim, const float* cos, const float* sin, bool interleaved);
  // Stores K and V (D floats each) of one token and KV head.
  void (*kv_append)(const KvMemory& kv, int layer, int kv_head, int block, int offset, const float* k, const float* v);

  // Attention of the query heads that share KV heads [kv_head, kv_head + num_kv_heads), for rows [row0, row1) of the sequence (counted within it), over keys
  // of split s only: [s * SPLIT_KEYS, min((s+1) * SPLIT_KEYS, position + row + 1)). group = query heads per KV head. Several KV heads in one call for few
  // rows, where memory is the limit: they lie side by side.
  //   q: of row r of the step, query head h of the first KV head's group on at q + r * ldq + h * D. Scores are scaled by `scale` in float32.
  //   Partials per (row - row0, head in group): max[...], sum[...], out[... * D], laid out [(row - row0) * group + head], those of the next KV head
  //   head_stride pairs further; rows without a key in the split get max = -inf, sum = 0, out = 0. A max of NaN marks a sum of NaN.
  void (*attention_split)(const KvMemory& kv, int layer, int kv_head, int num_kv_heads, int group, const SequenceRows& seq, int row0, int row1, int split,
                          const float* q, size_t ldq, float scale, float* max, float* sum, float* out, size_t head_stride, void* scratch);
  // With a max of -inf, sum and out may be unset.
  // acc := acc merged with a later split's partial, for n (row, head) pairs of D values: the only way partials meet, so its order and operations are fixed.
  void (*attention_merge)(float* acc_max, float* acc_sum, float* acc_out, const float* max, const float* sum, const float* out, int n, int head_dim);
  // out[i] = acc_out[i] / acc_sum
  void (*attention_finish)(const float* acc_sum, const float* acc_out, int head_dim, float* out);

  // Index of the largest value (the first of equals), and that value; index -1 when the maximum is not finite or any value is NaN.
  int (*argmax)(const float* x, int n, float* value);
  // out[i / 64 * 16 + i % 16] = min(255, floor((top - x) * 8)) for the largest x of the four x[i] that share it, the difference rounded to float; whole
  // sixteens of `out` are written. No x[i] is above top, none is NaN.
  void (*steps_below)(const float* x, int n, float top, uint8_t* out);
};
size_t attention_scratch_bytes(int max_rows, int group, int head_dim);  // for row1 - row0 <= max_rows

const OpsKernels* ops_avx512();
const OpsKernels* ops_avx2();
const OpsKernels* ops_portable();

// The token that the sampler's rule chooses for one row of logits: temperature, then top-k, top-p of what remains, min-p, then the inverse of the cumulated
// distribution in the order of token ids at u in [0, 1). See plugmesh_engine/sampler.py for the rule (ties with the last admitted token are admitted).
struct SampleParams {
  float temperature;  // 0: argmax
  int top_k;          // 0 or >= n: off
  float top_p;        // 1: off
  float min_p;        // 0: off
  double u;
};
// -1 when the row has no finite maximum. `scratch`: n floats. Deterministic.
int sample_row(const float* logits, int n, const SampleParams& p, float* scratch);
// Log-softmax: log-probability of `token` and the `num_top` best (id, value), best first, ties by lower id.
void logprobs_row(const float* logits, int n, int token, int num_top, float* token_logprob, int* top_ids, float* top_values);

}  // namespace pm
