// W4A8: 4-bit codes become int8 in registers and are multiplied by int8 activations; one float multiplication per output (QServe, arXiv:2405.04532, section 5).
//
// Order of the codes: [row block of 16][K / 8][16 rows][4 bytes]; byte e of a row has k = 8j + e in its low nibble and k = 8j + 4 + e in its high one. One
// load of 64 bytes is thereby two operands of a dot product of 16 rows by 4, and nothing is shuffled ("compute-aware order", for AVX-512's lanes).
// Scales of the second level: [row block][group][32 bytes], 16 times s1 and 16 times (128 - z * s1) mod 256.
//
// (q - z) * s1 is computed as q * s1 + (-z * s1), all mod 256: q * s1 <= 240 stays within its byte, so two bytes are multiplied by one 16-bit multiplication,
// and what wraps around in the sum cancels, because the protective range keeps the result in int8. The dot product wants its first operand unsigned, so
// 128 is part of the stored offset and 128 times the sum of the activations is taken off at the end.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__) && !defined(QSERVE_PORTABLE)
#define QSERVE_AVX512 1
#include <immintrin.h>
#endif

namespace {

// As plugmesh_qserve.weights fills it; every field is 8 bytes.
struct Matrix {
  const uint8_t* codes;
  const uint8_t* scales;
  const float* row_scales;
  int64_t group;
  int64_t rotation;  // width of the Hadamard blocks; 1 is none
  int64_t reuses;    // whether the linear called before had the same x
  int64_t raw;       // write the int32 sums instead of floats, for tests
};

// A thread's own encoding of the last x.
struct Input {
  int t = 0, k = 0;
  std::vector<int8_t> codes;
  std::vector<float> scales, rotated;
  std::vector<int32_t> corrections;
  std::vector<uint8_t> unpacked;
};
thread_local Input input;

constexpr float TINY = 1e-30f;  // rows of smaller numbers are zero: 127 / max stays finite

#if QSERVE_AVX512

template <int HALF>
__m512 butterfly(__m512 x) {
  constexpr __mmask16 upper = HALF == 8 ? 0xFF00 : HALF == 4 ? 0xF0F0 : HALF == 2 ? 0xCCCC : 0xAAAA;
  __m512 other;
  if (HALF == 8) other = _mm512_shuffle_f32x4(x, x, 0x4E);
  else if (HALF == 4) other = _mm512_shuffle_f32x4(x, x, 0xB1);
  else if (HALF == 2) other = _mm512_permute_ps(x, 0x4E);
  else other = _mm512_permute_ps(x, 0xB1);
  return _mm512_mask_sub_ps(_mm512_add_ps(x, other), upper, other, x);
}

#endif

// The Walsh-Hadamard transform of each piece of `width`, not normalised: the weights hold the factor. Halves first, so that numpy can do the same sums.
void rotate(float* x, int k, int width) {
  for (float* piece = x; piece < x + k; piece += width) {
    int half = width / 2;
#if QSERVE_AVX512
    for (; half >= 16; half /= 2)
#else
    for (; half >= 1; half /= 2)
#endif
      for (int at = 0; at < width; at += 2 * half)
        for (int i = at; i < at + half; ++i) {
          const float a = piece[i], b = piece[i + half];
          piece[i] = a + b;
          piece[i + half] = a - b;
        }
#if QSERVE_AVX512
    for (int i = 0; i < width; i += 16) {
      const __mmask16 lanes = width - i >= 16 ? 0xFFFF : __mmask16((1u << (width - i)) - 1);
      __m512 v = _mm512_maskz_loadu_ps(lanes, piece + i);
      if (half >= 8) v = butterfly<8>(v);
      if (half >= 4) v = butterfly<4>(v);
      if (half >= 2) v = butterfly<2>(v);
      if (half >= 1) v = butterfly<1>(v);
      _mm512_mask_storeu_ps(piece + i, lanes, v);
    }
#endif
  }
}

// One row: symmetric int8 with a scale of its own. A row that is not finite gives NaN everywhere, and nothing else does.
void encode_row(const float* x, int k, int8_t* codes, float* scale, int32_t* correction) {
  // Magnitudes are compared as integers: their order is the same, NaN and infinity are above all, and the compiler makes a vector loop of it.
  uint32_t highest = 0;
  for (int i = 0; i < k; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    highest = bits > highest ? bits : highest;
  }
  float largest;
  std::memcpy(&largest, &highest, 4);
  const bool finite = highest < 0x7f800000u;
  *correction = 0;
  if (!finite || largest < TINY) {
    std::memset(codes, 0, k);
    *scale = finite ? 0.0f : NAN;
    return;
  }
  const float inverse = 127.0f / largest;
  *scale = largest / 127.0f;
  int32_t sum = 0;
  int i = 0;
#if QSERVE_AVX512
  __m512i sums = _mm512_setzero_si512();
  for (; i + 16 <= k; i += 16) {
    const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(inverse)));
    sums = _mm512_add_epi32(sums, v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtsepi32_epi8(v));
  }
  sum = _mm512_reduce_add_epi32(sums);
