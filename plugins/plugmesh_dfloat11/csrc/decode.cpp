// Reads containers. One look into the table finishes as many codes as eleven bits hold, four on average, but the next look has to wait for it (a load and two
// shifts, some nine cycles). So several chunks are read side by side: their chains do not wait for one another.
#include "decode.h"

namespace {

constexpr int MASK = 2047;
constexpr int LOOKS = 5;         // 5 x 11 bits are below the 57 that an unaligned load has at least
constexpr int MOST = LOOKS * 6;  // symbols of one round
constexpr int STREAMS = 3;  // of 1, 2, 3 and 4 the fastest where it was measured: the state of four no longer fits the registers

struct Stream {
  const uint8_t* codes;
  uint64_t bit;
  uint8_t *at, *end;

  inline void round(const uint64_t* table) {
    uint64_t bits;
    memcpy(&bits, codes + (bit >> 3), 8);
    bits >>= bit & 7;
    uint64_t sum = 0;  // of bits in the low byte (55 at most) and of symbols above it
#pragma GCC unroll 5
    for (int i = 0; i < LOOKS; ++i) {
      const uint64_t entry = table[bits & MASK];
      memcpy(at, &entry, 8);  // the counts land behind the symbols and are overwritten by what comes next
      const uint64_t counts = entry >> 48;
      bits >>= counts & 63;
      at += counts >> 8;
      sum += counts;
    }
    bit += sum & 0xff;
  }
};

// Any number of streams, each with room for MOST + 8 bytes behind its end.
template <int N>
void read(const uint64_t* table, Stream* given) {
  Stream s[N];
  for (int i = 0; i < N; ++i) s[i] = given[i];
  for (;;) {
    bool is_far = true;
    for (int i = 0; i < N; ++i) is_far &= s[i].end - s[i].at >= MOST;
    if (!is_far) break;
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) s[i].round(table);
  }
  for (int i = 0; i < N; ++i)
    while (s[i].at < s[i].end) s[i].round(table);
}

inline void merge(const uint8_t* __restrict exponents, const uint8_t* __restrict rest, int64_t count, uint16_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = uint16_t((rest[i] & 0x80) << 8 | exponents[i] << 7 | (rest[i] & 0x7f));
}

}  // namespace

void decode_chunks(const Container& c, int64_t first, int64_t last, uint16_t* out) {
  alignas(64) uint8_t exponents[STREAMS][CHUNK + 64];
  for (int64_t chunk = first; chunk < last; chunk += STREAMS) {
    const int n = last - chunk < STREAMS ? int(last - chunk) : STREAMS;
    Stream s[STREAMS];
    for (int i = 0; i < n; ++i) {
      const int64_t left = c.num_values - (chunk + i) * CHUNK;
      s[i] = {c.codes + c.offsets[chunk + i], 0, exponents[i], exponents[i] + (left < CHUNK ? left : CHUNK)};
    }
    switch (n) {
      case 3: read<3>(c.table, s); break;
      case 2: read<2>(c.table, s); break;
      default: read<1>(c.table, s);
    }
    for (int i = 0; i < n; ++i, out += CHUNK) merge(exponents[i], c.rest + (chunk + i) * CHUNK, s[i].end - exponents[i], out);
  }
}

extern "C" void df11_decode(const Container* c, int64_t first, int64_t last, uint16_t* out) { decode_chunks(*c, first, last, out); }

// context: {int64_t layers, then per layer and for the head: const Container* (or null), uint16_t* to}
extern "C" void df11_before_layer(void* context, int layer, int thread, int num_threads) {
  const auto* words = static_cast<const uint64_t*>(context);
  if (uint64_t(layer) > words[0]) return;
  const auto* c = reinterpret_cast<const Container*>(words[1 + 2 * layer]);
  auto* to = reinterpret_cast<uint16_t*>(words[2 + 2 * layer]);
  if (!c) return;
  const int64_t n = c->num_chunks(), first = n * thread / num_threads, last = n * (thread + 1) / num_threads;
  decode_chunks(*c, first, last, to + first * CHUNK);
}

// context: {const Container*, int64_t hidden}. The rows of a token lie with 15 others in chunks of their own, (hidden + 63) / 64 of them.
extern "C" void df11_embedding(void* context, const int32_t* tokens, int t, float* x, int thread, int num_threads) {
  const auto* words = static_cast<const uint64_t*>(context);
  const auto& c = *reinterpret_cast<const Container*>(words[0]);
  const int64_t hidden = int64_t(words[1]), pieces = (hidden + 63) / 64;
  static thread_local std::vector<uint8_t> room;
  auto* rows = scratch<uint16_t>(room, size_t(pieces * CHUNK));
  for (int r = thread; r < t; r += num_threads) {
    const int64_t block = tokens[r] / 16, row = tokens[r] % 16;
    decode_chunks(c, block * pieces, (block + 1) * pieces, rows);
    for (int64_t k = 0; k < hidden; ++k) {
      const uint32_t bits = uint32_t(rows[k / 64 * CHUNK + k % 64 / 2 * 32 + row * 2 + k % 2]) << 16;
      memcpy(x + r * hidden + k, &bits, 4);
    }
  }
}
