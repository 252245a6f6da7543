// KV4: four-bit keys and values with a scale and an offset in half precision per token and head; attention reads the codes (QServe, section 5.3).
//
// A block of 16 tokens is (layers, 2, kv_heads) units of 8 * D + 64 bytes: codes, 16 scales, 16 offsets (half precision); x = code * scale + offset.
// Byte (i, t) of a key unit has channel i of token t in the low nibble and channel i + D / 2 in the high one, i below D / 2: one load has 16 tokens, which
// are the lanes of the score. Values are the other way round, (t, i): lanes are channels.
//
// A row's sums are taken block by block in one order, whichever rows share its tile, so chunks and company change no bit.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && !defined(QSERVE_PORTABLE)
#define QSERVE_AVX512 1
#include <immintrin.h>
#endif

namespace {

constexpr int TOKENS = 16;
constexpr int TILE = 8;  // rows of one sequence that read a block together

// As plugmesh_qserve.kv4 fills it; every field is 8 bytes.
struct Plan {
  uint8_t* memory;
  int64_t layers, heads, kv_heads, dim;
  const int32_t* positions;  // of every row
  const int64_t* tables;     // of every row: where the blocks of its sequence begin in `blocks`
  const int32_t* blocks;
  const int32_t* tiles;      // first row and number of rows, of one sequence and consecutive
  int64_t num_tiles;
};

int64_t unit_bytes(const Plan& p) { return p.dim * TOKENS / 2 + 4 * TOKENS; }

uint8_t* unit(const Plan& p, int64_t block, int64_t layer, int kind, int64_t head) {
  return p.memory + (((block * p.layers + layer) * 2 + kind) * p.kv_heads + head) * unit_bytes(p);
}

// Half precision by hand where the compiler has no _Float16; rounds to nearest even, as numpy does.
uint16_t to_half(float x) {
#if defined(__F16C__)
  return uint16_t(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), 0), 0));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return uint16_t(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // denormal: a multiple of 2^-24
    float absolute;
    std::memcpy(&absolute, &magnitude, 4);
    return uint16_t(sign | uint32_t(std::nearbyintf(absolute * 16777216.0f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
  return uint16_t(sign | (rounded - 0x38000000u) >> 13);
#endif
}

float from_half(uint16_t h) {
#if defined(__F16C__)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
#else
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ffu;
  float value;
  if (exponent == 0) {
    value = float(fraction) / 16777216.0f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

// One token of one head. The codes are chosen for the scale and offset as they are stored, rounding included.
void store(const float* x, int dim, int token, bool is_key, uint8_t* to) {
  // Sixteen of each at a time: a comparison lane by lane becomes a vector's, a minimum over all lanes would not.
  float lows[16], highs[16];
  uint32_t magnitudes[16] = {};
  for (int j = 0; j < 16; ++j) lows[j] = highs[j] = x[0];
  for (int i = 0; i < dim; i += 16)
    for (int j = 0; j < std::min(16, dim - i); ++j) {
      const float value = x[i + j];
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      bits &= 0x7fffffffu;
      magnitudes[j] = bits > magnitudes[j] ? bits : magnitudes[j];
      lows[j] = value < lows[j] ? value : lows[j];
      highs[j] = value > highs[j] ? value : highs[j];
    }
  float low = lows[0], high = highs[0];
  bool finite = true;
  for (int j = 0; j < 16; ++j) {
    low = lows[j] < low ? lows[j] : low;
    high = highs[j] > high ? highs[j] : high;
    finite &= magnitudes[j] < 0x7f800000u;
  }
  low += 0.0f;  // one zero, whichever sign came first
  const float limit = 65504.0f;
  const uint16_t scale = finite ? to_half(std::min(limit, (high - low) / 15.0f)) : 0x7e00;
  const uint16_t offset = finite ? to_half(std::max(-limit, std::min(limit, low))) : 0x7e00;
  uint8_t* scales = to + dim * TOKENS / 2;
  std::memcpy(scales + 2 * token, &scale, 2);
  std::memcpy(scales + 2 * TOKENS + 2 * token, &offset, 2);
  const float s = from_half(scale), o = from_half(offset);
  const int half = dim / 2;
  const float divisor = s > 0.0f ? s : 1.0f, top = s > 0.0f ? 15.0f : 0.0f;  // NaN is not above zero
  thread_local std::vector<uint8_t> codes;
  codes.resize(dim);
  for (int i = 0; i < dim; ++i) {
    float code = std::nearbyintf((x[i] - o) / divisor);
    code = code > 0.0f ? code : 0.0f;  // NaN too
    codes[i] = uint8_t(int(code < top ? code : top));
  }
  for (int i = 0; i < half; ++i) {
    const uint8_t both = uint8_t(codes[i] | codes[i + half] << 4);
    if (is_key) to[i * TOKENS + token] = both;
    else to[token * half + i] = both;
  }
}

// What a tile keeps while it goes over the blocks.
struct Scratch {
  std::vector<float> keys, values;             // codes of one block as floats: (dim, 16) and (16, dim)
  std::vector<float> sums, weights, offsets;   // per query: (dim), (16) and the share of the offsets
  std::vector<float> highest, total, query_sums;
};
thread_local Scratch scratch;

#if QSERVE_AVX512

// e^x for x <= 0; 0 below -87.
__m512 exp_of(__m512 x) {
  const __mmask16 gone = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), gone, _mm512_setzero_ps());
}

// 16 bytes to 32 floats: a table of the numbers 0 to 15 is indexed by the low four bits of each lane, so nothing is masked.
void expand(const uint8_t* bytes, float* low, float* high) {
  const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  _mm512_storeu_ps(low, _mm512_permutexvar_ps(both, numbers));
  _mm512_storeu_ps(high, _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), numbers));
}

void expand_keys(const uint8_t* from, int dim, float* to) {
  for (int i = 0; i < dim / 2; ++i) expand(from + i * TOKENS, to + i * TOKENS, to + (i + dim / 2) * TOKENS);
}

void expand_values(const uint8_t* from, int dim, float* to) {
  const int half = dim / 2;
  for (int t = 0; t < TOKENS; ++t)
    for (int i = 0; i < half; i += 16) expand(from + t * half + i, to + t * dim + i, to + t * dim + half + i);
}

template <int N>
void dots(const float* const* q, const float* keys, int dim, float* to) {
  __m512 sums[N];
  for (int n = 0; n < N; ++n) sums[n] = _mm512_setzero_ps();
  for (int i = 0; i < dim; ++i) {
    const __m512 k = _mm512_loadu_ps(keys + i * TOKENS);
    for (int n = 0; n < N; ++n) sums[n] = _mm512_fmadd_ps(_mm512_set1_ps(q[n][i]), k, sums[n]);
  }
  for (int n = 0; n < N; ++n) _mm512_storeu_ps(to + n * TOKENS, sums[n]);
}

// Scores of one query over one block become weights; what was summed before is scaled to the new maximum.
void soften(int query, int dim, int valid, float scale, const uint8_t* key_scales, const uint8_t* value_scales) {
  Scratch& s = scratch;
  const auto half = [](const uint8_t* at) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))); };
  float* weights = s.weights.data() + query * TOKENS;
  const __mmask16 lanes = valid >= TOKENS ? 0xFFFF : __mmask16((1u << valid) - 1);
  __m512 scores = _mm512_mul_ps(half(key_scales + 2 * TOKENS), _mm512_set1_ps(s.query_sums[query]));
  scores = _mm512_mul_ps(_mm512_fmadd_ps(half(key_scales), _mm512_loadu_ps(weights), scores), _mm512_set1_ps(scale));
  const bool broken = _mm512_mask_cmp_ps_mask(lanes, scores, scores, _CMP_UNORD_Q) != 0;
  const float highest = broken ? NAN : std::max(s.highest[query], _mm512_mask_reduce_max_ps(lanes, scores));
  const __m512 p = _mm512_maskz_mov_ps(lanes, exp_of(_mm512_sub_ps(scores, _mm512_set1_ps(highest))));
  const __m512 value_offsets = _mm512_maskz_mov_ps(lanes, half(value_scales + 2 * TOKENS));
  const __m512 scaled = _mm512_maskz_mul_ps(lanes, p, half(value_scales));
  if (highest != s.highest[query]) {
    const float factor = std::exp(s.highest[query] - highest);
    float* sums = s.sums.data() + query * dim;
    for (int i = 0; i < dim; i += 16) _mm512_storeu_ps(sums + i, _mm512_mul_ps(_mm512_loadu_ps(sums + i), _mm512_set1_ps(factor)));
    s.total[query] *= factor;
    s.offsets[query] *= factor;
    s.highest[query] = highest;
  }
  s.total[query] += _mm512_reduce_add_ps(p);
  s.offsets[query] += _mm512_reduce_add_ps(_mm512_mul_ps(p, value_offsets));
  _mm512_storeu_ps(weights, scaled);
}

