// Attention on codes. Scores of closed blocks are sums of table entries: for a query a table of q . centroid is made per subspace (the paper's LUT), in 16
// bits, as two planes of bytes that lie in registers and are read by byte permutes, 64 tokens at once. Values are looked up likewise, for all query heads
// of a KV head together, and multiplied with the weights as bfloat16. Rows of the open block are exact. Partial results are merged in a fixed order.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <memory>

#include "million.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__) && defined(__AVX512BF16__)

namespace million {
namespace {

constexpr int VECTORS = TILE / 64;
constexpr int LUT_BYTES = 2 * CENTROIDS;  // of a subspace: low bytes, high bytes

// 2^x for x <= 0, relative error 2e-7: Taylor on [-0.5, 0.5].
inline __m512 exp2_ps(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

inline float exp2_one(float x) { return _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(x))); }

// Appends a part to what was there. A part without positions has max -inf and sum 0.
void merge(Partial& to, const Partial& part, int dim) {
  if (part.max == -INFINITY) return;
  const float max = std::fmax(to.max, part.max);
  const float a = to.max == -INFINITY ? 0.0f : exp2_one(to.max - max), b = exp2_one(part.max - max);
  to.sum = to.sum * a + part.sum * b;
  for (int i = 0; i < dim; ++i) to.out[i] = to.out[i] * a + part.out[i] * b;
  to.max = max;
}

// Scratch of a thread.
struct Scratch {
  alignas(64) uint8_t codes[MAX_DIM / 2 * TILE];
  alignas(64) uint8_t lut[MAX_GROUP][MAX_DIM / 2 * LUT_BYTES];
  alignas(64) uint16_t sums[TILE];
  alignas(64) uint16_t weights[MAX_GROUP][TILE];  // bfloat16, in the order of the sums
  alignas(64) float query[MAX_GROUP][MAX_DIM];
  float unit[MAX_GROUP], base[MAX_GROUP];         // score = sum * unit + base
  alignas(64) float exact[BLOCK][MAX_DIM];
};

// q . centroid of every subspace and centroid, in steps of `unit` from a bound that no product is below. 65000 leaves room for rounding: sums of all
// subspaces fit into 16 bits whatever the codes are.
void make_luts(const Codec& c, int layer, int head, int group, Scratch& s) {
  const uint16_t* book = c.book(layer, 0, head);
  const float* reach = c.reach.data() + (book - c.centroids) / CENTROIDS;
  float scale[MAX_GROUP];
  for (int h = 0; h < group; ++h) {
    float bound = 0.0f;
    for (int i = 0; i < c.s.dim; ++i) bound += std::fabs(s.query[h][i]) * reach[i];
    scale[h] = bound > 0.0f ? 32500.0f / bound : 0.0f * bound;  // a NaN stays one
    s.unit[h] = bound / 32500.0f;
    s.base[h] = -bound;
  }
  for (int m = 0; m < c.subspaces; ++m) {
    const uint16_t* row = book + size_t(m) * 2 * CENTROIDS;
    for (int i = 0; i < CENTROIDS; i += 16) {
      const __m512 c0 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i))), 16));
      const __m512 c1 =
          _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + CENTROIDS + i))), 16));
      for (int h = 0; h < group; ++h) {
        const float q0 = s.query[h][2 * m], q1 = s.query[h][2 * m + 1], bound = std::fabs(q0) * reach[2 * m] + std::fabs(q1) * reach[2 * m + 1];
        const __m512 t = _mm512_fmadd_ps(c0, _mm512_set1_ps(q0 * scale[h]), _mm512_fmadd_ps(c1, _mm512_set1_ps(q1 * scale[h]), _mm512_set1_ps(bound * scale[h])));
        const __m512i u = _mm512_cvtps_epu32(_mm512_max_ps(t, _mm512_setzero_ps()));
        uint8_t* to = s.lut[h] + m * LUT_BYTES + i;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(u));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + CENTROIDS), _mm512_cvtepi32_epi8(_mm512_srli_epi32(u, 8)));
      }
    }
  }
}

struct Table {  // 256 bytes in registers
  __m512i a, b, c, d;
  explicit Table(const uint8_t* at)
      : a(_mm512_loadu_si512(at)), b(_mm512_loadu_si512(at + 64)), c(_mm512_loadu_si512(at + 128)), d(_mm512_loadu_si512(at + 192)) {}
  __m512i operator()(__m512i codes, __mmask64 is_upper) const {
    return _mm512_mask_blend_epi8(is_upper, _mm512_permutex2var_epi8(a, codes, b), _mm512_permutex2var_epi8(c, codes, d));
  }
};

