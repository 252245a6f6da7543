// Linear kernels for AVX-512 with VNNI and BF16 (Zen 4 and later, Sapphire Rapids).
//
// Integer weights: for more than 4 tokens the 16 vectors of a piece (64 K of 16 rows) are unpacked into registers once and all tokens of a tile pass by them;
// the float accumulators lie in L1. So there is no token tile in registers, no remainder of one, and nothing unpacked is ever written. Per piece and token
// 16 vpdpbusd and 5 (Q8_0: 3) multiplications use the two multiplying pipes, everything else runs beside them.
// For few tokens, where memory is the limit, the accumulators stay in registers and the weights are unpacked on the fly.
//
// This file must not use standard library templates (see linear_common.h).
#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx512vbmi,avx2,fma,f16c,bmi,bmi2")
// GCC's headers leave the destination of unmasked intrinsics undefined on purpose, and GCC warns of it in our name (bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "linear_common.h"

namespace pm {
namespace {

#define PM_INLINE inline __attribute__((always_inline))

// A row block range whose weights stay in L2 while the token tiles pass.
constexpr size_t CHUNK_BYTES = 512 * 1024;
PM_INLINE int blocks_per_chunk(const Weight& w) {
  const size_t bytes = w.row_block_bytes();  // 0 for a weight without columns
  return bytes ? static_cast<int>(CHUNK_BYTES / bytes) + 1 : w.row_blocks();
}

PM_INLINE __m512 load_f16(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
PM_INLINE __m512i load_i(const uint8_t* p) { return _mm512_loadu_si512(p); }

PM_INLINE void prefetch(const uint8_t* p, int bytes) {
  for (int line = 0; line < bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(p + line), _MM_HINT_T0);
}

// acc += w (u8) . x (s8), with the four bytes at x broadcast by the load: the compiler makes two instructions of the intrinsic.
PM_INLINE void dot(__m512i& acc, __m512i w, const int8_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*reinterpret_cast<const int8_t(*)[4]>(x)));
}

PM_INLINE __m512i low(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
PM_INLINE __m512i high(__m512i v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }

// ---- Q4_1 and Q8_0: one piece -------------------------------------------------------------------------------------------------------------------------

struct Q4 {
  static constexpr int BYTES = 640;
  __m512i w[16];
  __m512 d0, d1, m0, m1;

  PM_INLINE explicit Q4(const uint8_t* p) {
    for (int g = 0; g < 2; ++g)
      for (int v = 0; v < 4; ++v) {
        const __m512i both = load_i(p + 128 + 256 * g + 64 * v);
        w[8 * g + v] = low(both);
        w[8 * g + 4 + v] = high(both);
      }
    d0 = load_f16(p), d1 = load_f16(p + 32), m0 = load_f16(p + 64), m1 = load_f16(p + 96);
  }
  PM_INLINE static __m512i start(const QuantPiece&, int) { return _mm512_setzero_si512(); }
  PM_INLINE __m512 finish(__m512i i0, __m512i i1, const QuantPiece& x, __m512 acc) const {
    __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(i0), d0);
    part = _mm512_fmadd_ps(m0, _mm512_set1_ps(x.sum[0]), part);
    part = _mm512_fmadd_ps(_mm512_cvtepi32_ps(i1), d1, part);
    part = _mm512_fmadd_ps(m1, _mm512_set1_ps(x.sum[1]), part);
    return _mm512_fmadd_ps(part, _mm512_set1_ps(x.scale), acc);
  }
};

struct Q8 {
  static constexpr int BYTES = 1088;
  __m512i w[16];
  __m512 d0, d1;

  PM_INLINE explicit Q8(const uint8_t* p) {
    for (int v = 0; v < 16; ++v) w[v] = load_i(p + 64 + 64 * v);
    d0 = load_f16(p), d1 = load_f16(p + 32);
  }
  PM_INLINE static __m512i start(const QuantPiece& x, int g) { return _mm512_set1_epi32(x.init[g]); }
  PM_INLINE __m512 finish(__m512i i0, __m512i i1, const QuantPiece& x, __m512 acc) const {
    __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(i0), d0);
    part = _mm512_fmadd_ps(_mm512_cvtepi32_ps(i1), d1, part);
    return _mm512_fmadd_ps(part, _mm512_set1_ps(x.scale), acc);
  }
};

