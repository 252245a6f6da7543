// Paged attention with AVX-512 BF16 and VNNI.
//
// The work is cut into (row, head) pairs, which share the K and V of their KV head, and into tiles of 64 keys. For up to six pairs and one tile:
//   scores: 6 pairs x 4 blocks of 16 keys in 24 accumulators; a block's 16 keys are the lanes, two dimensions (bf16) or four (int8) per instruction
//   softmax: online, one update per tile; weights rounded to bf16 and laid out as token pairs
//   output: 6 pairs x 4 vectors of 16 dimensions in 24 accumulators, two tokens per instruction
// Every pair goes through the same operations in the same order for any number of its neighbours; that is what makes results independent of the batch.
#include "attention.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx512vbmi,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#include "vecmath_avx512.h"

namespace pm {
namespace avx512 {
namespace {

constexpr int PAIRS = 6;
constexpr int MAX_AHEAD = 4 * TILE_BLOCKS;
constexpr float NEG_INF = -__builtin_inff();

struct Tile {
  const uint8_t* k[TILE_BLOCKS];
  const uint8_t* v[TILE_BLOCKS];  // bf16 token pairs, as in memory or decoded
  const uint8_t* ahead[MAX_AHEAD];  // fetched ahead: pieces of one line per step, in the order of memory where they lie together
  int num_ahead;
  const float* k_scale[TILE_BLOCKS];  // int8 only
  const float* v_scale[TILE_BLOCKS];
};

// Walks through the pieces to fetch ahead, as many lines per step as there are pieces: memory likes to be read in one direction. Into L2, because L1's few
// miss buffers would stall the dot products.
struct Fetch {
  int piece = 0, line = 0;
  inline void lines(const Tile& t, int steps) {
    for (int i = 0; i < t.num_ahead; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(t.ahead[piece] + 64 * line), _MM_HINT_T1);
      if (++line == steps) line = 0, ++piece;
    }
  }
};

static inline __m512 load_f(const void* p) { return _mm512_loadu_ps(p); }
static inline __m512bh as_bh(__m512i v) { return reinterpret_cast<__m512bh>(v); }
static inline uint32_t load_u32(const void* p) {
  uint32_t v;
  __builtin_memcpy(&v, p, 4);
  return v;
}

// scores[r][64 keys] of R pairs: bf16 dot products as float, or int8 dot products as int32.
template <int R, bool INT8, bool PREFETCH>
static inline void tile_scores(const Tile& t, const uint8_t* q, size_t q_stride, const int32_t* init, int steps, float (*scores)[TILE_KEYS]) {
  const uint8_t *k0 = t.k[0], *k1 = t.k[1], *k2 = t.k[2], *k3 = t.k[3];
  if constexpr (INT8) {
    // vpdpbusd wants one unsigned side: k + 128; init = -128 * sum(q) takes the offset out again.
    const __m512i flip = _mm512_set1_epi8(char(0x80));
    __m512i acc[R][TILE_BLOCKS];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < TILE_BLOCKS; ++b) acc[r][b] = _mm512_set1_epi32(init[r]);
    Fetch fetch;
    for (int s = 0; s < steps; ++s) {
      __m512i k[TILE_BLOCKS] = {_mm512_xor_si512(_mm512_loadu_si512(k0 + 64 * s), flip), _mm512_xor_si512(_mm512_loadu_si512(k1 + 64 * s), flip),
                                _mm512_xor_si512(_mm512_loadu_si512(k2 + 64 * s), flip), _mm512_xor_si512(_mm512_loadu_si512(k3 + 64 * s), flip)};
      if constexpr (PREFETCH) {
        fetch.lines(t, steps);
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m512i x = _mm512_set1_epi32(int(load_u32(q + size_t(r) * q_stride + 4 * size_t(s))));
#pragma GCC unroll 4
        for (int b = 0; b < TILE_BLOCKS; ++b) acc[r][b] = _mm512_dpbusd_epi32(acc[r][b], k[b], x);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < TILE_BLOCKS; ++b) _mm512_storeu_si512(&scores[r][16 * b], acc[r][b]);
  } else {
    __m512 acc[R][TILE_BLOCKS];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < TILE_BLOCKS; ++b) acc[r][b] = _mm512_setzero_ps();
    Fetch fetch;
    for (int s = 0; s < steps; ++s) {
      const __m512bh k[TILE_BLOCKS] = {as_bh(_mm512_loadu_si512(k0 + 64 * s)), as_bh(_mm512_loadu_si512(k1 + 64 * s)),
                                       as_bh(_mm512_loadu_si512(k2 + 64 * s)), as_bh(_mm512_loadu_si512(k3 + 64 * s))};
      if constexpr (PREFETCH) {
        fetch.lines(t, steps);
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m512bh x = as_bh(_mm512_set1_epi32(int(load_u32(q + size_t(r) * q_stride + 4 * size_t(s)))));
#pragma GCC unroll 4
        for (int b = 0; b < TILE_BLOCKS; ++b) acc[r][b] = _mm512_dpbf16_ps(acc[r][b], k[b], x);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < TILE_BLOCKS; ++b) _mm512_storeu_ps(&scores[r][16 * b], acc[r][b]);
  }
}

// One online-softmax update of one pair: scores become weights (bf16 token pairs); returns the factor for what was accumulated before.
// Lanes at or beyond `live` are put to -inf, whatever they hold.
template <bool INT8>
static inline float tile_softmax(const Tile& t, const float* scores, int live, float c, float* max, float* sums, uint32_t* weights) {
  const __m512 lowest = _mm512_set1_ps(NEG_INF);
  __m512 s[TILE_BLOCKS];
  __mmask64 lanes = live >= TILE_KEYS ? ~0ull : (1ull << live) - 1;
#pragma GCC unroll 4
  for (int b = 0; b < TILE_BLOCKS; ++b) {
    s[b] = load_f(scores + 16 * b);
    if constexpr (INT8) s[b] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(s[b])), load_f(t.k_scale[b]));
  }
  if (live < TILE_KEYS) {
#pragma GCC unroll 4
    for (int b = 0; b < TILE_BLOCKS; ++b) s[b] = _mm512_mask_blend_ps(__mmask16(lanes >> (16 * b)), lowest, s[b]);
  }
  const __m512 highest = _mm512_max_ps(_mm512_max_ps(s[0], s[1]), _mm512_max_ps(s[2], s[3]));
  float alpha = 1.0f;
  if (_mm512_cmp_ps_mask(highest, _mm512_set1_ps(*max), _CMP_GT_OQ)) {  // seldom after the first tiles
    const float now = _mm512_reduce_max_ps(highest);
    alpha = _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps((*max - now) * c)));
    *max = now;
  }
  // All scores -inf so far: weights of 0 rather than NaN.
  const __m512 reference = _mm512_set1_ps(*max == NEG_INF ? 0.0f : *max * c);
  const __m512 factor = _mm512_set1_ps(c);
  __m512 p[TILE_BLOCKS];