template <int N>
void mix(int query, const float* values, int dim, int valid) {
  float* sums = scratch.sums.data() + query * dim;
  const float* weights = scratch.weights.data() + query * TOKENS;
  for (int i = 0; i < dim; i += 32) {
    __m512 a[N], b[N];
    for (int n = 0; n < N; ++n) {
      a[n] = _mm512_loadu_ps(sums + n * dim + i);
      b[n] = _mm512_loadu_ps(sums + n * dim + i + 16);
    }
    for (int t = 0; t < valid; ++t) {
      const __m512 v = _mm512_loadu_ps(values + t * dim + i), w = _mm512_loadu_ps(values + t * dim + i + 16);
      for (int n = 0; n < N; ++n) {
        const __m512 weight = _mm512_set1_ps(weights[n * TOKENS + t]);
        a[n] = _mm512_fmadd_ps(weight, v, a[n]);
        b[n] = _mm512_fmadd_ps(weight, w, b[n]);
      }
    }
    for (int n = 0; n < N; ++n) {
      _mm512_storeu_ps(sums + n * dim + i, a[n]);
      _mm512_storeu_ps(sums + n * dim + i + 16, b[n]);
    }
  }
}

constexpr int WIDTH = 32;  // dim must be a multiple

#else

void expand_keys(const uint8_t* from, int dim, float* to) {
  for (int i = 0; i < dim / 2 * TOKENS; ++i) {
    to[i] = float(from[i] & 15);
    to[i + dim / 2 * TOKENS] = float(from[i] >> 4);
  }
}