// U tokens against a piece in registers.
template <int U, class Q>
PM_INLINE void piece_tokens(const Q& q, const QuantPiece* x, __m512* acc) {
  __m512i i0[U], i1[U];
  for (int u = 0; u < U; ++u) i0[u] = Q::start(x[u], 0), i1[u] = Q::start(x[u], 1);
  for (int v = 0; v < 8; ++v)
    for (int u = 0; u < U; ++u) {
      dot(i0[u], q.w[v], x[u].q + 4 * v);
      dot(i1[u], q.w[8 + v], x[u].q + 32 + 4 * v);
    }
  for (int u = 0; u < U; ++u) acc[u] = q.finish(i0[u], i1[u], x[u], acc[u]);
}

// ---- results --------------------------------------------------------------------------------------------------------------------------------------

struct Output {
  float* y;
  size_t ldy;
  bool add;
  const float* bias;
  int n;

  // Stores row t's results of row block rb.
  PM_INLINE void store(int t, int rb, __m512 acc) const {
    const int left = n - rb * ROWS;
    const __mmask16 mask = left >= ROWS ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    if (bias) acc = _mm512_add_ps(acc, _mm512_maskz_loadu_ps(mask, bias + rb * ROWS));
    float* out = y + static_cast<size_t>(t) * ldy + static_cast<size_t>(rb) * ROWS;
    if (add) acc = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), acc);
    _mm512_mask_storeu_ps(out, mask, acc);
  }
};

// ---- Q4_1 and Q8_0: loops -----------------------------------------------------------------------------------------------------------------------------

// A piece for all tokens of a tile. The first piece starts from zeros, the last (LAST) one's sums go to y instead of acc: passes of their own over acc, and
// y's cache misses outside the products' shadow, cost 6 % at K = 576.
template <class Q, bool LAST>
void piece_tile(const uint8_t* w, const QuantPiece* x, int t, bool first, float* acc, const Output& out, int t0, int rb) {
  alignas(64) static const float zeros[2 * ROWS] = {};
  const Q q(w);
  const float* from = first ? zeros : acc;
  const int step = first ? 0 : ROWS;
  int i = 0;
  for (; i + 2 <= t; i += 2) {
    __m512 a[2] = {_mm512_load_ps(from + step * i), _mm512_load_ps(from + step * i + ROWS)};
    piece_tokens<2>(q, x + i, a);
    for (int u = 0; u < 2; ++u)
      if (LAST)
        out.store(t0 + i + u, rb, a[u]);
      else
        _mm512_store_ps(acc + ROWS * (i + u), a[u]);
  }
  if (i < t) {
    __m512 a = _mm512_load_ps(from + step * i);
    piece_tokens<1>(q, x + i, &a);
    if (LAST)
      out.store(t0 + i, rb, a);
    else
      _mm512_store_ps(acc + ROWS * i, a);
  }
}

template <class Q, int T>
void few_tokens(const uint8_t* data, int pieces, const QuantPiece* x, size_t stride, int t0, int block0, int block1, const Output& out) {
  const uint8_t* w = data + static_cast<size_t>(block0) * pieces * Q::BYTES;
  for (int rb = block0; rb < block1; ++rb) {
    __m512 acc[T];
    for (int t = 0; t < T; ++t) acc[t] = _mm512_setzero_ps();
    for (int p = 0; p < pieces; ++p, w += Q::BYTES) {
      // The processor's own prefetching does better than ours at this pace; but asking for all lines of the piece at once is faster (Q8_0: 20 %).
      prefetch(w, Q::BYTES);
      const Q q(w);
      piece_tokens<T>(q, x + static_cast<size_t>(p) * stride, acc);
    }
    for (int t = 0; t < T; ++t) out.store(t0 + t, rb, acc[t]);
  }
}

template <class Q>
void many_tokens(const uint8_t* data, int pieces, const QuantPiece* x, size_t stride, int t0, int t, int block0, int block1, float* acc, const Output& out) {
  const uint8_t* w = data + static_cast<size_t>(block0) * pieces * Q::BYTES;
  for (int rb = block0; rb < block1; ++rb) {
    for (int p = 0; p < pieces; ++p, w += Q::BYTES) {
      prefetch(w + 2 * Q::BYTES, Q::BYTES);  // a piece takes long enough for the processor to lose the trail
      const QuantPiece* tokens = x + static_cast<size_t>(p) * stride;
      if (p + 1 < pieces)
        piece_tile<Q, false>(w, tokens, t, p == 0, acc, out, t0, rb);
      else
        piece_tile<Q, true>(w, tokens, t, p == 0, acc, out, t0, rb);
    }
    for (int i = 0; pieces == 0 && i < t; ++i) out.store(t0 + i, rb, _mm512_setzero_ps());
  }
}