#pragma GCC unroll 4
  for (int b = 0; b < TILE_BLOCKS; ++b) p[b] = exp2_ps(_mm512_fmsub_ps(s[b], factor, reference));
  const __m512 total = _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
  _mm512_store_ps(sums, _mm512_fmadd_ps(_mm512_load_ps(sums), _mm512_set1_ps(alpha), total));
  if constexpr (INT8) {
#pragma GCC unroll 4
    for (int b = 0; b < TILE_BLOCKS; ++b) p[b] = _mm512_maskz_mul_ps(__mmask16(lanes >> (16 * b)), p[b], load_f(t.v_scale[b]));
  }
  _mm512_storeu_si512(weights, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(p[1], p[0])));
  _mm512_storeu_si512(weights + 16, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(p[3], p[2])));
  return alpha;
}

// out[r][16 * NV dimensions] = out * alpha[r] + weights[r] . V, for live[r] tokens (ascending in r). The last vector has `last` lanes.
template <int R, int NV, bool MASKED>
static inline void tile_output(const uint8_t* const* v, int head_dim, int dim0, __mmask16 last, const uint32_t (*weights)[TILE_KEYS / 2], const int* live,
                               const float* alpha, float* out) {
  __m512 acc[R][NV];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const float* from = out + size_t(r) * size_t(head_dim) + dim0 + 16 * j;
      const __m512 old = MASKED && j == NV - 1 ? _mm512_maskz_loadu_ps(last, from) : _mm512_loadu_ps(from);
      acc[r][j] = _mm512_mul_ps(old, _mm512_set1_ps(alpha[r]));
    }
  const size_t stride = size_t(head_dim) * 4;
  const size_t offset = size_t(dim0) * 4;
  const int common = live[0] / 2;  // token pairs that all R rows see
  auto value = [&](const uint8_t* base, int j) {
    return MASKED && j == NV - 1 ? _mm512_maskz_loadu_epi32(last, base + 64 * j) : _mm512_loadu_si512(base + 64 * j);
  };
  for (int b = 0; b * 8 < common; ++b) {
    const uint8_t* base = v[b] + offset;
    const int end = common - b * 8 < 8 ? common - b * 8 : 8;
    for (int pair = 0; pair < end; ++pair, base += stride) {
      __m512bh x[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) x[j] = as_bh(value(base, j));
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m512bh w = as_bh(_mm512_set1_epi32(int(weights[r][b * 8 + pair])));
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[r][j] = _mm512_dpbf16_ps(acc[r][j], x[j], w);
      }
    }
  }
  // The rest differs by row. Tokens beyond a row's reach never enter, not even with weight 0: they may be NaN.
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    if (live[r] > 2 * common) {
      for (int pair = common; 2 * pair < live[r]; ++pair) {
        const uint8_t* base = v[pair / 8] + offset + size_t(pair % 8) * stride;
        const __m512i keep = _mm512_set1_epi32(2 * pair + 1 < live[r] ? -1 : 0xFFFF);
        const __m512bh w = as_bh(_mm512_set1_epi32(int(weights[r][pair])));
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[r][j] = _mm512_dpbf16_ps(acc[r][j], as_bh(_mm512_and_si512(value(base, j), keep)), w);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      float* to = out + size_t(r) * size_t(head_dim) + dim0 + 16 * j;
      if (MASKED && j == NV - 1)
        _mm512_mask_storeu_ps(to, last, acc[r][j]);
      else
        _mm512_storeu_ps(to, acc[r][j]);
    }
}