void expand_values(const uint8_t* from, int dim, float* to) {
  const int half = dim / 2;
  for (int t = 0; t < TOKENS; ++t)
    for (int i = 0; i < half; ++i) {
      to[t * dim + i] = float(from[t * half + i] & 15);
      to[t * dim + half + i] = float(from[t * half + i] >> 4);
    }
}

template <int N>
void dots(const float* const* q, const float* keys, int dim, float* to) {
  std::memset(to, 0, sizeof(float) * N * TOKENS);
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < dim; ++i)
      for (int t = 0; t < TOKENS; ++t) to[n * TOKENS + t] += q[n][i] * keys[i * TOKENS + t];
}

void soften(int query, int dim, int valid, float scale, const uint8_t* key_scales, const uint8_t* value_scales) {
  Scratch& s = scratch;
  float* weights = s.weights.data() + query * TOKENS;
  const auto half = [](const uint8_t* at, int i) {
    uint16_t h;
    std::memcpy(&h, at + 2 * i, 2);
    return from_half(h);
  };
  float highest = s.highest[query];
  for (int t = 0; t < valid; ++t) {
    weights[t] = (half(key_scales, t) * weights[t] + half(key_scales, TOKENS + t) * s.query_sums[query]) * scale;
    highest = weights[t] <= highest ? highest : weights[t];  // a NaN stays
    if (std::isnan(weights[t])) break;
  }
  if (highest != s.highest[query]) {
    const float factor = std::exp(s.highest[query] - highest);
    for (int i = 0; i < dim; ++i) s.sums[query * dim + i] *= factor;
    s.total[query] *= factor;
    s.offsets[query] *= factor;
    s.highest[query] = highest;
  }
  for (int t = 0; t < valid; ++t) {
    const float p = std::exp(weights[t] - highest);
    s.total[query] += p;
    s.offsets[query] += p * half(value_scales, TOKENS + t);
    weights[t] = p * half(value_scales, t);
  }
}

template <int N>
void mix(int query, const float* values, int dim, int valid) {
  for (int n = 0; n < N; ++n)
    for (int t = 0; t < valid; ++t)
      for (int i = 0; i < dim; ++i)
        scratch.sums[(query + n) * dim + i] += scratch.weights[(query + n) * TOKENS + t] * values[t * dim + i];
}

constexpr int WIDTH = 2;

#endif