template <class Q>
void linear_q(const Weight& w, const Input& x, int block0, int block1, const Output& out, void* scratch) {
  const int pieces = w.kp() / INPUT_GROUP;
  float* acc = static_cast<float*>(scratch);
  const int per_chunk = blocks_per_chunk(w);
  const int tiles = (x.t + TILE_TOKENS - 1) / TILE_TOKENS;
  const int blocks_at_once = tiles == 1 ? block1 - block0 : per_chunk;
  for (int b = block0; b < block1; b += blocks_at_once) {
    const int end = b + blocks_at_once < block1 ? b + blocks_at_once : block1;
    for (int tile = 0; tile < tiles; ++tile) {
      // Tiles of the same size, give or take one.
      const int t0 = static_cast<int>(static_cast<int64_t>(x.t) * tile / tiles);
      const int t = static_cast<int>(static_cast<int64_t>(x.t) * (tile + 1) / tiles) - t0;
      const QuantPiece* tokens = x.pieces + t0;
      switch (t) {
        case 1: few_tokens<Q, 1>(w.data, pieces, tokens, x.stride, t0, b, end, out); break;
        case 2: few_tokens<Q, 2>(w.data, pieces, tokens, x.stride, t0, b, end, out); break;
        case 3: few_tokens<Q, 3>(w.data, pieces, tokens, x.stride, t0, b, end, out); break;
        case 4: few_tokens<Q, 4>(w.data, pieces, tokens, x.stride, t0, b, end, out); break;
        default: many_tokens<Q>(w.data, pieces, tokens, x.stride, t0, t, b, end, acc, out);
      }
    }
  }
}

// ---- BF16 and F32 -------------------------------------------------------------------------------------------------------------------------------------
// One multiplication per vector and token, so there is nothing to unpack or finish: a tile of tokens keeps its accumulators in registers.

struct Bf16 {
  using Value = uint16_t;
  static constexpr int PER_VECTOR = 2;
  PM_INLINE static const Value* rows(const Input& x) { return x.bf16; }
  PM_INLINE static __m512 step(__m512 acc, const uint8_t* w, const Value* x) {
    int32_t pair;
    memcpy(&pair, x, 4);
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32(pair));
  }
};

struct F32 {
  using Value = float;
  static constexpr int PER_VECTOR = 1;
  PM_INLINE static const Value* rows(const Input& x) { return x.f32; }
  PM_INLINE static __m512 step(__m512 acc, const uint8_t* w, const Value* x) {
    return _mm512_fmadd_ps(_mm512_loadu_ps(w), _mm512_set1_ps(*x), acc);
  }
};

template <class F, int T>
void float_tile(const uint8_t* w, const typename F::Value* x, int kp, int t0, int rb, const Output& out) {
  __m512 acc[T];
  for (int t = 0; t < T; ++t) acc[t] = _mm512_setzero_ps();
  const int vectors = kp / F::PER_VECTOR;
  for (int v = 0; v < vectors; ++v, w += 64) {
    prefetch(w + 4096, 64);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) acc[t] = F::step(acc[t], w, x + static_cast<size_t>(t) * kp + static_cast<size_t>(v) * F::PER_VECTOR);
  }
  for (int t = 0; t < T; ++t) out.store(t0 + t, rb, acc[t]);
}

template <class F>
void linear_f(const Weight& w, const Input& x, int block0, int block1, const Output& out) {
  constexpr int TILE = 12;
  const int kp = w.kp();
  const size_t block_bytes = w.row_block_bytes();
  const int tiles = (x.t + TILE - 1) / TILE;
  const int per_chunk = blocks_per_chunk(w);
  for (int b = block0; b < block1; b += per_chunk) {
    const int end = b + per_chunk < block1 ? b + per_chunk : block1;
    for (int tile = 0; tile < tiles; ++tile) {
      const int t0 = static_cast<int>(static_cast<int64_t>(x.t) * tile / tiles);
      const int t = static_cast<int>(static_cast<int64_t>(x.t) * (tile + 1) / tiles) - t0;
      const typename F::Value* xs = F::rows(x) + static_cast<size_t>(t0) * kp;
      for (int rb = b; rb < end; ++rb) {
        const uint8_t* data = w.data + rb * block_bytes;
        switch (t) {
#define PM_CASE(n) case n: float_tile<F, n>(data, xs, kp, t0, rb, out); break;
          PM_CASE(1) PM_CASE(2) PM_CASE(3) PM_CASE(4) PM_CASE(5) PM_CASE(6) PM_CASE(7) PM_CASE(8) PM_CASE(9) PM_CASE(10) PM_CASE(11) PM_CASE(12)
#undef PM_CASE
        }
      }
    }
  }
}