// Sums of a head's entries over the subspaces; per 64 tokens, in the order of unpacking: tokens 0 to 7 of four blocks, then 8 to 15 of them.
template <int V>
void score(const uint8_t* codes, const uint8_t* lut, int subspaces, uint16_t* sums) {
  __m512i low[V], high[V];
  for (int v = 0; v < V; ++v) low[v] = high[v] = _mm512_setzero_si512();
  for (int m = 0; m < subspaces; ++m) {
    const Table bottom(lut + m * LUT_BYTES), top(lut + m * LUT_BYTES + CENTROIDS);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const __m512i x = _mm512_load_si512(codes + m * TILE + 64 * v);
      const __mmask64 is_upper = _mm512_movepi8_mask(x);
      const __m512i l = bottom(x, is_upper), h = top(x, is_upper);
      low[v] = _mm512_add_epi16(low[v], _mm512_unpacklo_epi8(l, h));
      high[v] = _mm512_add_epi16(high[v], _mm512_unpackhi_epi8(l, h));
    }
  }
  for (int v = 0; v < V; ++v) {
    _mm512_store_si512(sums + 64 * v, low[v]);
    _mm512_store_si512(sums + 64 * v + 32, high[v]);
  }
}

// Weighted sums of values: out of G heads, 2 dimensions per subspace.
template <int G>
void weigh(const uint8_t* codes, const uint8_t* planes, int subspaces, int vectors, const uint16_t (*weights)[TILE], Partial* parts) {
  for (int m = 0; m < subspaces; ++m) {
    const uint8_t* at = planes + size_t(m) * 4 * CENTROIDS;
    const Table low0(at), high0(at + CENTROIDS), low1(at + 2 * CENTROIDS), high1(at + 3 * CENTROIDS);
    __m512 acc0[G], acc1[G];
    for (int g = 0; g < G; ++g) acc0[g] = acc1[g] = _mm512_setzero_ps();
    for (int v = 0; v < vectors; ++v) {
      const __m512i x = _mm512_load_si512(codes + m * TILE + 64 * v);
      const __mmask64 is_upper = _mm512_movepi8_mask(x);
      const __m512i l0 = low0(x, is_upper), h0 = high0(x, is_upper), l1 = low1(x, is_upper), h1 = high1(x, is_upper);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const __m512bh first = (__m512bh)_mm512_load_si512(weights[g] + 64 * v), second = (__m512bh)_mm512_load_si512(weights[g] + 64 * v + 32);
        acc0[g] = _mm512_dpbf16_ps(acc0[g], (__m512bh)_mm512_unpacklo_epi8(l0, h0), first);
        acc0[g] = _mm512_dpbf16_ps(acc0[g], (__m512bh)_mm512_unpackhi_epi8(l0, h0), second);
        acc1[g] = _mm512_dpbf16_ps(acc1[g], (__m512bh)_mm512_unpacklo_epi8(l1, h1), first);
        acc1[g] = _mm512_dpbf16_ps(acc1[g], (__m512bh)_mm512_unpackhi_epi8(l1, h1), second);
      }
    }
    for (int g = 0; g < G; ++g) {
      parts[g].out[2 * m] = _mm512_reduce_add_ps(acc0[g]);
      parts[g].out[2 * m + 1] = _mm512_reduce_add_ps(acc1[g]);
    }
  }
}