#endif
  for (; i < k; ++i) {
    const int32_t v = int32_t(std::nearbyintf(x[i] * inverse));
    codes[i] = int8_t(v);
    sum += v;
  }
  *correction = 128 * sum;
}

void encode(const float* x, int t, int k, int rotation, Input& to) {
  to.t = t;
  to.k = k;
  to.codes.resize(size_t(t) * k);
  to.scales.resize(t);
  to.corrections.resize(t);
  to.rotated.resize(k);
  for (int r = 0; r < t; ++r) {
    const float* row = x + size_t(r) * k;
    if (rotation > 1) {
      std::memcpy(to.rotated.data(), row, size_t(k) * 4);
      rotate(to.rotated.data(), k, rotation);
      row = to.rotated.data();
    }
    encode_row(row, k, to.codes.data() + size_t(r) * k, &to.scales[r], &to.corrections[r]);
  }
}

#if QSERVE_AVX512

struct Group {
  __m512i scale, offset;
};

Group group_of(const uint8_t* scales) {
  const __m512i s = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
  const __m512i o = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 16)));
  return {_mm512_or_si512(s, _mm512_slli_epi32(s, 16)), _mm512_mullo_epi32(o, _mm512_set1_epi32(0x01010101))};
}

// Multiply before subtract.
__m512i expand(__m512i nibbles, const Group& g) { return _mm512_add_epi8(_mm512_mullo_epi16(nibbles, g.scale), g.offset); }

void finish(const Matrix& m, __m512i sum, int row, int token, int n, float* y) {
  const int left = n - row;
  const __mmask16 rows = left >= 16 ? 0xFFFF : __mmask16((1u << left) - 1);
  sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(input.corrections[token]));
  float* to = y + size_t(token) * n + row;
  if (m.raw) {
    _mm512_mask_storeu_epi32(to, rows, sum);
    return;
  }
  const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(input.scales[token]));
  _mm512_mask_storeu_ps(to, rows, _mm512_mul_ps(scaled, _mm512_loadu_ps(m.row_scales + row)));
}

int32_t four(const int8_t* codes) {
  int32_t v;
  std::memcpy(&v, codes, 4);
  return v;
}

// Few tokens: codes are expanded in registers and used at once.
template <int T>
void few(const Matrix& m, int block, int token, int k, float* y, int n) {
  const int num_groups = k / int(m.group), steps = int(m.group) / 8;
  const uint8_t* codes = m.codes + size_t(block) * k * 8;
  const uint8_t* scales = m.scales + size_t(block) * num_groups * 32;
  const int8_t* x = input.codes.data() + size_t(token) * k;
  const __m512i low = _mm512_set1_epi8(15);
  __m512i a[T], b[T];
  for (int i = 0; i < T; ++i) a[i] = b[i] = _mm512_setzero_si512();
  for (int g = 0; g < num_groups; ++g) {
    const Group group = group_of(scales + size_t(g) * 32);
    for (int j = 0; j < steps; ++j, codes += 64, x += 8) {
      const __m512i both = _mm512_loadu_si512(codes);
      const __m512i w0 = expand(_mm512_and_si512(both, low), group);
      const __m512i w1 = expand(_mm512_and_si512(_mm512_srli_epi16(both, 4), low), group);
      for (int i = 0; i < T; ++i) {
        a[i] = _mm512_dpbusd_epi32(a[i], w0, _mm512_set1_epi32(four(x + size_t(i) * k)));
        b[i] = _mm512_dpbusd_epi32(b[i], w1, _mm512_set1_epi32(four(x + size_t(i) * k + 4)));
      }
    }
  }
  for (int i = 0; i < T; ++i) finish(m, _mm512_add_epi32(a[i], b[i]), block * 16, token + i, n, y);
}

// Many tokens: a row block is expanded once, into the cache.
void unpack(const Matrix& m, int block, int k, uint8_t* to) {
  const int num_groups = k / int(m.group), steps = int(m.group) / 8;
  const uint8_t* codes = m.codes + size_t(block) * k * 8;
  const uint8_t* scales = m.scales + size_t(block) * num_groups * 32;
  const __m512i low = _mm512_set1_epi8(15);
  for (int g = 0; g < num_groups; ++g) {
    const Group group = group_of(scales + size_t(g) * 32);
    for (int j = 0; j < steps; ++j, codes += 64, to += 128) {
      const __m512i both = _mm512_loadu_si512(codes);
      _mm512_storeu_si512(to, expand(_mm512_and_si512(both, low), group));
      _mm512_storeu_si512(to + 64, expand(_mm512_and_si512(_mm512_srli_epi16(both, 4), low), group));
    }
  }
}