struct Pairs {  // R consecutive (row, head) pairs
  const uint8_t* q;
  size_t q_stride;
  const int32_t* init;
  const float* c;
  float* max;
  float* sums;
  float* out;
};

template <int R, bool INT8, bool PREFETCH>
static void tile_step(const Tile& t, const Pairs& p, const int* live, int head_dim, int steps) {
  alignas(64) float scores[R][TILE_KEYS];
  alignas(64) uint32_t weights[R][TILE_KEYS / 2];
  float alpha[R];
  tile_scores<R, INT8, PREFETCH>(t, p.q, p.q_stride, p.init, steps, scores);
#pragma GCC unroll 1
  for (int r = 0; r < R; ++r)
    alpha[r] = live[r] > 0 ? tile_softmax<INT8>(t, scores[r], live[r], p.c[r], p.max + r, p.sums + 16 * r, weights[r]) : 1.0f;
  int d = 0;
  for (; d + 64 <= head_dim; d += 64) tile_output<R, 4, false>(t.v, head_dim, d, 0xFFFF, weights, live, alpha, p.out);
  const int rest = head_dim - d;
  if (rest == 0) return;
  const __mmask16 last = rest % 16 ? __mmask16((1u << (rest % 16)) - 1) : __mmask16(0xFFFF);
  switch ((rest + 15) / 16) {
    case 1: tile_output<R, 1, true>(t.v, head_dim, d, last, weights, live, alpha, p.out); break;
    case 2: tile_output<R, 2, true>(t.v, head_dim, d, last, weights, live, alpha, p.out); break;
    case 3: tile_output<R, 3, true>(t.v, head_dim, d, last, weights, live, alpha, p.out); break;
    default: tile_output<R, 4, true>(t.v, head_dim, d, last, weights, live, alpha, p.out); break;
  }
}

using Step = void (*)(const Tile&, const Pairs&, const int*, int, int);
template <bool INT8, bool PREFETCH>
static Step step_for(int r) {
  static constexpr Step steps[PAIRS] = {tile_step<1, INT8, PREFETCH>, tile_step<2, INT8, PREFETCH>, tile_step<3, INT8, PREFETCH>,
                                        tile_step<4, INT8, PREFETCH>, tile_step<5, INT8, PREFETCH>, tile_step<6, INT8, PREFETCH>};
  return steps[r - 1];
}

