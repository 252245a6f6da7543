#include "executor.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <tuple>

namespace pm {
namespace {

constexpr int TOKEN_CHUNK = 256;  // rows of activations that stay in the second-level cache beside a unit's weights
constexpr int SMALL_STEP = 2;     // up to so many rows every thread normalises and encodes for itself: that costs less than a barrier
constexpr int ROW_UNIT = 8;       // rows that one claim normalises and encodes
constexpr int QUERY_TILE = 32;    // rows of a prompt that attend together
constexpr int FIRST_BLOCKS = 4;   // blocks that are fetched before their unit begins
constexpr int FEW_PAIRS = 16;     // up to so many (row, head) pairs attention waits for memory rather than for itself
constexpr int HEAD_BLOCKS = 32;   // row blocks of the head per unit
constexpr float STEP = 0.125f;    // of OpsKernels::steps_below
constexpr int BY_ROWS = 128;      // from so many rows on each thread takes rows through a layer
constexpr int ROWS_AT_ONCE = 32;  // the most that it takes at a time: their activations stay in the second-level cache, and enough units are left to share

int num_units(int n, int per_unit) { return (n + per_unit - 1) / per_unit; }

}  // namespace

// ---- activations -----------------------------------------------------------------------------------------------------------------------------------

void Executor::InputBuffer::want(const Linear& l) {
  k = l.weight.k;
  if (!l.is_native()) {
    f32 = true;
    return;
  }
  switch (l.weight.type) {
    case WeightType::Q4_1:
    case WeightType::Q8_0: q8 = true; break;
    case WeightType::BF16: bf16 = true; break;
    case WeightType::F32: f32 = true; break;
  }
}

void Executor::InputBuffer::resize(int t) {
  const size_t kp = round_up(k, INPUT_GROUP), rows = size_t(t);
  size_t total = 64;
  const auto piece = [&](size_t bytes) {
    const size_t at = total;
    total += (bytes + 63) / 64 * 64;
    return at;
  };
  const size_t at_pieces = piece(q8 ? rows * (kp / INPUT_GROUP) * sizeof(QuantPiece) : 0);
  const size_t at_bf16 = piece(bf16 ? rows * kp * 2 : 0), at_f32 = piece(f32 ? rows * kp * 4 : 0);
  if (memory.size() < total) memory.resize(total);
  uint8_t* base = memory.data();
  base += (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64;
  base -= 64;  // offsets start at 64
  view.t = t;
  view.k = k;
  view.pieces = q8 ? reinterpret_cast<QuantPiece*>(base + at_pieces) : nullptr;
  view.stride = rows;
  view.bf16 = bf16 ? reinterpret_cast<uint16_t*>(base + at_bf16) : nullptr;
  view.f32 = f32 ? reinterpret_cast<float*>(base + at_f32) : nullptr;
}

Input Executor::InputBuffer::rows(int first, int num) const {
  Input part = view;
  const size_t kp = view.kp(), row = first;
  part.t = num;
  if (part.pieces) part.pieces += row;
  if (part.bf16) part.bf16 += row * kp;
  if (part.f32) part.f32 += row * kp;
  return part;
}

// Encodes k floats at column `first` (a multiple of 64) of a row; the rest of the last piece becomes zero.
static void encode(const LinearKernels* kernels, const float* x, int first, int k, const Input& to, int row) {
  const int kp = to.kp(), width = round_up(k, INPUT_GROUP);
  if (to.pieces) kernels->quantize_row(x, k, to.pieces + size_t(first / INPUT_GROUP) * to.stride + row, to.stride);
  if (to.bf16) kernels->to_bf16_row(x, k, width, to.bf16 + size_t(row) * kp + first);
  if (to.f32) {
    float* out = to.f32 + size_t(row) * kp + first;
    std::memcpy(out, x, size_t(k) * 4);
    std::memset(out + k, 0, size_t(width - k) * 4);
  }
}

void Executor::encode_row(const float* x, InputBuffer& to, int row) const { encode(linear_, x, 0, to.k, to.view, row); }

// ---- construction ----------------------------------------------------------------------------------------------------------------------------------

Executor::Executor(const ModelShape& shape, std::vector<LayerWeights> layers, Linear embedding, const float* norm, Linear head, const float* cos,
                   const float* sin, const KvMemory& kv, const LinearKernels* linear, const OpsKernels* ops, int num_threads, int spin_us, bool pin)
    : shape_(shape),
      layers_(std::move(layers)),
      embedding_(std::move(embedding)),
      head_(std::move(head)),
      norm_(norm),
      cos_(cos),
      sin_(sin),
      kv_(kv),
      linear_(linear),
      ops_(ops),
      pool_(num_threads, spin_us, pin),
      group_(shape.num_heads / shape.num_kv_heads),
      q_size_(shape.num_heads * shape.head_dim),
      kv_size_(shape.num_kv_heads * shape.head_dim) {
  int max_kp = round_up(std::max({shape.hidden, shape.intermediate, q_size_}), INPUT_GROUP);
  threads_.resize(pool_.num_threads());
  thread_best_.resize(pool_.num_threads());
  for (const auto& l : layers_) {
    for (const Linear* w : {&l.q, &l.k, &l.v, &l.gate, &l.up}) hidden_.want(*w);
    heads_.want(l.o);
    act_.want(l.down);
  }
  last_.want(head_);
  for (auto& t : threads_) {
    t.hidden = hidden_;
    t.heads = heads_;
    t.act = act_;
    t.scratch.resize(64 + std::max(linear_scratch_bytes(max_kp), std::max(attention_scratch_bytes(QUERY_TILE, group_, shape.head_dim),
                                                                              attention_scratch_bytes(FEW_PAIRS, shape.num_kv_heads, shape.head_dim))));
  }
}

static void* aligned(std::vector<uint8_t>& memory) {
  const auto at = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (64 - at % 64) % 64;
}

// ---- one step --------------------------------------------------------------------------------------------------------------------------------------

void Executor::run(const std::vector<StepSequence>& sequences, int32_t* best, float* logits, const std::vector<StepTap>& taps) {
  plan(sequences);
  if (num_rows_ == 0) return;
  taps_ = taps;
  keeps_all_rows_ = std::any_of(taps.begin(), taps.end(), [&](const StepTap& t) { return t.layer == shape_.num_layers; });
  num_row_units_ = may_go_by_rows() ? pool_.num_threads() * num_units(num_rows_, pool_.num_threads() * ROWS_AT_ONCE) : 0;
  error_ = nullptr;
  pool_.run([&](int thread) { step(thread, best, logits); });
  if (error_) std::rethrow_exception(error_);
}

void Executor::probe(const std::vector<StepSequence>& sequences, int layer, float* q, float* k) {
  plan(sequences);
  if (num_rows_ == 0) return;
  taps_.clear();
  num_row_units_ = 0;
  probed_layer_ = layer;
  probed_q_ = q;
  probed_k_ = k;
  error_ = nullptr;
  pool_.run([&](int thread) { step(thread, nullptr, nullptr); });
  probed_layer_ = -1;
  if (error_) std::rethrow_exception(error_);
}

void Executor::plan(const std::vector<StepSequence>& sequences) {
  pool_.settle();  // matchers may still look at the last step's
  sequences_ = sequences;
  ranges_.clear();
  row_sequence_.clear();
  row_token_.clear();
  row_position_.clear();
  wanted_row_.clear();
  wanted_full_.clear();
  kept_.clear();
  exact_ = nullptr;
  int num_full = 0, num_kept = 0;
  for (size_t i = 0; i < sequences_.size(); ++i) {
    const StepSequence& s = sequences_[i];
    ranges_.push_back({int(row_token_.size()), s.num_rows, s.position, s.blocks});
    for (int r = 0; r < s.num_rows; ++r) {
      row_sequence_.push_back(int(i));
      row_token_.push_back(s.tokens[r]);
      row_position_.push_back(s.position + r);
      if (r >= s.num_rows - s.num_wanted) {
        wanted_row_.push_back(int(row_token_.size()) - 1);
        wanted_full_.push_back(s.full ? num_full++ : -1);
        kept_.push_back(s.kept ? num_kept++ : -1);
      }
    }
  }
  num_rows_ = int(row_token_.size());
  num_wanted_ = int(wanted_row_.size());
  const size_t t = num_rows_;
  const auto grow = [](std::vector<float>& v, size_t n) {
    if (v.size() < n) v.resize(n);
  };
  grow(x_, t * shape_.hidden);
  grow(q_, t * q_size_);
  grow(k_, t * kv_size_);
  grow(v_, t * kv_size_);
  grow(attended_, t * q_size_);
  const bool any_shared = std::any_of(layers_.begin(), layers_.end(), [](const LayerWeights& w) { return w.o.shared || w.down.shared; });
  if (any_shared) grow(foreign_y_, t * shape_.hidden);  // here, since no thread may move it under the others
  last_.resize(num_wanted_);
  if (num_kept > 0) {
    if (steps_.size() < num_kept * kept_bytes()) steps_.resize(num_kept * kept_bytes());
    unit_top_.resize(size_t(num_kept) * head_units());
  }
  size_buffers();
  plan_attention();
}

void Executor::size_buffers() {
  small_ = num_rows_ <= SMALL_STEP;
  if (small_) {
    for (auto& s : threads_) {
      s.hidden.resize(num_rows_);
      s.heads.resize(num_rows_);
    }
  } else {
    hidden_.resize(num_rows_);
    heads_.resize(num_rows_);
  }
  act_.resize(num_rows_);
}

// In the last layer only the wanted rows have a future: of the others no more than K and V is needed. Moves hidden state and heads (the queries, or what a
// function from elsewhere attended) of the wanted rows to the front and goes on with those. One thread calls it, while the others wait.
void Executor::keep_wanted_rows(std::vector<float>& heads) {
  std::vector<SequenceRows> kept;
  for (size_t i = 0; i < sequences_.size(); ++i) {
    const StepSequence& s = sequences_[i];
    if (s.num_wanted == 0) continue;
    const int first = kept.empty() ? 0 : kept.back().first_row + kept.back().num_rows;
    const int skipped = s.num_rows - s.num_wanted, from = ranges_[i].first_row + skipped;
    std::memmove(x_.data() + size_t(first) * shape_.hidden, x_.data() + size_t(from) * shape_.hidden, size_t(s.num_wanted) * shape_.hidden * 4);
    std::memmove(heads.data() + size_t(first) * q_size_, heads.data() + size_t(from) * q_size_, size_t(s.num_wanted) * q_size_ * 4);
    kept.push_back({first, s.num_wanted, s.position + skipped, s.blocks});
  }
  ranges_ = std::move(kept);
  num_rows_ = num_wanted_;
  num_row_units_ = 0;
  for (int i = 0; i < num_wanted_; ++i) wanted_row_[i] = i;
  size_buffers();
  plan_attention();
}

void Executor::plan_attention() {
  units_.clear();
  merges_.clear();
  merge_of_row_.assign(num_rows_, -1);
  if (attends_elsewhere()) return;
  // Rows of a prompt: a unit per KV head. Few rows, where memory is the limit: KV heads lie side by side in a block, so one unit takes them all and fetches
  // ahead for all, unless that leaves threads without work; splits of the keys are apart when there are few sequences.
  const int threads = pool_.num_threads(), all = shape_.num_kv_heads;
  int num_tiles = 0, num_pieces = 0;
  for (const auto& r : ranges_) {
    num_tiles += num_units(r.num_rows, QUERY_TILE);
    num_pieces += num_units(r.num_rows, QUERY_TILE) * num_units(r.position + r.num_rows, SPLIT_KEYS);
  }
  const bool split = num_tiles * all < 4 * threads, together = (split ? num_pieces : num_tiles) >= 4 * threads;
  int partials = 0;
  for (size_t i = 0; i < ranges_.size(); ++i) {
    const SequenceRows& r = ranges_[i];
    for (int row0 = 0; row0 < r.num_rows; row0 += QUERY_TILE) {
      const int row1 = std::min(row0 + QUERY_TILE, r.num_rows), rows = row1 - row0, keys = r.position + row1, splits = num_units(keys, SPLIT_KEYS);
      const int heads = together && rows * group_ <= FEW_PAIRS ? all : 1;
      const int slot = rows * group_;  // partials of one split
      const bool apart = splits > 1 && split;
      if (apart) {
        for (int row = row0; row < row1; ++row)
          if (merge_of_row_[r.first_row + row] < 0) merge_of_row_[r.first_row + row] = int(merges_.size());
        for (int h = 0; h < all; ++h) merges_.push_back({r.first_row + row0, rows, h, splits, partials + h * splits * slot});
      }
      for (int h = 0; h < all; h += heads) {
        if (apart) {
          for (int s = 0; s < splits; ++s) {
            const int64_t cost = int64_t(rows) * heads * (std::min((s + 1) * SPLIT_KEYS, keys) - s * SPLIT_KEYS);
            units_.push_back({int(i), h, heads, row0, row1, s, s + 1, partials + (h * splits + s) * slot, splits * slot, cost});
          }
        } else {
          units_.push_back({int(i), h, heads, row0, row1, 0, splits, -1, 0, int64_t(rows) * heads * keys});
        }
      }
      if (apart) partials += all * splits * slot;
    }
  }
  std::sort(units_.begin(), units_.end(), [](const AttentionUnit& a, const AttentionUnit& b) {  // the dearest first, so that the ends meet; heads of the same keys in turn: they lie together
    return a.cost != b.cost ? a.cost > b.cost : std::tie(a.sequence, a.split0, a.row0, a.kv_head) < std::tie(b.sequence, b.split0, b.row0, b.kv_head);
  });
  if (partial_max_.size() < size_t(partials)) {
    partial_max_.resize(partials);
    partial_sum_.resize(partials);
    partial_out_.resize(size_t(partials) * shape_.head_dim);
  }
}

void Executor::step(int thread, int32_t* best, float* logits) {
  embed(thread);
  pool_.barrier();
  for (int i = 0; i < shape_.num_layers; ++i) {
    const LayerWeights& w = layers_[i];
    if (!taps_.empty()) tap(thread, i);
    before_layer(thread, i);
    if (i == probed_layer_) return probe_layer(thread, i);
    if (!num_row_units_)
      qkv(thread, i, normed(thread, w.input_norm, hidden_, &ThreadState::hidden));
    else if (i == 0)
      for (int u; (u = pool_.claim()) < num_row_units_;) qkv_of_rows(thread, 0, first_of(u), end_of(u));
    if (!num_row_units_ || i == 0) pool_.barrier();
    const bool drops_rows = i + 1 == shape_.num_layers && num_wanted_ < num_rows_ && !keeps_all_rows_;
    if (drops_rows && !attends_elsewhere()) {
      pool_.barrier();  // everybody has looked at num_rows_
      if (thread == 0) keep_wanted_rows(q_);
      pool_.barrier();
      if (num_rows_ == 0) return;
    }
    attention(thread, i);
    pool_.barrier();
    if (drops_rows && attends_elsewhere()) {
      if (thread == 0) keep_wanted_rows(attended_);
      pool_.barrier();
      if (num_rows_ == 0) return;
    }
    if (num_row_units_) {
      for (int u; (u = pool_.claim()) < num_row_units_;) {
        feed_forward_of_rows(thread, i, first_of(u), end_of(u));
        if (i + 1 < shape_.num_layers) qkv_of_rows(thread, i + 1, first_of(u), end_of(u));
      }
      pool_.barrier();
      continue;
    }
    linear_units(thread, w.o, heads_encoded(thread), x_.data(), shape_.hidden, true, 3);
    pool_.barrier();
    gate_up(thread, w, normed(thread, w.mlp_norm, hidden_, &ThreadState::hidden));
    pool_.barrier();
    linear_units(thread, w.down, act_, x_.data(), shape_.hidden, true, 2);
    pool_.barrier();
  }
  if (!taps_.empty()) tap(thread, shape_.num_layers);
  if (num_wanted_) {
    before_layer(thread, shape_.num_layers);
    head(thread, best, logits);
  }
}

// On the caller's thread, which keeps an exception for the end of the step; nothing is called after one.
void Executor::guarded(int thread, const std::function<void()>& call) {
  if (thread != 0 || error_) return;
  try {
    call();
  } catch (...) {
    error_ = std::current_exception();
  }
}

void Executor::embed(int thread) {
  if (shared_embedding_) return shared_embedding_.call(shared_embedding_.context, row_token_.data(), num_rows_, x_.data(), thread, pool_.num_threads());
  if (foreign_embedding_) return guarded(thread, [&] { foreign_embedding_(row_token_.data(), num_rows_, x_.data()); });
  for (int u; (u = pool_.claim()) < num_units(num_rows_, ROW_UNIT);)
    for (int r = u * ROW_UNIT; r < std::min(num_rows_, (u + 1) * ROW_UNIT); ++r)
      linear_->dequantize_row(embedding_.weight, row_token_[r], x_.data() + size_t(r) * shape_.hidden);
}

void Executor::before_layer(int thread, int layer) {
  if (!shared_layer_ && !foreign_layer_) return;
  if (shared_layer_)
    shared_layer_.call(shared_layer_.context, layer, thread, pool_.num_threads());
  else
    guarded(thread, [&] { foreign_layer_(layer); });
  pool_.barrier();
}

// Copies this thread's share of the rows. Nobody writes x_ until all threads have passed a barrier after this.
void Executor::tap(int thread, int layer) const {
  const size_t n = shape_.hidden;
  for (const StepTap& t : taps_) {
    if (t.layer != layer) continue;
    const SequenceRows& r = ranges_[t.sequence];
    for (int row = thread; row < r.num_rows; row += pool_.num_threads())
      std::memcpy(t.out + size_t(row) * n, x_.data() + (size_t(r.first_row) + row) * n, n * 4);
  }
}

// Queries and keys of one layer, rotated, not stored.
void Executor::probe_layer(int thread, int layer) {
  const LayerWeights& w = layers_[layer];
  const InputBuffer& x = normed(thread, w.input_norm, hidden_, &ThreadState::hidden);
  linear_units(thread, w.q, x, q_.data(), q_size_, false, 4);
  pool_.barrier();
  linear_units(thread, w.k, x, k_.data(), kv_size_, false, 4);
  pool_.barrier();
  for (int u; (u = pool_.claim()) < num_units(num_rows_, ROW_UNIT);) {
    const int first = u * ROW_UNIT, num = std::min(ROW_UNIT, num_rows_ - first);
    rope_rows(layer, first, num, false);
    std::memcpy(probed_q_ + size_t(first) * q_size_, q_.data() + size_t(first) * q_size_, size_t(num) * q_size_ * 4);
    std::memcpy(probed_k_ + size_t(first) * kv_size_, k_.data() + size_t(first) * kv_size_, size_t(num) * kv_size_ * 4);
  }
}

// The normed and encoded rows: this thread's own in a small step, else shared, made together.
const Executor::InputBuffer& Executor::normed(int thread, const float* weight, InputBuffer& shared, InputBuffer ThreadState::*own) {
  ThreadState& state = threads_[thread];
  InputBuffer& to = small_ ? state.*own : shared;
  if (state.a.size() < size_t(shape_.hidden)) state.a.resize(shape_.hidden);
  const auto row = [&](int r) {
    ops_->rms_norm_row(x_.data() + size_t(r) * shape_.hidden, weight, shape_.hidden, shape_.eps, state.a.data());
    encode_row(state.a.data(), to, r);
  };
  if (small_) {
    for (int r = 0; r < num_rows_; ++r) row(r);
    return to;
  }
  for (int u; (u = pool_.claim()) < num_units(num_rows_, ROW_UNIT);)
    for (int r = u * ROW_UNIT; r < std::min(num_rows_, (u + 1) * ROW_UNIT); ++r) row(r);
  pool_.barrier();
  return to;
}

// Computes y for all rows and all of N, in units of row blocks and token chunks.
void Executor::linear_units(int thread, const Linear& l, const InputBuffer& x, float* y, size_t ldy, bool add, int blocks_per_unit) {
  if (l.shared) return shared_linear(thread, l, x, y, ldy, add);
  if (l.foreign) return foreign_linear(thread, l, x, y, ldy, add);
  const int blocks = l.weight.row_blocks(), t = x.view.t, chunks = num_units(t, TOKEN_CHUNK), per_chunk = num_units(blocks, blocks_per_unit);
  void* scratch = aligned(threads_[thread].scratch);
  for (int u; (u = pool_.claim()) < per_chunk * chunks;) {
    const int first = u / per_chunk * TOKEN_CHUNK, block = u % per_chunk * blocks_per_unit;
    linear_->linear(l.weight, x.rows(first, std::min(TOKEN_CHUNK, t - first)), block, std::min(block + blocks_per_unit, blocks), y + size_t(first) * ldy, ldy,
                    add, scratch);
  }
}

void Executor::foreign_linear(int thread, const Linear& l, const InputBuffer& x, float* y, size_t ldy, bool add) {
  if (thread != 0 || error_) return;
  const int t = x.view.t, k = l.weight.k, n = l.weight.n, kp = x.view.kp();
  const float* rows = x.view.f32;
  if (kp != k) {
    foreign_x_.resize(size_t(t) * k);
    for (int r = 0; r < t; ++r) std::memcpy(foreign_x_.data() + size_t(r) * k, rows + size_t(r) * kp, size_t(k) * 4);
    rows = foreign_x_.data();
  }
  if (foreign_y_.size() < size_t(t) * n) foreign_y_.resize(size_t(t) * n);
  try {
    l.foreign(rows, t, foreign_y_.data());
  } catch (...) {
    error_ = std::current_exception();
    return;
  }
  for (int r = 0; r < t; ++r)
    for (int i = 0; i < n; ++i) {
      const float value = foreign_y_[size_t(r) * n + i];
      float& to = y[r * ldy + i];
      to = add ? to + value : value;
    }
}

void Executor::shared_linear(int thread, const Linear& l, const InputBuffer& x, float* y, size_t ldy, bool add) {
  const int t = x.view.t, k = l.weight.k, n = l.weight.n, kp = x.view.kp();
  const float* rows = x.view.f32;
  if (kp != k) {
    std::vector<float>& dense = threads_[thread].dense;
    if (dense.size() < size_t(t) * k) dense.resize(size_t(t) * k);
    for (int r = 0; r < t; ++r) std::memcpy(dense.data() + size_t(r) * k, rows + size_t(r) * kp, size_t(k) * 4);
    rows = dense.data();
  }
  const bool in_place = !add && ldy == size_t(n);
  l.shared.call(l.shared.context, rows, t, k, in_place ? y : foreign_y_.data(), n, thread, pool_.num_threads());
  if (in_place) return;
  pool_.barrier();  // who computed which columns is not known here
  for (int u; (u = pool_.claim()) < num_units(t, ROW_UNIT);)
    for (int r = u * ROW_UNIT; r < std::min(t, (u + 1) * ROW_UNIT); ++r) {
      const float* from = foreign_y_.data() + size_t(r) * n;
      float* to = y + r * ldy;
      for (int i = 0; i < n; ++i) to[i] = add ? to[i] + from[i] : from[i];
    }
}

// ---- attention -------------------------------------------------------------------------------------------------------------------------------------

void Executor::qkv(int thread, int layer, const InputBuffer& x) {
  const LayerWeights& w = layers_[layer];
  const int d = shape_.head_dim, t = num_rows_;
  const bool whole_heads = d % ROWS == 0 && w.q.is_native() && w.k.is_native() && w.v.is_native(), append = !attends_elsewhere();
  if (!whole_heads) {
    linear_units(thread, w.q, x, q_.data(), q_size_, false, 4);
    pool_.barrier();
    linear_units(thread, w.k, x, k_.data(), kv_size_, false, 4);
    pool_.barrier();
    linear_units(thread, w.v, x, v_.data(), kv_size_, false, 4);
    pool_.barrier();
    for (int u; (u = pool_.claim()) < num_units(t, ROW_UNIT);) rope_rows(layer, u * ROW_UNIT, std::min(ROW_UNIT, t - u * ROW_UNIT), append);
    return;
  }
  // A unit is one query head, or one KV head's K and V, turned and stored while it is in the cache. The larger ones come first.
  const int blocks = d / ROWS, chunks = num_units(t, TOKEN_CHUNK), per_chunk = shape_.num_kv_heads + shape_.num_heads;
  void* scratch = aligned(threads_[thread].scratch);
  for (int u; (u = pool_.claim()) < per_chunk * chunks;) {
    const int first = u % chunks * TOKEN_CHUNK, num = std::min(TOKEN_CHUNK, t - first), which = u / chunks;
    const Input rows = x.rows(first, num);
    if (which < shape_.num_kv_heads) {
      linear_->linear(w.k.weight, rows, which * blocks, (which + 1) * blocks, k_.data() + size_t(first) * kv_size_, kv_size_, false, scratch);
      linear_->linear(w.v.weight, rows, which * blocks, (which + 1) * blocks, v_.data() + size_t(first) * kv_size_, kv_size_, false, scratch);
      for (int r = first; r < first + num; ++r) {
        rope_head(k_.data() + size_t(r) * kv_size_ + which * d, r);
        if (append) append_head(layer, r, which);
      }
    } else {
      const int h = which - shape_.num_kv_heads;
      linear_->linear(w.q.weight, rows, h * blocks, (h + 1) * blocks, q_.data() + size_t(first) * q_size_, q_size_, false, scratch);
      for (int r = first; r < first + num; ++r) rope_head(q_.data() + size_t(r) * q_size_ + h * d, r);
    }
  }
}

void Executor::rope_head(float* x, int row) const {
  const size_t at = size_t(row_position_[row]) * (shape_.head_dim / 2);
  ops_->rope_head(x, shape_.head_dim, cos_ + at, sin_ + at, shape_.rope_interleaved);
}

void Executor::append_head(int layer, int row, int kv_head) {
  const int position = row_position_[row], block = sequences_[row_sequence_[row]].blocks[position / BLOCK_TOKENS];
  const size_t at = size_t(row) * kv_size_ + size_t(kv_head) * shape_.head_dim;
  ops_->kv_append(kv_, layer, kv_head, block, position % BLOCK_TOKENS, k_.data() + at, v_.data() + at);
}

void Executor::rope_rows(int layer, int first, int num, bool append) {
  const LayerWeights& w = layers_[layer];
  const auto add_bias = [](const Linear& l, float* y) {  // of a native linear the kernel has added it
    if (l.is_native() || !l.weight.bias) return;
    for (int i = 0; i < l.weight.n; ++i) y[i] += l.weight.bias[i];
  };
  for (int r = first; r < first + num; ++r) {
    add_bias(w.q, q_.data() + size_t(r) * q_size_);
    add_bias(w.k, k_.data() + size_t(r) * kv_size_);
    add_bias(w.v, v_.data() + size_t(r) * kv_size_);
    for (int h = 0; h < shape_.num_heads; ++h) rope_head(q_.data() + size_t(r) * q_size_ + h * shape_.head_dim, r);
    for (int h = 0; h < shape_.num_kv_heads; ++h) {
      rope_head(k_.data() + size_t(r) * kv_size_ + h * shape_.head_dim, r);
      if (append) append_head(layer, r, h);
    }
  }
}

void Executor::attention(int thread, int layer) {
  if (shared_attention_) {
    const auto barrier = [](void* pool) { static_cast<Pool*>(pool)->barrier(); };
    return shared_attention_.call(shared_attention_.context, layer, q_.data(), k_.data(), v_.data(), num_rows_, attended_.data(), thread, pool_.num_threads(),
                                  barrier, &pool_);
  }
  if (foreign_attention_)
    return guarded(thread, [&] { foreign_attention_(layer, q_.data(), k_.data(), v_.data(), num_rows_, attended_.data()); });
  // A unit's first keys are on their way while the one before is computed.
  const int all = int(units_.size());
  for (int u = pool_.claim(); u < all;) {
    const int next = pool_.claim();
    if (next < all) fetch_first_keys(layer, units_[next]);
    attention_unit(thread, layer, units_[u]);
    u = next;
  }
}

void Executor::fetch_first_keys(int layer, const AttentionUnit& u) const {
  if (u.num_kv_heads == 1) return;  // waits for itself rather than for memory
  const SequenceRows& seq = ranges_[u.sequence];
  const int first = u.split0 * (SPLIT_KEYS / BLOCK_TOKENS), last = (seq.position + u.row1 - 1) / BLOCK_TOKENS;
  const size_t head = kv_.part_bytes() / kv_.kv_heads;
  for (int b = first; b < first + FIRST_BLOCKS && b <= last; ++b)
    for (const uint8_t* part : {kv_.k_part(seq.blocks[b], layer), kv_.v_part(seq.blocks[b], layer)})
      for (size_t at = 0; at < head; at += 64) __builtin_prefetch(part + u.kv_head * head + at, 0, 2);
}

void Executor::attention_unit(int thread, int layer, const AttentionUnit& u) {
  const int d = shape_.head_dim, n = (u.row1 - u.row0) * group_;
  const SequenceRows& seq = ranges_[u.sequence];
  const float scale = 1.0f / std::sqrt(float(d));
  ThreadState& state = threads_[thread];
  void* scratch = aligned(state.scratch);
  const float* q = q_.data() + size_t(u.kv_head) * group_ * d;
  if (u.partial >= 0) {
    ops_->attention_split(kv_, layer, u.kv_head, u.num_kv_heads, group_, seq, u.row0, u.row1, u.split0, q, q_size_, scale, partial_max_.data() + u.partial,
                          partial_sum_.data() + u.partial, partial_out_.data() + size_t(u.partial) * d, size_t(u.partial_stride), scratch);
    return;
  }
  const int all = n * u.num_kv_heads;
  const size_t each = size_t(all) * (2 + d);
  if (state.b.size() < 2 * each) state.b.resize(2 * each);
  float *acc_max = state.b.data(), *acc_sum = acc_max + all, *acc_out = acc_sum + all;
  float *max = state.b.data() + each, *sum = max + all, *out = sum + all;
  for (int s = u.split0; s < u.split1; ++s) {
    const bool first = s == u.split0;
    ops_->attention_split(kv_, layer, u.kv_head, u.num_kv_heads, group_, seq, u.row0, u.row1, s, q, q_size_, scale, first ? acc_max : max,
                          first ? acc_sum : sum, first ? acc_out : out, size_t(n), scratch);
    if (!first) ops_->attention_merge(acc_max, acc_sum, acc_out, max, sum, out, all, d);
  }
  for (int i = 0; i < all; ++i) {
    const size_t row = seq.first_row + u.row0 + i % n / group_, head = size_t(u.kv_head + i / n) * group_ + i % group_;
    ops_->attention_finish(acc_sum + i, acc_out + size_t(i) * d, d, attended_.data() + row * q_size_ + head * d);
  }
}

// The row that the output projection reads: splits merged, encoded.
void Executor::encode_heads(int thread, int r, InputBuffer& to, int at_row) {
  ThreadState& state = threads_[thread];
  const int d = shape_.head_dim;
  if (state.a.size() < size_t(q_size_)) state.a.resize(q_size_);
  std::vector<float>& acc = state.b;
  if (acc.size() < size_t(group_) * (2 + d)) acc.resize(size_t(group_) * (2 + d));
  const float* heads = attended_.data() + size_t(r) * q_size_;
  for (size_t i = merge_of_row_[r]; merge_of_row_[r] >= 0 && i < merges_.size(); ++i) {
    const PendingMerge& m = merges_[i];
    if (r < m.first_row || r >= m.first_row + m.num_rows) continue;
    heads = state.a.data();  // of a row either all KV heads are split or none
    float *acc_max = acc.data(), *acc_sum = acc_max + group_, *acc_out = acc_sum + group_;
    for (int s = 0; s < m.num_splits; ++s) {
      const size_t at = size_t(m.partial) + (size_t(s) * m.num_rows + (r - m.first_row)) * group_;
      if (s == 0) {
        std::memcpy(acc_max, partial_max_.data() + at, size_t(group_) * 4);
        std::memcpy(acc_sum, partial_sum_.data() + at, size_t(group_) * 4);
        std::memcpy(acc_out, partial_out_.data() + at * d, size_t(group_) * d * 4);
      } else {
        ops_->attention_merge(acc_max, acc_sum, acc_out, partial_max_.data() + at, partial_sum_.data() + at, partial_out_.data() + at * d, group_, d);
      }
    }
    for (int g = 0; g < group_; ++g)
      ops_->attention_finish(acc_sum + g, acc_out + size_t(g) * d, d, state.a.data() + (size_t(m.kv_head) * group_ + g) * d);
  }
  encode_row(heads, to, at_row);
}

const Executor::InputBuffer& Executor::heads_encoded(int thread) {
  ThreadState& state = threads_[thread];
  InputBuffer& to = small_ ? state.heads : heads_;
  if (small_) {
    for (int r = 0; r < num_rows_; ++r) encode_heads(thread, r, to, r);
    return to;
  }
  for (int u; (u = pool_.claim()) < num_units(num_rows_, ROW_UNIT);)
    for (int r = u * ROW_UNIT; r < std::min(num_rows_, (u + 1) * ROW_UNIT); ++r) encode_heads(thread, r, to, r);
  pool_.barrier();
  return to;
}

// ---- feed-forward and head -------------------------------------------------------------------------------------------------------------------------

void Executor::gate_up(int thread, const LayerWeights& w, const InputBuffer& x) {
  const int width = INPUT_GROUP, t = num_rows_, n = shape_.intermediate;
  ThreadState& state = threads_[thread];
  if (!w.gate.is_native() || !w.up.is_native()) {
    if (thread == 0) {
      gate_.resize(size_t(t) * n);
      up_.resize(size_t(t) * n);
    }
    pool_.barrier();
    linear_units(thread, w.gate, x, gate_.data(), n, false, 4);
    pool_.barrier();
    linear_units(thread, w.up, x, up_.data(), n, false, 4);
    pool_.barrier();
    for (int u; (u = pool_.claim()) < num_units(t, ROW_UNIT);)
      for (int r = u * ROW_UNIT; r < std::min(t, (u + 1) * ROW_UNIT); ++r) {
        float* gate = gate_.data() + size_t(r) * n;
        ops_->silu_mul(gate, up_.data() + size_t(r) * n, n, gate);
        encode_row(gate, act_, r);
      }
    return;
  }
  // A unit is 64 values of the activation: both matrices' rows, SiLU, and the encoding for the down projection without a trip through memory.
  const int chunks = num_units(t, TOKEN_CHUNK), per_chunk = num_units(n, width);
  for (int u; (u = pool_.claim()) < per_chunk * chunks;) {
    const int first = u / per_chunk * TOKEN_CHUNK;
    gate_up_columns(state, w, x.rows(first, std::min(TOKEN_CHUNK, t - first)), u % per_chunk * width, act_.view, first);
  }
}

void Executor::gate_up_columns(ThreadState& state, const LayerWeights& w, const Input& rows, int column, const Input& act, int first) {
  const int width = INPUT_GROUP, block = column / ROWS, end = std::min(block + width / ROWS, w.gate.weight.row_blocks());
  const int wide = std::min(width, shape_.intermediate - column);
  const size_t piece = size_t(rows.t) * width;
  if (state.a.size() < piece) state.a.resize(piece);
  if (state.b.size() < piece) state.b.resize(piece);
  void* scratch = aligned(state.scratch);
  linear_->linear(w.gate.weight, rows, block, end, state.a.data() - column, width, false, scratch);
  linear_->linear(w.up.weight, rows, block, end, state.b.data() - column, width, false, scratch);
  for (int r = 0; r < rows.t; ++r) {
    float* gate = state.a.data() + size_t(r) * width;
    ops_->silu_mul(gate, state.b.data() + size_t(r) * width, wide, gate);
    encode(linear_, gate, column, wide, act, first + r);
  }
}

// ---- by rows ---------------------------------------------------------------------------------------------------------------------------------------
// Nothing but attention looks at another row. So with many rows a thread takes some of them from one attention to the next: what it writes it reads again
// itself, out of its own second-level cache, and there are two barriers a layer instead of eight. Every thread reads all weights, which pays with many rows.

bool Executor::may_go_by_rows() const {
  const auto native = [](const LayerWeights& w) {
    for (const Linear* l : {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down})
      if (!l->is_native()) return false;
    return true;
  };
  return num_rows_ >= BY_ROWS && taps_.empty() && probed_layer_ < 0 && !attends_elsewhere() && !shared_layer_ && !foreign_layer_ &&
         std::all_of(layers_.begin(), layers_.end(), native);
}

void Executor::qkv_of_rows(int thread, int layer, int first, int end) {
  const LayerWeights& w = layers_[layer];
  ThreadState& state = threads_[thread];
  if (state.a.size() < size_t(shape_.hidden)) state.a.resize(shape_.hidden);
  state.hidden.resize(end - first);
  for (int r = first; r < end; ++r) {
    ops_->rms_norm_row(x_.data() + size_t(r) * shape_.hidden, w.input_norm, shape_.hidden, shape_.eps, state.a.data());
    encode_row(state.a.data(), state.hidden, r - first);
  }
  void* scratch = aligned(state.scratch);
  const auto times = [&](const Linear& l, std::vector<float>& y, int size) {
    linear_->linear(l.weight, state.hidden.view, 0, l.weight.row_blocks(), y.data() + size_t(first) * size, size, false, scratch);
  };
  times(w.q, q_, q_size_);
  times(w.k, k_, kv_size_);
  times(w.v, v_, kv_size_);
  rope_rows(layer, first, end - first, true);
}

void Executor::feed_forward_of_rows(int thread, int layer, int first, int end) {
  const LayerWeights& w = layers_[layer];
  ThreadState& state = threads_[thread];
  const int num = end - first, hidden = shape_.hidden;
  float* x = x_.data() + size_t(first) * hidden;
  void* scratch = aligned(state.scratch);
  state.heads.resize(num);
  for (int r = 0; r < num; ++r) encode_heads(thread, first + r, state.heads, r);
  linear_->linear(w.o.weight, state.heads.view, 0, w.o.weight.row_blocks(), x, hidden, true, scratch);
  if (state.a.size() < size_t(hidden)) state.a.resize(hidden);
  state.hidden.resize(num);
  for (int r = 0; r < num; ++r) {
    ops_->rms_norm_row(x + size_t(r) * hidden, w.mlp_norm, hidden, shape_.eps, state.a.data());
    encode_row(state.a.data(), state.hidden, r);
  }
  state.act.resize(num);
  for (int column = 0; column < shape_.intermediate; column += INPUT_GROUP) gate_up_columns(state, w, state.hidden.view, column, state.act.view, 0);
  linear_->linear(w.down.weight, state.act.view, 0, w.down.weight.row_blocks(), x, hidden, true, scratch);
}

void Executor::head(int thread, int32_t* best, float* logits) {
  ThreadState& state = threads_[thread];
  const int v = shape_.vocab;
  if (state.a.size() < size_t(shape_.hidden)) state.a.resize(shape_.hidden);
  for (int u; (u = pool_.claim()) < num_wanted_;) {
    ops_->rms_norm_row(x_.data() + size_t(wanted_row_[u]) * shape_.hidden, norm_, shape_.hidden, shape_.eps, state.a.data());
    encode_row(state.a.data(), last_, u);
  }
  pool_.barrier();
  constexpr int BAD = -2;  // a value that is not finite
  auto& bests = thread_best_[thread];
  bests.assign(num_wanted_, {0.0f, -1});
  const auto look = [&](const float* y, int row, int first, int n) {
    Best& b = bests[row];
    float value = 0.0f;
    const int i = ops_->argmax(y, n, &value);
    if (i < 0)
      b.index = BAD;
    else if (b.index != BAD && (b.index < 0 || value > b.value || (value == b.value && first + i < b.index)))
      b = {value, first + i};
    return value;
  };
  if (head_.shared) {
    if (thread == 0 && gate_.size() < size_t(num_wanted_) * v) gate_.resize(size_t(num_wanted_) * v);
    pool_.barrier();
    shared_linear(thread, head_, last_, gate_.data(), v, false);
    pool_.barrier();
    const int width = HEAD_BLOCKS * ROWS;
    for (int u; (u = pool_.claim()) < num_units(v, width);)
      for (int r = 0; r < num_wanted_; ++r) look(gate_.data() + size_t(r) * v + u * width, r, u * width, std::min(width, v - u * width));
    if (thread == 0)
      for (int r = 0; r < num_wanted_; ++r)
        if (wanted_full_[r] >= 0) std::memcpy(logits + size_t(wanted_full_[r]) * v, gate_.data() + size_t(r) * v, size_t(v) * 4);
    if (thread == 0) exact_ = gate_.data();
  } else if (head_.foreign) {
    if (thread == 0) {
      foreign_linear(0, head_, last_, (gate_.resize(size_t(num_wanted_) * v), gate_.data()), v, false);
      for (int r = 0; r < num_wanted_ && !error_; ++r) {
        look(gate_.data() + size_t(r) * v, r, 0, v);
        if (wanted_full_[r] >= 0) std::memcpy(logits + size_t(wanted_full_[r]) * v, gate_.data() + size_t(r) * v, size_t(v) * 4);
      }
      exact_ = gate_.data();
    }
  } else {
    const int width = HEAD_BLOCKS * ROWS, blocks = head_.weight.row_blocks();
    const size_t piece = size_t(num_wanted_) * width;
    if (state.a.size() < piece) state.a.resize(piece);
    void* scratch = aligned(state.scratch);
    for (int u; (u = pool_.claim()) < num_units(blocks, HEAD_BLOCKS);) {
      const int column = u * width, n = std::min(width, v - column);
      linear_->linear(head_.weight, last_.view, u * HEAD_BLOCKS, std::min((u + 1) * HEAD_BLOCKS, blocks), state.a.data() - column, width, false, scratch);
      for (int r = 0; r < num_wanted_; ++r) {
        const float* y = state.a.data() + size_t(r) * width;
        const float top = look(y, r, column, n);
        if (kept_[r] >= 0) keep(kept_[r], u, y, n, top);
        if (wanted_full_[r] >= 0) std::memcpy(logits + size_t(wanted_full_[r]) * v + column, y, size_t(n) * 4);
      }
    }
  }
  pool_.barrier();
  if (thread != 0) return;
  for (int r = 0; r < num_wanted_; ++r) {
    Best top{0.0f, -1};
    for (const auto& t : thread_best_) {
      const Best& b = t[r];
      if (b.index == BAD) {
        top.index = BAD;
        break;
      }
      if (b.index >= 0 && (top.index < 0 || b.value > top.value || (b.value == top.value && b.index < top.index))) top = b;
    }
    best[r] = top.index < 0 ? -1 : top.index;
  }
}

// ---- kept logits -----------------------------------------------------------------------------------------------------------------------------------
// Of a greedy row the next best token is rarely wanted, and to write 32 rows of 49,152 logits takes longer than 32 matchers. So a byte is kept for four of
// them: how far below the best of its unit the best of the four lies. It bounds them, so few can be the best of those allowed, and of these the head is
// computed again, to the same bits: a linear kernel's result does not depend on what else it computes.

int Executor::head_units() const { return num_units(shape_.vocab, HEAD_BLOCKS * ROWS); }

size_t Executor::kept_bytes() const { return size_t(head_units()) * HEAD_BLOCKS * ROWS / 4; }

void Executor::keep(int kept, int unit, const float* y, int n, float top) {
  unit_top_[size_t(kept) * head_units() + unit] = top;
  if (std::isfinite(top)) ops_->steps_below(y, n, top, steps_.data() + kept * kept_bytes() + size_t(unit) * HEAD_BLOCKS * ROWS / 4);
}

int Executor::best_allowed(int row, const uint32_t* mask) {
  static_assert(HEAD_BLOCKS * ROWS % 64 == 0, "a unit has words of the mask and groups of four of its own");
  constexpr float NONE = -std::numeric_limits<float>::infinity();
  const int v = shape_.vocab, width = HEAD_BLOCKS * ROWS, units = head_units();
  const auto each_allowed = [&](int first, int end, const auto& visit) {
    for (int word = first / 32; word * 32 < end; ++word)
      for (uint32_t rest = mask[word]; rest != 0; rest &= rest - 1)
        if (const int id = word * 32 + __builtin_ctz(rest); id < end) visit(id);
  };
  int best = -1;
  float value = NONE;
  const auto look = [&](int id, float x) {
    if (x > value || (x == value && id < best)) best = id, value = x;
  };
  if (exact_) {
    const float* x = exact_ + size_t(row) * v;
    each_allowed(0, v, [&](int id) { look(id, x[id]); });
    return best;
  }
  const float* tops = unit_top_.data() + size_t(kept_[row]) * units;
  const uint8_t* steps = steps_.data() + kept_[row] * kept_bytes();
  unit_order_.resize(units);
  for (int u = 0; u < units; ++u) {
    if (!std::isfinite(tops[u])) return -1;
    unit_order_[u] = u;
  }
  std::sort(unit_order_.begin(), unit_order_.end(), [&](int a, int b) { return tops[a] > tops[b]; });
  const Input input = last_.rows(row, 1);
  if (kept_scratch_.empty()) kept_scratch_.resize(threads_[0].scratch.size());
  alignas(64) float y[ROWS];
  int block = -1;
  for (int u : unit_order_) {
    if (tops[u] < value) break;
    candidates_.clear();
    each_allowed(u * width, std::min(v, (u + 1) * width), [&](int id) {
      // One step is for what rounding did to the difference; where the bound itself is rounded it stays one.
      const float highest = tops[u] - float(std::max(0, steps[id / 64 * 16 + id % 16] - 1)) * STEP;
      if (highest >= value) candidates_.push_back({highest, id});
    });
    std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& a, const Candidate& b) { return a.highest != b.highest ? a.highest > b.highest : a.id < b.id; });
    for (const Candidate& c : candidates_) {
      if (c.highest < value) break;
      if (c.id / ROWS != block) {
        block = c.id / ROWS;
        linear_->linear(head_.weight, input, block, block + 1, y - block * ROWS, size_t(v), false, aligned(kept_scratch_));
      }
      look(c.id, y[c.id % ROWS]);
    }
  }
  return best;
}

}  // namespace pm