template <int T>
void many(const Matrix& m, const uint8_t* w, int block, int token, int k, float* y, int n) {
  const int8_t* x = input.codes.data() + size_t(token) * k;
  __m512i sums[T];
  for (int i = 0; i < T; ++i) sums[i] = _mm512_setzero_si512();
  for (int j = 0; j < k; j += 4, w += 64) {
    const __m512i weights = _mm512_loadu_si512(w);
    for (int i = 0; i < T; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], weights, _mm512_set1_epi32(four(x + size_t(i) * k + j)));
  }
  for (int i = 0; i < T; ++i) finish(m, sums[i], block * 16, token + i, n, y);
}

void multiply(const Matrix& m, int block, int t, int k, float* y, int n) {
  if (t <= 4) {
    if (t == 1) few<1>(m, block, 0, k, y, n);
    if (t == 2) few<2>(m, block, 0, k, y, n);
    if (t == 3) few<3>(m, block, 0, k, y, n);
    if (t == 4) few<4>(m, block, 0, k, y, n);
    return;
  }
  input.unpacked.resize(size_t(k) * 16 + 64);
  uint8_t* w = input.unpacked.data() + (-reinterpret_cast<uintptr_t>(input.unpacked.data()) & 63);
  unpack(m, block, k, w);
  int at = 0;
  for (; t - at >= 16; at += 16) many<16>(m, w, block, at, k, y, n);
  for (; t - at >= 8; at += 8) many<8>(m, w, block, at, k, y, n);
  for (; t - at >= 4; at += 4) many<4>(m, w, block, at, k, y, n);
  for (; at < t; ++at) many<1>(m, w, block, at, k, y, n);
}

#else

void multiply(const Matrix& m, int block, int t, int k, float* y, int n) {
  const int num_groups = k / int(m.group);
  const uint8_t* codes = m.codes + size_t(block) * k * 8;
  const uint8_t* scales = m.scales + size_t(block) * num_groups * 32;
  input.unpacked.resize(k);
  auto* w = reinterpret_cast<int8_t*>(input.unpacked.data());
  for (int lane = 0; lane < 16 && block * 16 + lane < n; ++lane) {
    for (int i = 0; i < k; ++i) {
      const uint8_t both = codes[size_t(i / 8) * 64 + lane * 4 + i % 4], code = i % 8 < 4 ? both & 15 : both >> 4;
      const uint8_t* of = scales + size_t(i / int(m.group)) * 32 + lane;
      w[i] = int8_t(uint8_t(code * of[0] + of[16] - 128));
    }
    const int row = block * 16 + lane;
    for (int r = 0; r < t; ++r) {
      const int8_t* x = input.codes.data() + size_t(r) * k;
      int32_t sum = 0;
      for (int i = 0; i < k; ++i) sum += int32_t(w[i]) * x[i];
      float* to = y + size_t(r) * n + row;
      if (m.raw) std::memcpy(to, &sum, 4);
      else *to = float(sum) * input.scales[r] * m.row_scales[row];
    }
  }
}

#endif

}  // namespace

// "plugmesh.linear.v2"
extern "C" void qserve_linear(void* context, const float* x, int t, int k, float* y, int n, int thread, int num_threads) {
  const Matrix& m = *static_cast<const Matrix*>(context);
  if (!m.reuses || input.t != t || input.k != k) encode(x, t, k, int(m.rotation), input);
  const int blocks = (n + 15) / 16, end = int(int64_t(blocks) * (thread + 1) / num_threads);
  for (int block = int(int64_t(blocks) * thread / num_threads); block < end; ++block) multiply(m, block, t, k, y, n);
}

// What the kernel makes of rows x (t, k): codes (t, k) and scales (t). For tests.
extern "C" void qserve_encode(const float* x, int t, int k, int rotation, int8_t* codes, float* scales) {
  Input made;
  encode(x, t, k, rotation, made);
  std::memcpy(codes, made.codes.data(), made.codes.size());
  std::memcpy(scales, made.scales.data(), made.scales.size() * 4);
}

// 1 with AVX-512 VNNI, 0 with plain loops.
extern "C" int qserve_is_vector() {
#if QSERVE_AVX512
  return 1;
#else
  return 0;
#endif
}
