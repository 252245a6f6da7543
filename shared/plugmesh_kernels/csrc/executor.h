// Runs a whole step of a Llama-family model in one call: embedding, all layers, head.
#pragma once
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "matching.h"
#include "pool.h"

namespace pm {

// y (T, N) of x (T, K), both float32 and dense: a linear layer that somebody else computes. Called on the caller's thread only, while the others wait.
using ForeignLinear = std::function<void(const float* x, int t, float* y)>;
// out (T, heads * D) of q (T, heads * D), k and v (T, kv_heads * D); stores k and v itself.
using ForeignAttention = std::function<void(int layer, const float* q, const float* k, const float* v, int t, float* out)>;

// The functions of plugins that every thread of the pool calls at the same time; capsules bring them in (bind_executor.cpp). All matrices are dense float32.
// A linear fills its own share of the N columns of y (T, N), for all rows; it must not wait for the others. Linears of the same input are called one after
// another with the same x and the same pointer (q, k, v; gate, up), so a thread may keep what it made of x between those calls, and no longer.
using SharedLinear = void (*)(void* context, const float* x, int t, int k, float* y, int n, int thread, int num_threads);
// Comes before a layer, and once more, with layer = num_layers, before the head where there are wanted rows. What all threads wrote is visible afterwards.
using SharedLayer = void (*)(void* context, int layer, int thread, int num_threads);
// Stores k, v (T, kv_heads * D) and fills out (T, heads * D), its own share of it. barrier(barrier_context) waits for all threads and must be called by all.
using SharedAttention = void (*)(void* context, int layer, const float* q, const float* k, const float* v, int t, float* out, int thread, int num_threads,
                                 void (*barrier)(void*), void* barrier_context);
// Fills its own share of the rows of x (T, hidden).
using SharedEmbedding = void (*)(void* context, const int32_t* tokens, int t, float* x, int thread, int num_threads);

template <class F>
struct Shared {
  F call = nullptr;
  void* context = nullptr;
  explicit operator bool() const { return call != nullptr; }
};

// The same from Python, on the caller's thread only.
using ForeignLayer = std::function<void(int layer)>;
using ForeignEmbedding = std::function<void(const int32_t* tokens, int t, float* x)>;

struct Linear {
  Weight weight{};        // of a linear that is not native only n, k and the bias count; the bias is added by the executor, to q, k and v
  ForeignLinear foreign;
  Shared<SharedLinear> shared;
  bool is_native() const { return !foreign && !shared; }
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
  bool kept = false;  // the executor is to remember enough of them for best_allowed()
};

// Rows of one sequence's residual stream, asked for along with a step.
struct StepTap {
  int sequence, layer;  // before that layer; num_layers: behind the last one
  float* out;           // (num_rows of the sequence, hidden)
};

class Executor : public KeptLogits {
 public:
  Executor(const ModelShape& shape, std::vector<LayerWeights> layers, Linear embedding, const float* norm, Linear head, const float* cos, const float* sin,
           const KvMemory& kv, const LinearKernels* linear, const OpsKernels* ops, int num_threads, int spin_us, bool pin);

  void set_attention(ForeignAttention attention, Shared<SharedAttention> shared = {}) {
    foreign_attention_ = std::move(attention);
    shared_attention_ = shared;
  }
  void set_before_layer(ForeignLayer layer, Shared<SharedLayer> shared) {
    foreign_layer_ = std::move(layer);
    shared_layer_ = shared;
  }
  void set_embedding(ForeignEmbedding embedding, Shared<SharedEmbedding> shared) {
    foreign_embedding_ = std::move(embedding);
    shared_embedding_ = shared;
  }
  bool has_embedding() const { return embedding_.is_native() || foreign_embedding_ || shared_embedding_; }

  // best: one per wanted row, -1 where the logits are not finite. logits: (wanted rows of full sequences, vocab).
  // Throws what a foreign function throws; the step's KV is then undefined, the executor usable.
  void run(const std::vector<StepSequence>& sequences, int32_t* best, float* logits, const std::vector<StepTap>& taps = {});

  // Runs the layers before `layer` on all rows, storing their KV, then gives q (T, heads * D) and k (T, kv_heads * D) of `layer` after the rotation, and stops:
  // nothing of `layer` itself is stored. Throws as run does.
  void probe(const std::vector<StepSequence>& sequences, int layer, float* q, float* k);