// Weights of a head out of its sums, 32 of them (four blocks, half of each) at once; `live` blocks count.
void soften(const Scratch& s, int h, int live, int vectors, uint16_t* weights, Partial& part) {
  alignas(64) float scores[TILE];
  const __m512 unit = _mm512_set1_ps(s.unit[h]), base = _mm512_set1_ps(s.base[h]), lowest = _mm512_set1_ps(-1e30f);  // not -inf: exp2 subtracts
  __m512 max = lowest;
  for (int i = 0; i < 4 * vectors; ++i) {  // 16 sums: halves of blocks b and b + 1
    const __m512i u = _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(s.sums + 16 * i)));
    const int b = 4 * (i / 4) + 2 * (i % 2);
    const __mmask16 lanes = __mmask16((b < live ? 0x00FF : 0) | (b + 1 < live ? 0xFF00 : 0));
    const __m512 x = _mm512_mask_blend_ps(lanes, lowest, _mm512_fmadd_ps(_mm512_cvtepi32_ps(u), unit, base));
    max = _mm512_max_ps(x, max);
    _mm512_store_ps(scores + 16 * i, x);
  }
  part.max = _mm512_reduce_max_ps(max);
  const __m512 top = _mm512_set1_ps(part.max);
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < 2 * vectors; ++i) {
    const __m512bh p = _mm512_cvtne2ps_pbh(exp2_ps(_mm512_sub_ps(_mm512_load_ps(scores + 32 * i + 16), top)), exp2_ps(_mm512_sub_ps(_mm512_load_ps(scores + 32 * i), top)));
    const __m512i bits = (__m512i)p;  // the sum is that of the rounded weights, so that rounding does not change the mean of V
    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int(0xFFFF0000u)))));
    _mm512_store_si512(weights + 32 * i, bits);
  }
  part.sum = _mm512_reduce_add_ps(sum);
}

// Codes of a tile's blocks, subspace by subspace; the rest of the last 64 tokens is zero.
void gather(const Codec& c, size_t offset, const int32_t* blocks, int live, int vectors, uint8_t* codes) {
  for (int b = 0; b < 4 * vectors; ++b) {
    const uint8_t* from = b < live ? c.blocks + size_t(blocks[b]) * c.block_bytes + offset : nullptr;
    for (int m = 0; m < c.subspaces; ++m) {
      const __m128i x = from ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + m * BLOCK)) : _mm_setzero_si128();
      _mm_store_si128(reinterpret_cast<__m128i*>(codes + m * TILE + b * BLOCK), x);
    }
  }
}

// Parts of all query heads of a KV head over one tile of closed blocks. The tables must be made.
void tile(const Codec& c, int layer, int head, int group, const int32_t* blocks, int live, Scratch& s, Partial* parts) {
  const int vectors = live <= 4 ? 1 : live <= 8 ? 2 : live <= 16 ? 4 : VECTORS;
  gather(c, c.row_offset(layer, 0, head), blocks, live, vectors, s.codes);
  for (int h = 0; h < group; ++h) {
    switch (vectors) {
      case 1: score<1>(s.codes, s.lut[h], c.subspaces, s.sums); break;
      case 2: score<2>(s.codes, s.lut[h], c.subspaces, s.sums); break;
      case 4: score<4>(s.codes, s.lut[h], c.subspaces, s.sums); break;
      default: score<VECTORS>(s.codes, s.lut[h], c.subspaces, s.sums);
    }
    soften(s, h, live, vectors, s.weights[h], parts[h]);
  }
  gather(c, c.row_offset(layer, 1, head), blocks, live, vectors, s.codes);
  const uint8_t* planes = c.planes.data() + size_t(c.book(layer, 1, head) - c.centroids) * 2;
  for (int h = 0; h < group; h += 4) switch (group - h) {
      case 1: weigh<1>(s.codes, planes, c.subspaces, vectors, s.weights + h, parts + h); break;
      case 2: weigh<2>(s.codes, planes, c.subspaces, vectors, s.weights + h, parts + h); break;
      case 3: weigh<3>(s.codes, planes, c.subspaces, vectors, s.weights + h, parts + h); break;
      default: weigh<4>(s.codes, planes, c.subspaces, vectors, s.weights + h, parts + h);
    }
}

// Exact rows of the open block up to `position`; `part` 0 for K, 1 for V. What was lost (an imported half block) is read from its codes.
void exact_rows(const Codec& c, const Entry& e, int layer, int part, int head, int64_t position, const float* step, Scratch& s) {
  const int64_t start = position / BLOCK * BLOCK, dim = c.s.dim;
  alignas(64) uint16_t rounded[MAX_DIM];
  for (int64_t p = start; p <= position; ++p) {
    float* to = s.exact[p - start];
    if (p >= e.position) {
      round_row(step + ((e.row + p - e.position) * c.s.kv_heads + head) * dim, rounded, int(dim));
      widen_row(rounded, to, int(dim));
    } else if (e.held >> (p - start) & 1) {
      widen_row(reinterpret_cast<const uint16_t*>(c.slot_table[size_t(e.slots)]) + c.open_offset(layer, part, int(p - start), head), to, int(dim));
    } else {
      decode_row(c, layer, part, head, c.block_table[size_t(e.blocks + p / BLOCK)], int(p - start), to);
    }
  }
}