// All query heads of one KV head, for a tile's rows.
void attend(const Plan& p, int layer, int first, int num, int kv_head, const float* q, float* out) {
  Scratch& s = scratch;
  const int dim = int(p.dim), per = int(p.heads / p.kv_heads), num_queries = num * per;
  const int32_t* blocks = p.blocks + p.tables[first];
  const float scale = 1.0f / std::sqrt(float(dim));
  s.keys.resize(dim * TOKENS);
  s.values.resize(dim * TOKENS);
  s.sums.assign(num_queries * dim, 0.0f);
  s.weights.resize(num_queries * TOKENS);
  s.offsets.assign(num_queries, 0.0f);
  s.total.assign(num_queries, 0.0f);
  s.highest.assign(num_queries, -INFINITY);
  s.query_sums.resize(num_queries);
  const auto query_of = [&](int i) { return q + (int64_t(first + i / per) * p.heads + kv_head * per + i % per) * dim; };
  for (int i = 0; i < num_queries; ++i) {
    float sum = 0.0f;
    for (int c = 0; c < dim; ++c) sum += query_of(i)[c];
    s.query_sums[i] = sum;
  }
  const int last = p.positions[first + num - 1] / TOKENS;
  for (int b = 0; b <= last; ++b) {
    const uint8_t* keys = unit(p, blocks[b], layer, 0, kv_head);
    const uint8_t* values = unit(p, blocks[b], layer, 1, kv_head);
    expand_keys(keys, dim, s.keys.data());
    expand_values(values, dim, s.values.data());
    for (int at = 0; at < num_queries;) {
      const int valid = std::min(TOKENS, p.positions[first + at / per] + 1 - b * TOKENS);
      if (valid <= 0) {
        ++at;
        continue;
      }
      // Queries of one length go together, four or one at a time.
      int n = 1;
      while (n < 4 && at + n < num_queries && std::min(TOKENS, p.positions[first + (at + n) / per] + 1 - b * TOKENS) == valid) ++n;
      const float* pointers[4];
      for (int i = 0; i < n; ++i) pointers[i] = query_of(at + i);
      float* scores = s.weights.data() + at * TOKENS;
      if (n == 4) dots<4>(pointers, s.keys.data(), dim, scores);
      if (n == 3) dots<3>(pointers, s.keys.data(), dim, scores);
      if (n == 2) dots<2>(pointers, s.keys.data(), dim, scores);
      if (n == 1) dots<1>(pointers, s.keys.data(), dim, scores);
      for (int i = 0; i < n; ++i) soften(at + i, dim, valid, scale, keys + dim * TOKENS / 2, values + dim * TOKENS / 2);
      if (n == 4) mix<4>(at, s.values.data(), dim, valid);
      if (n == 3) mix<3>(at, s.values.data(), dim, valid);
      if (n == 2) mix<2>(at, s.values.data(), dim, valid);
      if (n == 1) mix<1>(at, s.values.data(), dim, valid);
      at += n;
    }
  }
  for (int i = 0; i < num_queries; ++i) {
    float* to = out + (int64_t(first + i / per) * p.heads + kv_head * per + i % per) * dim;
    for (int c = 0; c < dim; ++c) to[c] = (s.sums[i * dim + c] + s.offsets[i]) / s.total[i];
  }
}

}  // namespace

// "plugmesh.attention.v2"
extern "C" void qserve_attention(void* context, int layer, const float* q, const float* k, const float* v, int t, float* out, int thread, int num_threads,
                                 void (*barrier)(void*), void* barrier_context) {
  const Plan& p = *static_cast<const Plan*>(context);
  const int kv_heads = int(p.kv_heads), dim = int(p.dim);
  for (int r = int(int64_t(t) * thread / num_threads); r < int(int64_t(t) * (thread + 1) / num_threads); ++r) {
    const int position = p.positions[r], block = p.blocks[p.tables[r] + position / TOKENS];
    for (int h = 0; h < kv_heads; ++h) {
      const int64_t at = (int64_t(r) * kv_heads + h) * dim;
      store(k + at, dim, position % TOKENS, true, unit(p, block, layer, 0, h));
      store(v + at, dim, position % TOKENS, false, unit(p, block, layer, 1, h));
    }
  }
  if (barrier) barrier(barrier_context);  // others' rows are read from here on
  // The last tiles of a prompt cost the most, so threads take turns.
  for (int64_t u = thread; u < p.num_tiles * kv_heads; u += num_threads) {
    const int32_t* tile = p.tiles + u / kv_heads * 2;
    attend(p, layer, tile[0], tile[1], int(u % kv_heads), q, out);
  }
}

// Head widths must be multiples of this; rows of one tile are at most `qserve_tile`.
extern "C" int qserve_width() { return WIDTH; }
extern "C" int qserve_tile() { return TILE; }