// int8 V of a block becomes bf16 token pairs; 127 fits bf16 exactly, so cutting the float's lower half loses nothing.
static void decode_v(const int8_t* v, int head_dim, int tokens, uint8_t* out) {
  const __m128i zero = _mm_setzero_si128();
  for (int t = 0; t < tokens; t += 2)
    for (int d = 0; d < head_dim; d += 16) {
      const __mmask16 lanes = head_dim - d >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (head_dim - d)) - 1);
      const __m128i a = _mm_maskz_loadu_epi8(lanes, v + t * head_dim + d);
      const __m128i b = t + 1 < tokens ? _mm_maskz_loadu_epi8(lanes, v + (t + 1) * head_dim + d) : zero;
      const __m512i even = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(a)));
      const __m512i odd = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b)));
      _mm512_mask_storeu_epi32(out + (size_t(t / 2) * size_t(head_dim) + size_t(d)) * 4, lanes, _mm512_or_si512(odd, _mm512_srli_epi32(even, 16)));
    }
}

static void query_bf16(const float* q, int head_dim, uint8_t* out) {
  for (int d = 0; d < head_dim; d += 16) {
    const __mmask16 lanes = head_dim - d >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (head_dim - d)) - 1);
    const __m256bh x = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, q + d));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2 * d), reinterpret_cast<__m256i>(x));
  }
}

// Symmetric int8 of D floats; returns the scale (NaN, and zeros, when a value is not finite).
static float quantize(const float* x, int n, int8_t* out) {
  __m512 top = _mm512_setzero_ps();
  __mmask16 bad = 0;
  for (int d = 0; d < n; d += 16) {
    const __mmask16 lanes = n - d >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (n - d)) - 1);
    const __m512 v = _mm512_abs_ps(_mm512_maskz_loadu_ps(lanes, x + d));
    bad |= _mm512_cmp_ps_mask(v, _mm512_set1_ps(__builtin_inff()), _CMP_NLT_UQ);
    top = _mm512_max_ps(top, v);
  }
  const float highest = _mm512_reduce_max_ps(top);
  const __m512 inverse = _mm512_set1_ps(highest < 1e-30f ? 0.0f : 127.0f / highest);  // next to nothing is nothing: its inverse would overflow
  for (int d = 0; d < n; d += 16) {
    const __mmask16 lanes = n - d >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (n - d)) - 1);
    const __m512i q = bad ? _mm512_setzero_si512() : _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + d), inverse));
    _mm_mask_storeu_epi8(out + d, lanes, _mm512_cvtsepi32_epi8(q));
  }
  return bad ? __builtin_nanf("") : highest / 127.0f;
}

}  // namespace

void kv_append(const KvMemory& kv, int layer, int kv_head, int block, int offset, const float* k, const float* v) {
  const int dim = kv.head_dim;
  uint8_t* kp = kv.k_part(block, layer) + size_t(kv_head) * head_bytes(kv);
  uint8_t* vp = kv.v_part(block, layer) + size_t(kv_head) * head_bytes(kv);
  if (kv.type == KvType::INT8) {
    // One scale for the head, so it is quantised as a whole, by way of the place for V, which is overwritten next.
    int8_t* q = reinterpret_cast<int8_t*>(vp + 64) + size_t(offset) * size_t(dim);
    reinterpret_cast<float*>(kp)[offset] = quantize(k, dim, q);
    for (int d = 0; d < dim; d += 4) {
      uint32_t four = 0;
      __builtin_memcpy(&four, q + d, size_t(dim - d < 4 ? dim - d : 4));
      __builtin_memcpy(kp + 64 + size_t(d) * BLOCK_TOKENS + size_t(offset) * 4, &four, 4);
    }
    reinterpret_cast<float*>(vp)[offset] = quantize(v, dim, reinterpret_cast<int8_t*>(vp + 64) + size_t(offset) * size_t(dim));
    return;
  }
  // V of a token shares words with its neighbour's, which another thread may be writing: halves are stored under a mask, never read.
  const __mmask32 half = offset % 2 ? 0xAAAAAAAAu : 0x55555555u;
  uint8_t* row = vp + size_t(offset / 2) * size_t(dim) * 4;
  for (int d = 0; d < dim; d += 16) {
    const int n = dim - d < 16 ? dim - d : 16;
    const __mmask16 lanes = __mmask16((1u << n) - 1);
    alignas(32) uint32_t pairs[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, k + d))));
    for (int i = 0; i < n / 2; ++i) __builtin_memcpy(kp + (size_t(d / 2 + i) * BLOCK_TOKENS + size_t(offset)) * 4, pairs + i, 4);
    __m512i x = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, v + d))));
    x = _mm512_or_si512(x, _mm512_slli_epi32(x, 16));
    const __mmask32 present = n == 16 ? ~0u : (1u << (2 * n)) - 1;
    _mm512_mask_storeu_epi16(row + size_t(d) * 4, half & present, x);
  }
}

