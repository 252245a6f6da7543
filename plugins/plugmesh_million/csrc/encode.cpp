// Rows to codes, and back.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "million.h"

namespace million {

void round_row(const float* from, uint16_t* to, int dim) {
  for (int i = 0; i < dim; ++i) {
    uint32_t u;
    std::memcpy(&u, from + i, 4);
    const bool is_nan = (u & 0x7FFFFFFFu) > 0x7F800000u;  // rounding up would make an infinity of some
    const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    to[i] = uint16_t(is_nan ? 0x7FC0u : rounded);
  }
}

void widen_row(const uint16_t* from, float* to, int dim) {
  for (int i = 0; i < dim; ++i) {
    const uint32_t u = uint32_t(from[i]) << 16;
    std::memcpy(to + i, &u, 4);
  }
}

void widen_book(const uint16_t* book, float* c0, float* c1) {
  widen_row(book, c0, CENTROIDS);
  widen_row(book + CENTROIDS, c1, CENTROIDS);
}

// The lowest of the nearest centroids. NaN is nearer to nothing: code 0.
uint8_t nearest(float x0, float x1, const float* c0, const float* c1) {
#if defined(__AVX512F__)
  const __m512 a = _mm512_set1_ps(x0), b = _mm512_set1_ps(x1);
  const __m512i step = _mm512_set1_epi32(16);
  __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 best = _mm512_set1_ps(INFINITY);
  __m512i index = _mm512_setzero_si512();
  for (int i = 0; i < CENTROIDS; i += 16) {
    const __m512 d0 = _mm512_sub_ps(_mm512_loadu_ps(c0 + i), a), d1 = _mm512_sub_ps(_mm512_loadu_ps(c1 + i), b);
    const __m512 d = _mm512_fmadd_ps(d0, d0, _mm512_mul_ps(d1, d1));
    const __mmask16 is_less = _mm512_cmp_ps_mask(d, best, _CMP_LT_OQ);
    best = _mm512_mask_mov_ps(best, is_less, d);
    index = _mm512_mask_mov_epi32(index, is_less, lane);
    lane = _mm512_add_epi32(lane, step);
  }
  const __mmask16 is_best = _mm512_cmp_ps_mask(best, _mm512_set1_ps(_mm512_reduce_min_ps(best)), _CMP_EQ_OQ);
  return uint8_t(_mm512_mask_reduce_min_epu32(is_best, index));
#else
  float best = INFINITY;
  int index = 0;
  for (int i = 0; i < CENTROIDS; ++i) {
    const float d0 = c0[i] - x0, d1 = c1[i] - x1, d = d0 * d0 + d1 * d1;
    if (d < best) best = d, index = i;
  }
  return uint8_t(index);
#endif
}

void decode_row(const Codec& c, int layer, int part, int head, int block, int slot, float* to) {
  const uint8_t* codes = c.blocks + size_t(block) * c.block_bytes + c.row_offset(layer, part, head) + slot;
  const uint16_t* book = c.book(layer, part, head);
  for (int m = 0; m < c.subspaces; ++m)
    for (int i = 0; i < 2; ++i) {
      const uint32_t u = uint32_t(book[(m * 2 + i) * CENTROIDS + codes[m * BLOCK]]) << 16;
      std::memcpy(to + 2 * m + i, &u, 4);
    }
}

}  // namespace million

// Codes of n points of one subspace: x (n, 2), centroids as two rows of 256. For training.
extern "C" void million_assign(const float* x, int64_t n, const float* c0, const float* c1, uint8_t* codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = million::nearest(x[2 * i], x[2 * i + 1], c0, c1);
}