// Parts of all query heads of a KV head over the open block, up to the row itself.
void window(const Codec& c, const Entry& e, int layer, int head, int group, int64_t position, const float* k, const float* v, Scratch& s, Partial* parts) {
  const int n = int(position % BLOCK) + 1, dim = c.s.dim;
  float weights[MAX_GROUP][BLOCK];
  exact_rows(c, e, layer, 0, head, position, k, s);
  for (int h = 0; h < group; ++h) {
    Partial& part = parts[h];
    part.max = -INFINITY;
    part.sum = 0.0f;
    bool is_nan = false;
    for (int p = 0; p < n; ++p) {
      __m512 dot = _mm512_setzero_ps();
      for (int i = 0; i < dim; i += 16) dot = _mm512_fmadd_ps(_mm512_load_ps(s.query[h] + i), _mm512_load_ps(s.exact[p] + i), dot);
      weights[h][p] = _mm512_reduce_add_ps(dot);
      is_nan |= std::isnan(weights[h][p]);
      part.max = std::fmax(part.max, weights[h][p]);
    }
    if (is_nan) part.max = NAN;
    for (int p = 0; p < n; ++p) part.sum += weights[h][p] = exp2_one(weights[h][p] - part.max);
    std::memset(part.out, 0, sizeof(float) * size_t(dim));
  }
  exact_rows(c, e, layer, 1, head, position, v, s);
  for (int h = 0; h < group; ++h)
    for (int p = 0; p < n; ++p)
      for (int i = 0; i < dim; ++i) parts[h].out[i] += weights[h][p] * s.exact[p][i];
}

// One of a row's parts: a tile of closed blocks, or behind the last of them the open block.
void one_part(const Codec& c, const Entry& e, int layer, int head, int group, int64_t position, int64_t index, const float* k, const float* v, Scratch& s,
              Partial* parts) {
  if (index == tiles_of(position)) return window(c, e, layer, head, group, position, k, v, s, parts);
  const int64_t first = index * TILE_BLOCKS, closed = position / BLOCK;
  const int live = int(closed - first < TILE_BLOCKS ? closed - first : TILE_BLOCKS);
  tile(c, layer, head, group, c.block_table.data() + e.blocks + first, live, s, parts);
}

void load_queries(const Codec& c, const float* q, int64_t row, int head, int group, Scratch& s) {
  const float factor = 1.4426950408889634f / std::sqrt(float(c.s.dim));
  for (int h = 0; h < group; ++h)
    for (int i = 0; i < c.s.dim; ++i) s.query[h][i] = q[(row * c.s.heads + head * group + h) * c.s.dim + i] * factor;
}

void finish(const Partial& total, float* out, int dim) {
  const float factor = 1.0f / total.sum;
  for (int i = 0; i < dim; ++i) out[i] = total.out[i] * factor;
}

// Rows into the open blocks, and those that close within the step into codes.
void store(Codec& c, int layer, const float* k, const float* v, int thread, int num_threads) {
  const int heads = c.s.kv_heads, dim = c.s.dim;
  alignas(64) uint16_t rounded[MAX_DIM];
  for (size_t r = size_t(thread); r < c.entry_of.size(); r += size_t(num_threads)) {
    const Entry& e = c.entries[size_t(c.entry_of[r])];
    const int64_t position = e.position + int64_t(r) - e.row;
    auto* open = reinterpret_cast<uint16_t*>(c.slot_table[size_t(e.slots + position / BLOCK - e.position / BLOCK)]);
    bool is_bad = false;
    for (int part = 0; part < 2; ++part)
      for (int head = 0; head < heads; ++head) {
        round_row((part ? v : k) + (int64_t(r) * heads + head) * dim, rounded, dim);
        for (int i = 0; i < dim; ++i) is_bad |= (rounded[i] & 0x7F80) == 0x7F80;
        if (open) std::memcpy(open + c.open_offset(layer, part, int(position % BLOCK), head), rounded, size_t(dim) * 2);
      }
    if (is_bad) c.bad[c.block_table[size_t(e.blocks + position / BLOCK)]] = 1;
  }
  if (c.encode_rows.empty()) return;
  // A centroid's row serves all rows of the step, so threads share the subspaces.
  const int units = 2 * heads * c.subspaces;
  alignas(64) float c0[CENTROIDS], c1[CENTROIDS];
  for (int u = thread; u < units; u += num_threads) {
    const int m = u % c.subspaces, head = u / c.subspaces % heads, part = u / c.subspaces / heads;
    widen_book(c.book(layer, part, head) + size_t(m) * 2 * CENTROIDS, c0, c1);
    for (const int32_t r : c.encode_rows) {
      const Entry& e = c.entries[size_t(c.entry_of[size_t(r)])];
      const int64_t position = e.position + r - e.row;
      float x[2];
      round_row((part ? v : k) + (int64_t(r) * heads + head) * dim + 2 * m, rounded, 2);
      widen_row(rounded, x, 2);
      const size_t block = size_t(c.block_table[size_t(e.blocks + position / BLOCK)]);
      c.blocks[block * c.block_bytes + c.row_offset(layer, part, head) + m * BLOCK + position % BLOCK] = nearest(x[0], x[1], c0, c1);
    }
  }
}

