// What the files of one instruction set share with each other; nobody else includes this.
#pragma once
#include "kernels.h"

namespace pm {

constexpr int TILE_KEYS = 64;  // keys of one online-softmax update; boundaries are absolute, so a row meets the same tiles in every batch
constexpr int TILE_BLOCKS = TILE_KEYS / BLOCK_TOKENS;
static_assert(SPLIT_KEYS % TILE_KEYS == 0, "a tile lies in one split");

// The scratch of attention_split, 64-byte aligned parts. Sized for the most demanding instruction set, so that one number serves all.
struct AttentionScratch {
  uint8_t* q;    // queries as the dot product wants them; q_stride bytes each
  float* sums;   // 16 partial sums per (row, head)
  float* max;    // running maximum, before scaling
  float* scale;  // per (row, head)
  int32_t* init; // per (row, head)
  uint8_t* v;    // V of a tile, decoded
};

inline size_t attention_q_stride(int head_dim) { return size_t(round_up(head_dim, 16)) * 4; }
inline size_t attention_v_bytes(int head_dim) { return size_t(TILE_KEYS) * size_t(round_up(head_dim, 16)) * 4; }

inline AttentionScratch attention_scratch(void* scratch, int pairs, int head_dim) {
  AttentionScratch s;
  const size_t n = size_t(round_up(pairs, 16));
  uint8_t* p = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
  s.q = p;
  p += n * attention_q_stride(head_dim);
  s.sums = reinterpret_cast<float*>(p);
  p += n * 64;
  s.max = reinterpret_cast<float*>(p);
  p += n * 4;
  s.scale = reinterpret_cast<float*>(p);
  p += n * 4;
  s.init = reinterpret_cast<int32_t*>(p);
  p += n * 4;
  s.v = p;
  return s;
}

// Bytes of one KV head within the K or V part of a layer.
inline size_t head_bytes(const KvMemory& kv) { return kv.part_bytes() / size_t(kv.kv_heads); }

#define PM_ATTENTION_FUNCTIONS                                                                                                                    \
  void kv_append(const KvMemory& kv, int layer, int kv_head, int block, int offset, const float* k, const float* v);                              \
  void attention_split(const KvMemory& kv, int layer, int kv_head, int num_kv_heads, int group, const SequenceRows& seq, int row0, int row1, int split,             \
                       const float* q, size_t ldq, float scale, float* max, float* sum, float* out, size_t head_stride, void* scratch);                               \
  void attention_merge(float* acc_max, float* acc_sum, float* acc_out, const float* max, const float* sum, const float* out, int n, int head_dim); \
  void attention_finish(const float* acc_sum, const float* acc_out, int head_dim, float* out);
namespace avx512 {
PM_ATTENTION_FUNCTIONS
}
namespace avx2 {
PM_ATTENTION_FUNCTIONS
}
namespace portable {
PM_ATTENTION_FUNCTIONS
}
#undef PM_ATTENTION_FUNCTIONS

}  // namespace pm
