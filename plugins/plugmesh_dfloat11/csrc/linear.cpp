// Multiplies by a matrix in a container, a few rows at a time: decoded into memory that stays in the cache, used, forgotten. What it computes is what the native
// executor's kernel for bfloat16 computes (activations rounded to nearest even, one accumulator per row and token, pairs of K in order), so results are equal in
// every bit; on a processor without these instructions that kernel adds in another order, and df11_has_tiles says no.
#include "decode.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>

namespace {

constexpr int TILE = 12;                  // tokens whose accumulators fit the registers
constexpr int64_t ROWS_BYTES = 128 << 10;  // decoded rows that many tokens share: half of a second-level cache or less

void to_bf16(const float* x, int k, int kp, uint16_t* out) {
  for (int i = 0; i < kp; ++i) {
    uint32_t bits = 0;
    if (i < k) memcpy(&bits, x + i, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    out[i] = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
  }
}

template <int T>
void tile(const uint16_t* w, const uint16_t* x, int kp, float* y, int n, int first) {
  __m512 acc[T];
  for (int t = 0; t < T; ++t) acc[t] = _mm512_setzero_ps();
  for (int k = 0; k < kp; k += 2, w += 32) {
    const __m512bh rows = (__m512bh)_mm512_load_si512(w);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      int32_t pair;
      memcpy(&pair, x + size_t(t) * kp + k, 4);
      acc[t] = _mm512_dpbf16_ps(acc[t], rows, (__m512bh)_mm512_set1_epi32(pair));
    }
  }
  const int left = n - first;
  const __mmask16 mask = left >= 16 ? 0xffff : __mmask16((1u << left) - 1);
  for (int t = 0; t < T; ++t) _mm512_mask_storeu_ps(y + size_t(t) * n + first, mask, acc[t]);
}

}  // namespace

extern "C" int df11_has_tiles() { return 1; }

// context: {const Container*, int64_t first chunk of the matrix}
extern "C" void df11_linear(void* context, const float* x, int t, int k, float* y, int n, int thread, int num_threads) {
  const auto* words = static_cast<const uint64_t*>(context);
  const auto& c = *reinterpret_cast<const Container*>(words[0]);
  const int64_t start = int64_t(words[1]);
  const int kp = (k + 63) / 64 * 64, pieces = kp / 64;
  const int64_t blocks = (n + 15) / 16, begin = blocks * thread / num_threads, end = blocks * (thread + 1) / num_threads;
  if (begin == end || t == 0) return;
  static thread_local std::vector<uint8_t> x_room, w_room;
  auto* input = scratch<uint16_t>(x_room, size_t(t) * kp);
  for (int i = 0; i < t; ++i) to_bf16(x + size_t(i) * k, k, kp, input + size_t(i) * kp);
  const int64_t block_bytes = int64_t(pieces) * CHUNK * 2;
  int64_t together = t <= TILE ? 1 : ROWS_BYTES / block_bytes;
  if (together < 1) together = 1;
  auto* rows = scratch<uint16_t>(w_room, size_t(together) * block_bytes / 2);
  const int tiles = (t + TILE - 1) / TILE;
  for (int64_t b = begin; b < end; b += together) {
    const int64_t count = end - b < together ? end - b : together;
    decode_chunks(c, start + b * pieces, start + (b + count) * pieces, rows);
    for (int i = 0; i < tiles; ++i) {
      const int t0 = int(int64_t(t) * i / tiles), size = int(int64_t(t) * (i + 1) / tiles) - t0;
      for (int64_t r = 0; r < count; ++r) {
        const uint16_t* w = rows + r * block_bytes / 2;
        const uint16_t* from = input + size_t(t0) * kp;
        float* to = y + size_t(t0) * n;
        switch (size) {
#define CASE(m) case m: tile<m>(w, from, kp, to, n, int(b + r) * 16); break;
          CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
        }
      }
    }
  }
}

#else

extern "C" int df11_has_tiles() { return 0; }
extern "C" void df11_linear(void*, const float*, int, int, float*, int, int, int) {}

#endif