Scratch& scratch() {
  static thread_local const std::unique_ptr<Scratch> found(new Scratch);  // as long as the thread
  return *found;
}

}  // namespace
}  // namespace million

using namespace million;

// Capsule "plugmesh.attention.v2".
extern "C" void million_attention(void* context, int layer, const float* q, const float* k, const float* v, int t, float* out, int thread, int num_threads,
                                  void (*barrier)(void*), void* barrier_context) {
  Codec& c = *static_cast<Codec*>(context);
  const int heads = c.s.kv_heads, group = c.s.heads / heads, dim = c.s.dim;
  const bool is_split = t <= SPLIT_ROWS;  // threads share the tiles of a row, and merge them afterwards
  store(c, layer, k, v, thread, num_threads);
  barrier(barrier_context);  // codes of others are read from here on
  if (thread == 0) c.layers_stored = layer + 1;
  Scratch& s = scratch();
  if (is_split) {
    Partial* partials = c.partials.data();
    const int64_t units = c.first_unit.back(), end = units * (thread + 1) / num_threads;
    int64_t pair = 0, loaded = -1, tabled = -1;
    for (int64_t u = units * thread / num_threads; u < end; ++u) {
      while (c.first_unit[size_t(pair) + 1] <= u) ++pair;
      const int64_t r = pair / heads, index = u - c.first_unit[size_t(pair)];
      const int head = int(pair % heads);
      const Entry& e = c.entries[size_t(c.entry_of[size_t(r)])];
      const int64_t position = e.position + r - e.row;
      if (loaded != pair) load_queries(c, q, r, head, group, s), loaded = pair;
      if (index < tiles_of(position) && tabled != pair) make_luts(c, layer, head, group, s), tabled = pair;
      one_part(c, e, layer, head, group, position, index, k, v, s, partials + u * group);
    }
    barrier(barrier_context);
    for (int64_t i = thread; i < int64_t(t) * c.s.heads; i += num_threads) {
      const int64_t r = i / c.s.heads, h = i % c.s.heads, at = r * heads + h / group;
      Partial total = partials[c.first_unit[size_t(at)] * group + h % group];
      for (int64_t u = c.first_unit[size_t(at)] + 1; u < c.first_unit[size_t(at) + 1]; ++u) merge(total, partials[u * group + h % group], dim);
      finish(total, out + i * dim, dim);
    }
  } else {
    Partial totals[MAX_GROUP], parts[MAX_GROUP];
    for (int64_t i = thread; i < int64_t(t) * heads; i += num_threads) {
      const int64_t r = i / heads;
      const int head = int(i % heads);
      const Entry& e = c.entries[size_t(c.entry_of[size_t(r)])];
      const int64_t position = e.position + r - e.row, tiles = tiles_of(position);
      load_queries(c, q, r, head, group, s);
      if (tiles > 0) make_luts(c, layer, head, group, s);
      one_part(c, e, layer, head, group, position, 0, k, v, s, totals);
      for (int64_t index = 1; index <= tiles; ++index) {
        one_part(c, e, layer, head, group, position, index, k, v, s, parts);
        for (int h = 0; h < group; ++h) merge(totals[h], parts[h], dim);
      }
      for (int h = 0; h < group; ++h) finish(totals[h], out + (r * c.s.heads + head * group + h) * dim, dim);
    }
  }
  if (thread == 0 && layer == c.s.layers - 1) release(c);
}

#else
extern "C" void million_attention(void*, int, const float*, const float*, const float*, int, float*, int, int, void (*)(void*), void*) {}
#endif