// ---- table ----------------------------------------------------------------------------------------------------------------------------------------

void linear(const Weight& w, const Input& x, int block0, int block1, float* y, size_t ldy, bool add, void* scratch) {
  if (block1 > w.row_blocks()) block1 = w.row_blocks();
  if (x.t <= 0 || block0 >= block1) return;
  const Output out{y, ldy, add, w.bias, w.n};
  switch (w.type) {
    case WeightType::Q4_1: linear_q<Q4>(w, x, block0, block1, out, scratch); break;
    case WeightType::Q8_0: linear_q<Q8>(w, x, block0, block1, out, scratch); break;
    case WeightType::BF16: linear_f<Bf16>(w, x, block0, block1, out); break;
    case WeightType::F32: linear_f<F32>(w, x, block0, block1, out); break;
  }
}

// The 16 values from i on, zero beyond k.
PM_INLINE __m512 load_padded(const float* x, int i, int k) {
  const int left = k - i;
  if (left >= 16) return _mm512_loadu_ps(x + i);
  return left <= 0 ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << left) - 1), x + i);
}

void quantize_row(const float* x, int k, QuantPiece* to, size_t stride) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int p = 0; p * INPUT_GROUP < k; ++p, to += stride) {
    __m512 v[4];
    __m512i magnitude = _mm512_setzero_si512();
    for (int i = 0; i < 4; ++i) {
      v[i] = load_padded(x, p * INPUT_GROUP + 16 * i, k);
      // As integers, magnitudes are ordered like the numbers, and infinity and NaN come last.
      magnitude = _mm512_max_epu32(magnitude, _mm512_and_si512(_mm512_castps_si512(v[i]), _mm512_set1_epi32(0x7fffffff)));
    }
    const uint32_t bits = _mm512_reduce_max_epu32(magnitude);
    if (__builtin_expect(bits >= 0x7f800000u, 0)) {
      memset(to, 0, sizeof *to);
      to->scale = __builtin_nanf("");
      continue;
    }
    float max;
    memcpy(&max, &bits, 4);
    if (max < QUANT_TINY) {
      memset(to, 0, sizeof *to);
      continue;
    }
    const __m128 quotients = _mm_div_ps(_mm_setr_ps(max, 127.0f, 0.0f, 0.0f), _mm_setr_ps(127.0f, max, 1.0f, 1.0f));
    to->scale = _mm_cvtss_f32(quotients);
    const __m512 inverse = _mm512_broadcastss_ps(_mm_movehdup_ps(quotients));
    __m512i n[4];
    for (int i = 0; i < 4; ++i) n[i] = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], inverse));
    // Packing works within 128 bits; the permutation brings the words of four bytes back into order.
    const __m512i q = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(_mm512_packs_epi32(n[0], n[1]), _mm512_packs_epi32(n[2], n[3])));
    _mm512_storeu_si512(to->q, q);
    const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), q);
    __m256i both = _mm256_hadd_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
    both = _mm256_hadd_epi32(both, both);
    const __m128i total = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    _mm_storel_pi(reinterpret_cast<__m64*>(to->sum), _mm_cvtepi32_ps(total));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to->init), _mm_sub_epi32(_mm_setzero_si128(), _mm_slli_epi32(total, 7)));
  }
}

void to_bf16_row(const float* x, int k, int kp, uint16_t* out) {
  for (int i = 0; i < kp; i += 16) {
    const __m512i bits = _mm512_castps_si512(load_padded(x, i, k));
    // Not vcvtneps2bf16: that one flushes denormals.
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_epu32_mask(_mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)), _mm512_set1_epi32(0x7f800000), _MM_CMPINT_NLE);
    rounded = _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtepi32_epi16(rounded));
  }
}

}  // namespace

#include "linear_row.inc"

const LinearKernels* linear_avx512() {
  static const LinearKernels table = {"avx512", quantize_row, to_bf16_row, linear, dequantize_row};
  return &table;
}

}  // namespace pm

#else
#include "kernels.h"
namespace pm {
const LinearKernels* linear_avx512() { return nullptr; }
}  // namespace pm
#endif