void attention_split(const KvMemory& kv, int layer, int kv_head, int num_kv_heads, int group, const SequenceRows& seq, int row0, int row1, int split,
                     const float* q, size_t ldq, float scale, float* max, float* sum, float* out, size_t head_stride, void* scratch) {
  const int dim = kv.head_dim;
  const bool int8 = kv.type == KvType::INT8;
  const int pairs = (row1 - row0) * group;  // of one KV head
  if (pairs <= 0) return;
  const AttentionScratch mem = attention_scratch(scratch, pairs * num_kv_heads, dim);
  const size_t q_stride = size_t(round_up(dim, 16)) * (int8 ? 1 : 2);

  for (int h = 0; h < num_kv_heads; ++h)
    for (int i = 0; i < pairs; ++i) {
      const float* head = q + size_t(seq.first_row + row0 + i / group) * ldq + size_t(h * group + i % group) * size_t(dim);
      const int at = h * pairs + i;
      uint8_t* to = mem.q + size_t(at) * q_stride;
      float unit = 1.0f;
      mem.init[at] = 0;
      if (int8) {
        unit = quantize(head, dim, reinterpret_cast<int8_t*>(to));
        for (int d = dim; d % 4; ++d) to[d] = 0;
        int total = 0;
        for (int d = 0; d < dim; ++d) total += reinterpret_cast<int8_t*>(to)[d];
        mem.init[at] = -128 * total;
      } else {
        query_bf16(head, dim, to);
      }
      mem.scale[at] = unit * scale * LOG2E_F;
      mem.max[at] = NEG_INF;
      _mm512_store_ps(mem.sums + 16 * size_t(at), _mm512_setzero_ps());
      float* zero = out + (size_t(h) * head_stride + size_t(i)) * size_t(dim);
      for (int d = 0; d < dim; ++d) zero[d] = 0.0f;
    }

  const int begin = split * SPLIT_KEYS;
  const int reach = seq.position + row1;  // keys of the last row
  const int end = reach < begin + SPLIT_KEYS ? reach : begin + SPLIT_KEYS;
  const int steps = int8 ? (dim + 3) / 4 : dim / 2;
  const size_t per_head = head_bytes(kv), values = int8 ? 64 : 0;
  for (int key0 = begin; key0 < end; key0 += TILE_KEYS)
    for (int h = 0; h < num_kv_heads; ++h) {
      const size_t head = size_t(kv_head + h) * per_head;
      Tile t;
      const int blocks = (end - key0 + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
      for (int b = 0; b < TILE_BLOCKS; ++b) {
        // A block beyond the end stands for nothing (its lanes are masked) but must be readable.
        const int at = key0 / BLOCK_TOKENS + (b < blocks ? b : 0);
        const uint8_t* kb = kv.k_part(seq.blocks[at], layer) + head;
        const uint8_t* vb = kv.v_part(seq.blocks[at], layer) + head;
        t.k_scale[b] = reinterpret_cast<const float*>(kb);
        t.v_scale[b] = reinterpret_cast<const float*>(vb);
        t.k[b] = kb + values;
        t.v[b] = vb;
      }
      // The next tile of this head, and at the start this tile of the next head.
      t.num_ahead = 0;
      for (int part = key0 == begin && h + 1 < num_kv_heads ? 0 : 1; part < 2; ++part)
        for (int b = part * TILE_BLOCKS; b < (part + 1) * TILE_BLOCKS && b < blocks; ++b) {
          const int block = seq.blocks[key0 / BLOCK_TOKENS + b];
          const size_t offset = head + (part == 0 ? per_head : 0) + values;
          t.ahead[t.num_ahead++] = kv.k_part(block, layer) + offset;
          t.ahead[t.num_ahead++] = kv.v_part(block, layer) + offset;
        }
      if (int8)
        for (int b = 0; b < TILE_BLOCKS && b < blocks; ++b) {
          const int tokens = end - key0 - b * BLOCK_TOKENS < BLOCK_TOKENS ? end - key0 - b * BLOCK_TOKENS : BLOCK_TOKENS;
          uint8_t* to = mem.v + size_t(b) * 8 * size_t(dim) * 4;
          decode_v(reinterpret_cast<const int8_t*>(t.v[b] + 64), dim, tokens, to);
          t.v[b] = to;
        }
      // Rows below the tile see nothing of it.
      int first = key0 - seq.position - row0;
      if (first < 0) first = 0;
      bool prefetch = t.num_ahead > 0;
      for (int i = first * group; i < pairs;) {
        const int n = pairs - i < PAIRS ? pairs - i : PAIRS;
        int live[PAIRS];
        for (int r = 0; r < n; ++r) {
          const int left = seq.position + row0 + (i + r) / group + 1 - key0;
          live[r] = left < TILE_KEYS ? left : TILE_KEYS;
        }
        const size_t at = size_t(h * pairs + i);
        const Pairs p{mem.q + at * q_stride, q_stride, mem.init + at, mem.scale + at, mem.max + at, mem.sums + 16 * at,
                      out + (size_t(h) * head_stride + size_t(i)) * size_t(dim)};
        const Step step = int8 ? (prefetch ? step_for<true, true>(n) : step_for<true, false>(n)) : (prefetch ? step_for<false, true>(n) : step_for<false, false>(n));
        step(t, p, live, dim, steps);
        prefetch = false;
        i += n;
      }
    }
  for (int h = 0; h < num_kv_heads; ++h)
    for (int i = 0; i < pairs; ++i) {
      const size_t from = size_t(h * pairs + i), to = size_t(h) * head_stride + size_t(i);
      sum[to] = _mm512_reduce_add_ps(_mm512_load_ps(mem.sums + 16 * from));
      // A NaN score never becomes the maximum; merging has to learn of it all the same.
      max[to] = sum[to] != sum[to] ? sum[to] : mem.max[from] == NEG_INF ? NEG_INF : mem.max[from] * (mem.scale[from] * 0.6931471805599453f);
    }
}

void attention_merge(float* acc_max, float* acc_sum, float* acc_out, const float* max, const float* sum, const float* out, int n, int head_dim) {
  for (int i = 0; i < n; ++i, acc_out += head_dim, out += head_dim) {
    if (max[i] == NEG_INF) continue;
    float a = 0.0f, b = 1.0f;
    const bool copy = acc_max[i] == NEG_INF;  // what was there may be unset
    if (copy) {
      acc_max[i] = max[i];
      acc_sum[i] = sum[i];
    } else {
      const float top = acc_max[i] > max[i] ? acc_max[i] : max[i];
      a = _mm512_cvtss_f32(exp_ps(_mm512_set1_ps(acc_max[i] - top)));
      b = _mm512_cvtss_f32(exp_ps(_mm512_set1_ps(max[i] - top)));
      acc_max[i] = top;
      acc_sum[i] = acc_sum[i] * a + sum[i] * b;
    }
    for (int d = 0; d < head_dim; d += 16) {
      const __mmask16 lanes = head_dim - d >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (head_dim - d)) - 1);
      __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, out + d), _mm512_set1_ps(b));
      if (!copy) x = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes, acc_out + d), _mm512_set1_ps(a), x);
      _mm512_mask_storeu_ps(acc_out + d, lanes, x);
    }
  }
}

void attention_finish(const float* acc_sum, const float* acc_out, int head_dim, float* out) {
  const __m512 sum = _mm512_set1_ps(*acc_sum);
  for (int d = 0; d < head_dim; d += 16) {
    const __mmask16 lanes = head_dim - d >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (head_dim - d)) - 1);
    _mm512_mask_storeu_ps(out + d, lanes, _mm512_maskz_div_ps(lanes, _mm512_maskz_loadu_ps(lanes, acc_out + d), sum));
  }
}

}  // namespace avx512
}  // namespace pm
#pragma GCC pop_options
#endif