  // Of a wanted row of the last run. Not while anything else runs.
  bool is_kept(int row) const override { return row >= 0 && size_t(row) < kept_.size() && kept_[size_t(row)] >= 0; }
  int best_allowed(int row, const uint32_t* mask) override;

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
    std::vector<float> dense;                // input of a shared linear whose K is no multiple of 64
    InputBuffer hidden, heads, act;          // small steps and steps by rows encode their own input
  };

  void plan(const std::vector<StepSequence>& sequences);
  void plan_attention();
  void size_buffers();
  void keep_wanted_rows(std::vector<float>& heads);
  void step(int thread, int32_t* best, float* logits);
  void embed(int thread);
  void before_layer(int thread, int layer);
  void guarded(int thread, const std::function<void()>& call);
  bool attends_elsewhere() const { return foreign_attention_ || shared_attention_; }
  void encode_norm(const float* x, const float* weight, int first, int num, InputBuffer& to, int to_row, std::vector<float>& row);
  void encode_row(const float* x, InputBuffer& to, int row) const;
  const InputBuffer& normed(int thread, const float* weight, InputBuffer& shared, InputBuffer ThreadState::*own);
  void linear_units(int thread, const Linear& l, const InputBuffer& x, float* y, size_t ldy, bool add, int blocks_per_unit);
  void foreign_linear(int thread, const Linear& l, const InputBuffer& x, float* y, size_t ldy, bool add);
  void shared_linear(int thread, const Linear& l, const InputBuffer& x, float* y, size_t ldy, bool add);
  void qkv(int thread, int layer, const InputBuffer& x);
  void rope_rows(int layer, int first, int num, bool append);
  void rope_head(float* x, int row) const;
  void append_head(int layer, int row, int kv_head);
  void attention(int thread, int layer);
  void attention_unit(int thread, int layer, const AttentionUnit& u);
  void fetch_first_keys(int layer, const AttentionUnit& u) const;
  const InputBuffer& heads_encoded(int thread);
  void encode_heads(int thread, int row, InputBuffer& to, int at);
  void gate_up_columns(ThreadState& state, const LayerWeights& w, const Input& rows, int column, const Input& act, int first);
  bool may_go_by_rows() const;
  int first_of(int row_unit) const { return int(int64_t(num_rows_) * row_unit / num_row_units_) & ~1; }
  int end_of(int row_unit) const { return row_unit + 1 == num_row_units_ ? num_rows_ : first_of(row_unit + 1); }
  void qkv_of_rows(int thread, int layer, int first, int end);
  void feed_forward_of_rows(int thread, int layer, int first, int end);
  void gate_up(int thread, const LayerWeights& w, const InputBuffer& x);
  void head(int thread, int32_t* best, float* logits);
  void keep(int kept, int unit, const float* y, int n, float top);
  int head_units() const;
  size_t kept_bytes() const;
  void tap(int thread, int layer) const;
  void probe_layer(int thread, int layer);

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
  ForeignLayer foreign_layer_;
  ForeignEmbedding foreign_embedding_;
  Shared<SharedAttention> shared_attention_;
  Shared<SharedLayer> shared_layer_;
  Shared<SharedEmbedding> shared_embedding_;
  Pool pool_;
  const int group_, q_size_, kv_size_;

  // of the step
  int num_rows_ = 0, num_wanted_ = 0;
  bool small_ = false;
  int num_row_units_ = 0;  // 0: not by rows
  std::vector<StepSequence> sequences_;
  std::vector<SequenceRows> ranges_;
  std::vector<int> row_sequence_, row_token_, row_position_, wanted_row_, wanted_full_;
  // Of kept rows: how far the largest of four logits lies below the largest of its unit of the head, and that one.
  std::vector<int> kept_;  // per wanted row its place in the next two, -1 for none
  std::vector<uint8_t> steps_;
  std::vector<float> unit_top_;
  const float* exact_ = nullptr;  // the logits of all wanted rows, where the head is not native
  struct Candidate {
    float highest;
    int id;
  };
  std::vector<Candidate> candidates_;
  std::vector<int> unit_order_;
  std::vector<uint8_t> kept_scratch_;
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
  std::vector<StepTap> taps_;
  bool keeps_all_rows_ = false;  // a tap reads rows behind the last layer that give no output
  int probed_layer_ = -1;
  float *probed_q_ = nullptr, *probed_k_ = nullptr;
  std::exception_ptr error_;
};

}  // namespace pm
