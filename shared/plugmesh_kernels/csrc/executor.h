// Runs a whole step of a Llama-family model in one call: embedding, all layers, head.
#pragma once
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace pm {

// y (T, N) of x (T, K), both float32 and dense: a linear layer that somebody else computes. Called on the caller's thread only, while the others wait.
using ForeignLinear = std::function<void(const float* x, int t, float* y)>;
// out (T, heads * D) of q (T, heads * D), k and v (T, kv_heads * D); stores k and v itself.
using ForeignAttention = std::function<void(int layer, const float* q, const float* k, const float* v, int t, float* out)>;

struct Linear {
  Weight weight{};        // unused when `foreign` is set, but for n and k
  ForeignLinear foreign;
};

struct LayerWeights {
  const float* input_norm = nullptr;
  const float* mlp_norm = nullptr;
  Linear q, k, v, o, gate, up, down;
};

struct ModelShape {
  int hidden, intermediate, num_layers, num_heads, num_kv_heads, head_dim, vocab, max_position;
  float eps;
  bool rope_interleaved;
};

struct StepSequence {
  const int32_t* tokens;  // num_rows of them
  int num_rows, position;
  const int32_t* blocks;
  int num_wanted;  // the last rows whose best token is wanted
  bool full;       // and their logits
};

class Executor {
 public:
  Executor(const ModelShape& shape, std::vector<LayerWeights> layers, Linear embedding, const float* norm, Linear head, const float* cos, const float* sin,
           const KvMemory& kv, const LinearKernels* linear, const OpsKernels* ops, int num_threads, int spin_us, bool pin);

  void set_attention(ForeignAttention attention) { foreign_attention_ = std::move(attention); }

  // best: one per wanted row, -1 where the logits are not finite. logits: (wanted rows of full sequences, vocab).
  // Throws what a foreign function throws; the step's KV is then undefined, the executor usable.
  void run(const std::vector<StepSequence>& sequences, int32_t* best, float* logits);

  Pool& pool() { return pool_; }
  const ModelShape& shape() const { return shape_; }

 private:
  // Encodings of one activation matrix, as the weights that read it want them.
  struct InputBuffer {
    int k = 0;
    bool q8 = false, bf16 = false, f32 = false;
    Input view{};
    std::vector<uint8_t> memory;
    void want(const Linear& l);
    void resize(int t);
    Input rows(int first, int num) const;
  };
  struct AttentionUnit {
    int sequence, kv_head, num_kv_heads, row0, row1, split0, split1;
    int partial, partial_stride;  // slot of its partials and the distance between KV heads; -1 when it covers all splits of its rows
    int64_t cost;
  };
  struct PendingMerge {  // rows of one sequence and KV head whose splits were computed apart
    int first_row, num_rows, kv_head, num_splits, partial;
  };
  struct ThreadState {
    std::vector<uint8_t> scratch;            // of the linear and attention kernels
    std::vector<float> a, b;                 // pieces of gate and up, partials of attention
    InputBuffer hidden, heads;               // small steps encode their own input, which spares a barrier
  };

  void plan(const std::vector<StepSequence>& sequences);
  void plan_attention();
  void size_buffers();
  void keep_wanted_rows();
  void step(int thread, int32_t* best, float* logits);
  void embed();
  void encode_norm(const float* x, const float* weight, int first, int num, InputBuffer& to, int to_row, std::vector<float>& row);
  void encode_row(const float* x, InputBuffer& to, int row) const;
  const InputBuffer& normed(int thread, const float* weight, InputBuffer& shared, InputBuffer ThreadState::*own);
  void linear_units(int thread, const Linear& l, const InputBuffer& x, float* y, size_t ldy, bool add, int blocks_per_unit);
  void foreign_linear(int thread, const Linear& l, const InputBuffer& x, float* y, size_t ldy, bool add);
  void qkv(int thread, int layer, const InputBuffer& x);
  void rope_rows(int layer, int first, int num, bool append);
  void rope_head(float* x, int row) const;
  void append_head(int layer, int row, int kv_head);
  void attention(int thread, int layer);
  void attention_unit(int thread, int layer, const AttentionUnit& u);
  void fetch_first_keys(int layer, const AttentionUnit& u) const;
  const InputBuffer& heads_encoded(int thread);
  void gate_up(int thread, const LayerWeights& w, const InputBuffer& x);
  void head(int thread, int32_t* best, float* logits);

  const ModelShape shape_;
  const std::vector<LayerWeights> layers_;
  const Linear embedding_, head_;
  const float* norm_;
  const float* cos_;
  const float* sin_;
  const KvMemory kv_;
  const LinearKernels* linear_;
  const OpsKernels* ops_;
  ForeignAttention foreign_attention_;
  Pool pool_;
  const int group_, q_size_, kv_size_;

  // of the step
  int num_rows_ = 0, num_wanted_ = 0;
  bool small_ = false;
  std::vector<StepSequence> sequences_;
  std::vector<SequenceRows> ranges_;
  std::vector<int> row_sequence_, row_token_, row_position_, wanted_row_, wanted_full_;
  std::vector<AttentionUnit> units_;
  std::vector<PendingMerge> merges_;
  std::vector<int> merge_of_row_;  // first of merges_ that touches a row, -1 for none
  std::vector<float> partial_max_, partial_sum_, partial_out_;
  std::vector<float> x_, q_, k_, v_, attended_, gate_, up_, foreign_y_, foreign_x_;
  InputBuffer hidden_, heads_, act_, last_;
  std::vector<ThreadState> threads_;
  struct Best {
    float value;
    int index;
  };
  std::vector<std::vector<Best>> thread_best_;
  std::exception_ptr error_;
};

}  // namespace pm
